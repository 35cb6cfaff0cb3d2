"""An executor that always answers: what a dead or silent sandbox owes is run again, then counted as a fault."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Protocol

from retool_jax.core.records import ExecResult, Fault, Verdict
from retool_jax.sandbox.pool import PoolFull

_PAUSE_S = 5.0  # between two renewals: a machine that cannot start a sandbox must not be kept busy trying


class Sandbox(Protocol):
    """sandbox.pool.Pool, or a remote client."""

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(eq=False)
class _Call:
    code: str
    answer: concurrent.futures.Future
    tries: int = 0


class Guard:
    """Stands between the engine and a sandbox that may fail in any way; a rollout never hangs or dies by it.

    A call that the sandbox cannot take or breaks with is run once more on a new sandbox, and then answered with
    SANDBOX_ERROR, so that its episode leaves the update. A sandbox that answers nothing for `stall_s` seconds while
    calls wait is given up. The sandbox that it is made with is closed by whoever made it, later ones by `close`.
    """

    def __init__(self, sandbox: Sandbox, renew: Callable[[], Sandbox], stall_s: float):
        self._sandbox, self._renew, self._stall_s = sandbox, renew, stall_s
        self._own: list[Sandbox] = []
        self._waiting: dict[_Call, Sandbox] = {}
        self._lock = threading.RLock()
        self._heard = time.monotonic()
        self._renewed = float('-inf')
        self._closed = threading.Event()
        self.faults = 0  # calls answered with SANDBOX_ERROR by this class
        self.renewals = 0
        self._thread = threading.Thread(target=self._watch, name='sandbox-guard', daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return str(self._sandbox)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]:
        """Queues a snippet; the future never carries an exception."""
        call = _Call(code, concurrent.futures.Future())
        self._try(call)
        return call.answer

    def close(self) -> None:
        """Answers what still waits and closes the sandboxes it has started."""
        self._closed.set()
        with self._lock:
            calls, self._waiting = list(self._waiting), {}
        for call in calls:
            self._fault(call, Fault.POOL, 'the run is over')
        for sandbox in self._own:
            sandbox.close()

    def _try(self, call: _Call) -> None:
        with self._lock:
            sandbox, call.tries = self._sandbox, call.tries + 1
            if not self._waiting:
                self._heard = time.monotonic()
            self._waiting[call] = sandbox
        try:
            future = sandbox.submit(call.code)
        except PoolFull as full:  # alive, only busy
            self._drop(call)
            self._fault(call, Fault.FULL, str(full))
            return
        except Exception as error:
            self._failed(call, sandbox, error)
            return
        future.add_done_callback(lambda done: self._answered(call, sandbox, done))

    def _answered(self, call: _Call, sandbox: Sandbox, done: concurrent.futures.Future) -> None:
        self._heard = time.monotonic()
        error = concurrent.futures.CancelledError() if done.cancelled() else done.exception()
        if error is not None:
            self._failed(call, sandbox, error)
        elif self._drop(call):
            call.answer.set_result(done.result())

    def _failed(self, call: _Call, sandbox: Sandbox, error: BaseException) -> None:
        if not self._drop(call):  # a stalled sandbox was given up meanwhile
            return
        if call.tries < 2 and not self._closed.is_set() and self._replace(sandbox):
            self._try(call)
        else:
            fault = Fault.SILENCE if isinstance(error, TimeoutError) else Fault.POOL
            self._fault(call, fault, f'{type(error).__name__}: {error}')

    def _drop(self, call: _Call) -> bool:
        with self._lock:
            return self._waiting.pop(call, None) is not None

    def _fault(self, call: _Call, fault: Fault, reason: str) -> None:
        self.faults += 1
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            call.answer.set_result(ExecResult(Verdict.SANDBOX_ERROR, '', reason, fault=fault))

    def _replace(self, broken: Sandbox) -> bool:
        """Whether a sandbox other than the broken one is in place now."""
        with self._lock:
            if self._sandbox is not broken:
                return True
            if time.monotonic() - self._renewed < _PAUSE_S:
                return False
            self._renewed, self.renewals = time.monotonic(), self.renewals + 1
            self._sandbox = self._renew()
            self._own.append(self._sandbox)
        threading.Thread(target=broken.close, daemon=True).start()  # it may take seconds to be convinced
        return True

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._stall_s / 4)):
            with self._lock:
                stalled = bool(self._waiting) and time.monotonic() - self._heard > self._stall_s
                silent, calls = self._sandbox, list(self._waiting) if stalled else []
                self._heard = time.monotonic() if stalled else self._heard
            for call in calls:
                self._failed(call, silent, TimeoutError(f'no answer for {self._stall_s:g} s'))
