"""What a run tells people: lines, the start-up banner and progress on stderr, tables on stdout.

Of a run's processes the one that leads speaks: `say`, `banner` and `progress` of the others are silent. JAX and rich
are imported when something is shown (a machine without rich still gets plain lines).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

QUIET_S = 15.0  # seconds between progress lines where there is no terminal


def say(line: str) -> None:
    """One line for people, on stderr."""
    if _leads():
        print(line, file=sys.stderr, flush=True)


def banner(**rows: Any) -> None:
    """The start-up lines on stderr: banner(model=…, mesh={'data': 1, …}, sandbox=…, run=…).

    Where several processes make the run, the last line is their number.
    """
    if not _leads():
        return
    from retool_jax.core import processes

    if processes.count() > 1:
        rows['processes'] = processes.count()
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
    if not _leads():
        yield lambda text='', n=1: None
        return
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


def _leads() -> bool:
    """Whether this process speaks; imported here, for binaries answer --help before JAX is loaded."""
    from retool_jax.core import processes

    return processes.leads()


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
