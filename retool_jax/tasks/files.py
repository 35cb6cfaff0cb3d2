"""Rows of files: every format and folder that sets of problems and traces come in, and where each row stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from retool_jax.core import pointers
from retool_jax.core.errors import UserError
from retool_jax.tasks import schemas
from retool_jax.tasks.schemas import brief

BATCH_ROWS = 8192  # of a parquet file, in memory at once
TFDS = ('dataset_info.json', 'features.json')  # which stand in a folder that TFDS prepared
# What the hub's tools write beside a set: none of it is one.
ABOUT = ('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'features.json', 'state.json')

Row = tuple[str, Mapping]  # where it stands ('file:line'), its fields


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, or of every file of a folder by name, with where each stands.

    Raises:
      UserError: no such file, a format that is not known, or a row that is no object.
    """
    if path.is_dir():
        if all((path / name).is_file() for name in TFDS):
            yield from _tfds_rows(path)
            return
        for file in files_of(path):
            yield from read_rows(file)
        return
    if not path.exists():
        raise UserError(f'problems file {str(path)!r} does not exist')
    kind = kind_of(path)
    if kind is None:
        known = ', '.join(_READERS)
        raise UserError(f'{path}: cannot tell its format from its name; it must end in {known}')
    for where, row in _READERS[kind](path):
        if not isinstance(row, Mapping):
            raise UserError(f'{where}: {brief(row)} where an object with fields was expected')
        yield where, row


def kind_of(path: Path) -> str | None:
    """The ending that tells a file's format, also of a shard `….array_record-00000-of-00016`; None for any other."""
    name = re.sub(r'-\d{5}-of-\d{5}$', '', path.name)
    return next((suffix for suffix in _READERS if name.endswith(suffix)), None)


def file_of(where: str, path: Path) -> str:
    """The file of a row, by its path below `path`; of a TFDS folder the split."""
    place = re.sub(r':\d+$|: (?:record|row) \d+$| record \d+$', '', where)
    return place.removeprefix(str(path)).lstrip('/: ') or path.name


def files_of(folder: Path) -> list[Path]:
    """The files of a set, by name; of a folder as it comes from the hub those below `data/`, or its one subfolder's.

    Raises:
      UserError: there are none, or in several subfolders.
    """
    entries = sorted(f for f in folder.iterdir() if not f.name.startswith('.'))
    readable = [f for f in entries if f.is_file() and kind_of(f) and f.name not in ABOUT]
    if readable:
        return readable
    inner = [f for f in entries if f.is_dir() and any(kind_of(g) and g.is_file() for g in f.iterdir())]
    inner = [f for f in inner if f.name == 'data'] or inner
    if len(inner) == 1:
        return files_of(inner[0])
    if inner:
        raise UserError(f'{folder}: problem files lie in {", ".join(f.name for f in inner)}; name one of these folders')
    raise UserError(f'{folder}: no file in this folder ends in {", ".join(_READERS)}')


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f'{path}:{number}', _parse(line, f'{path}:{number}')


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
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
                raise UserError(
                    f'{where}: the data viewer cut its cells {row["truncated_cells"]}; download the file itself'
                )
            row = row['row']
        yield where, row


def _rows_in(content: object, path: Path) -> list:
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


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    pointers.refuse(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f'{path}: row {number}', row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f'{path}: not a parquet file that can be read: {_first_line(error)}') from None


def _array_record_rows(path: Path) -> Iterator[tuple[str, object]]:
    for number, record in enumerate(_array_records(path), start=1):
        where = f'{path}: record {number}'
        if not record.lstrip().startswith(b'{'):
            raise UserError(f'{where}: no JSON object; of a TFDS set, name the folder instead')
        yield where, _parse(record, where)


def _array_records(path: Path, batch: int = 1024) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    pointers.refuse(path)
    try:
        reader = ArrayRecordReader(str(path))
        total = reader.num_records()
        for start in range(0, total, batch):
            yield from reader.read(list(range(start, min(start + batch, total))))
        reader.close()
    except RuntimeError as error:  # the library raises nothing narrower
        raise UserError(f'{path}: no array_record file that can be read: {_first_line(error)}') from None


_READERS = {
    '.jsonl': _jsonl_rows,
    '.json': _json_rows,
    '.parquet': _parquet_rows,
    '.array_record': _array_record_rows,
}


def _tfds_rows(path: Path) -> Iterator[Row]:
    """Rows of a folder that TFDS prepared, split by split, fields with text as str."""
    import tensorflow_datasets as tfds

    try:
        sources = tfds.builder_from_directory(path).as_data_source()
    except Exception as error:  # whatever its parts raise about a folder that is not theirs
        raise UserError(f'{path}: no TFDS folder that can be read: {_first_line(error)}') from None
    for split, source in sources.items():
        for number in range(len(source)):
            yield f'{path}: {split} record {number + 1}', _plain(source[number])


def _plain(value):
    """A value of TFDS as JSON would hold it."""
    if isinstance(value, bytes):
        return value.decode('utf-8', 'replace')
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return _plain(value.tolist()) if hasattr(value, 'tolist') else value


def _opened(path: Path):
    pointers.refuse(path)
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
