"""The light process between a trainer and its jails: `python -m retool_jax.sandbox.supervisor FD`.

It starts zygotes (or cold jails), keeps sealed children ahead of need, gives each snippet to one,
and answers over a stream socket in frames of JSON. When its client's end closes, or its client is
killed, everything below it goes.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import itertools
import os
import resource
import signal
import socket
import sys
import time

from retool_jax.core.records import Verdict
from retool_jax.core.signals import restore
from retool_jax.sandbox import canary, frames, jail
from retool_jax.sandbox import guest as guest_lib
from retool_jax.sandbox.cgroups import SCARCE, Groups
from retool_jax.sandbox.child import Child, Lost, Request, fault_outcome
from retool_jax.sandbox.settings import SandboxSettings
from retool_jax.sandbox.workers import Cold, Reports, Resources, Warm

_FAILURES = 3  # in a row, before the jail counts as impossible here
_PR_SET_CHILD_SUBREAPER = 36
_UIDS = range(10000, 59000)  # all of five digits: the guest's memory looks alike whichever it gets
# Descriptors of a child: pidfd, control, two pipes, scratch; two more and a log on the cold path; of its lease: three
# groups and eight counters.
_DESCRIPTORS, _RESERVED = 19, 128  # the latter for the process, its zygotes, and what is open for a moment
_libc = ctypes.CDLL(None, use_errno=True)


def _reap_orphans(known: set[int]) -> None:
    """Collects what died below a killed nsjail: this process is made the reaper of its descendants."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid not in known:
            os.waitpid(found.si_pid, 0)


def _reap_all(seconds: float) -> None:
    """Waits until no child is left, or for so long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)


def _within_descriptors(settings: SandboxSettings) -> tuple[int, int, str]:
    """Raises the soft limit of descriptors to the hard one; (snippets at once, children at once, why not as asked)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    room = sys.maxsize if soft == resource.RLIM_INFINITY else max(1, (soft - _RESERVED) // _DESCRIPTORS)
    limit = min(settings.concurrency, max(1, room - settings.zygotes * settings.spares))
    if limit == settings.concurrency:
        return limit, room, ''
    needed = _RESERVED + _DESCRIPTORS * (settings.concurrency + settings.zygotes * settings.spares)
    return (
        limit,
        room,
        (
            f'sandbox.concurrency={settings.concurrency}: needs {needed} descriptors, {soft} is the hard '
            f'limit here, so {limit} snippets run at once; raise it (ulimit -Hn, LimitNOFILE=)'
        ),
    )


class Supervisor:
    """Dispatches snippets to children in order of arrival."""

    def __init__(self, settings: SandboxSettings, link: socket.socket):
        self.settings = settings
        self.limit, self._most, self._capped = _within_descriptors(settings)
        self.room = self._most  # children at once
        if self._capped:
            print(self._capped, file=sys.stderr)
        self.groups = Groups()
        if settings.require_groups and self.groups.missing:
            raise RuntimeError(
                f'sandbox: no control group for {", ".join(self.groups.missing)} may be written here '
                '(run as root, or delegate one); or set sandbox.require_groups=False'
            )
        nsjail = jail.binary()
        guest = guest_lib.ensure(settings.packages, lambda line: print(f'guest root: {line}', file=sys.stderr))
        self._resources = Resources(settings, nsjail, guest, self.groups, collections.deque(_UIDS), itertools.count(1))
        self._reports = Reports(
            self.dispatch,
            self._on_child_ready,
            self._on_child_end,
            self._on_worker_death,
            self._run_short,
            self._complain,
        )
        self.running: dict[int, Child] = {}
        self.counters = collections.Counter(retried=0, respawned=0, recycled=0)
        self._link = link
        # No snippet runs before the isolation has been seen to hold.
        self._canary = canary.combined()
        self._proven = False
        code = self._canary.code.encode()
        probe = Request(-1, {'code': len(code), 'stdin': 0, 'files': [], 'fetch': [], 'seed': 0}, code)
        self._queue = collections.OrderedDict({probe.id: probe})  # a request may leave from anywhere
        self._spares: collections.deque[Child] = collections.deque()
        self._requests: dict[int, Request] = {}
        self._workers: list[Warm] = []
        self._starting = 0  # cold jails on their way
        self._failures = 0
        self._words = ''
        self._broken = ''

    async def run(self) -> None:
        """Serves until the client's end closes."""
        reader, self._writer = await asyncio.open_connection(sock=self._link, limit=1 << 20)
        loop = asyncio.get_running_loop()
        stopped = asyncio.ensure_future(self._read(reader))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.cancel)
        parent = os.getppid()
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            if self.settings.path == 'warm':
                self._staff()
            else:
                self.dispatch()
            while not stopped.done():
                await asyncio.wait([stopped], timeout=1.0)
                self._say({'op': 'alive'})
                if os.getppid() != parent:
                    break
                for worker in list(self._workers):
                    worker.watch()
                self._staff()
                self.room = min(self._most, self.room + 1)  # what was short may not be short any more
                self.dispatch()
                _reap_orphans(self._resources.jails)
        finally:
            for worker in list(self._workers):
                worker.draining = True
                worker.die()
            for child in list(self.running.values()):
                child.kill(Verdict.SANDBOX_ERROR)
            self.groups.remove()
            _reap_all(5.0)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                message, payload = await frames.read(reader)
                if message['op'] == 'run':
                    request = Request(message['id'], message, payload)
                    self._requests[request.id] = request
                    self._queue[request.id] = request
                    self.dispatch()
                elif message['op'] == 'cancel':
                    self._cancel(message['id'])

    def _say(self, message: dict) -> None:
        self._writer.write(frames.pack(message))

    def _cancel(self, id_: int) -> None:
        request = self._requests.get(id_)
        if request is None:
            return
        request.cancelled = True
        if self._queue.pop(id_, None):
            del self._requests[id_]
        elif request.child is not None:
            request.child.kill(Verdict.SANDBOX_ERROR)

    def _on_child_ready(self, child: Child) -> None:
        """A sealed child waits for a snippet."""
        self._starting = max(0, self._starting - 1)
        self._failures = 0
        self._spares.append(child)
        self.dispatch()

    def _on_child_end(self, child: Child, outcome: dict | Lost) -> None:
        """A child is over: deliver, or run its snippet elsewhere."""
        with contextlib.suppress(ValueError):
            self._spares.remove(child)
        self.running.pop(child.number, None)
        with contextlib.suppress(OSError):
            child.lease.disarm()
        self.groups.give(child.lease)
        request = child.request
        if request is None:
            if not child.sealed:
                self._starting = max(0, self._starting - 1)
            if isinstance(outcome, Lost) and outcome.unsealed:
                self._complain(str(outcome))
            if isinstance(outcome, Lost) and outcome.short:
                self._run_short()
        elif request.cancelled:
            self._requests.pop(request.id, None)
        elif isinstance(outcome, Lost):
            request.attempts += not outcome.short or not self._alive()  # others take what a short one leaves
            request.child = None
            if outcome.short:
                self._run_short()
            if request.attempts <= self.settings.retries:
                self.counters['retried'] += 1
                self._queue[request.id] = request
                self._queue.move_to_end(request.id, last=False)
            else:
                self._deliver(request, fault_outcome(outcome.fault, str(outcome)))
        else:
            self._deliver(request, outcome)
        self.dispatch()

    def _on_worker_death(self, worker: Warm, words: str) -> None:
        """Replaces a worker that died; three that never became ready end the pool."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        if worker.draining:
            return
        self.counters['respawned'] += 1
        if not worker.ready:
            self._complain(words)
        self._staff()

    def _staff(self) -> None:
        """Starts the workers that are lacking; what the machine has no room for now is tried again each second."""
        if self.settings.path == 'cold':
            return
        while not self._broken and sum(not w.draining for w in self._workers) < self.settings.zygotes:
            try:
                self._workers.append(Warm(self._resources, self._reports))
            except OSError as error:
                self._complain(f'a worker cannot be started: {error}')
                return

    def _complain(self, words: str) -> None:
        """Counts a worker that could not isolate itself, and keeps its reason for the message that ends the pool."""
        self._words = words or self._words
        self._failures += 1
        if self._failures >= _FAILURES * max(1, self.settings.zygotes):
            self._break()

    def _run_short(self, error: OSError | None = None) -> None:
        """A child could not be taken in. Without descriptors no more than are alive are tried until the next second."""
        alive = self._alive()
        scarce = error is None or error.errno in SCARCE
        if scarce:
            self.room = min(self.room, alive)
            print(f'sandbox: out of descriptors with {self.room} children', file=sys.stderr)
        if not (scarce and alive):
            self._complain(str(error or 'no descriptor is left (ulimit -n)'))

    def _alive(self) -> int:
        """Children that exist or are on their way."""
        if self.settings.path == 'cold':
            return self._starting + len(self._spares) + len(self.running)
        return sum(len(w.children) + len(w.ordered) for w in self._workers)

    def _break(self) -> None:
        if not self._broken:
            self._broken = (
                f'sandbox: no isolated worker can be started here, so no code is run: {self._words}; '
                '`python -m retool_jax.sandbox.doctor` names the remedy'
            )
            self._say({'op': 'broken', 'reason': self._broken})

    def _prove(self, outcome: dict) -> None:
        """Opens the pool where the canary sang, ends it where not."""
        if outcome['verdict'] == Verdict.OK and outcome['stdout'] == self._canary.expected:
            self._proven = True
            self._say(
                {
                    'op': 'ready',
                    'missing': self.groups.missing,
                    'groups': self.groups.version,
                    'guest': str(self._resources.guest.root),
                    'capped': self._capped,
                }
            )
        else:
            self._words = f'the isolation does not hold ({outcome["verdict"]}: {outcome["stderr"][-200:]})'
            self._break()

    def _deliver(self, request: Request, outcome: dict) -> None:
        if request.id < 0:
            self._prove(outcome)
            return
        self._requests.pop(request.id, None)
        self._say({'op': 'result', 'id': request.id, 'outcome': outcome, 'counters': self.counters})

    def dispatch(self) -> None:
        """Gives waiting snippets to waiting children, and has new children made."""
        limit = self.limit if self._proven else 1
        while self._queue and self._spares and len(self.running) < limit:
            child = self._spares.popleft()
            _, request = self._queue.popitem(last=False)
            self.running[child.number] = child
            child.start(request, self.settings)
        if self._broken:
            return
        if self.settings.path == 'cold':
            room = self.limit - len(self.running)
            while self._starting + len(self._spares) < min(len(self._queue), room) and self._alive() < self.room:
                try:
                    Cold(self._resources, self._reports)
                except OSError as error:
                    self._run_short(error)
                    return
                self._starting += 1
            return
        self._refill()

    def _refill(self) -> None:
        """Keeps `spares` children ahead per worker; replaces workers that have served their time."""
        for worker in list(self._workers):
            if worker.draining:
                if not worker.children and not worker.ordered:
                    worker.die()
                continue
            if not worker.ready:
                continue
            if worker.forked >= self.settings.recycle and worker.successor is None:
                with contextlib.suppress(OSError):  # the next child that ends tries again
                    worker.successor = Warm(self._resources, self._reports)
                    self._workers.append(worker.successor)
            if worker.successor and (worker.successor.ready or worker.successor.dead):
                worker.draining = True
                self.counters['recycled'] += 1
                for child in [c for c in worker.children.values() if c.request is None]:
                    with contextlib.suppress(ValueError):
                        self._spares.remove(child)  # no snippet may be given to it before it is dead
                    child.kill(None)
                continue
            idle = sum(c.request is None for c in worker.children.values()) + len(worker.ordered)
            for _ in range(min(self.settings.spares - idle, self.room - self._alive())):
                worker.fork()


def main() -> None:
    """Reads the settings as the first frame, then serves."""
    restore()
    link = socket.socket(fileno=int(sys.argv[1]))
    settings = SandboxSettings(**frames.receive(link))

    async def serve() -> None:
        await Supervisor(settings, link).run()

    try:
        asyncio.run(serve())
    except (RuntimeError, ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            link.setblocking(True)
            link.sendall(frames.pack({'op': 'broken', 'reason': str(error)}))
        sys.exit(1)


if __name__ == '__main__':
    main()
