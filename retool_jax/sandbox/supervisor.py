"""The light process between a trainer and its jails: `python -m retool_jax.sandbox.supervisor FD`.

It starts zygotes (or cold jails), keeps sealed children ahead of need, gives each snippet to one,
and answers over a stream socket in frames of JSON. When its client's end closes, or its client is
killed, everything below it goes.
"""

from __future__ import annotations

import array
import asyncio
import collections
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time

from retool_jax.core.records import Verdict
from retool_jax.sandbox import canary, jail
from retool_jax.sandbox import guest as guest_lib
from retool_jax.sandbox.cgroups import Groups
from retool_jax.sandbox.pool import SandboxSettings
from retool_jax.sandbox.worker import Child, Lost, Request

_FAILURES = 3  # in a row, before the jail counts as impossible here
_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 60.0  # for a worker to import its packages, or to fork
_UIDS = range(10000, 59000)  # all of five digits: the guest's memory looks alike whichever it gets
# What zygote.py speaks; it is imported only inside the jail.
_READY, _CHILD = 0, 1
_UP, _DOWN = struct.Struct('=iiiid'), struct.Struct('=ii')
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


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)


class Jail:
    """A running nsjail: its process, and the last lines of its log."""

    def __init__(self, argv: list[str], descriptors: list[int], log: int | None = None):
        read, write = os.pipe()
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=write, stderr=write,
                                        pass_fds=descriptors, preexec_fn=_die_with_parent, start_new_session=True)
        os.close(write)
        os.set_blocking(read, False)
        self._log, self._read = bytearray(), read
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(read, self._drain)
        self.pidfd = os.pidfd_open(self.process.pid)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read, 1 << 16):
                self._log = (self._log + data)[-8192:]
            self._loop.remove_reader(self._read)

    def last_words(self) -> str:
        """What nsjail said last, on one line."""
        self._drain()
        lines = [line for line in self._log.decode(errors='replace').splitlines() if line.strip()]
        worst = [line for line in lines if line.startswith('[E]') or line.startswith('[F]') or 'Error' in line]
        return ' | '.join((worst or lines)[-3:])

    def close(self) -> None:
        """Kills nsjail (the jail's processes go with it), reaps it, closes what is open."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._loop.remove_reader(self._read)
        os.close(self._read)
        os.close(self.pidfd)


class Zygote:
    """The supervisor's end of one warm worker."""

    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        self.ready = self.dead = self.draining = False
        self.children: dict[int, Child] = {}
        self.ordered: dict[int, int] = {}  # number → uid, forks asked for and not yet announced
        self.uids: dict[int, int] = {}
        self.pids: dict[int, int] = {}  # pid in the jail → number
        self.forked = 0
        self._heard = time.monotonic()
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = supervisor.settings
        words = json.dumps({
            'preload': list(settings.preload), 'scratch_mb': settings.scratch_mb, 'files': settings.files,
            'scratch_inodes': settings.scratch_inodes, 'processes': settings.processes,
            'single_uid': jail.single_uid()})
        config = jail.zygote(supervisor.guest, theirs.fileno(), words)
        argv, descriptor = jail.command(supervisor.nsjail, config)
        self.jail = Jail(argv, [theirs.fileno(), descriptor])
        os.close(descriptor)
        theirs.close()
        with contextlib.suppress(OSError):
            supervisor.groups.adopt(self.jail.process.pid, 'zygotes')
        self.link.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.link.fileno(), self._on_message)
        self._loop.add_reader(self.jail.pidfd, self.die)

    def fork(self) -> None:
        """Orders one more child."""
        number = self.supervisor.next_number()
        uid = self.supervisor.uids.popleft()
        try:
            self.link.send(_DOWN.pack(number, uid))
        except OSError:
            self.supervisor.uids.append(uid)
            return  # dying: the readers will see it
        if not self.ordered:
            self._heard = time.monotonic()
        self.ordered[number] = uid
        self.forked += 1

    def watch(self) -> None:
        """Ends a worker that owes an answer for too long (stopped, or out of memory)."""
        if (self.ordered or not self.ready) and time.monotonic() - self._heard > _PATIENCE_S:
            self.die()

    def _on_message(self) -> None:
        while not self.dead:
            try:
                data, ancillary, _, _ = self.link.recvmsg(4096, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data = b''
            if not data:
                self.die()
                return
            self._heard = time.monotonic()
            kind, number, pid, status, cpu_s = _UP.unpack(data)
            if kind == _READY:
                self.ready = True
                self.supervisor.dispatch()
            elif kind == _CHILD:
                descriptors = array.array('i')
                for level, type_, raw in ancillary:
                    if (level, type_) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        descriptors.frombytes(raw)
                self.pids[pid] = number
                self._adopt(number, *descriptors)
            elif child := self.children.pop(self.pids.pop(pid, -1), None):
                child.on_exit(status, cpu_s)

    def _adopt(self, number: int, pidfd: int, control: int, out: int, err: int) -> None:
        self.uids[number] = self.ordered.pop(number)
        self.children[number] = Child(
            number, pidfd, socket.socket(fileno=control), out, err, self.supervisor.groups.take(),
            self.supervisor.on_child_ready, self._on_child_end, self.supervisor.settings.output_bytes)

    def _on_child_end(self, child: Child, outcome: dict | Lost) -> None:
        self.children.pop(child.number, None)
        self.supervisor.uids.append(self.uids.pop(child.number))
        self.supervisor.on_child_end(child, outcome)

    def die(self) -> None:
        """The worker is gone (or is told to go): its snippets are lost here and run elsewhere."""
        if self.dead:
            return
        self.dead = True
        self._loop.remove_reader(self.link.fileno())
        self._loop.remove_reader(self.jail.pidfd)
        words = self.jail.last_words()
        self.link.close()
        self.jail.close()  # returns when nsjail is reaped; the kernel has then killed all in its namespace
        for child in list(self.children.values()):
            child.lose()
        self.supervisor.uids.extend(self.ordered.values())
        self.supervisor.on_zygote_death(self, words)


class Cold:
    """One jail for one snippet, each limit by nsjail itself."""

    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        control, theirs = socket.socketpair()
        control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        out, out_write = os.pipe()
        err, err_write = os.pipe()
        log, log_write = os.pipe()
        os.set_blocking(log, False)
        config = jail.cold(supervisor.guest, (theirs.fileno(), out_write, err_write), log_write,
                           supervisor.settings)
        argv, descriptor = jail.command(supervisor.nsjail, config)
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log_write, stderr=log_write, preexec_fn=_die_with_parent,
            pass_fds=[theirs.fileno(), out_write, err_write, descriptor, log_write], start_new_session=True)
        for unneeded in (descriptor, out_write, err_write, log_write):
            os.close(unneeded)
        theirs.close()
        self._log = log
        with contextlib.suppress(OSError):
            supervisor.groups.adopt(self.process.pid, 'cold')
        supervisor.cold_pids.add(self.process.pid)
        self._pidfd = os.pidfd_open(self.process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._on_exit)
        self.child = Child(supervisor.next_number(), os.dup(self._pidfd), control, out, err, supervisor.groups.take(),
                           self._on_ready, self._on_end, supervisor.settings.output_bytes)

    def _on_ready(self, child: Child) -> None:
        try:
            child.track()
        except OSError:
            return  # gone already: the exit is on its way
        self.supervisor.on_child_ready(child)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.process.wait()
        self.supervisor.cold_pids.discard(self.process.pid)
        words = b''
        with contextlib.suppress(OSError):
            words = os.read(self._log, 1 << 20)
        os.close(self._log)
        os.close(self._pidfd)
        exited = re.findall(rb'exited with status: (\d+)', words)
        killed = re.findall(rb'terminated with signal: [^\n]*?\((\d+)\)', words)
        if exited:
            self.child.on_exit(int(exited[-1]) << 8)
        elif killed:
            self.child.on_exit(int(killed[-1]))
        else:
            lines = [x for x in words.decode(errors='replace').splitlines() if x.startswith(('[E]', '[F]', '[W]'))]
            self.supervisor.complain(' | '.join(lines[-3:]) or 'nsjail said nothing')
            self.child.lose()

    def _on_end(self, child: Child, outcome: dict | Lost) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.supervisor.on_child_end(child, outcome)


class Supervisor:
    """Dispatches snippets to children in order of arrival."""

    def __init__(self, settings: SandboxSettings, link: socket.socket):
        self.settings = settings
        self.groups = Groups()
        if settings.require_groups and self.groups.missing:
            raise RuntimeError(f'sandbox: no control group for {", ".join(self.groups.missing)} may be written here '
                               '(run as root, or delegate one); or set sandbox.require_groups=False')
        self.nsjail = jail.binary()
        self.guest = guest_lib.ensure(settings.packages, lambda line: print(f'guest root: {line}', file=sys.stderr))
        self.uids = collections.deque(_UIDS)
        self.running: dict[int, Child] = {}
        self.cold_pids: set[int] = set()
        self.counters = collections.Counter(retried=0, respawned=0, recycled=0)
        self._link = link
        self._number = 0
        # No snippet runs before the isolation has been seen to hold.
        self._canary = canary.combined()
        self._proven = False
        probe = Request(-1, {'code': self._canary.code, 'seed': 0})
        self._queue: collections.deque[Request] = collections.deque([probe])
        self._spares: collections.deque[Child] = collections.deque()
        self._requests: dict[int, Request] = {}
        self._zygotes: list[Zygote] = []
        self._starting = 0  # cold jails on their way
        self._failures = 0
        self._words = ''
        self._broken = ''

    def next_number(self) -> int:
        """A number that no other child of this supervisor had."""
        self._number += 1
        return self._number

    async def run(self) -> None:
        """Serves until the client's end closes."""
        reader, self._writer = await asyncio.open_connection(sock=self._link, limit=1 << 26)
        loop = asyncio.get_running_loop()
        stopped = asyncio.ensure_future(self._read(reader))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.cancel)
        parent = os.getppid()
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            if self.settings.path == 'warm':
                for _ in range(self.settings.zygotes):
                    self._zygotes.append(Zygote(self))
            else:
                self.dispatch()
            while not stopped.done():
                await asyncio.wait([stopped], timeout=1.0)
                if os.getppid() != parent:
                    break
                for zygote in list(self._zygotes):
                    zygote.watch()
                _reap_orphans({z.jail.process.pid for z in self._zygotes} | self.cold_pids)
        finally:
            for zygote in list(self._zygotes):
                zygote.draining = True
                zygote.die()
            for child in list(self.running.values()):
                child.kill(Verdict.SANDBOX_ERROR)
            self.groups.remove()
            _reap_all(5.0)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = struct.unpack('!I', await reader.readexactly(4))[0]
                message = json.loads(await reader.readexactly(size))
                if message['op'] == 'run':
                    request = Request(message['id'], message)
                    self._requests[request.id] = request
                    self._queue.append(request)
                    self.dispatch()
                elif message['op'] == 'cancel':
                    self._cancel(message['id'])

    def _say(self, message: dict) -> None:
        data = json.dumps(message).encode()
        self._writer.write(struct.pack('!I', len(data)) + data)

    def _cancel(self, id_: int) -> None:
        request = self._requests.get(id_)
        if request is None:
            return
        request.cancelled = True
        if request in self._queue:
            self._queue.remove(request)
            del self._requests[id_]
        for child in self.running.values():
            if child.request is request:
                child.kill(Verdict.SANDBOX_ERROR)

    def on_child_ready(self, child: Child) -> None:
        """A sealed child waits for a snippet."""
        self._starting = max(0, self._starting - 1)
        self._failures = 0
        self._spares.append(child)
        self.dispatch()

    def on_child_end(self, child: Child, outcome: dict | Lost) -> None:
        """A child is over: deliver, or run its snippet elsewhere."""
        with contextlib.suppress(ValueError):
            self._spares.remove(child)
        self.running.pop(child.number, None)
        with contextlib.suppress(OSError):
            child.slot.disarm()
        self.groups.give(child.slot)
        request = child.request
        if request is None:
            self._starting = max(0, self._starting - 1)
            self._words = str(outcome) if isinstance(outcome, Lost) and not self._words else self._words
            self._fail()
        elif request.cancelled:
            self._requests.pop(request.id, None)
        elif isinstance(outcome, Lost):
            request.attempts += 1
            self.counters['retried'] += 1
            if request.attempts <= self.settings.retries:
                self._queue.appendleft(request)
            else:
                self._deliver(request, {'verdict': Verdict.SANDBOX_ERROR, 'stdout': '', 'stderr': str(outcome)})
        else:
            self._deliver(request, outcome)
        self.dispatch()

    def on_zygote_death(self, zygote: Zygote, words: str) -> None:
        """Replaces a worker that died; three that never became ready end the pool."""
        if zygote not in self._zygotes:
            return
        self._zygotes.remove(zygote)
        if zygote.draining:
            return
        self.counters['respawned'] += 1
        if not zygote.ready:
            self._words = words or self._words
            self._fail()
        if not self._broken:
            self._zygotes.append(Zygote(self))

    def complain(self, words: str) -> None:
        """Keeps the reason of a failure for the message that ends the pool."""
        self._words = words

    def _fail(self) -> None:
        self._failures += 1
        if self._failures >= _FAILURES * max(1, self.settings.zygotes):
            self._break()

    def _break(self) -> None:
        if not self._broken:
            self._broken = (f'sandbox: no isolated worker can be started here, so no code is run: {self._words}; '
                            '`python -m retool_jax.sandbox.doctor` names the remedy')
            self._say({'op': 'broken', 'reason': self._broken})

    def _prove(self, outcome: dict) -> None:
        """Opens the pool where the canary sang, ends it where not."""
        if outcome['verdict'] == Verdict.OK and outcome['stdout'] == self._canary.expected:
            self._proven = True
            self._say({'op': 'ready', 'missing': self.groups.missing, 'groups': self.groups.version,
                       'guest': str(self.guest.root)})
        else:
            self._words = f"the isolation does not hold ({outcome['verdict']}: {outcome['stderr'][-200:]})"
            self._break()

    def _deliver(self, request: Request, outcome: dict) -> None:
        if request.id < 0:
            self._prove(outcome)
            return
        self._requests.pop(request.id, None)
        self._say({'op': 'result', 'id': request.id, 'outcome': outcome, 'counters': self.counters})

    def dispatch(self) -> None:
        """Gives waiting snippets to waiting children, and has new children made."""
        limit = self.settings.concurrency if self._proven else 1
        while self._queue and self._spares and len(self.running) < limit:
            child = self._spares.popleft()
            request = self._queue.popleft()
            self.running[child.number] = child
            child.start(request, self.settings)
        if self._broken:
            return
        if self.settings.path == 'cold':
            room = self.settings.concurrency - len(self.running)
            while self._starting + len(self._spares) < min(len(self._queue), room):
                self._starting += 1
                Cold(self)
            return
        self._refill()

    def _refill(self) -> None:
        """Keeps `spares` children ahead per worker; replaces workers that have served their time."""
        for zygote in list(self._zygotes):
            if zygote.draining:
                if not zygote.children and not zygote.ordered:
                    zygote.die()
                continue
            if not zygote.ready:
                continue
            if zygote.forked >= self.settings.recycle:
                zygote.draining = True
                self.counters['recycled'] += 1
                for child in [c for c in zygote.children.values() if c.request is None]:
                    child.kill(None)
                self._zygotes.append(Zygote(self))
                continue
            idle = sum(c.request is None for c in zygote.children.values()) + len(zygote.ordered)
            for _ in range(self.settings.spares - idle):
                zygote.fork()


def main() -> None:
    """Reads the settings as the first frame, then serves."""
    link = socket.socket(fileno=int(sys.argv[1]))
    size = struct.unpack('!I', link.recv(4, socket.MSG_WAITALL))[0]
    fields = json.loads(link.recv(size, socket.MSG_WAITALL))
    settings = SandboxSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    async def serve() -> None:
        await Supervisor(settings, link).run()

    try:
        asyncio.run(serve())
    except (RuntimeError, ValueError, OSError) as error:
        data = json.dumps({'op': 'broken', 'reason': str(error)}).encode()
        with contextlib.suppress(OSError):
            link.setblocking(True)
            link.sendall(struct.pack('!I', len(data)) + data)
        sys.exit(1)


if __name__ == '__main__':
    main()
