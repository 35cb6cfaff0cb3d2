"""Light children that answer JSON lines and may be killed at any moment: the parent's half, and the child's.

What a model wrote may hang its reader, exhaust memory or crash it. So the child imports its libraries once and forks
a worker that answers; the kernel's timer of its CPU time ends a worker that is late, whatever it is doing (an
exception from a signal handler would not end one long C call), and the next worker is forked within milliseconds.
CPU time, because a busy machine must not make a right answer wrong.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from retool_jax.core.signals import restore

START_LIMIT_S = 120.0  # for a child to import libraries on a loaded machine; a longer start is a broken installation
HANG_S = 600.0  # without a reply a child hangs, on any machine: a limit on CPU time does not end one that uses none


class Child:
    """One child process, started when first asked."""

    def __init__(self, module: str, *arguments: object, hang_s: float = HANG_S):
        """module: what is run, whose `main` calls `serve`; arguments: its command line."""
        self.command = [sys.executable, '-m', module, *map(str, arguments)]
        self.hang_s = hang_s
        self.process: subprocess.Popen | None = None
        self.buffer, self.ready = b'', False

    def ask(self, message: dict) -> dict:
        """The child's reply; {'died': True} where it had to be replaced."""
        if self.process is None:
            self.start()
        self.await_ready()
        try:
            deadline = time.monotonic() + self.hang_s
            self.send((json.dumps(message) + '\n').encode(), deadline)
            return self.receive(deadline)
        except (TimeoutError, EOFError):
            self.kill()
            self.start()  # its imports run while the caller goes on
            return {'died': True}

    def start(self) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # The same in every process: some generated problems follow the order of a set of strings.
            env={**os.environ, 'PYTHONPATH': path, 'OPENBLAS_NUM_THREADS': '1', 'PYTHONHASHSEED': '0'},
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the trainer's; and the whole group can be killed
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self.buffer, self.ready = b'', False

    def await_ready(self) -> None:
        if self.ready:
            return
        try:
            self.receive(time.monotonic() + START_LIMIT_S)
        except (TimeoutError, EOFError) as e:
            self.kill()
            raise RuntimeError(
                f'a process does not start: run `{" ".join(["python", *self.command[1:]])}` to see why'
            ) from e
        self.ready = True

    def send(self, data: bytes, deadline: float) -> None:
        fd = self.process.stdin.fileno()
        while data:
            if not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError
            try:
                data = data[os.write(fd, data) :]
            except BrokenPipeError as e:
                raise EOFError from e

    def receive(self, deadline: float) -> dict:
        fd = self.process.stdout.fileno()
        while b'\n' not in self.buffer:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            chunk = os.read(fd, 65536)
            if not chunk:
                raise EOFError
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b'\n')
        return json.loads(line)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the process and its worker
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def serve(answer: Callable[[dict], dict], warm_up: Callable[[], object], memory_mb: int) -> None:
    """The child's half: a line {'ready'} after `warm_up`, then what `answer` makes of each message, or {'late'} or
    {'died'} where that ended the worker."""
    restore()
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Libraries may print: the protocol has the real standard output to itself.
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)
    warm_up()
    _reply(replies, {'ready': True})
    while True:
        worker = os.fork()
        if worker == 0:
            for line in sys.stdin:
                _reply(replies, answer(json.loads(line)))
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if status == 0:
            return
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        _reply(replies, {'late' if late else 'died': True})


@contextlib.contextmanager
def limited(cpu_s: float) -> Iterator[None]:
    """Ends this worker where its body takes more CPU time than that."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF's default action ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reply(replies: int, message: dict) -> None:
    data = (json.dumps(message) + '\n').encode()
    while data:
        data = data[os.write(replies, data) :]
