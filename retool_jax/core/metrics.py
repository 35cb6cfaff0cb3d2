"""What a run measures: metrics.jsonl, with TensorBoard beside it.

`metrics.jsonl` is the truth, one JSON object a line: {"step": 3, "time": 1767225600.0, "rewards/mean": 0.5, …}.
TensorBoard's event files are derived from it and written anew on a resume. Standard library only until
something is written.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retool_jax.core.errors import UserError

FILE = 'metrics.jsonl'
HOSTS = 'hosts.jsonl'  # beside it, a line for each process of a step


class Metrics:
    """Writes one line per step to a run's folder; steps ascend.

    An existing file is gone on with, less a last line that a killed run wrote half of.

    Args:
      directory: the run's folder, made where it is missing.
      active: False on the processes that do not write; every method then does nothing.
      tensorboard: whether to keep event files in `directory/tensorboard`.
    """

    def __init__(self, directory: str | os.PathLike, active: bool = True, tensorboard: bool = True):
        self._path = Path(directory) / FILE
        self._active, self._tensorboard = active, tensorboard
        self._file = self._events = None
        self.last: int | None = None  # the newest step in the file
        if active:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open(keep=None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, whole and at once; numbers that are not finite become null.

        Values are numbers (Python's, or arrays of no dimensions) or strings. Raises: ValueError where
        `step` is not beyond the last one.
        """
        if not self._active:
            return
        if self.last is not None and step <= self.last:
            raise ValueError(f'{self._path}: step {step} comes after step {self.last}: every step is written once')
        line = {'step': int(step), 'time': time.time()} | {k: _plain(v) for k, v in metrics.items()}
        # One write to a file opened for appending: a reader or a killed process never splits a line
        # that came through.
        os.write(self._file, (json.dumps(line, allow_nan=False) + '\n').encode())
        self._emit(line)
        self.last = int(step)

    def rewind(self, step: int | None) -> None:
        """Drops every line of a later step than `step` (all of them for None) here and in TensorBoard."""
        if self._active:
            self.close()
            self._open(keep=-1 if step is None else step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            os.close(self._file)
        self._file = self._events = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _open(self, keep: int | None) -> None:
        lines = cut(self._path, keep)
        self.last = lines[-1]['step'] if lines else None
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        if self._tensorboard:
            self._rewrite_events(lines)

    def _rewrite_events(self, lines: Sequence[Mapping[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        folder = self._path.parent / 'tensorboard'
        stale = list(folder.glob('events.*'))
        # The name's own clock ticks in seconds: two writers of one second would share a file.
        self._events = SummaryWriter(str(folder), filename_suffix=f'.{os.getpid()}.{time.time_ns()}')
        for line in lines:
            self._emit(line)
        for file in stale:
            file.unlink()

    def _emit(self, line: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        for name, value in line.items():
            if name not in ('step', 'time') and isinstance(value, (int, float)):
                self._events.add_scalar(name, float(value), line['step'], walltime=line['time'])


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl (or of the run's folder), less a last one that was cut short.

    Raises: UserError naming file and line where another line is damaged. A missing file has no lines.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        return []
    lines = path.read_bytes().split(b'\n')
    parsed = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            parsed.append(json.loads(line))
        except ValueError:
            raise UserError(f'{path}:{number}: not a line of metrics: {line[:60]!r}') from None
    return parsed


def cut(path: Path, keep: int | None) -> list[dict[str, Any]]:
    """Drops the lines of steps beyond `keep` (None: none of them) and a last one that was cut short; returns the rest.

    Raises: UserError where the file is damaged.
    """
    lines = [line for line in read(path) if keep is None or line['step'] <= keep]
    new = path.with_suffix('.jsonl.new')
    new.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    os.replace(new, path)
    return lines


def append(path: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends a line for each of the rows of a step, all at once; numbers that are not finite become null."""
    lines = [{'step': step} | {key: _plain(value) for key, value in row.items()} for row in rows]
    if lines:
        with open(path, 'ab', buffering=0) as file:
            file.write(''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines).encode())


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    value = value.item() if hasattr(value, 'item') else value
    if isinstance(value, (bool, int)):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
