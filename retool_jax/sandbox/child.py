"""One sealed process as the supervisor sees it: limits before code, pipes drained while waiting, the verdict.

Verdicts come from the wait status, the control group's counters and the supervisor's own acts;
never from bytes that the guest wrote.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import errno
import functools
import os
import re
import signal
import socket
import stat
import struct
import time
import traceback
from collections.abc import Callable

from retool_jax.core.records import Fault, Verdict
from retool_jax.sandbox.cgroups import SCARCE, Lease, expose
from retool_jax.sandbox.inside import protocol
from retool_jax.sandbox.settings import SandboxSettings

_PAGE = os.sysconf('SC_PAGE_SIZE')
_TICK = os.sysconf('SC_CLK_TCK')
_CORES = os.cpu_count() or 1  # a snippet may leave the supervisor's affinity
# Address space where a group counts the real pages: enough for stacks and reservations, too little
# for an array that could never be filled.
_ADDRESS_FACTOR, _ADDRESS_EXTRA = 8, 1 << 30
_PATIENCE_S = 60.0  # for a child to seal itself
_GRACE_S = 5.0  # after a kill, before the supervisor stops waiting for the kernel's word
# Lines of a traceback, or of the interpreter's own dump of all frames, that are ours: the runner's, and beside them
# the command line's.
_LINE = rb'  File "%s", line %s,? in [^\n]*\n(?:    [^\n]*\n)*'
_COMMAND, _RUNNER = _LINE % (b'<string>', b'1'), _LINE % (rb'/runner/[^"\n]*', rb'\d+')
_OUR_FRAMES = re.compile(b'(?:%s)?(?:%s)+(?:%s)?' % (_COMMAND, _RUNNER, _COMMAND))
FETCH_BYTES = 16 << 20  # of all the files that one request fetches


@dataclasses.dataclass(slots=True)
class Request:
    """One snippet on its way; `fields` are what the pool sent."""

    id: int
    fields: dict
    payload: bytes  # code, standard input and files, one after another
    attempts: int = 0
    cancelled: bool = False
    child: Child | None = None  # that runs it


class Lost(Exception):
    """A worker failed before or during a snippet through no fault of the snippet.

    `unsealed` says that the child itself gave up while sealing: isolation cannot be had. `short` says that this
    process has no descriptors left.
    """

    def __init__(self, words: str, fault: Fault = Fault.WORKER, unsealed: bool = False, short: bool = False):
        super().__init__(words)
        self.fault, self.unsealed, self.short = fault, unsealed, short


def _costs_its_request(callback: Callable) -> Callable:
    """An exception within a callback ends its child at once, with the reason; loop and neighbours go on."""

    @functools.wraps(callback)
    def guarded(child: Child, *arguments) -> None:
        try:
            callback(child, *arguments)
        except Exception as error:
            traceback.print_exc()
            child.fail(f'{type(error).__name__}: {error}')

    return guarded


class Child:
    """One sealed process: waits, runs one snippet, is gone.

    `report(child, outcome)` is called once, with a dictionary, or with `Lost`.
    """

    def __init__(
        self,
        number: int,
        pidfd: int,
        control: socket.socket,
        out: int,
        err: int,
        lease: Lease,
        ready: Callable,
        report: Callable,
        output_bytes: int,
    ):
        self.number, self.lease = number, lease
        self.request: Request | None = None
        self.sealed = False
        self._killed = self._short = False
        self._pidfd, self._control = pidfd, control
        self._ready, self._report = ready, report
        self._pipes = {out: bytearray(), err: bytearray()}
        self._out, self._err = out, err
        self._limit = output_bytes
        self._pid = 0
        self._box = -1
        self._status: int | None = None
        self._usage_cpu_s = 0.0
        self._cause: Verdict | None = None
        self._cut = False
        self._over = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(_PATIENCE_S, self.kill, None)
        control.setblocking(False)
        self._loop.add_reader(control.fileno(), self._on_ready)

    @_costs_its_request
    def _on_ready(self) -> None:
        """The child is sealed: learns its pid on this host and puts it under its limits."""
        self._loop.remove_reader(self._control.fileno())
        try:
            message, ancillary, flags, _ = self._control.recvmsg(
                len(protocol.SEALED), socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
            for _, kind, data in ancillary:
                if kind == socket.SCM_RIGHTS:
                    self._box = struct.unpack('i', data[:4])[0]
                elif kind == socket.SCM_CREDENTIALS:
                    self._pid = struct.unpack('3i', data[:12])[0]
            if message != protocol.SEALED or not self._pid or self._killed:
                return  # ended before it was ready: its exit is reported by whoever waits for it
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, 'no room for the descriptor of its scratch')
            self.lease.place(self._pid)
            expose(self._pid)
        except OSError as error:
            self._short = error.errno in SCARCE
            self.kill(None)
            return
        self._timer.cancel()
        self.sealed = True
        self._ready(self)

    def track(self) -> None:
        """Kills the process in the jail itself from now on (cold path: until now, nsjail)."""
        descriptor = os.pidfd_open(self._pid)
        os.close(self._pidfd)
        self._pidfd = descriptor

    @_costs_its_request
    def start(self, request: Request, settings: SandboxSettings) -> None:
        """Sets the limits, then hands over the code; time is counted from here."""
        self.request, request.child = request, self
        fields = request.fields
        self._cpu_s = fields.get('cpu_s') or settings.cpu_s
        self._wall_s = fields.get('wall_s') or settings.wall_s
        memory_bytes = int((fields.get('memory_mb') or settings.memory_mb) * 2**20)
        try:
            self.lease.arm(memory_bytes, settings.processes)
            with open(f'/proc/{self._pid}/statm') as file:
                size = int(file.read().split()[0]) * _PAGE
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in SCARCE:  # at once: the next child takes what it leaves
                self._close(Lost('no descriptor is left', Fault.LIMITS, short=True))
            else:
                self.kill(None)
            return
        self._start_cpu_s = self._process_cpu_s()
        counted = 'memory' in self.lease.enforced
        address_bytes = size + memory_bytes * (_ADDRESS_FACTOR if counted else 1) + (_ADDRESS_EXTRA if counted else 0)
        header = protocol.header(
            code=fields['code'],
            stdin=fields['stdin'],
            files=fields['files'],
            seed=fields['seed'],
            echo=settings.echo,
            cpu_s=self._cpu_s,
            address_bytes=-(-address_bytes >> 24) << 24,
        )
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
            self._loop.add_reader(descriptor, self._on_output, descriptor)
        self._unsent = [memoryview(header), memoryview(request.payload)]
        self._start = time.monotonic()
        self._send()
        self._arm_timer(0.0)

    @_costs_its_request
    def _send(self) -> None:
        descriptor = self._control.fileno()
        try:
            while self._unsent:
                self._unsent[0] = self._unsent[0][self._control.send(self._unsent[0]) :]
                if not self._unsent[0]:
                    del self._unsent[0]
        except BlockingIOError:
            self._loop.add_writer(descriptor, self._send)
            return
        except OSError:
            self._unsent.clear()
        self._loop.remove_writer(descriptor)
        self._control.shutdown(socket.SHUT_WR) if self._status is None else None

    @_costs_its_request
    def _on_output(self, descriptor: int) -> None:
        if not self._take_output(descriptor):
            self._loop.remove_reader(descriptor)

    def _take_output(self, descriptor: int) -> bool:
        """Takes some of what is in a pipe; False where nothing more is wanted, or there."""
        kept = self._pipes[descriptor]
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        room = self._limit - len(kept)
        kept += data[:room]
        if len(data) > room:
            self._cut = True
            self.kill(Verdict.OUTPUT_LIMIT)
            return False
        return bool(data)

    def _process_cpu_s(self) -> float:
        try:
            with open(f'/proc/{self._pid}/stat') as file:
                fields = file.read().rpartition(')')[2].split()
            return sum(map(int, fields[11:15])) / _TICK
        except (OSError, IndexError):
            return 0.0

    def _used_cpu_s(self) -> float:
        if 'cpu' in self.lease.enforced:
            return self.lease.cpu_s()
        return max(self._usage_cpu_s, self._process_cpu_s()) - self._start_cpu_s

    def _arm_timer(self, cpu_s: float) -> None:
        """Looks again when the CPU budget could be spent at the earliest, or when the wall limit is reached."""
        wall_left = self._wall_s - (time.monotonic() - self._start)
        self._timer = self._loop.call_later(min(wall_left, max(0.02, (self._cpu_s - cpu_s) / _CORES)), self._on_timer)

    @_costs_its_request
    def _on_timer(self) -> None:
        cpu_s = self._used_cpu_s()
        if cpu_s >= self._cpu_s or time.monotonic() - self._start >= self._wall_s:
            self.kill(Verdict.TIMEOUT)
        else:
            self._arm_timer(cpu_s)

    def kill(self, cause: Verdict | None) -> None:
        """Kills the snippet with all its processes; `cause` becomes the verdict (None: a fault of ours)."""
        self._cause = self._cause or cause
        if self._status is not None or self._over:
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(_GRACE_S, self.lose)

    def fail(self, reason: str) -> None:
        """Ends a child that we cannot carry on with; its snippet is not run again: it would fail again."""
        if self.request is None:
            self._close(Lost(reason))
        else:
            self._close(fault_outcome(Fault.HANDLING, reason))

    @_costs_its_request
    def on_exit(self, status: int, cpu_s: float = 0.0) -> None:
        """The wait status has come, from the parent of the process (not from the process)."""
        self._status, self._usage_cpu_s = status, cpu_s
        if self.request is None:
            unsealed = not self.sealed and not self._killed
            self._close(Lost(f'ended before its snippet ({self._last_words()})', unsealed=unsealed, short=self._short))
        else:
            self._settle()

    @_costs_its_request
    def lose(self) -> None:
        """The worker is gone and its wait status with it."""
        if self._over:
            return
        if self.request is not None and self._cause is not None:
            self._status = signal.SIGKILL
            self._settle()
        else:
            self._close(Lost('its worker was lost'))

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            os.set_blocking(self._err, False)
            return os.read(self._err, 4096).decode(errors='replace')
        return ''

    def _settle(self) -> None:
        """The verdict. All its processes are dead, whatever still holds its pipes (a cycle of sockets may)."""
        if self._over:
            return
        if self._killed and self._cause is None:
            self._close(Lost('its limits could not be set', Fault.LIMITS))
            return
        for descriptor in self._pipes:
            while self._take_output(descriptor):
                pass
        wall_s = time.monotonic() - self._start
        status, cpu_s = self._status, max(0.0, self._used_cpu_s())
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        exit_code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        if self._cause is Verdict.OUTPUT_LIMIT:
            verdict = self._cause
        elif self.lease.oom_kills() > 0:
            verdict = Verdict.OOM
        elif self._cause is not None:
            verdict = self._cause
        elif exit_code is not None:
            verdict = Verdict.OK if exit_code == 0 else Verdict.ERROR
        elif number in (signal.SIGKILL, signal.SIGXCPU) and cpu_s >= self._cpu_s:
            verdict = Verdict.TIMEOUT  # the backstop
        else:
            # SIGKILL too: a process cannot kill its namespace's first one, but that one can lower its own limits, or
            # have a timer do it. Somebody on the host who kills snippets one by one gets this verdict, and no more.
            verdict = Verdict.SIGNAL
        if verdict in (Verdict.OUTPUT_LIMIT, Verdict.OOM, Verdict.TIMEOUT):
            exit_code = number = None  # whether the kill or the end came first is chance
        fetched = {} if self._cause else self._fetch(self.request.fields['fetch'])
        self._close(
            {
                'verdict': verdict,
                'exit_code': exit_code,
                'signal': number,
                'cpu_s': cpu_s,
                'wall_s': wall_s,
                'peak_mb': self.lease.peak_mb(),
                'truncated': self._cut,
                'files': fetched,
                'stdout': self._pipes[self._out].decode('utf-8', 'replace'),
                'stderr': _without_our_frames(bytes(self._pipes[self._err])).decode('utf-8', 'replace'),
            }
        )

    def _fetch(self, paths: list[str]) -> dict[str, str]:
        """Regular files below /box, base64; links are not followed, so nothing else can be reached."""
        fetched, room = {}, FETCH_BYTES
        for path in paths:
            parts = [p for p in os.path.normpath(os.path.join('/box', path)).split('/') if p]
            opened: list[int] = []
            with contextlib.suppress(OSError, ValueError):  # ValueError: names that no file can have
                try:
                    if parts[:1] != ['box'] or len(parts) < 2 or '\0' in path:
                        continue
                    at = self._box
                    for part in parts[1:-1]:
                        at = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                        opened.append(at)
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    opened.append(os.open(parts[-1], flags, dir_fd=at))
                    facts = os.fstat(opened[-1])
                    if stat.S_ISREG(facts.st_mode) and facts.st_size <= room:
                        content = os.read(opened[-1], facts.st_size)
                        room -= len(content)
                        fetched[path] = base64.b64encode(content).decode()
                finally:
                    for descriptor in opened:
                        os.close(descriptor)
        return fetched

    def _close(self, outcome: dict | Lost) -> None:
        if self._over:
            return
        self._over = True
        if self._timer:
            self._timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._loop.remove_reader(self._control.fileno())
        self._loop.remove_writer(self._control.fileno())
        self._control.close()
        for descriptor in self._pipes:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        for descriptor in (self._pidfd, self._box):
            if descriptor >= 0:
                os.close(descriptor)
        self._report(self, outcome)


def fault_outcome(fault: Fault, words: str) -> dict:
    """What is reported of a snippet that we could not run."""
    return {'verdict': Verdict.SANDBOX_ERROR, 'stdout': '', 'stderr': words, 'fault': fault}


def _without_our_frames(text: bytes) -> bytes:
    return _OUR_FRAMES.sub(b'', text) if b'"/runner/' in text else text
