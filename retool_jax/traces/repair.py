r"""What is mended in a rewritten trace before it is judged: each rule by name, so that it can be counted.

A language model that rewrites traces forgets a fence, closes without a box, writes its calls as its own tools want
them. What it meant is plain, and such traces are most of what a strict reader drops. A rule here changes how something
is written, never what it says; rules that need a run of the snippets are in `snippets`, and applied by `verification`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable

from retool_jax.core.records import Problem
from retool_jax.tasks import answers
from retool_jax.tasks.chats import INTERPRETER
from retool_jax.text.template import wrap_answer, wrap_snippet
from retool_jax.traces import drafts
from retool_jax.traces.drafts import Draft

RULES = {  # name → what was mended
    'call_tags': 'a block of Python, or a call of a tool, written as a call in code tags',
    'code_end': 'a </code> that was left out before the interpreter element',
    'fence': 'a fence around the script that was missing or left open',
    'answer_tag': 'an answer element around the last box',
    'answer_box': 'a box around the answer in its element',
    'answer_words': 'words inside the answer element, put before it',
    'answer_again': 'the same answer in an element twice, kept once',
    'after_answer': 'words behind the answer element, left out',
    'output': 'no interpreter element: the real output is put in',
    'print': 'a bare last expression, printed',
    'joined': 'a snippet that uses names of an earlier one, put behind its definitions',
    'number_form': 'an output whose numbers are written in another form, replaced by the real one',
    'finished': 'an output that was wrong: cut there, and finished by the rewriter from the real one',
}

_FLAGS = re.DOTALL | re.MULTILINE | re.IGNORECASE
_BLOCK = re.compile(r'^[ \t]*```[ \t]*(?:python|py)\w*[ \t]*\n(?P<code>.*?)\n[ \t]*```[ \t]*$', _FLAGS)
_OUTPUT = re.compile(
    r'\s*(?:(?:output|result|stdout)\s*:?\s*)?```[ \t]*(?:output|text|stdout)[ \t]*\n(.*?)\n?[ \t]*```', _FLAGS
)
_TOOL_CALL = re.compile(r'<tool_call>\s*(\{.*?\})\s*</tool_call>', re.DOTALL)
_RESPONSE = re.compile(r'\s*<tool_response>\n?(.*?)\n?</tool_response>', re.DOTALL)
_BODY = re.compile(r'<code>(.*?)</code>', re.DOTALL)
_ELEMENT = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)
_OPENS = ' \t\r\n$*'  # what may stand between a line's beginning and its box
_LONGEST_BARE = 60  # characters of an answer that stands in its element without a box


def read(problem: Problem, text: str) -> Draft:
    """A rewritten answer as a draft, mended where its form is not that of a rollout; `drafts.flaw` says what is left.

    An element around the whole, the rewriter's marker, is dropped.
    """
    text = text.strip()
    marker = re.fullmatch(r'<([\w-]+)>\s*(.*?)\s*</\1>', text, re.DOTALL)
    if marker and marker[1] not in ('code', 'answer', 'interpreter'):
        text = marker[2]
    done: list[str] = []
    for name, rule in _STATIC:
        mended = rule(text)
        if mended != text:
            done.append(name)
            text = mended
    draft = drafts.read(problem, text, done)
    silent = None in draft.printed and any('<code>' in turn for turn in draft.turns)
    return drafts.read(problem, text, (*done, 'output')) if silent else draft


def _call_tags(text: str) -> str:
    """Calls that are written in another way, in a text without any in code tags."""
    if '<code>' in text:
        return text
    made, position = '', 0
    while True:
        block, call = _BLOCK.search(text, position), _TOOL_CALL.search(text, position)
        found = min((m for m in (block, call) if m), key=lambda m: m.start(), default=None)
        if found is None:
            return made + text[position:]
        code = found['code'] if found is block else _script(found[1])
        made += text[position : found.start()] + (wrap_snippet(code) if code else found[0])
        position = found.end()
        said = _RESPONSE.match(text, position) or _OUTPUT.match(text, position)
        if code and said:
            made += f'\n<interpreter>\n{said[1]}\n</interpreter>\n\n'
            position = said.end()


def _script(call: str) -> str | None:
    """The script that a call hands to an interpreter of Python; None for another tool."""
    try:
        read = json.loads(call)
        arguments = read.get('arguments', read.get('parameters'))
        arguments = json.loads(arguments) if isinstance(arguments, str) and arguments.lstrip()[:1] == '{' else arguments
        if not INTERPRETER.search(read['name']):
            return None
        texts = [arguments] if isinstance(arguments, str) else [v for v in arguments.values() if isinstance(v, str)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return texts[0] if len(texts) == 1 and texts[0].strip() else None


def _code_end(text: str) -> str:
    """A call that runs into its interpreter element gets its end."""
    return re.sub(
        r'(<code>(?:(?!</code>|<interpreter>).)*?)(\s*)(?=<interpreter>)',
        lambda m: f'{m[1].rstrip()}\n</code>{m[2] or chr(10)}' if '```' in m[1] else m[0],
        text,
        flags=re.DOTALL,
    )


def _fence(text: str) -> str:
    """Scripts between code tags that stand there bare, or in a fence that is opened and not closed."""

    def fenced(call: re.Match[str]) -> str:
        body, fences = call[1], call[1].count('```')
        if fences == 1 and (opened := re.match(r'\s*```[ \t]*(?:python|py)?\w*[ \t]*\n', body)):
            body, fences = body[opened.end() :], 0
        elif fences == 1 and (closed := re.search(r'\n[ \t]*```\s*\Z', body)):
            body, fences = body[: closed.start()], 0
        return wrap_snippet(body.strip('\r\n').rstrip()) if not fences and _parses(body) else call[0]

    return _BODY.sub(fenced, text)


def _parses(code: str) -> bool:
    try:
        return bool(ast.parse(code.strip('\r\n').rstrip() + '\n').body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _after_answer(text: str) -> str:
    """Words behind the last answer element, where no call is among them."""
    head, tag, tail = text.rpartition('</answer>')
    return head + tag if tag and tail.strip() and not drafts.TAG.search(tail) else text


def _answer_again(text: str) -> str:
    """Earlier elements with the very answer of the last, without a call between: their tags go, their words stay."""
    found = list(_ELEMENT.finditer(text))
    last_call = max(text.rfind('</code>'), text.rfind('</interpreter>'))
    if len(found) < 2 or found[0].start() < last_call:
        return text
    said = {answers.normalise(answers.last_box(one[1]) or one[1]) for one in found}
    if len(said) > 1:
        return text
    end = found[-1].start()
    return re.sub(r'</?answer>\n?', '', text[:end]) + text[end:]


def _answer_tag(text: str) -> str:
    """A box at the end without its element, or in one that is not closed."""
    place = max(text.rfind('</code>'), text.rfind('</interpreter>'), 0)
    tail = text[place:]
    box = answers.last_box(tail)
    if box is None or '</answer>' in tail or text.count('<answer>') > 1:
        return text
    if '<answer>' in tail:
        return f'{text.rstrip()}\n</answer>'
    head, _, rest = text.rpartition('\\boxed')
    before = head.rstrip(_OPENS).removesuffix('\\[').rstrip(_OPENS)
    alone = not before or '\n' in head[len(before) :]
    if alone and re.fullmatch(rf'\s*\{{{re.escape(box)}\}}(?:\\\]|[\s$.*])*', rest):
        return f'{before}\n\n{wrap_answer(box)}'.lstrip()  # the box is all of its line: it is put in the element
    return f'{text.rstrip()}\n\n{wrap_answer(box)}'


def _inside(change: Callable[[str], tuple[str, str] | None]) -> Callable[[str], str]:
    """A rule for the contents of the last answer element: (words to put before it, the box's contents), or None."""

    def rule(text: str) -> str:
        found = list(_ELEMENT.finditer(text))
        if not found:
            return text
        changed = change(found[-1][1].strip())
        if changed is None:
            return text
        words, box = changed
        before = text[: found[-1].start()].rstrip()
        parts = [part for part in (before, words.strip(), wrap_answer(box)) if part]
        return '\n\n'.join(parts) + text[found[-1].end() :]

    return rule


def _boxed(said: str) -> tuple[str, str] | None:
    """A short answer on one line without a box."""
    bare = said.strip('$ ')
    words = re.search(r'\b[A-Za-z]{2,}\s+[A-Za-z]{2,}\s+[A-Za-z]{2,}', bare)
    fits = bare and '\n' not in bare and len(bare) <= _LONGEST_BARE and not words and '\\boxed' not in bare
    return ('', bare.removesuffix('.')) if fits else None


def _worded(said: str) -> tuple[str, str] | None:
    """Words around a box, or around what is set in bold as the answer."""
    box = answers.last_box(said)
    if box is not None:
        bare = re.fullmatch(r'\\boxed\{.*\}', said, re.DOTALL)
        return None if bare and said.count('\\boxed') == 1 else (said, box)
    bold = re.findall(r'\*\*\s*([^*\n]{1,60}?)\s*\*\*', said)
    return (said, bold[0]) if len(bold) == 1 else None


_STATIC = (
    ('call_tags', _call_tags),
    ('code_end', _code_end),
    ('fence', _fence),
    ('after_answer', _after_answer),
    ('answer_again', _answer_again),
    ('answer_tag', _answer_tag),
    ('answer_words', _inside(_worded)),
    ('answer_box', _inside(_boxed)),
)
