"""The pool as a trainer sees it: code in, a future of the result out; nothing here blocks or forks.

A thread with an event loop talks to the supervisor (supervisor.py), a light process that owns the
jails. If the trainer dies, the supervisor sees the end of file and takes everything down.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable

import retool_jax
from retool_jax.core.errors import UserError
from retool_jax.core.records import ExecResult, Verdict

_RESTARTS = 3
_START_S = 600.0  # the first start may build the guest root


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxSettings:
    """Limits per snippet and the shape of the pool; every value has its default."""

    path: str = 'warm'  # 'warm': sealed forks of a zygote; 'cold': one jail per snippet, the oracle
    zygotes: int = 2
    spares: int = 3  # children sealed ahead of need, per zygote
    concurrency: int = 0  # snippets running at once; 0: two per core
    recycle: int = 2000  # snippets per zygote before it is replaced
    cpu_s: float = 5.0  # CPU seconds of all the snippet's processes
    wall_s: float = 15.0  # three times as long, so that a loaded host does not change rewards
    memory_mb: int = 256  # beyond what the packages occupy
    processes: int = 64  # threads count
    files: int = 256  # open descriptors per process
    scratch_mb: int = 64  # of /box, the only writable place
    scratch_inodes: int = 4096
    output_bytes: int = 262144  # per stream; more ends the snippet
    preload: tuple[str, ...] = ('numpy', 'sympy')  # imported before the snippet starts
    packages: tuple[str, ...] = ('numpy', 'scipy', 'sympy')  # what can be imported at all
    echo: bool = False  # print the value of a last expression, as a notebook does
    retries: int = 3  # after faults of the sandbox, each on another worker
    queue: int = 16384  # snippets waiting; one more raises PoolFull
    require_groups: bool = False  # refuse to run where control groups cannot be written

    def __post_init__(self):
        if self.path not in ('warm', 'cold'):
            raise UserError(f"sandbox.path={self.path!r}: must be 'warm' or 'cold'")
        positive = ('zygotes', 'spares', 'recycle', 'cpu_s', 'wall_s', 'memory_mb', 'processes', 'files', 'scratch_mb',
                    'scratch_inodes', 'output_bytes', 'queue')
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f'sandbox.{name}={getattr(self, name)!r}: must be greater than 0')
        if self.concurrency < 0 or self.retries < 0:
            raise UserError('sandbox.concurrency and sandbox.retries must not be negative')
        for name in self.preload:
            if not name.replace('.', '').replace('_', '').isalnum():
                raise UserError(f'sandbox.preload: {name!r} is no module name')
        object.__setattr__(self, 'preload', tuple(self.preload))
        object.__setattr__(self, 'packages', tuple(self.packages))
        if not self.concurrency:
            # macOS knows no affinity; it runs no pool either, but it may hold its settings.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
            object.__setattr__(self, 'concurrency', 2 * cores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A snippet with what a server's request may add to it; None takes the setting."""

    code: str
    seed: int = 0
    stdin: bytes = b''
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)  # path below /box → content
    fetch: tuple[str, ...] = ()  # paths below /box to return
    cpu_s: float | None = None
    wall_s: float | None = None
    memory_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A result with the files that were asked for and found."""

    result: ExecResult
    files: dict[str, bytes]


class PoolFull(RuntimeError):
    """More snippets wait than `queue` allows."""


class Pool:
    """A sandbox on this machine. `with Pool(settings) as pool: pool.submit(code).result()`."""

    def __init__(self, settings: SandboxSettings = SandboxSettings()):
        self.settings = settings
        self.missing: tuple[str, ...] = ()  # control groups that could not be had: what is not enforced
        self._waiting: dict[int, tuple[concurrent.futures.Future, dict]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._ready: concurrent.futures.Future = concurrent.futures.Future()
        self._counts: collections.Counter = collections.Counter()
        self._counters: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process: subprocess.Popen | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._closed = False
        self._reason = ''

    def start(self) -> Pool:
        """Starts the workers and waits for the first; RuntimeError says why isolation cannot be had."""
        self._launch()
        self._ready.result(_START_S)
        return self

    def __str__(self) -> str:
        s, lacking = self.settings, f', not enforced: {", ".join(self.missing)}' if self.missing else ''
        return (f'nsjail, {s.path} path, {s.zygotes} zygotes; {s.cpu_s:g} s CPU, {s.wall_s:g} s, '
                f'{s.memory_mb} MiB a snippet{lacking}')

    def __enter__(self) -> Pool:
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, code: str, seed: int = 0) -> concurrent.futures.Future[ExecResult]:
        """Queues a snippet; returns at once. PoolFull where the queue is full, RuntimeError when closed."""
        future = concurrent.futures.Future()
        inner = self.submit_job(Job(code=code, seed=seed))

        def pass_on(done: concurrent.futures.Future) -> None:
            if done.cancelled():
                future.cancel()
            elif not future.cancelled():
                error = done.exception()
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    future.set_exception(error) if error else future.set_result(done.result().result)

        inner.add_done_callback(pass_on)
        future.add_done_callback(lambda f: inner.cancel() if f.cancelled() else None)
        return future

    async def run(self, code: str, seed: int = 0) -> ExecResult:
        """Runs a snippet; cancelling the task ends it."""
        return await asyncio.wrap_future(self.submit(code, seed))

    def submit_job(self, job: Job) -> concurrent.futures.Future[Outcome]:
        """`submit` with standard input, files and limits of its own; cancelling the future kills the snippet."""
        self._launch()
        fields = {'op': 'run', 'code': job.code, 'seed': int(job.seed) % 2**32, 'fetch': list(job.fetch)}
        fields |= {k: getattr(job, k) for k in ('cpu_s', 'wall_s', 'memory_mb') if getattr(job, k) is not None}
        if job.stdin:
            fields['stdin'] = base64.b64encode(job.stdin).decode()
        if job.files:
            fields['files'] = {n: base64.b64encode(c).decode() for n, c in job.files.items()}
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            if self._closed or self._reason:
                raise RuntimeError(self._reason or 'sandbox: the pool is closed')
            if len(self._waiting) >= self.settings.queue:
                raise PoolFull(f'sandbox: {len(self._waiting)} snippets wait already (sandbox.queue)')
            fields['id'] = next(self._numbers)
            self._waiting[fields['id']] = (future, fields)
        future.add_done_callback(lambda f: self._forget(fields['id']) if f.cancelled() else None)
        self._call(self._say, fields)
        return future

    def stats(self) -> dict:
        """Counts since the start: snippets by verdict, waiting, retried and respawned workers."""
        with self._lock:
            return {'waiting': len(self._waiting), 'verdicts': dict(self._counts), 'missing': list(self.missing),
                    **self._counters}

    def close(self) -> None:
        """Ends every snippet and worker; waiting futures get an exception."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or self._thread is None:
            return
        self._call(self._hang_up)
        self._thread.join(10.0)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()  # its jails die with it
            self._thread.join(10.0)
        self._abandon('sandbox: the pool was closed')

    def _launch(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed:
                started = threading.Event()
                self._thread = threading.Thread(target=self._main, args=(started,), name='sandbox-pool', daemon=True)
                self._thread.start()
                started.wait()

    def _call(self, function, *arguments) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _main(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            started.set()
            for _ in range(1 + _RESTARTS):
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await self._serve_once()
                self._process.wait()
                if self._closed or self._reason:
                    break
            else:
                self._abandon('sandbox: its supervisor died again and again')

        try:
            asyncio.run(serve())
        except BaseException as error:
            started.set()
            self._abandon(f'sandbox: {type(error).__name__}: {error}')
            raise

    async def _serve_once(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(pathlib.Path(retool_jax.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'retool_jax.sandbox.supervisor', str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, 'PYTHONPATH': path})
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 26)
        self._say(dataclasses.asdict(self.settings))
        with self._lock:
            todo = [fields for _, fields in self._waiting.values()]
        for fields in todo:  # after a restart: whatever is not answered yet runs again
            self._say(fields)
        try:
            while True:
                size = struct.unpack('!I', await reader.readexactly(4))[0]
                self._hear(json.loads(await reader.readexactly(size)))
        finally:
            self._hang_up()

    def _say(self, message: dict) -> None:
        if self._writer is not None:  # else the next connection sends all that wait
            data = json.dumps(message).encode()
            self._writer.write(struct.pack('!I', len(data)) + data)

    def _hear(self, message: dict) -> None:
        if message['op'] == 'ready':
            self.missing = tuple(message['missing'])
            if not self._ready.done():
                self._ready.set_result(None)
        elif message['op'] == 'broken':
            self._abandon(message['reason'])
            self._hang_up()
        else:
            with self._lock:
                future, _ = self._waiting.pop(message['id'], (None, None))
                self._counters = message['counters']
            if future is not None:
                outcome = _outcome(message['outcome'])
                self._counts[str(outcome.result.verdict)] += 1
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    future.set_result(outcome)

    def _forget(self, number: int) -> None:
        with self._lock:
            known = self._waiting.pop(number, None)
        if known:
            self._call(self._say, {'op': 'cancel', 'id': number})

    def _hang_up(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _abandon(self, reason: str) -> None:
        """Nothing more will run: everybody who waits is told why."""
        with self._lock:
            self._reason = self._reason or reason
            futures = [future for future, _ in self._waiting.values()]
            self._waiting.clear()
        for future in [self._ready, *futures]:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(RuntimeError(reason))


def _outcome(fields: dict) -> Outcome:
    files = {name: base64.b64decode(text) for name, text in fields.pop('files', {}).items()}
    fields['verdict'] = Verdict(fields['verdict'])
    return Outcome(ExecResult(**fields), files)


def run_all(pool: Pool, snippets: Iterable[str]) -> list[ExecResult]:
    """Results in the order of the snippets."""
    return [future.result() for future in [pool.submit(code) for code in snippets]]
