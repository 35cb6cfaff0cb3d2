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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import schemas
from retool_jax.tasks.files import file_of, kind_of, read_rows
from retool_jax.tasks.schemas import is_dapo, read_problem


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Problems of a file or a folder, and what was left out."""

    problems: list[Problem]
    rows: int  # read
    repeated: int  # DAPO only: rows left out because the same question and answer stood before
    conflicting: int  # DAPO only: questions left out because their rows disagree about the answer
    files: dict[str, int]  # rows of each file, or of each split of a TFDS folder
    unreadable: tuple[str, ...] = ()  # what is wrong with each row that was left out for it

    def remarks(self, path: str | Path) -> list[str]:
        """Lines for people: which files were read together, and what was left out."""
        lines = _remarks(path, self.files, self.unreadable)
        if self.repeated or self.conflicting:
            lines.append(
                f'{path}: of {self.rows} rows {self.repeated} repeated ones are left out, and '
                f'{self.conflicting} questions with conflicting answers'
            )
        return lines


def _remarks(path: str | Path, files: Mapping[str, int], unreadable: Sequence[str]) -> list[str]:
    lines = []
    if len(files) > 1:
        parts = ', '.join(f'{name} ({count} rows)' for name, count in files.items())
        lines.append(f'{path}: {len(files)} files are read together: {parts}')
    if unreadable:
        lines.append(
            f'{path}: {len(unreadable)} of {sum(files.values())} rows cannot be read and are left out, '
            f'the first: {unreadable[0]}'
        )
    return lines


def read(path: str | Path, limit: int | None = None) -> list[Problem]:
    """Problems of a file, or of all files of a folder, in order; `load` tells what was left out as well.

    Reads .jsonl, .json, .parquet, .array_record and folders that TFDS prepared; `limit` keeps the first
    ones. Raises: UserError, one line naming file, line and field, for whatever cannot be read; a file
    without problems is an error.
    """
    loaded = load(path)
    for line in loaded.remarks(path):
        logging.info(line)
    return loaded.problems[:limit]


def load(path: str | Path, leave_out: bool = False) -> Loaded:
    """`read` with counts; with `leave_out` rows that cannot be read are left out and listed instead of refused.

    The public file of DAPO-Math-17k is one block repeated a hundred times: each of its questions is kept once,
    and dropped where its rows disagree about the answer. Other sets are never thinned.

    Raises:
      UserError: those of `read`; with `leave_out`, where nothing else is left.
    """
    path = Path(path)
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()  # DAPO: question and answer as they stand in the file
    golds: dict[str, str] = {}  # DAPO: question → answer
    conflicts: set[str] = set()
    asked: set[str] = set()  # DAPO: questions kept
    ids: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    unreadable: list[str] = []
    repeated = 0

    def read(row: Mapping, where: str, name: str) -> tuple[Problem | None, bool]:
        """A problem, or None where it stood before; whether the row is DAPO's."""
        if not is_dapo(row):
            return read_problem(row, where, name, path.stem), False
        key = schemas.dapo_key(row, where)
        if key in seen:
            return None, True
        seen.add(key)
        return read_problem(row, where, name, path.stem), True

    for number, (problem, dapo) in _rows(path, read, counts, unreadable, leave_out):
        if problem is None:
            repeated += 1
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


def _rows[T](
    path: Path,
    read: Callable[[Mapping, str, str], T],
    counts: collections.Counter[str],
    unreadable: list[str],
    leave_out: bool,
) -> Iterator[tuple[int, T]]:
    """Yields number and `read(row, where it stands, an id for it)` of every row, and counts rows by file.

    What `read` refuses is put into `unreadable` where `leave_out` says so.
    """
    for number, (where, row) in enumerate(read_rows(path)):
        counts[file_of(where, path)] += 1
        try:
            found = read(row, where, f'{path.stem}-{number}')
        except UserError as error:
            if not leave_out:
                raise
            unreadable.append(str(error))
        else:
            yield number, found


def _unique(problem: Problem, ids: set[str], number: int) -> Problem:
    """A problem under an id that is not among `ids`, to which it is added."""
    name = problem.id
    while name in ids:
        name = f'{name}#{number}'
    ids.add(name)
    return problem if name == problem.id else dataclasses.replace(problem, id=name)


def read_traces(path: str | Path) -> list[tuple[Problem, str]]:
    """Worked answers of a file: rows with a chat, whose turns are joined with their calls, or a problem with its
    `rewritten` (else `trace`, `response`, …) field. Raises: UserError for what is neither, and for a chat that cannot
    be joined whole."""
    return load_traces(path)[0]


def load_traces(
    path: str | Path, leave_out: bool = False, solutions: bool = False
) -> tuple[list[tuple[Problem, str]], list[str]]:
    """`read_traces`, and lines for people as `Loaded.remarks` has them; `leave_out` drops rows that cannot be read
    instead of refusing the file. solutions: worked solutions beside or in the answer's column are traces too.

    Raises:
      UserError: those of `read_traces`; with `leave_out`, where nothing else is left.
    """
    path, ids = Path(path), set()
    pairs, unreadable, counts = [], [], collections.Counter()
    worked = schemas.read_solution if solutions else schemas.read_trace
    read = lambda row, where, name: (worked(row, where), read_problem(row, where, name, path.stem))
    for number, (text, problem) in _rows(path, read, counts, unreadable, leave_out):
        pairs.append((_unique(problem, ids, number), text))
    if not pairs:
        raise UserError(f'{path}: no traces in it')
    return pairs, _remarks(path, counts, unreadable)


def write_array_record(path: str | Path, problems: Iterable[Problem]) -> int:
    """Writes problems as JSON objects, one a record, for random access; the file appears whole or not.

    Returns how many were written. `read` and `tasks.stream` read it. Ids that stand there already get a number.

    Raises:
      UserError: the name has another ending.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    if kind_of(path) != '.array_record':
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
    fields = {k: v for k, v in dataclasses.asdict(problem).items() if v or k != 'judge'}  # most problems have none
    return json.dumps(fields, ensure_ascii=False).encode()


def decode_problem(record: bytes) -> Problem:
    """The problem of one record that `write_array_record` wrote."""
    return Problem(**json.loads(record))
