"""Problem files of every public spelling, read into `Problem`s; array_record files of our own.

Which schema a row has is seen from its fields, so a file is named and nothing else. Nothing is fetched:
the README says where each set comes from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import answers

QUESTION_FIELDS = ('problem', 'question', 'input', 'prompt')  # looked up in this order, in any case
ANSWER_FIELDS = ('answer', 'output', 'final_answer', 'expected_answer', 'ground_truth', 'solution')
ID_FIELDS = ('id', 'unique_id', 'problem_id')
TRACE_FIELDS = ('rewritten', 'trace', 'response', 'text')
BATCH_ROWS = 8192

# DAPO's instruction asks for an "Answer:" line, which contradicts the box; ReTool-SFT's user turn
# wraps the question in the whole tool prompt.
_DAPO = re.compile(
    r'^\s*Solve the following math problem step by step\..*?to the problem\.\s*'
    r'|\s*Remember to put your answer on its own line after "Answer:"\.?\s*$',
    re.DOTALL,
)
_RETOOL = re.compile(
    r'\*?user question:?\*?:?\s*(.*?)(?:\s*Remember to place the final answer.*)?$', re.DOTALL
)
_RETOOL_ASK = re.compile(r'^Answer the following Math Problem[^\n]*\\boxed\{[^\n]*\n+')

Row = tuple[str, Mapping]  # where it stands ('file:line'), its fields


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Problems of a file and what was left out."""

    problems: list[Problem]
    rows: int  # read
    repeated: int  # DAPO only: rows left out because the same question and answer stood before
    conflicting: int  # DAPO only: questions left out because their rows disagree about the answer


def read(path: str | pathlib.Path, limit: int | None = None) -> list[Problem]:
    """Problems of a file, or of all files of a folder, in order; `load` tells what was left out as well.

    Reads .jsonl, .json, .parquet, .array_record and folders that TFDS prepared; `limit` keeps the first
    ones. Raises ValueError, one line naming file, line and field, for whatever cannot be read; a file
    without problems is an error.
    """
    loaded = load(path)
    if loaded.repeated or loaded.conflicting:
        logging.info(
            '%s: %d rows, %d repeated and %d questions with conflicting answers left out',
            path, loaded.rows, loaded.repeated, loaded.conflicting,
        )  # fmt: skip
    return loaded.problems[:limit]


def load(path: str | pathlib.Path) -> Loaded:
    """`read` with counts.

    Of DAPO-Math-17k's rows (its public file is one block repeated a hundred times) every question is
    kept once, and none whose rows disagree about the answer. Other sets are never thinned.
    """
    path = pathlib.Path(path)
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()  # DAPO: question and answer as they stand in the file
    golds: dict[str, str] = {}  # DAPO: question → answer
    conflicts: set[str] = set()
    asked: set[str] = set()  # DAPO: questions kept
    ids: set[str] = set()
    rows = repeated = 0
    for number, (where, row) in enumerate(read_rows(path)):
        rows += 1
        if is_dapo(row):
            key = _dapo_key(row, where)
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
        problem = read_problem(row, where, f'{path.stem}-{number}', path.stem)
        if is_dapo(row):
            known = golds.setdefault(problem.question, problem.answer)
            if known != problem.answer:
                conflicts.add(problem.question)
                continue
            if problem.question in asked:
                repeated += 1
                continue
            asked.add(problem.question)
        if problem.id in ids:
            problem = dataclasses.replace(problem, id=f'{problem.id}#{number}')
        ids.add(problem.id)
        problems.append(problem)
    problems = [p for p in problems if p.question not in conflicts]
    if not problems:
        raise UserError(f'{path}: no problems in it ({rows} rows read)')
    return Loaded(problems, rows, repeated, len(conflicts))


def check_golds(problems: Iterable[Problem], parses: Callable[[str], bool]) -> None:
    """Raises ValueError at the first gold answer that `parses` (`Grader.parses`) cannot read."""
    for problem in problems:
        if not parses(problem.answer):
            raise UserError(
                f'problem {problem.id!r} of {problem.source}: answer {problem.answer[:80]!r} cannot be read '
                'as mathematics: correct it in the file'
            )


def read_traces(path: str | pathlib.Path) -> list[tuple[Problem, str]]:
    """Worked answers of a file: rows with `messages` (a user and an assistant turn), or a problem with
    its `rewritten` (else `trace`, `response` or `text`) field."""
    out = []
    path = pathlib.Path(path)
    for number, (where, row) in enumerate(read_rows(path)):
        if 'messages' in row:
            text = _turn(row, 'messages', 'assistant', where)
        else:
            name = next((n for n in TRACE_FIELDS if isinstance(row.get(n), str)), None)
            if name is None:
                wanted = ', '.join(('messages', *TRACE_FIELDS))
                raise UserError(f'{where}: no worked answer: none of the fields {wanted} is there')
            text = row[name]
        out.append((read_problem(row, where, f'{path.stem}-{number}', path.stem), text))
    if not out:
        raise UserError(f'{path}: no traces in it')
    return out


def read_problem(row: Mapping, where: str, default_id: str, source: str) -> Problem:
    """One row of any known schema as a Problem; `where` names it in errors."""
    if is_dapo(row):
        question = _DAPO.sub('', _turn(row, 'prompt', 'user', where))
        answer, field = row['reward_model'].get('ground_truth'), 'reward_model.ground_truth'
    elif 'messages' in row:
        question = _strip_prompt(_turn(row, 'messages', 'user', where))
        answer, field = answers.last_box(_turn(row, 'messages', 'assistant', where)), 'messages: last box'
    else:
        names = {name.lower(): name for name in row}
        asked = _first(names, QUESTION_FIELDS, where)
        field = _first(names, ANSWER_FIELDS, where)
        question, answer = row[asked], row[field]
        if not isinstance(question, str):
            raise UserError(f'{where}: field {asked!r} is {_brief(question)}: it must be text')
        if field.lower() == 'solution':  # MATH's own files: the answer is the box of the solution
            answer = answers.last_box(answer) if isinstance(answer, str) else answer
    if not question.strip():
        raise UserError(f'{where}: the question is empty')
    own_id = next((row[name] for name in ID_FIELDS if row.get(name) not in (None, '')), None)
    extra = row.get('extra_info')
    if own_id is None and isinstance(extra, Mapping) and extra.get('index') not in (None, ''):
        own_id = extra['index']
    return Problem(
        id=str(default_id if own_id is None else own_id),
        question=question.strip(),
        answer=read_answer(answer, where, field),
        source=str(row.get('source') or row.get('data_source') or source),
        family=str(row.get('family') or row.get('subject') or ''),
    )


def read_answer(value: object, where: str, field: str) -> str:
    """A gold answer as a bare string: 25, 25.0, '025', ['25'] and a boxed 25 are all '25'."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f'{where}: field {field!r} is {_brief(value)}: an answer is text or a number')
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f'{where}: field {field!r} is {value}: an answer is a finite number')
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    box = answers.last_box(text)
    if box is not None and re.fullmatch(r'\$?\\boxed\s*\{' + re.escape(box) + r'\}\$?', text):
        text = box.strip()  # the box is the whole answer
    if not text:
        raise UserError(f'{where}: field {field!r} is empty: every problem needs its answer')
    return answers.integer(text) or text


def is_dapo(row: Mapping) -> bool:
    """Whether a row has DAPO-Math-17k's fields."""
    return isinstance(row.get('reward_model'), Mapping) and isinstance(row.get('prompt'), list)


# --- rows of files -------------------------------------------------------------------------------


def read_rows(path: pathlib.Path) -> Iterator[Row]:
    """Rows of a file, or of every file of a folder by name, with where each stands."""
    if path.is_dir():
        if (path / 'dataset_info.json').is_file():
            yield from _tfds_rows(path)
            return
        files = sorted(f for f in path.iterdir() if _kind(f))
        if not files:
            raise UserError(f'{path}: no file in this folder ends in {", ".join(_READERS)}')
        for file in files:
            yield from read_rows(file)
        return
    if not path.exists():
        raise UserError(f'problems file {str(path)!r} does not exist')
    kind = _kind(path)
    if kind is None:
        known = ', '.join(_READERS)
        raise UserError(f'{path}: cannot tell its format from its name; it must end in {known}')
    for where, row in _READERS[kind](path):
        if not isinstance(row, Mapping):
            raise UserError(f'{where}: {_brief(row)} where an object with fields was expected')
        yield where, row


def _kind(path: pathlib.Path) -> str | None:
    name = re.sub(r'-\d{5}-of-\d{5}$', '', path.name)
    return next((suffix for suffix in _READERS if name.endswith(suffix)), None)


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f'{path}:{number}', _parse(line, f'{path}:{number}')


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    with _opened(path) as file:
        content = _parse(file.read(), str(path))
    if isinstance(content, Mapping):
        lists = (v for v in content.values() if isinstance(v, list) and v and isinstance(v[0], Mapping))
        content = [content] if is_dapo(content) or 'messages' in content else next(lists, [content])
    if not isinstance(content, list):
        raise UserError(f'{path}: {_brief(content)} where a list of problems was expected')
    for number, row in enumerate(content, start=1):
        if isinstance(row, Mapping) and isinstance(row.get('row'), Mapping):
            row = row['row']  # the data viewer's form of a row
        yield f'{path}: record {number}', row


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f'{path}: row {number}', row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f'{path}: not a parquet file that can be read: {_first_line(error)}') from None


def _array_record_rows(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    for number, record in enumerate(_array_records(path), start=1):
        where = f'{path}: record {number}'
        if not record.lstrip().startswith(b'{'):
            raise UserError(f'{where}: no JSON object; of a TFDS set, name the folder instead')
        yield where, _parse(record, where)


def _array_records(path: pathlib.Path, batch: int = 1024) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        total = reader.num_records()
        for start in range(0, total, batch):
            yield from reader.read(list(range(start, min(start + batch, total))))
        reader.close()
    except RuntimeError as error:  # the library raises nothing narrower
        raise UserError(f'{path}: no array_record file that can be read: {_first_line(error)}') from None


def _tfds_rows(path: pathlib.Path) -> Iterator[Row]:
    from retool_jax.tasks import builders

    for split, number, row in builders.read_folder(path):
        yield f'{path}: {split} record {number}', row


_READERS = {
    '.jsonl': _jsonl_rows,
    '.json': _json_rows,
    '.parquet': _parquet_rows,
    '.array_record': _array_record_rows,
}


def write_array_record(path: str | pathlib.Path, problems: Iterable[Problem]) -> int:
    """Writes problems as JSON objects, one a record, for random access; the file appears whole or not.

    Returns how many were written. `read` and `train.data` read it.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = pathlib.Path(path)
    if _kind(path) != '.array_record':
        raise UserError(f'{path}: the name of an array_record file must end in .array_record')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    count = 0
    try:
        writer = ArrayRecordWriter(str(partial), 'group_size:1')  # one record a group: access at random
        for problem in problems:
            writer.write(encode_problem(problem))
            count += 1
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def encode_problem(problem: Problem) -> bytes:
    """A problem as one array_record's bytes."""
    return json.dumps(dataclasses.asdict(problem), ensure_ascii=False).encode()


def decode_problem(record: bytes) -> Problem:
    """The problem of one record that `write_array_record` wrote."""
    return Problem(**json.loads(record))


# --- small parts ---------------------------------------------------------------------------------


def _opened(path: pathlib.Path):
    try:
        return path.open('rb')
    except OSError as error:
        raise UserError(f'problems file {str(path)!r} cannot be read: {error.strerror}') from None


def _parse(data: bytes, where: str) -> object:
    try:
        return json.loads(data.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: not UTF-8 (byte {error.start}): save it as UTF-8') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: malformed JSON: {_first_line(error)}') from None


def _first(names: Mapping[str, str], wanted: tuple[str, ...], where: str) -> str:
    for name in wanted:
        if name in names:
            return names[name]
    found = ', '.join(names.values())
    raise UserError(f'{where}: none of the fields {", ".join(wanted)} is there (found: {found})')


def _turn(row: Mapping, field: str, role: str, where: str) -> str:
    """Text of the last message of a role."""
    messages = row[field]
    if isinstance(messages, list):
        for message in reversed(messages):
            if isinstance(message, Mapping) and message.get('role') == role:
                if isinstance(message.get('content'), str):
                    return message['content']
                break
    raise UserError(f'{where}: field {field!r} holds no {role} message with text content')


def _dapo_key(row: Mapping, where: str) -> tuple[str, str]:
    return _turn(row, 'prompt', 'user', where), str(row['reward_model'].get('ground_truth'))


def _strip_prompt(text: str) -> str:
    """The question inside ReTool-SFT's tool prompt; a plain user turn stays as it is."""
    found = _RETOOL.search(text)
    return _RETOOL_ASK.sub('', found[1]).strip() if found else text.strip()


def _brief(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + '...'


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
