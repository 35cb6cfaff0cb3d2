"""Ctrl-C and SIGTERM: taken at once, held back where half-done work would be worse, and answered in time.

A signal is taken at once, as an exception in the main thread, except in a block of `uninterrupted`. There it waits: a
short block ends first; a long one (a training loop) asks `told` where it can stop, and raises `stop` itself. A process
that does neither, because it compiles or waits for others, is ended by its `Watch` before SIGKILL would end it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from retool_jax.core.errors import UserError

STOPS = (signal.SIGINT, signal.SIGTERM)
GRACE = 'RETOOL_GRACE_S'  # environment variable: seconds from SIGTERM to the SIGKILL that follows it
GRACE_S = 30.0  # Kubernetes' and SLURM's own
SPARE_S = 5.0  # of the grace, in which a process is ended that has not answered
TWICE_S = 1.0  # a second Ctrl-C after so long is meant: the first may come from the terminal and from another process


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread; `except KeyboardInterrupt` takes it together with Ctrl-C."""


_held: list[int] = []  # signals that wait for the end of the block of `uninterrupted` that runs
_depth = 0  # blocks of `uninterrupted` that are open
watch: Watch | None = None  # of this process, if its binary has one


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds signals back: one that arrives takes effect when the outermost block is over, or the block asks `told`.

    For code that donates its arguments (an update: between the call and the assignment no state is whole) or
    writes several files that belong together. Outside the main thread no signal arrives, so nothing is done.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread() or _depth:
        yield
        return
    # A signal that the process ignores stays ignored: a shell's background job ignores Ctrl-C.
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _hold) for number in heard}
    _depth = 1
    try:
        yield
    except KeyboardInterrupt:  # the block's own `stop`
        _held.clear()
        raise
    finally:
        _depth = 0
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if _held:
            number = _held[0]
            _held.clear()
            again(number)


def again(number: int) -> None:
    """Raises a signal in the main thread that was heard already and has had no effect yet; the watch takes it for no
    second one."""
    if watch is not None:
        watch.repeated += 1
    signal.pthread_kill(threading.main_thread().ident, number)


def _hold(number: int, frame) -> None:
    if not _held:
        again = '; Ctrl-C again ends at once' if watch and number == signal.SIGINT else ''
        os.write(2, f'stopping as soon as this step is whole{again}\n'.encode())
    _held.append(number)


def told() -> int:
    """The signal that waits for the block of `uninterrupted` that runs, 0 without one."""
    return _held[0] if _held else 0


def stop(number: int) -> KeyboardInterrupt:
    """What a block raises that was told to stop, and stops now."""
    answered()
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def answered() -> None:
    """The main thread has taken a signal and ends by itself: saving takes what it takes."""
    if watch is not None:
        watch.answered()


class Watch:
    """A thread that hears of signals while the main thread computes, and ends the process in time; for a block.

    Python's own handlers run in the main thread alone, once the call that it is in returns: a compilation takes
    minutes. `number` is the first signal, 0 before it.

    grace_s: seconds from SIGTERM to the end of a process that has not `answered`. Ctrl-C has none, its second one
    ends at once.
    """

    def __init__(self, grace_s: float):
        self.grace_s, self.number = grace_s, 0
        self.repeated = 0  # signals on their way that `again` raised
        # Of several processes: tells the others with which status and line this one ends.
        self.farewell: Callable[..., None] | None = None
        self._since = 0.0
        self._ends: dict[str, tuple[float, int, str]] = {}  # why: (when, exit status, line)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._over, self._lock = False, threading.RLock()  # a signal's handler may interrupt `answered`

    def __enter__(self) -> Watch:
        global watch
        watch, self._before = self, signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        global watch
        watch, self._over = None, True
        signal.set_wakeup_fd(self._before)
        os.write(self._write, b'\0')
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def answered(self) -> None:
        """Lets the main thread end by itself."""
        with self._lock:
            self._ends.pop('signal', None)

    def end_within(self, seconds: float, status: int, line: str) -> None:
        """Ends the process with a line and a status, unless it is through by then."""
        with self._lock:
            self._ends['others'] = time.monotonic() + seconds, status, line
        os.write(self._write, b'\0')

    def _run(self) -> None:
        while not self._over:
            with self._lock:
                first = min(self._ends.values(), default=None)
            left = None if first is None else first[0] - time.monotonic()
            if left is not None and left <= 0:
                self._end(*first[1:])
            if select.select([self._read], [], [], left)[0]:
                for number in os.read(self._read, 64):
                    if number in STOPS:
                        self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self.repeated:
            self.repeated -= 1
            return
        if signal.getsignal(number) not in _ours:  # a server drains, as long as that takes
            return
        if self.number and number == signal.SIGINT and now - self._since > TWICE_S:
            self._end(128 + number, 'interrupted twice')
        if self.number == signal.SIGTERM or (self.number and number == signal.SIGINT):
            return
        self.number, self._since = number, now
        if number == signal.SIGTERM:
            line = f'stopped by SIGTERM; what ran then has not come to an end within {self.grace_s:g} s'
            with self._lock:
                self._ends['signal'] = now + self.grace_s, 128 + number, line

    def _end(self, status: int, line: str) -> None:
        if self.farewell is not None:
            telling = threading.Thread(target=self.farewell, args=(status, line), daemon=True)
            telling.start()
            telling.join(SPARE_S / 2)  # those who are told may be gone
        end(status, line)


def end(status: int, line: str = '') -> None:
    """Ends the process as it stands: no `finally` runs, no other process is waited for; what is printed is flushed."""
    try:
        sys.stdout.flush()
        if line:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    finally:
        os._exit(status)


_ours = [_hold]  # handlers whose end is an exception in the main thread; others mean other things by a signal


def listen(handler: Callable) -> None:
    """Makes `handler` the process's own for Ctrl-C and SIGTERM. Main thread only."""
    for number in STOPS:
        signal.signal(number, handler)
    if handler not in _ours:
        _ours.append(handler)


def ignore() -> None:
    """Lets nothing interrupt the end of the process, which has begun. Main thread only."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def restore() -> None:
    """Gives a child every signal as a new process has it, whatever its parent ignores or blocks. Main thread only.

    Both are inherited: libtpu ignores SIGPROF, the limit of a judge's time, in the trainer that loads it, and SIGHUP.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # those two Python itself ignores
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def grace() -> float:
    """Seconds from SIGTERM to the end of a process that does not answer, by RETOOL_GRACE_S.

    Raises: UserError where that is no number above SPARE_S.
    """
    text = os.environ.get(GRACE) or str(GRACE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SPARE_S < seconds < 1e6:
        raise UserError(f'{GRACE}={text!r}: expected seconds, more than {SPARE_S:g}')
    return seconds - SPARE_S
