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
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import retool_jax
from retool_jax.core.records import ExecResult, Fault, Verdict
from retool_jax.sandbox import cgroups, frames
from retool_jax.sandbox.job import Job
from retool_jax.sandbox.settings import SandboxSettings

_DEATHS = 4  # of the supervisor, in a row and without an answer between them, before the pool is broken
_SILENT_S, _DEAF_S = 10.0, 60.0  # without a word of the supervisor: the pool ails; it is replaced
_START_S = 600.0  # the first start may build the guest root


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A result with the files that were asked for and found."""

    result: ExecResult
    files: dict[str, bytes]


class PoolFull(RuntimeError):
    """More snippets wait than `queue` allows, or more bytes than `queue_mb`."""


@dataclasses.dataclass(slots=True)
class _Call:
    """A job that is not answered yet, as the bytes that the supervisor gets."""

    future: concurrent.futures.Future
    frame: bytes
    sent: bool = False
    losses: int = 0  # deaths of the supervisor while it had this job


class Pool:
    """A sandbox on this machine. `with Pool(settings) as pool: pool.submit(code).result()`."""

    def __init__(self, settings: SandboxSettings):
        self.settings = settings = dataclasses.replace(
            settings, concurrency=settings.concurrency or 2 * cgroups.cores()
        )
        self.missing: tuple[str, ...] = ()  # control groups that could not be had: what is not enforced
        self.capped = ''  # why fewer snippets run at once than `concurrency` says
        self._waiting: dict[int, _Call] = {}
        self._unsent: collections.deque[int] = collections.deque()  # in order; what was cancelled is skipped
        self._sent = 0  # the supervisor has so many
        self._bytes = 0  # of all frames that wait
        # Enough that a child never waits for this thread, little enough that what waits is held once: here.
        self._window = 2 * settings.concurrency + 2
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._ready: concurrent.futures.Future = concurrent.futures.Future()
        self._counts: collections.Counter = collections.Counter()
        self._counters: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process: subprocess.Popen | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._heard = math.inf
        self._deaths = 0  # in a row
        self._closed = False
        self._reason = ''

    def start(self) -> Pool:
        """Starts the workers and waits until the first has proven its isolation.

        Raises:
            RuntimeError: it cannot be had here, and why.
        """
        self._launch()
        self._ready.result(_START_S)
        return self

    def __str__(self) -> str:
        s, lacking = self.settings, f', not enforced: {", ".join(self.missing)}' if self.missing else ''
        return (
            f'nsjail, {s.path} path, {s.zygotes} zygotes; {s.cpu_s:g} s CPU, {s.wall_s:g} s, '
            f'{s.memory_mb} MiB a snippet{lacking}'
        )

    def __enter__(self) -> Pool:
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, code: str, seed: int = 0) -> concurrent.futures.Future[ExecResult]:
        """Queues a snippet and returns at once; cancelling the future kills it.

        Raises: as `submit_job`.
        """
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
        """`submit` with standard input, files and limits of its own; cancelling the future kills the snippet.

        Raises:
            ValueError: the field of the job that cannot be run, and why.
            PoolFull: too many snippets wait, or too many bytes.
            RuntimeError: the pool is closed, or broken: why.
        """
        id_ = next(self._numbers)
        frame = job.frame(id_, self.settings)
        self._launch()
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            if self._closed or self._reason:
                raise RuntimeError(self._reason or 'sandbox: the pool is closed')
            if len(self._waiting) >= self.settings.queue:
                raise PoolFull(f'sandbox: {len(self._waiting)} snippets wait already (sandbox.queue)')
            if self._waiting and self._bytes + len(frame) > self.settings.queue_mb << 20:
                raise PoolFull(f'sandbox: {self._bytes >> 20} MiB of snippets wait already (sandbox.queue_mb)')
            self._waiting[id_] = _Call(future, frame)
            self._unsent.append(id_)
            self._bytes += len(frame)
        future.add_done_callback(lambda f: self._forget(id_) if f.cancelled() else None)
        self._call(self._feed)
        return future

    def ailing(self) -> str:
        """Why no snippet can run at present, '' where all is well."""
        if self._closed or self._reason:
            return self._reason or 'sandbox: the pool is closed'
        silent_s = time.monotonic() - self._heard
        return f'sandbox: its supervisor has been silent for {silent_s:.0f} s' if silent_s > _SILENT_S else ''

    def stats(self) -> dict:
        """Counts since the start: snippets by verdict, waiting, retried and respawned workers."""
        with self._lock:
            return {
                'waiting': len(self._waiting),
                'verdicts': dict(self._counts),
                'missing': list(self.missing),
                **self._counters,
            }

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
        if platform.system() != 'Linux' or platform.machine() != 'x86_64':
            raise RuntimeError(
                f'sandbox: the local pool needs Linux on x86_64, not {platform.system()} on '
                f'{platform.machine()}; name servers in sandbox.addresses'
            )
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
            while not (self._closed or self._reason):
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await self._serve_once()
                status = self._process.wait()
                self._deaths += 1
                if self._deaths >= _DEATHS:
                    self._abandon(f'sandbox: its supervisor died {self._deaths} times in a row (status {status})')
                self._recount()
                await asyncio.sleep(0.5 * (self._deaths - 1))

        try:
            asyncio.run(serve())
        except BaseException as error:
            started.set()
            self._abandon(f'sandbox: {type(error).__name__}: {error}')
            raise

    async def _serve_once(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(retool_jax.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'retool_jax.sandbox.supervisor', str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, 'PYTHONPATH': path},
        )
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 26)
        self._writer.write(frames.pack(self.settings.fields()))
        self._feed()
        watch = asyncio.ensure_future(self._listen_for_life())
        try:
            while True:
                message, _ = await frames.read(reader)
                self._heard = time.monotonic()
                self._hear(message)
        finally:
            watch.cancel()
            self._hang_up()

    async def _listen_for_life(self) -> None:
        """Kills a supervisor that has spoken and says nothing any more: stopped, or stuck in the kernel."""
        while time.monotonic() - self._heard < _DEAF_S:
            await asyncio.sleep(1.0)
        self._process.kill()

    def _feed(self) -> None:
        """Hands over what waits, as far as the supervisor has use for it."""
        with self._lock:
            while self._writer is not None and self._unsent and self._sent < self._window:
                call = self._waiting.get(self._unsent.popleft())
                if call is not None:
                    call.sent = True
                    self._sent += 1
                    self._writer.write(call.frame)

    def _recount(self) -> None:
        """After a death: all that is not answered waits again, but for what was there at too many deaths."""
        self._heard = math.inf
        with self._lock:
            for call in self._waiting.values():
                call.losses, call.sent = call.losses + call.sent, False
            lost = [id_ for id_, call in self._waiting.items() if call.losses > self.settings.retries]
            calls = [self._take(id_) for id_ in lost]
            self._unsent, self._sent = collections.deque(self._waiting), 0
        for call in calls:
            self._answer(
                call,
                Outcome(ExecResult(Verdict.SANDBOX_ERROR, '', 'its supervisor died every time', fault=Fault.POOL), {}),
            )

    def _take(self, id_: int) -> _Call | None:
        """Removes a call from those that wait; the lock is held."""
        call = self._waiting.pop(id_, None)
        if call is not None:
            self._bytes -= len(call.frame)
            self._sent -= call.sent
        return call

    def _answer(self, call: _Call, outcome: Outcome) -> None:
        self._counts[str(outcome.result.verdict)] += 1
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            call.future.set_result(outcome)

    def _hear(self, message: dict) -> None:
        if message['op'] == 'ready':
            self.missing, self.capped = tuple(message['missing']), message['capped']
            if not self._ready.done():
                self._ready.set_result(None)
        elif message['op'] == 'broken':
            self._abandon(message['reason'])
            self._hang_up()
        elif message['op'] == 'result':
            self._deaths = 0
            with self._lock:
                call = self._take(message['id'])
                self._counters = message['counters']
            if call is not None:
                self._answer(call, _outcome(message['outcome']))
            self._feed()

    def _forget(self, id_: int) -> None:
        with self._lock:
            call = self._take(id_)
        if call is not None and call.sent:
            self._call(self._cancel, id_)

    def _cancel(self, id_: int) -> None:
        if self._writer is not None:
            self._writer.write(frames.pack({'op': 'cancel', 'id': id_}))
            self._feed()

    def _hang_up(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _abandon(self, reason: str) -> None:
        """Nothing more will run: everybody who waits is told why."""
        with self._lock:
            self._reason = self._reason or reason
            futures = [self._take(id_).future for id_ in list(self._waiting)]
        for future in [self._ready, *futures]:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(RuntimeError(reason))


def _outcome(fields: dict) -> Outcome:
    files = {name: base64.b64decode(text) for name, text in fields.pop('files', {}).items()}
    fields['verdict'] = Verdict(fields['verdict'])
    if 'fault' in fields:
        fields['fault'] = Fault(fields['fault'])
    return Outcome(ExecResult(**fields), files)


def run_all(pool: Pool, snippets: Iterable[str]) -> list[ExecResult]:
    """Results in the order of the snippets."""
    return [future.result() for future in [pool.submit(code) for code in snippets]]
