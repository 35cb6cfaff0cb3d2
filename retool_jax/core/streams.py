"""Standard streams that nobody reads any more, as after `| head`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

UNREAD = 128 + signal.SIGPIPE  # the exit status, 141: what a shell shows of a program that SIGPIPE ended


@contextlib.contextmanager
def ends_unread() -> Iterator[None]:
    """Around a program: it ends without a word, by SystemExit of UNREAD, once stdout or stderr has no reader.

    What is printed is flushed before the end, which else comes when the interpreter is past every handler. A
    BrokenPipeError of another pipe, and any other error, passes.
    """
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        unread = [number for number in (1, 2) if _has_no_reader(number)]
        if not unread:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in unread:  # the interpreter flushes them again
            os.dup2(nowhere, number)
        sys.exit(UNREAD)


def _has_no_reader(number: int) -> bool:
    """Whether a descriptor is a pipe or a socket whose other end is closed."""
    poll = select.poll()
    poll.register(number, 0)  # errors are told unasked
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
