"""A process that ignores and blocks signals, as libraries make it: its children inherit both."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def unheard(numbers: set[int]) -> Iterator[None]:
    """Ignores and blocks signals for a block."""
    already = ignored()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if number in already else handler)


def ignored() -> set[int]:
    """Signals that this process ignores. Python does not know of those that a library's own code ignores, as libtpu
    does SIGPROF, which it is sent all the time."""
    mask = int(re.search(r'SigIgn:\s*(\w+)', Path('/proc/self/status').read_text())[1], 16)
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}
