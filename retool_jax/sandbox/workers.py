"""Where children come from: a warm worker, whose zygote forks them, or a cold one, a jail for a single child.

A worker reports what happens to its children and to itself; what is done about it is the supervisor's affair. The
death of a warm worker, of its own or by somebody's hand, loses the snippets that ran there.
"""

from __future__ import annotations

import array
import asyncio
import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

from retool_jax.sandbox import jail
from retool_jax.sandbox.cgroups import Groups
from retool_jax.sandbox.child import Child, Lost
from retool_jax.sandbox.guest import Guest
from retool_jax.sandbox.inside import protocol
from retool_jax.sandbox.settings import SandboxSettings

_PATIENCE_S = 60.0  # for a worker to import its packages, or to fork
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What all workers of one supervisor draw on."""

    settings: SandboxSettings
    nsjail: str  # path of the binary
    guest: Guest
    groups: Groups
    uids: collections.deque[int]  # users that no child has; a worker gives back what it took
    numbers: Iterator[int]  # of children, none of them twice
    jails: set[int] = dataclasses.field(default_factory=set)  # pids of nsjail, each reaped by its own worker


@dataclasses.dataclass(frozen=True)
class Reports:
    """Whom a worker tells."""

    worker_ready: Callable[[], None]
    child_ready: Callable[[Child], None]
    child_end: Callable[[Child, dict | Lost], None]
    worker_dead: Callable[[Warm, str], None]  # with nsjail's last words
    refused: Callable[[OSError | None], None]  # a child could not be taken in; None: no descriptor was left for it
    not_isolated: Callable[[str], None]  # why a child could not be sealed


class Jail:
    """A running nsjail: its process, and the last lines of its log."""

    def __init__(self, argv: list[str], descriptors: list[int], log: int | None = None):
        read, write = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, read)
            try:
                self.process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=write,
                    stderr=write,
                    pass_fds=descriptors,
                    preexec_fn=_die_with_parent,
                    start_new_session=True,
                )
            finally:
                os.close(write)
            stack.callback(self.process.wait)
            stack.callback(self.process.kill)
            self.pidfd = os.pidfd_open(self.process.pid)
            stack.pop_all()
        os.set_blocking(read, False)
        self._log, self._read = bytearray(), read
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(read, self._drain)

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


class Warm:
    """The host's end of a zygote, and of the children that it has forked."""

    def __init__(self, resources: Resources, reports: Reports):
        self._resources, self._reports = resources, reports
        self.ready = self.dead = self.draining = False
        self.children: dict[int, Child] = {}
        self.ordered: dict[int, int] = {}  # number → uid, forks asked for and not yet announced
        self.uids: dict[int, int] = {}
        self.pids: dict[int, int] = {}  # pid in the jail → number
        self.forked = 0
        self.successor: Warm | None = None  # starts before this one stops
        self._heard = time.monotonic()
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = resources.settings
        words = json.dumps(
            {
                'preload': list(settings.preload),
                'scratch_mb': settings.scratch_mb,
                'files': settings.files,
                'scratch_inodes': settings.scratch_inodes,
                'processes': settings.processes,
                'single_uid': jail.single_uid(),
            }
        )
        config = jail.warm(resources.guest, theirs.fileno(), words)
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(self.link.close)
            argv, descriptor = jail.command(resources.nsjail, config)
            stack.callback(os.close, descriptor)
            self.jail = Jail(argv, [theirs.fileno(), descriptor])
            stack.pop_all()
            os.close(descriptor)
        resources.jails.add(self.jail.process.pid)
        with contextlib.suppress(OSError):
            resources.groups.adopt(self.jail.process.pid, 'zygotes')
        self.link.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.link.fileno(), self._on_message)
        self._loop.add_reader(self.jail.pidfd, self.die)

    def fork(self) -> None:
        """Orders one more child."""
        number = next(self._resources.numbers)
        uid = self._resources.uids.popleft()
        try:
            self.link.send(protocol.DOWN.pack(number, uid))
        except OSError:
            self._resources.uids.append(uid)
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
                data, ancillary, flags, _ = self.link.recvmsg(
                    protocol.UP.size, socket.CMSG_SPACE(4 * protocol.CHILD_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data = b''
            if not data:
                self.die()
                return
            self._heard = time.monotonic()
            kind, number, pid, status, cpu_s = protocol.UP.unpack(data)
            if kind == protocol.READY:
                self.ready = True
                self._reports.worker_ready()
            elif kind == protocol.CHILD:
                descriptors = array.array('i')
                for level, type_, raw in ancillary:
                    if (level, type_) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        descriptors.frombytes(raw)
                if flags & socket.MSG_CTRUNC:
                    self._refuse(number, descriptors)
                else:
                    self._adopt(number, pid, descriptors)
            elif child := self.children.pop(self.pids.pop(pid, -1), None):
                child.on_exit(status, cpu_s)

    def _adopt(self, number: int, pid: int, descriptors: array.array) -> None:
        try:
            lease = self._resources.groups.take()
        except OSError as error:
            self._refuse(number, descriptors, error)
            return
        pidfd, control, out, err = descriptors
        self.pids[pid] = number
        self.uids[number] = self.ordered.pop(number)
        self.children[number] = Child(
            number,
            pidfd,
            socket.socket(fileno=control),
            out,
            err,
            lease,
            self._reports.child_ready,
            self._on_child_end,
            self._resources.settings.output_bytes,
        )

    def _refuse(self, number: int, descriptors: array.array, error: OSError | None = None) -> None:
        """A child that cannot be taken in: it ends by itself when its channel is closed."""
        for descriptor in descriptors:
            os.close(descriptor)
        self._resources.uids.append(self.ordered.pop(number))
        self._reports.refused(error)

    def _on_child_end(self, child: Child, outcome: dict | Lost) -> None:
        self.children.pop(child.number, None)
        self._resources.uids.append(self.uids.pop(child.number))
        self._reports.child_end(child, outcome)

    def die(self) -> None:
        """The worker is gone (or is told to go): its children report that they are lost, then it reports itself."""
        if self.dead:
            return
        self.dead = True
        self._loop.remove_reader(self.link.fileno())
        self._loop.remove_reader(self.jail.pidfd)
        words = self.jail.last_words()
        self.link.close()
        self.jail.close()  # returns when nsjail is reaped; the kernel has then killed all in its namespace
        self._resources.jails.discard(self.jail.process.pid)
        # Those that wait are lost first: else the snippet of one that runs would be given to the next of them, which is
        # as dead, and so on until it has no try left.
        for child in sorted(self.children.values(), key=lambda child: child.request is not None):
            child.lose()
        self._resources.uids.extend(self.ordered.values())
        self._reports.worker_dead(self, words)


class Cold:
    """One jail for one snippet, each limit by nsjail itself."""

    def __init__(self, resources: Resources, reports: Reports):
        self._resources, self._reports = resources, reports
        control, theirs = socket.socketpair()
        control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        out, out_write = os.pipe()
        err, err_write = os.pipe()
        log, log_write = os.pipe()
        os.set_blocking(log, False)
        config = jail.cold(resources.guest, (theirs.fileno(), out_write, err_write), log_write, resources.settings)
        argv, descriptor = jail.command(resources.nsjail, config)
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log_write,
            stderr=log_write,
            preexec_fn=_die_with_parent,
            pass_fds=[theirs.fileno(), out_write, err_write, descriptor, log_write],
            start_new_session=True,
        )
        for unneeded in (descriptor, out_write, err_write, log_write):
            os.close(unneeded)
        theirs.close()
        self._log = log
        with contextlib.suppress(OSError):
            resources.groups.adopt(self.process.pid, 'cold')
        resources.jails.add(self.process.pid)
        self._pidfd = os.pidfd_open(self.process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._on_exit)
        self.child = Child(
            next(resources.numbers),
            os.dup(self._pidfd),
            control,
            out,
            err,
            resources.groups.take(),
            self._on_ready,
            self._on_end,
            resources.settings.output_bytes,
        )

    def _on_ready(self, child: Child) -> None:
        try:
            child.track()
        except OSError:
            return  # gone already: the exit is on its way
        self._reports.child_ready(child)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.process.wait()
        self._resources.jails.discard(self.process.pid)
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
            self._reports.not_isolated(' | '.join(lines[-3:]) or 'nsjail said nothing')
            self.child.lose()

    def _on_end(self, child: Child, outcome: dict | Lost) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self._reports.child_end(child, outcome)
