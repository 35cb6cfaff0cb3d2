"""Ctrl-C and SIGTERM held back where a half-done piece of work would be worse than a late end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Finishes its block before a signal that arrived meanwhile takes effect, which it then does at once.

    For code that donates its arguments (an update: between the call and the assignment no state is whole) or
    writes several files that belong together. Outside the main thread no signal arrives, so nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame) -> None:
        if not seen:
            os.write(2, b'stopping as soon as this step is whole\n')
        seen.append(number)

    # A signal that the process ignores stays ignored: a shell's background job ignores Ctrl-C.
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if seen:
            signal.raise_signal(seen[0])
