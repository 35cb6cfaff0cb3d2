"""What the model reads and writes around its own words: prompt, snippet, feedback, answer.

One record per model family, used alike by SFT, rollout and evaluation, so that all three see the
same ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from pathlib import Path

from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode
from retool_jax.text import chat
from retool_jax.text.tokenizer import Tokenizer

COMMON_FROM = 16  # ids
QUESTION = '{question}'  # where the problem goes in an instruction
# Prompt elements: P fig. 7. The words are ours.
ANSWER_FORM = """\
Close with the final answer, in a box, as the last thing you write:
<answer>
\\boxed{your final answer}
</answer>

Problem:
{question}"""

TOOL_INSTRUCTION = f"""\
Work through the problem below one step at a time.

You may write Python to compute or check something whenever that helps; you do not have to. \
An external sandbox runs each script, and what it printed, or its error, comes back between \
<interpreter> and </interpreter>; then go on reasoning from there. Every script starts in a fresh \
process: it must be complete, with its imports and definitions, and it must print what you want to \
see. Write it exactly like this:
<code>
```python
import math
print(math.comb(10, 3))
```
</code>

{ANSWER_FORM}"""

TEXT_INSTRUCTION = f"""\
Work through the problem below one step at a time, in words and formulas.

{ANSWER_FORM}"""

# For small models: of a context of a few thousand tokens, and of every step on a CPU, the words above are most.
_SHORT_FORM = """\
End with
<answer>
\\boxed{result}
</answer>

{question}"""

SHORT_TOOL_INSTRUCTION = f"""\
Solve step by step. You may run Python:
<code>
```python
print(6*7)
```
</code>
Its output comes in <interpreter>. {_SHORT_FORM}"""

SHORT_TEXT_INSTRUCTION = f'Solve step by step. {_SHORT_FORM}'

# model.instruction → with the interpreter, without
INSTRUCTIONS = {
    'paper': (TOOL_INSTRUCTION, TEXT_INSTRUCTION),
    'short': (SHORT_TOOL_INSTRUCTION, SHORT_TEXT_INSTRUCTION),
}

FORMAT_FEEDBACK = 'Nothing was run: write one complete script in a python fence inside the code tags.'
CAP_FEEDBACK = 'Nothing was run: no more scripts are allowed. Give the final answer now.'

# A space after '<' in what a tool printed: visible, the same for every tokenizer, and done once
# (the result no longer matches). Normal form C, which Qwen's tokenizer applies, keeps it.
FOREIGN_TAG = re.compile(
    r'<(?=/?(?:code|answer|interpreter|think|tool_call|tool_response|tools|s|bos|eos|unk|pad)>'
    r'|[|｜][^<>\s]+[|｜]>)'
)

# Opening fences as CommonMark has them (§4.5), at any depth: indentation, signs, and what the block is marked as.
FENCE = re.compile(r'^([ \t]*)(`{3,}|~{3,})[ \t]*([^`\n]*)$', re.MULTILINE)
PYTHON = re.compile(r'[{.\s]*(?:i?python|py)[\d.]*(?![\w+-])', re.IGNORECASE)
# Comments and strings of Python: what in a script may hold a line like a closing fence, or a quote that begins nothing.
LITERAL = (
    r'#[^\n]*|(?P<quote>"""|\'\'\')(?:\\.|[^\\])*?(?P=quote)'
    r'|"(?:\\.|[^"\\\n])*"?|\'(?:\\.|[^\'\\\n])*\'?'
)


@dataclasses.dataclass(frozen=True)
class Template:
    """How one model family is asked: the text before and after the question, special tokens inside."""

    name: str
    tools: bool  # False: the text-only version of the instruction
    before: str  # from the first token of the context to the question
    after: str  # from the question to the first token of the model's answer
    turn_end: str  # the special token with which the model ends its answer
    opens_think: bool = False  # the prompt ends inside an open <think>


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A script that the model asked to run, and where it stands in the turn's text."""

    code: str
    start: int  # characters before the code's first line


def make_template(
    name: str, tools: bool = True, tokenizer: Tokenizer | None = None, instruction: str | None = None
) -> Template:
    """The record of a family: 'tiny', 'qwen2_5', 'qwen3', 'r1_distill', or 'own', read from the chat template that
    lies beside `tokenizer`.

    instruction: what the user turn says, as `read_instruction` gives it; None: 'paper', and 'tiny' the bare question.

    Raises: UserError for any other name, and where the chat template's rendering of a prompt has other ids.
    """
    if name not in NAMES:
        raise UserError(f'template {name!r} is not known; use one of {", ".join(NAMES)}')
    before, after, turn_end = chat.read(tokenizer) if name == OWN else _FAMILIES[name]
    instruction = _instruction(name, tools) if instruction is None else instruction
    opening, _, closing = instruction.partition(QUESTION)
    made = Template(name, tools, before + opening, closing + after, turn_end, after.endswith('<think>\n'))
    if name == OWN:
        content = instruction.replace(QUESTION, chat.ASKED)
        rendered = chat.render(tokenizer, [{'role': 'user', 'content': content}], True)
        if prompt_ids(made, tokenizer, chat.ASKED) != tokenizer.encode(rendered, specials=True):
            raise UserError(
                f'chat template of {str(tokenizer.directory)!r} changes the words of a message; name a '
                'template with model.template'
            )
    return made


def read_instruction(path: str | Path, tools: bool = True) -> str:
    """The words for `make_template`: those of a name ('paper', 'short'), or of a file, without its last line's end.

    Raises: UserError naming the file where it cannot be read.
    """
    if path in INSTRUCTIONS:
        return INSTRUCTIONS[path][0 if tools else 1]
    named = f'model.instruction={str(path)!r}'
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{named} is not UTF-8 (byte {error.start}): save it as UTF-8') from None
    except OSError as error:
        raise UserError(
            f'{named} cannot be read: {error.strerror}; give a file, or one of {", ".join(INSTRUCTIONS)}'
        ) from None
    if (times := text.count(QUESTION)) != 1:
        raise UserError(f'{named} holds {QUESTION} {times} times; it has to stand there once, where the problem goes')
    return text.removesuffix('\n').removesuffix('\r')


def prompt_ids(template: Template, tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of the whole prompt; chat tokens come from the template alone, the question stays plain text.

    Raises: UserError if the tokenizer lacks one of the template's special tokens.
    """
    before, after = (_cut(template, tokenizer, text) for text in (template.before, template.after))
    ids: list[int] = []
    plain = ''  # runs between special tokens are encoded whole, as the chat template's text would be
    for piece in (*before, question, *after, None):
        if isinstance(piece, str):
            plain += piece
            continue
        ids += tokenizer.encode(plain)
        plain = ''
        if piece is not None:
            ids.append(piece)
    return ids


def common_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that prompts of a template begin with, whatever the question is, but for one that begins with blanks.

    (): fewer than COMMON_FROM, which are not worth a copy of their own.
    """
    prompts = [prompt_ids(template, tokenizer, question) for question in ('a', 'A', '7', '$x$', '(', 'é', '"')]
    common = list(itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts)))
    return tuple(ids[0] for ids in common) if len(common) >= COMMON_FROM else ()


def end_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The one id with which the model ends its answer, for the last segment of an SFT trace.

    Raises:
      UserError: the tokenizer lacks a special token of the template.
    """
    return _cut(template, tokenizer, template.turn_end)


def wrap_snippet(code: str) -> str:
    """The form in which the model writes a script (P fig. 7)."""
    return f'<code>\n```python\n{code.strip("\n")}\n```\n</code>'


def wrap_answer(answer: str) -> str:
    """The form in which the model closes (P fig. 7)."""
    return f'<answer>\n\\boxed{{{answer}}}\n</answer>'


def extract_snippet(turn_text: str) -> Snippet | None:
    """The script of a turn that ends at `</code>`, or None where nothing can be run.

    Looks between the first `<code>` and the last `</code>` of the turn: the last block there that is marked as Python,
    or, where none is marked so, the only one that is not marked at all. It is taken whole – a fence inside a string of
    the script does not end it – and without the indentation of its fence. None: no `<code>`, no such block, one that is
    left open, or nothing but blanks in it.
    """
    end = turn_text.rfind('</code>')
    begin = turn_text.find('<code>', 0, max(end, 0))
    if begin < 0:
        return None
    begin += len('<code>')
    body, position, marked, plain = turn_text[begin:end], 0, [], []
    while opening := FENCE.search(body, position):
        position = min(opening.end() + 1, len(body))
        python, other = PYTHON.match(opening[3]), opening[3].strip()
        closing = _closing(opening[2], scripts=bool(python) or not other, body=body, start=position)
        code = body[position : closing.start()].rstrip('\r\n') if closing else ''
        snippet = Snippet(_dedented(code, opening[1]), begin + position) if code.strip() else None
        if python:
            marked.append(snippet)
        elif not other and snippet:
            plain.append(snippet)
        position = closing.end() if closing else len(body)
    if marked:
        return marked[-1]
    return plain[0] if len(plain) == 1 else None


def _closing(fence: str, scripts: bool, body: str, start: int) -> re.Match[str] | None:
    """The line that ends the block whose code begins at `start`; of scripts none that lies in a string."""
    line = rf'(?P<fence>^[ \t]*{fence}{fence[0]}*[ \t]*\r?$)'
    scan = re.compile(f'{line}|{LITERAL}' if scripts else line, re.MULTILINE | re.DOTALL)
    return next((found for found in scan.finditer(body, start) if found['fence'] is not None), None)


def _dedented(code: str, indentation: str) -> str:
    """Code without its fence's indentation, or without what all of its lines begin with."""
    first = re.search(r'^.*\S', code, re.MULTILINE)
    if indentation and first[0].startswith(indentation):
        code = re.sub(f'^{indentation}', '', code, flags=re.MULTILINE)
    return textwrap.dedent(code) if re.match(r'\n*[ \t]', code) else code


def has_answer(turn_text: str) -> bool:
    """Whether a turn answers: a closed answer element or a box."""
    return '</answer>' in turn_text or '\\boxed{' in turn_text


def is_void(turn_text: str) -> bool:
    """Whether a turn holds neither a snippet that can be run nor an answer."""
    return extract_snippet(turn_text) is None and not has_answer(turn_text)


def neutralise(text: str) -> str:
    """Takes the force out of tags and chat tokens in foreign text by a space after their `<`."""
    return FOREIGN_TAG.sub('< ', text)


def wrap_feedback(text: str, overshoot: str = '') -> str:
    r"""What is appended after a snippet: `\n<interpreter>\n` text `\n</interpreter>\n\n` (O), neutralised.

    `overshoot` is what the model's last token said after `</code>`; the part of the opening that it
    already said is left out (after `</code>\n` comes `<interpreter>`, not a second newline).
    """
    opening, body = '\n<interpreter>\n', neutralise(text).rstrip('\r\n')
    heads = [(head[:k], head[k:]) for head in (opening, opening[1:]) for k in range(1, len(head))]
    rest = min((left for said, left in heads if overshoot.endswith(said)), key=len, default=opening)
    return f'{rest}{body}{"\n" if body else ""}</interpreter>\n\n'


def final_text(episode: Episode, tokenizer: Tokenizer) -> str:
    """The model's own text after the last fed-back token: what is graded. '' if it wrote nothing there.

    Found by the author of each token, never by looking for tags, so nothing that a tool printed or
    that the model wrote about tools can move it.
    """
    runs = episode.segments()
    return tokenizer.decode(runs[-1][1]) if runs and runs[-1][0] else ''


_CHATML = ('<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n', '<|im_end|>')

# family → text before the instruction, text after it, end of turn; each as its chat template renders
# one user turn with the generation prompt.
_FAMILIES = {
    'tiny': _CHATML,
    'qwen2_5': (
        '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
        + _CHATML[0],
        *_CHATML[1:],
    ),
    'qwen3': _CHATML,
    'r1_distill': (
        '<｜begin▁of▁sentence｜><｜User｜>',
        '<｜Assistant｜><think>\n',
        '<｜end▁of▁sentence｜>',
    ),
}
OWN = 'own'
NAMES = (*_FAMILIES, OWN)


def _instruction(name: str, tools: bool) -> str:
    if name == 'tiny':  # a few hundred ids of context are worth more than words it cannot read
        return '{question}'
    return read_instruction('paper', tools)


def _cut(template: Template, tokenizer: Tokenizer, text: str) -> list[str | int]:
    pieces = tokenizer.split(text)
    for name in re.findall(r'<[|｜][^<>\s]+[|｜]>', text):
        if name not in tokenizer.special_ids:
            raise UserError(
                f'template {template.name!r} needs the special token {name}, which the tokenizer lacks: '
                "choose the template of the model's family"
            )
    return pieces
