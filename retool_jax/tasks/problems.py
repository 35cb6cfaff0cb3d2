"""Problem files of every public spelling, read into `Problem`s; array_record files of our own.

Which schema a row has is seen from its fields (`schemas`), so a file is named and nothing else. Nothing is
fetched: docs/guide.md says where each set comes from.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from retool_jax.core import files
from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import schemas
from retool_jax.tasks.schemas import brief, is_dapo, read_problem

BATCH_ROWS = 8192
TFDS = ('dataset_info.json', 'features.json')  # which stand in a folder that TFDS prepared
# What the hub's tools write beside a set: none of it is one.
ABOUT = ('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'features.json', 'state.json')

Row = tuple[str, Mapping]  # where it stands ('file:line'), its fields


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Problems of a file or a folder, and what was left out."""

    problems: list[Problem]
    rows: int  # read
    repeated: int  # DAPO only: rows left out because the same question and answer stood before
    conflicting: int  # DAPO only: questions left out because their rows disagree about the answer
    files: dict[str, int]  # rows of each file, or of each split of a TFDS folder
    unreadable: tuple[str, ...] = ()  # what is wrong with each row that was left out for it

    def remarks(self, path: str | pathlib.Path) -> list[str]:
        """What a person should hear of it, a line each."""
        lines = _remarks(path, self.files, self.unreadable)
        if self.repeated or self.conflicting:
            lines.append(f'{path}: of {self.rows} rows {self.repeated} repeated ones are left out, and '
                         f'{self.conflicting} questions with conflicting answers')
        return lines


def _remarks(path: str | pathlib.Path, files: Mapping[str, int], unreadable: Sequence[str]) -> list[str]:
    lines = []
    if len(files) > 1:
        parts = ', '.join(f'{name} ({count} rows)' for name, count in files.items())
        lines.append(f'{path}: {len(files)} files are read together: {parts}')
    if unreadable:
        lines.append(f'{path}: {len(unreadable)} of {sum(files.values())} rows cannot be read and are left out, '
                     f'the first: {unreadable[0]}')
    return lines


def read(path: str | pathlib.Path, limit: int | None = None) -> list[Problem]:
    """Problems of a file, or of all files of a folder, in order; `load` tells what was left out as well.

    Reads .jsonl, .json, .parquet, .array_record and folders that TFDS prepared; `limit` keeps the first
    ones. Raises UserError, one line naming file, line and field, for whatever cannot be read; a file
    without problems is an error.
    """
    loaded = load(path)
    for line in loaded.remarks(path):
        logging.info(line)
    return loaded.problems[:limit]


def load(path: str | pathlib.Path, leave_out: bool = False) -> Loaded:
    """`read` with counts; with `leave_out` rows that cannot be read are left out and listed instead of refused.

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
    counts: collections.Counter[str] = collections.Counter()
    unreadable: list[str] = []
    repeated = 0
    for number, (where, row) in enumerate(read_rows(path)):
        counts[_file_of(where, path)] += 1
        try:
            dapo = is_dapo(row)
            if dapo:
                key = schemas.dapo_key(row, where)
                if key in seen:
                    repeated += 1
                    continue
                seen.add(key)
            problem = read_problem(row, where, f'{path.stem}-{number}', path.stem)
        except UserError as error:
            if not leave_out:
                raise
            unreadable.append(str(error))
            continue
        if dapo:
            known = golds.setdefault(problem.question, problem.answer)
            if known != problem.answer:
                conflicts.add(problem.question)
                continue
            if problem.question in asked:
                repeated += 1
                continue
            asked.add(problem.question)
        problems.append(_unique(problem, ids, number))
    problems = [p for p in problems if p.question not in conflicts]
    if not problems:
        more = f'; the first that cannot be read: {unreadable[0]}' if unreadable else ''
        raise UserError(f'{path}: no problems in it ({counts.total()} rows read){more}')
    return Loaded(problems, counts.total(), repeated, len(conflicts), dict(counts), tuple(unreadable))


def _unique(problem: Problem, ids: set[str], number: int) -> Problem:
    """A problem under an id that is not among `ids`, to which it is added."""
    name = problem.id
    while name in ids:
        name = f'{name}#{number}'
    ids.add(name)
    return problem if name == problem.id else dataclasses.replace(problem, id=name)


def _file_of(where: str, path: pathlib.Path) -> str:
    """The file of a row, by its path below `path`; of a TFDS folder the split."""
    place = re.sub(r':\d+$|: (?:record|row) \d+$| record \d+$', '', where)
    return place.removeprefix(str(path)).lstrip('/: ') or path.name


def read_traces(path: str | pathlib.Path) -> list[tuple[Problem, str]]:
    """Worked answers of a file: rows with a chat, whose turns are joined with their calls, or a problem with its
    `rewritten` (else `trace`, `response`, …) field. Raises UserError for what is neither, and for a chat that cannot
    be joined whole."""
    return load_traces(path)[0]


def load_traces(path: str | pathlib.Path, leave_out: bool = False) -> tuple[list[tuple[Problem, str]], list[str]]:
    """`read_traces`, and what a person should hear of it, a line each; `leave_out` leaves rows that cannot be read
    out instead of refusing the file."""
    path, ids = pathlib.Path(path), set()
    pairs, unreadable, counts = [], [], collections.Counter()
    for number, (where, row) in enumerate(read_rows(path)):
        counts[_file_of(where, path)] += 1
        try:
            text = schemas.read_trace(row, where)
            problem = read_problem(row, where, f'{path.stem}-{number}', path.stem)
        except UserError as error:
            if not leave_out:
                raise
            unreadable.append(str(error))
            continue
        pairs.append((_unique(problem, ids, number), text))
    if not pairs:
        raise UserError(f'{path}: no traces in it')
    return pairs, _remarks(path, counts, unreadable)


# --- rows of files -------------------------------------------------------------------------------


def read_rows(path: pathlib.Path) -> Iterator[Row]:
    """Rows of a file, or of every file of a folder by name, with where each stands."""
    if path.is_dir():
        if all((path / name).is_file() for name in TFDS):
            yield from _tfds_rows(path)
            return
        for file in _files(path):
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
            raise UserError(f'{where}: {brief(row)} where an object with fields was expected')
        yield where, row


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a set, by name; of a folder as it comes from the hub those below `data/`, or its one subfolder's."""
    entries = sorted(f for f in folder.iterdir() if not f.name.startswith('.'))
    found = [f for f in entries if f.is_file() and _kind(f) and f.name not in ABOUT]
    if found:
        return found
    inner = [f for f in entries if f.is_dir() and any(_kind(g) and g.is_file() for g in f.iterdir())]
    inner = [f for f in inner if f.name == 'data'] or inner
    if len(inner) == 1:
        return _files(inner[0])
    if inner:
        raise UserError(f'{folder}: problem files lie in {", ".join(f.name for f in inner)}; name one of these folders')
    raise UserError(f'{folder}: no file in this folder ends in {", ".join(_READERS)}')


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
        data = file.read()
    try:
        content = _parse(data, str(path))
    except UserError:
        lines = [line for line in data.splitlines() if line.strip()]
        if len(lines) < 2 or not lines[0].lstrip().startswith(b'{') or not lines[0].rstrip().endswith(b'}'):
            raise
        yield from _jsonl_rows(path)  # JSON lines under a name that says otherwise
        return
    for number, row in enumerate(_rows_in(content, path), start=1):
        where = f'{path}: record {number}'
        if isinstance(row, Mapping) and isinstance(row.get('row'), Mapping):  # the data viewer's form of a row
            if row.get('truncated_cells'):
                raise UserError(f'{where}: the data viewer cut its cells {row["truncated_cells"]}; '
                                'download the file itself')
            row = row['row']
        yield where, row


def _rows_in(content: object, path: pathlib.Path) -> list:
    """The rows of a JSON file: a list, one row alone, a table by columns, or the one list of rows in a record."""
    if isinstance(content, Mapping):
        names = {str(name).lower() for name in content}
        columns = [v for v in content.values() if isinstance(v, list)]
        if names & set(schemas.QUESTION_FIELDS):
            table = len(columns) == len(content) and len({len(column) for column in columns}) == 1
            if not table or any(isinstance(row, Mapping) for row in columns[0]):
                return [content]
            return [dict(zip(content, row)) for row in zip(*columns)]
        lists = {name: v for name, v in content.items() if isinstance(v, list) and v and isinstance(v[0], Mapping)}
        if 'rows' in lists:
            return lists['rows']  # beside the data viewer's list of features
        if len(lists) > 1:
            raise UserError(f'{path}: it holds {len(lists)} lists of rows, {", ".join(lists)}; keep one to a file')
        return next(iter(lists.values()), [content])
    if not isinstance(content, list):
        raise UserError(f'{path}: {brief(content)} where a list of problems was expected')
    return content


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    files.refuse_pointer(path)
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

    files.refuse_pointer(path)
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

    Returns how many were written. `read` and `tasks.stream` read it. Ids that stand there already get a number.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = pathlib.Path(path)
    if _kind(path) != '.array_record':
        raise UserError(f'{path}: the name of an array_record file must end in .array_record')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    ids: set[str] = set()
    try:
        writer = ArrayRecordWriter(str(partial), 'group_size:1')  # one record a group: access at random
        for number, problem in enumerate(problems):
            writer.write(encode_problem(_unique(problem, ids, number)))
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(ids)


def encode_problem(problem: Problem) -> bytes:
    """A problem as one array_record's bytes."""
    return json.dumps(dataclasses.asdict(problem), ensure_ascii=False).encode()


def decode_problem(record: bytes) -> Problem:
    """The problem of one record that `write_array_record` wrote."""
    return Problem(**json.loads(record))


# --- small parts ---------------------------------------------------------------------------------


def _opened(path: pathlib.Path):
    files.refuse_pointer(path)
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
