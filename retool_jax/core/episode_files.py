"""A run's `episodes/` folder: for people and tools a JSONL file, for exact numbers an npz beside it.

`NAME.jsonl.gz` (`zcat` shows it) begins with {"schema": 1, "step": S, "episodes": N}; each further line is one episode:
problem, text of each segment, calls with verdicts, reward, stop. `NAME.npz` holds ids, acted, logprobs and
versions of all its episodes end to end with their offsets (as JSON they would be ten times as large). Both are
compressed; what earlier versions wrote, a `NAME.jsonl` and an npz that are not, is read as well.
A part exists once its JSONL does: the npz is renamed into place first.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from retool_jax.core.checks import MANY, check, within
from retool_jax.core.columns import narrow
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Problem, Reward, Stop, ToolCall, Verdict

SCHEMA = 1
TEXTS = ('.jsonl.gz', '.jsonl')  # how a part's text ends: as it is written, and as earlier versions wrote it
LEVEL = 6  # of gzip, as np.savez_compressed has it: 9 takes three times as long for a hundredth less
# What reading a damaged part raises. Of OSError gzip's own alone: others are the machine's.
DAMAGES = (
    ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """Which training episodes stay on disk."""

    # steps from one whose episodes are kept to the next: 1 all, 10 every tenth and the last, 0 none; those of alarms
    # and validations are kept besides. H 1
    keep: int

    def __post_init__(self):
        check(self, keep=within(0, MANY))

    def keeps(self, step: int, steps: int) -> bool:
        """Whether the episodes of a step of `steps` are kept."""
        return bool(self.keep) and (step % self.keep == 0 or step == steps - 1)


def write(
    directory: str | os.PathLike,
    name: str,
    episodes: Sequence[Episode],
    decode: Callable[[list[int]], str],
    step: int | None = None,
) -> Path:
    """Writes one part and returns its JSONL file; a part of that name is replaced.

    Args:
      directory: the run's `episodes` folder, made where it is missing.
      name: the part's name, e.g. 'step_00012'.
      decode: ids to text, for the segments' texts.
      step: training step written into the header; `rewind` deletes parts of later steps. Default: the largest
        `episode.step`.

    Raises:
      ValueError: an episode's tokens, authors, logprobs and versions differ in number.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    counts = [len(e.tokens) for e in episodes]
    for episode, count in zip(episodes, counts):
        if not count == len(episode.acted) == len(episode.logprobs) == len(episode.versions):
            raise ValueError(f'{episode.problem.id}: tokens, acted, logprobs and versions differ in length')
    arrays = {
        'offsets': np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        'tokens': _join([e.tokens for e in episodes], np.int32),
        'acted': _join([e.acted for e in episodes], np.bool_),
        'logprobs': narrow(_join([e.logprobs for e in episodes], None)),
        'versions': _join([e.versions for e in episodes], np.int32),
    }
    step = max((e.step for e in episodes), default=0) if step is None else step
    lines = [{'schema': SCHEMA, 'step': step, 'episodes': len(episodes)}]
    lines += [_to_json(episode, decode) for episode in episodes]
    text = ''.join(json.dumps(line, ensure_ascii=True) + '\n' for line in lines)

    target = directory / f'{name}{TEXTS[0]}'
    for end in TEXTS:
        (directory / f'{name}{end}').unlink(missing_ok=True)  # from here to the last rename the part does not exist
    with _replacing(directory / f'{name}.npz') as file:
        np.savez_compressed(file, **arrays)
    with _replacing(target) as file:
        file.write(gzip.compress(text.encode(), LEVEL, mtime=0))  # without a clock in it: equal parts are equal files
    return target


def names(directory: str | os.PathLike) -> list[str]:
    """Names of the parts of a folder, in order."""
    return sorted({path.name.removesuffix(end) for end in TEXTS for path in Path(directory).glob(f'*{end}')})


def text_file(directory: str | os.PathLike, name: str) -> Path:
    """The JSONL file of a part, which need not be there: the plain one where there is one, else the compressed one."""
    plain = Path(directory) / f'{name}.jsonl'
    return plain if plain.exists() else plain.with_name(f'{name}{TEXTS[0]}')


def open_text(path: Path) -> IO[str]:
    """The text of a part's JSONL file, compressed or not."""
    return (gzip.open if path.name.endswith('.gz') else open)(path, 'rt', encoding='utf-8')


def read(directory: str | os.PathLike, name: str | None = None) -> list[Episode]:
    """The episodes of one part, or of all in order of their names, equal to what was written.

    Raises: UserError naming the file where it is of another schema or damaged.
    """
    if name is None:
        return [episode for part in names(directory) for episode in read(directory, part)]
    path = text_file(directory, name)
    try:
        return _read(path, Path(directory) / f'{name}.npz')
    except UserError:
        raise
    except DAMAGES as error:
        raise UserError(f'{path} or its .npz is damaged: {type(error).__name__}: {error}') from error


def _read(path: Path, arrays_path: Path) -> list[Episode]:
    header, *lines = _lines(path)
    if header.get('schema') != SCHEMA:
        raise UserError(f'{path}: schema {header.get("schema")!r}; this version reads {SCHEMA}')
    if header['episodes'] != len(lines):
        raise UserError(f'{path}: {len(lines)} episodes of {header["episodes"]}: the file was cut short')
    # The file is opened here: np.load would leave a damaged one open.
    with open(arrays_path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
        offsets = arrays['offsets'].tolist()
        columns = {key: arrays[key] for key in ('tokens', 'acted', 'logprobs', 'versions')}
    if len(offsets) != len(lines) + 1 or any(len(c) != offsets[-1] for c in columns.values()):
        raise UserError(f'{arrays_path}: does not belong to {path.name}')
    return [
        _from_json(line, {key: column[start:end].tolist() for key, column in columns.items()})
        for line, start, end in zip(lines, offsets, offsets[1:])
    ]


def rewind(directory: str | os.PathLike, step: int) -> None:
    """Removes every part of a later step, and what a killed run left half written."""
    directory = Path(directory)
    for path in directory.glob('.*.new'):
        path.unlink()
    for name in names(directory):
        with open_text(text_file(directory, name)) as file:
            later = json.loads(file.readline())['step'] > step
        if later:
            _unlink(directory, name)
    there = set(names(directory))
    for path in directory.glob('*.npz'):
        if path.stem not in there:
            path.unlink()


def remove(directory: str | os.PathLike, but: Collection[str]) -> None:
    """Removes every part whose name is not among `but`."""
    for name in set(names(directory)) - set(but):
        _unlink(directory, name)


def link(source: str | os.PathLike, name: str, target: str | os.PathLike, other: str) -> bool:
    """Makes the part `name` of the folder `source` the part `other` of the folder `target` too; False where it is not
    there.

    The two are hard links, one set of bytes that is there until both are removed; copies where the storage has none. A
    part of that name is replaced.
    """
    text, target = text_file(source, name), Path(target)
    if not text.exists():
        return False
    target.mkdir(parents=True, exist_ok=True)
    _unlink(target, other)
    for path in (text.with_name(f'{name}.npz'), text):
        new = target / f'{other}{path.name.removeprefix(name)}'
        try:
            os.link(path, new)
        except OSError:
            with _replacing(new) as file:
                file.write(path.read_bytes())
    return True


def _unlink(directory: Path, name: str) -> None:
    for end in (*TEXTS, '.npz'):  # in this order: without the first two the part does not exist
        (Path(directory) / f'{name}{end}').unlink(missing_ok=True)


class _replacing:
    """A binary file that takes its name when it is whole."""

    def __init__(self, target: Path):
        self._target, self._new = target, target.with_name(f'.{target.name}.new')

    def __enter__(self):
        self._file = open(self._new, 'wb')
        return self._file

    def __exit__(self, kind, *unused) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._new, self._target)
        else:
            self._new.unlink(missing_ok=True)


def _join(rows: list[list[Any]], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(f'{path}:{number}: not a line of episodes: {line[:60]!r}') from None


def _to_json(episode: Episode, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    segments, length = [], 0
    for acted, ids in episode.segments():
        kind = 'prompt' if length < episode.prompt_length else 'model' if acted else 'tool'
        segments.append({'kind': kind, 'tokens': len(ids), 'text': decode(ids)})
        length += len(ids)
    return {
        'problem': dataclasses.asdict(episode.problem),
        'sample': episode.sample,
        'step': episode.step,
        'prompt_length': episode.prompt_length,
        'turns': episode.turns,
        'stop': episode.stop,
        'void': episode.void,
        'reward': None if episode.reward is None else dataclasses.asdict(episode.reward),
        'segments': segments,
        'calls': [dataclasses.asdict(call) for call in episode.calls],
    }


def _from_json(line: dict[str, Any], columns: dict[str, list]) -> Episode:
    calls = [ToolCall(**call | {'verdict': Verdict(call['verdict'])}) for call in line['calls']]
    return Episode(
        problem=Problem(**line['problem']),
        sample=line['sample'],
        step=line['step'],
        **columns,
        prompt_length=line['prompt_length'],
        calls=calls,
        turns=line['turns'],
        stop=None if line['stop'] is None else Stop(line['stop']),
        void=line['void'],
        reward=None if line['reward'] is None else Reward(**line['reward']),
    )
