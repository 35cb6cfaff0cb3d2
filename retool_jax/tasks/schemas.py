"""Rows of public sets: which field asks and which is the gold answer, seen from the fields alone.

docs/guide.md has the table of every schema that is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import answers, chats

# Names of fields, looked up in this order and in any case; the first one that is filled counts.
QUESTION_FIELDS = ('problem', 'question', 'input', 'prompt', 'messages', 'conversations', 'query', 'instruction')
ANSWER_FIELDS = (
    'answer', 'final_answer', 'expected_answer', 'correct_answer', 'ground_truth', 'reward_model.ground_truth',
    'gold_answer', 'reference_answer', 'answers', 'gold', 'label', 'target', 'output', 'solution',
)  # fmt: skip
ID_FIELDS = ('id', 'unique_id', 'problem_id', 'question_id', 'uuid')
FAMILY_FIELDS = ('family', 'subject', 'type')
TRACE_FIELDS = ('rewritten', 'trace', 'response', 'text', 'generation', 'completion')
SOLUTION_FIELDS = ('solution', 'worked_solution', 'generated_solution', 'reasoning', 'answer', 'output')  # with working

# Instructions that contradict the box, or ask for it once more: DAPO's, and those that verl appends to GSM8K and MATH.
_INSTRUCTION = re.compile(
    r'^\s*Solve the following math problem step by step\..*?to the problem\.\s*'
    r'|\s*Remember to put your answer on its own line after "Answer:"\.?\s*$'
    r"|\s*Let's think step by step and output the final answer (?:after \"####\"|within \\boxed\{\})\.?\s*$",
    re.DOTALL,
)
# ReTool-SFT's user turn wraps the question in the whole tool prompt.
_RETOOL = re.compile(r'\*?user question:?\*?:?\s*(.*?)(?:\s*Remember to place the final answer.*)?$', re.DOTALL)
_RETOOL_ASK = re.compile(r'^Answer the following Math Problem[^\n]*\\boxed\{[^\n]*\n+')
_MARKED = re.compile(r'(?:\A|\n)[ \t]*####[ \t]*([^\n]*\S)\s*\Z')  # GSM8K: the answer behind the working
_GROUPED = re.compile(r'[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?')
_LISTED = re.compile(r"""\s*\[\s*(?:"|'([^']*)'\s*\]\s*\Z)""")  # texts as JSON lists them, one as Python does
_PROSE = re.compile(r'(?<![A-Za-z\\])[A-Za-z]{3,}')


def read_problem(row: Mapping, where: str, default_id: str, source: str) -> Problem:
    """One row of any known schema as a Problem; `where` names it in errors.

    An answer column goes before everything else that holds an answer: a worked solution, and what a model wrote.

    Raises:
      UserError: no schema fits, or a field does not hold what it should; the field is named.
    """
    names = {str(name).lower(): name for name in row}
    fields = lambda wanted: {name: row[names[name]] for name in wanted if name in names}
    own_id = _first_filled(fields(ID_FIELDS))[1]
    extra = row.get('extra_info')
    if own_id is None and isinstance(extra, Mapping):
        own_id = None if _blank(extra.get('index')) else extra['index']
    family = _first_filled(fields(FAMILY_FIELDS))[1]
    return Problem(
        id=str(default_id if own_id is None else own_id),
        question=_read_question(row, names, where),
        answer=_find_answer(row, names, where),
        source=str(row.get('source') or row.get('data_source') or source),
        family=family if isinstance(family, str) else '',
    )


def has_gold(row: Mapping) -> bool:
    """Whether a row has an answer beside what a model wrote in its chat."""
    names = {str(name).lower(): name for name in row}
    model = row.get('reward_model')
    told = [row[names[name]] for name in ANSWER_FIELDS if name in names]
    return any(not _blank(x) for x in [*told, model.get('ground_truth') if isinstance(model, Mapping) else None])


def read_solution(row: Mapping, where: str) -> str:
    """The text trace of a row: its worked answer, or the worked solution in the column of its answer (GSM8K, MATH).

    Raises:
      UserError: there is none.
    """
    names = {str(name).lower(): name for name in row}
    told = {name: row[names[name]] for name in SOLUTION_FIELDS if name in names}
    worked = next((text for text in told.values() if isinstance(text, str) and _is_worked(text)), None)
    return worked if worked is not None else read_trace(row, where)


def _is_worked(text: str) -> bool:
    """Whether a text in a solution's column is more than an answer: it marks one, or is prose."""
    return bool(_MARKED.search(text)) or (len(_PROSE.findall(text)) > 3 and answers.last_box(text) is not None)


def read_trace(row: Mapping, where: str) -> str:
    """The worked answer of a row: a chat's, joined, or the text of one of TRACE_FIELDS.

    Raises:
      UserError: there is none, or a chat that cannot be joined whole.
    """
    for name in ('messages', 'conversations'):
        if not _blank(row.get(name)):
            return chats.trace(_unpacked(row[name]), where, name)
    name = next(
        (n for n in TRACE_FIELDS if not _blank(row.get(n)) and (isinstance(row[n], str) or chats.is_chat(row[n]))), None
    )
    if name is None:
        wanted = ', '.join(('messages', *TRACE_FIELDS))
        raise UserError(f'{where}: no worked answer: none of the fields {wanted} is there')
    if isinstance(row[name], str):
        return row[name]
    asked = row['prompt'] if chats.is_chat(row.get('prompt')) else [{'role': 'user', 'content': '?'}]
    return chats.trace([*asked, *row[name]], where, name)


def read_answer(value: object, where: str, field: str) -> str:
    """A gold answer as a bare string: 25, 25.0, '025', ['25'], '["25"]', a boxed 25 and '… #### 25' are all '25'.

    Raises: UserError for what is no answer: several, none, or a word that says that there is none.
    """
    if isinstance(value, str) and (listed := _LISTED.match(value)):
        value = listed[1] or _unpacked(value)
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f'{where}: field {field!r} is {brief(value)}: an answer is text or a number')
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f'{where}: field {field!r} is {value}: an answer is a finite number')
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    if marked := _MARKED.search(text):
        text = marked[1].strip()
    box = answers.last_box(text)
    if box is not None:
        around = text.replace(box, '', 1) if text.count('\\boxed') == 1 else ''
        if '\n' in text or _PROSE.search(around) or re.fullmatch(r'\$?\\boxed\s*\{\}\$?\.?', around):
            text = box.strip()  # a solution, or nothing but its box
    if not text:
        raise UserError(f'{where}: field {field!r} is empty: every problem needs its answer')
    if answers.is_no_answer(text):
        raise UserError(
            f'{where}: field {field!r} is {text!r}, which stands for no answer; '
            'set reward.unreadable=leave_out to go on without such rows'
        )
    if _GROUPED.fullmatch(text):
        text = text.replace(',', '')
    return answers.integer(text) or text


def is_dapo(row: Mapping) -> bool:
    """Whether a row is one of DAPO's sets, whose public files repeat their rows."""
    if not isinstance(row.get('reward_model'), Mapping) or not isinstance(row.get('prompt'), list):
        return False
    if 'dapo' in str(row.get('data_source')).lower():
        return True
    return any(isinstance(m, Mapping) and _INSTRUCTION.match(str(m.get('content'))) for m in row['prompt'])


def dapo_key(row: Mapping, where: str) -> tuple[str, str]:
    """Question and answer as they stand in a row of DAPO's."""
    return chats.question(row['prompt'], where, 'prompt'), str(row['reward_model'].get('ground_truth'))


def brief(value: object) -> str:
    """A value on at most 40 characters, for errors."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + '...'


def _read_question(row: Mapping, names: Mapping[str, str], where: str) -> str:
    wanted = {name: row[names[name]] for name in QUESTION_FIELDS if name in names}
    name, value = _first_filled(wanted)
    if name is None:
        if wanted:
            field, value = next(iter(wanted.items()))
            if isinstance(value, str):
                raise UserError(f'{where}: the question is empty')
            raise UserError(f'{where}: field {names[field]!r} is {brief(value)}: it must be text')
        raise _nothing(QUESTION_FIELDS, names, where)
    value = _unpacked(value)
    if chats.is_chat(value) or name in ('messages', 'conversations'):
        text = chats.question(value, where, names[name])
    elif isinstance(value, str):
        text = value
    else:
        raise UserError(f'{where}: field {names[name]!r} is {brief(value)}: it must be text')
    body = row.get(names.get('body', ''))  # SVAMP: the story, and what is asked of it
    if name == 'question' and isinstance(body, str) and body.strip():
        text = f'{body.strip()} {text.strip()}'
    wrapped = _RETOOL.search(text)
    text = _RETOOL_ASK.sub('', wrapped[1]) if wrapped else _INSTRUCTION.sub('', text)
    if not text.strip():
        raise UserError(f'{where}: the question is empty')
    return text.strip()


def _find_answer(row: Mapping, names: Mapping[str, str], where: str) -> str:
    wanted = {name: row[names[name]] for name in ANSWER_FIELDS if name in names}
    reward = _unpacked(row.get('reward_model'))
    if isinstance(reward, Mapping):
        wanted['reward_model.ground_truth'] = reward.get('ground_truth')
    name, value = _first_filled({name: wanted[name] for name in ANSWER_FIELDS if name in wanted})
    if name is None:
        for chat in ('messages', 'conversations', 'completion'):
            if written := _written(_unpacked(row.get(chat))):
                return read_answer(answers.last_box(written), where, f'{chat}: last box')
        if wanted:  # none is filled
            name, value = next(iter(wanted.items()))
            return read_answer(value, where, names.get(name, name))
        raise _nothing(ANSWER_FIELDS, names, where)
    field = names.get(name, name)
    if name in ('solution', 'output') and isinstance(value, str):
        value = _of_solution(value, where, field)
    return read_answer(value, where, field)


def _of_solution(text: str, where: str, field: str) -> str:
    """The answer of a worked solution: its last box, what is marked, or all of it where it is nothing else."""
    box = answers.last_box(text)
    if box is not None:
        return box
    bare = re.sub(r'\\[A-Za-z]+(?:\{[A-Za-z ]*\})?', '', text.strip())
    if _MARKED.search(text) or re.fullmatch(r'\w+', bare) or not ('\n' in bare or _PROSE.search(bare)):
        return text
    raise UserError(
        f'{where}: field {field!r} is {brief(text)}: a solution has its answer in a box or behind ####, '
        'or is nothing else'
    )


def _written(messages: object) -> str:
    """What the assistant of a chat wrote last; '' where it wrote nothing."""
    if not chats.is_chat(messages):
        return ''
    last = [m for m in messages if chats.ROLES.get(m.get('role') or m.get('from')) == 'assistant'][-1:]
    text = last[0].get('content', last[0].get('value')) if last else ''
    return text if isinstance(text, str) else ''


def _first_filled(fields: Mapping[str, object]) -> tuple[str | None, object]:
    """The first field that holds anything, and its value; (None, None) where none does."""
    return next(((name, value) for name, value in fields.items() if not _blank(value)), (None, None))


def _blank(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | tuple) and not value)
    )


def _unpacked(value: object) -> object:
    """A list or a record that was written as JSON into a text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ('[', '{'):
        try:
            unpacked = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return unpacked if isinstance(unpacked, list | dict) else value
    return value


def _nothing(wanted: tuple[str, ...], names: Mapping[str, str], where: str) -> UserError:
    present = ', '.join(names.values())
    return UserError(f'{where}: none of the fields {", ".join(wanted)} is there (found: {present})')
