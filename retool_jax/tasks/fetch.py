"""The public sets that docs/guide.md names, from the Hugging Face hub: one file each, and beside it what it came from.

Nothing of a run fetches anything; `launch/fetch.py` does, where it is asked to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retool_jax.core.errors import UserError, nearest
from retool_jax.tasks import files

SOURCE = '.source'  # ends the name of the file that says where a set is from; no reader of sets opens such a one


@dataclasses.dataclass(frozen=True)
class Set:
    """A set on the hub."""

    repository: str
    file: str  # the name under which the commands of docs/guide.md read it
    rows: int  # as its card has them; another number is refused


SETS = {
    'retool_sft': Set('JoeYing/ReTool-SFT', 'ReTool-SFT.parquet', 2_000),
    'dapo_math_17k': Set('BytedTsinghua-SIA/DAPO-Math-17k', 'dapo-math-17k.parquet', 1_791_700),  # 17,917 × 100
    'aime24': Set('HuggingFaceH4/aime_2024', 'aime24.jsonl', 30),
    'aime25': Set('math-ai/aime25', 'aime25.jsonl', 30),
    'math500': Set('HuggingFaceH4/MATH-500', 'math500.jsonl', 500),
}


def fetch(name: str, folder: Path, revision: str = 'main') -> tuple[Path, dict[str, Any]]:
    """Puts a set into a folder and returns its file, and what stands beside it in FILE.source: the repository, the
    commit that `revision` (a branch, tag or commit) was, rows, SHA-256. One that is there already stays as it is.

    Raises:
      UserError: no such set; the hub cannot be asked or has no such revision; another number of rows; a file of that
        name that was not fetched.
    """
    if name not in SETS:
        raise UserError(f'there is no set {name!r}{nearest(name, SETS)}; choose one of {", ".join(SETS)}')
    known = SETS[name]
    target, source = folder / known.file, folder / f'{known.file}{SOURCE}'
    if source.exists():
        return target, json.loads(source.read_text())
    if target.exists():
        raise UserError(f'{target} is there, and was not fetched; move it away, or give another folder')
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.fetch-') as place:  # beside it, so that it appears whole
        commit = _download(known.repository, revision, Path(place) / 'set')
        made = Path(place) / known.file
        rows = _join(files.files_of(Path(place) / 'set'), made)
        if rows != known.rows:
            raise UserError(
                f'{known.repository} at {commit} has {rows:,} rows, not {known.rows:,}: the set was changed; '
                'give --revision the commit of the one that you want'
            )
        with open(made, 'rb') as stream:
            digest = hashlib.file_digest(stream, 'sha256').hexdigest()
        facts = {'repository': known.repository, 'revision': commit, 'rows': rows, 'sha256': digest}
        made.rename(target)
        (Path(place) / 'source').write_text(json.dumps(facts, indent=2))
        (Path(place) / 'source').rename(source)
    return target, facts


def _download(repository: str, revision: str, folder: Path) -> str:
    """Gets every file of a repository that a set may be read from; returns the commit."""
    import huggingface_hub

    where = f'{repository} at revision {revision!r} of {os.environ.get("HF_ENDPOINT", "https://huggingface.co")}'
    found = _ask(where, lambda: huggingface_hub.HfApi().dataset_info(repository, revision=revision))
    paths = [Path(file.rfilename) for file in found.siblings or ()]
    paths = [path for path in paths if files.kind_of(path) and not any(part.startswith('.') for part in path.parts)]
    if not paths:
        raise UserError(f'{where} holds no file that a set could be read from')
    for path in paths:
        _ask(
            where,
            lambda path=path: huggingface_hub.hf_hub_download(
                repository, str(path), repo_type='dataset', revision=found.sha, local_dir=folder
            ),
        )
    return found.sha


def _ask[T](where: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:  # the library's own, its HTTP client's, the system's
        said = ' '.join(str(error).split())[:300]
        raise UserError(f'{where} cannot be fetched: {type(error).__name__}: {said}') from error


def _join(parts: list[Path], target: Path) -> int:
    """Makes one file of a set's, and returns its rows; a single one of the same format stays as it is."""
    if len(parts) == 1 and parts[0].suffix == target.suffix:
        parts[0].rename(target)
    elif target.suffix == '.parquet':
        _join_tables(parts, target)
    else:
        with open(target, 'w', encoding='utf-8') as file:
            for part in parts:
                for _, row in files.read_rows(part):
                    file.write(json.dumps(row, ensure_ascii=False) + '\n')
    return sum(1 for _ in files.read_rows(target)) if target.suffix != '.parquet' else _table_rows(target)


def _join_tables(parts: list[Path], target: Path) -> None:
    """Parquet files of one schema as one, a group of rows at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(parts[0]) as first:
        schema = first.schema_arrow
    with pyarrow.parquet.ParquetWriter(target, schema) as writer:
        for part in parts:
            with pyarrow.parquet.ParquetFile(part) as file:
                for batch in file.iter_batches(files.BATCH_ROWS):
                    writer.write_batch(batch)


def _table_rows(path: Path) -> int:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.metadata.num_rows
