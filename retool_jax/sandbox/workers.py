"""Where children come from: a zygote that forks them, or a jail for each (the cold path).

Each tells the supervisor of its children's readiness and end; a zygote's death, of its own or by
somebody's hand, loses what ran there, and the supervisor runs it elsewhere.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING

from retool_jax.sandbox import jail
from retool_jax.sandbox.child import Child, Lost

if TYPE_CHECKING:
    from retool_jax.sandbox.supervisor import Supervisor

_PATIENCE_S = 60.0  # for a worker to import its packages, or to fork
# What zygote.py speaks; it is imported only inside the jail.
_READY, _CHILD = 0, 1
_UP, _DOWN = struct.Struct('=iiiid'), struct.Struct('=ii')
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Jail:
    """A running nsjail: its process, and the last lines of its log."""

    def __init__(self, argv: list[str], descriptors: list[int], log: int | None = None):
        read, write = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, read)
            try:
                self.process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=write, stderr=write, pass_fds=descriptors,
                    preexec_fn=_die_with_parent, start_new_session=True)
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
        self.successor: Zygote | None = None  # starts before this one stops
        self._heard = time.monotonic()
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = supervisor.settings
        words = json.dumps({
            'preload': list(settings.preload), 'scratch_mb': settings.scratch_mb, 'files': settings.files,
            'scratch_inodes': settings.scratch_inodes, 'processes': settings.processes,
            'single_uid': jail.single_uid()})
        config = jail.zygote(supervisor.guest, theirs.fileno(), words)
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(self.link.close)
            argv, descriptor = jail.command(supervisor.nsjail, config)
            stack.callback(os.close, descriptor)
            self.jail = Jail(argv, [theirs.fileno(), descriptor])
            stack.pop_all()
            os.close(descriptor)
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
                data, ancillary, flags, _ = self.link.recvmsg(4096, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
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
                if flags & socket.MSG_CTRUNC:
                    self._refuse(number, descriptors)
                else:
                    self._adopt(number, pid, descriptors)
            elif child := self.children.pop(self.pids.pop(pid, -1), None):
                child.on_exit(status, cpu_s)

    def _adopt(self, number: int, pid: int, descriptors: array.array) -> None:
        try:
            slot = self.supervisor.groups.take()
        except OSError as error:
            self._refuse(number, descriptors, error)
            return
        pidfd, control, out, err = descriptors
        self.pids[pid] = number
        self.uids[number] = self.ordered.pop(number)
        self.children[number] = Child(
            number, pidfd, socket.socket(fileno=control), out, err, slot,
            self.supervisor.on_child_ready, self._on_child_end, self.supervisor.settings.output_bytes)

    def _refuse(self, number: int, descriptors: array.array, error: OSError | None = None) -> None:
        """A child that cannot be taken in: it ends by itself when its channel is closed."""
        for descriptor in descriptors:
            os.close(descriptor)
        self.supervisor.uids.append(self.ordered.pop(number))
        self.supervisor.run_short(error)

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
