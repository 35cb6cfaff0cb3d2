"""What a run tells: metrics.jsonl with TensorBoard beside it, and banner, progress and tables on the terminal.

`metrics.jsonl` is the truth, one JSON object a line: {"step": 3, "time": 1767225600.0, "rewards/mean": 0.5, …}.
TensorBoard's event files are derived from it and written anew on a resume. Standard library only until
something is written or shown (a machine without rich still gets plain lines).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retool_jax.core.errors import UserError

FILE = 'metrics.jsonl'
QUIET_S = 15.0  # seconds between progress lines where there is no terminal


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

        Values are numbers (Python's, or arrays of no dimensions) or strings. Raises ValueError where
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
        lines = [line for line in read(self._path) if keep is None or line['step'] <= keep]
        new = self._path.with_suffix('.jsonl.new')
        new.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        os.replace(new, self._path)
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

    Raises UserError naming file and line where another line is damaged. A missing file has no lines.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        return []
    lines = path.read_bytes().split(b'\n')
    found = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f'{path}:{number}: not a line of metrics: {line[:60]!r}') from None
    return found


def say(line: str) -> None:
    """One line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def banner(**rows: Any) -> None:
    """The start-up lines on stderr: banner(model=…, mesh={'data': 1, …}, sandbox=…, run=…)."""
    text = {name: _describe(value) for name, value in rows.items()}
    width = max(map(len, text), default=0)
    console = _console()
    if console is None:
        for name, value in text.items():
            say(f'{name:<{width}}  {value}')
        return
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for name, value in text.items():
        grid.add_row(f'[bold]{name}[/bold]', _escape(value))
    console.print(Panel(grid, title='retool_jax', title_align='left', expand=False))


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields `advance(text='', n=1)`, whose text stands beside the bar.

    Without a terminal it is a line at most every 15 seconds, and one at the end.
    """
    console = _console()
    if console is None:
        with _plain_progress(title, total) as advance:
            yield advance
        return
    from rich import progress as bars

    columns = [
        bars.TextColumn('{task.description}'), bars.BarColumn(bar_width=30), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TextColumn('eta'), bars.TimeRemainingColumn(),
        bars.TextColumn('{task.fields[text]}'),
    ]  # fmt: skip
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task(_escape(title), total=total, text='')

        def advance(text: str = '', n: int = 1) -> None:
            bar.update(task, advance=n, **({'text': _escape(text)} if text else {}))

        yield advance


@contextlib.contextmanager
def _plain_progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    began = shown = time.monotonic()
    done, last = 0, ''

    def advance(text: str = '', n: int = 1) -> None:
        nonlocal done, last, shown
        done, last = done + n, text or last
        now = time.monotonic()
        if now - shown >= QUIET_S and done < total:
            shown = now
            say(f'{title}: {done}/{total} {now - began:.0f} s {last}'.rstrip())

    try:
        yield advance
    finally:
        say(f'{title}: {done}/{total} {time.monotonic() - began:.0f} s {last}'.rstrip())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; columns after the first are aligned to the right."""
    cells = [list(columns)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(title)
    for n, row in enumerate(cells):
        print('  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())
        if n == 0:
            print('  '.join('-' * w for w in widths))
    sys.stdout.flush()


def _console() -> Any:
    """rich's console on stderr, or None without rich or without a terminal."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=True, highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return ' × '.join(f'{k}={v}' for k, v in value.items())
    return str(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    value = value.item() if hasattr(value, 'item') else value
    if isinstance(value, (bool, int)):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
