"""A sandbox that fails, falls silent or dies: every call is answered, faults are counted, the next one works."""

import concurrent.futures
import os
import signal
import time

import pytest

from retool_jax.core.records import ExecResult, Verdict
from retool_jax.sandbox.guard import Guard
from retool_jax.sandbox.pool import Pool, PoolFull
from tests.sandbox.given import tiny

WORKS = lambda code: ExecResult(Verdict.OK, code, '')


class Scripted:
    """A sandbox that does with each call what a function of the code says; None never answers."""

    def __init__(self, act):
        self.act, self.closed, self.codes = act, 0, []

    def submit(self, code):
        self.codes.append(code)
        future = concurrent.futures.Future()
        found = self.act(code)  # or raises
        if isinstance(found, Exception):
            future.set_exception(found)
        elif found is not None:
            future.set_result(found)
        return future

    def close(self):
        self.closed += 1


def refuse(code):
    raise RuntimeError('the pool is closed')


def full(code):
    raise PoolFull('16384 wait')


@pytest.mark.parametrize('broken', [refuse, lambda code: RuntimeError('its supervisor died again and again')])
def test_what_a_broken_sandbox_owes_is_run_on_a_new_one(broken):
    first, second = Scripted(broken), Scripted(WORKS)
    with Guard(first, lambda: second, stall_s=60) as guard:
        assert guard.submit('1').result(5).stdout == '1' and guard.submit('2').result(5).stdout == '2'
        assert guard.faults == 0 and guard.renewals == 1 and second.codes == ['1', '2']
    assert second.closed == 1


def test_a_call_that_fails_twice_is_a_fault_and_a_machine_without_sandbox_is_not_kept_busy():
    made = []

    def renew():
        made.append(Scripted(refuse))
        return made[-1]

    with Guard(Scripted(refuse), renew, stall_s=60) as guard:
        results = [guard.submit('1').result(5) for _ in range(20)]
    assert {r.verdict for r in results} == {Verdict.SANDBOX_ERROR} and 'the pool is closed' in results[0].stderr
    assert guard.faults == 20 and len(made) == 1


def test_a_full_queue_is_a_fault_but_no_reason_for_a_new_sandbox():
    with Guard(Scripted(full), lambda: pytest.fail('renewed'), stall_s=60) as guard:
        assert guard.submit('1').result(5).verdict == Verdict.SANDBOX_ERROR and guard.faults == 1


def test_a_silent_sandbox_is_given_up_and_its_calls_run_elsewhere():
    silent, second = Scripted(lambda code: None), Scripted(WORKS)
    with Guard(silent, lambda: second, stall_s=0.2) as guard:
        futures = [guard.submit(str(i)) for i in range(3)]
        assert [f.result(10).stdout for f in futures] == ['0', '1', '2']
        assert guard.renewals == 1 and guard.faults == 0
        deadline = time.monotonic() + 5
        while not silent.closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert silent.closed == 1


def test_a_slow_sandbox_that_goes_on_answering_is_kept():
    held = []
    slow = Scripted(lambda code: None)
    slow.submit = lambda code: held.append(concurrent.futures.Future()) or held[-1]
    with Guard(slow, lambda: pytest.fail('renewed'), stall_s=0.4) as guard:
        futures = [guard.submit(str(i)) for i in range(5)]
        for future in held:
            time.sleep(0.2)
            future.set_result(WORKS('x'))
        assert [f.result(5).stdout for f in futures] == ['x'] * 5 and guard.renewals == 0


def test_the_end_of_a_run_answers_what_still_waits():
    with Guard(Scripted(lambda code: None), lambda: None, stall_s=60) as guard:
        future = guard.submit('1')
    assert future.result(1).verdict == Verdict.SANDBOX_ERROR


SMALL = tiny(zygotes=1, spares=1, concurrency=2, preload=(), memory_mb=128)


def test_a_real_pool_that_is_stopped_or_killed_is_replaced_and_no_answer_is_lost():
    with Pool(SMALL) as pool, Guard(pool, lambda: Pool(SMALL), stall_s=5) as guard:
        assert guard.submit('print(1)').result(60).stdout == '1\n'
        os.kill(pool._process.pid, signal.SIGSTOP)  # hangs
        waiting = [guard.submit(f'print({i})') for i in range(4)]
        assert [f.result(120).stdout for f in waiting] == [f'{i}\n' for i in range(4)]
        assert guard.renewals == 1 and guard.faults == 0
        second = guard._sandbox
        waiting = [guard.submit(f'import time; time.sleep(0.2); print({i})') for i in range(4)]
        os.kill(second._process.pid, signal.SIGKILL)  # dies
        assert [f.result(120).stdout for f in waiting] == [f'{i}\n' for i in range(4)]
        os.kill(pool._process.pid, signal.SIGCONT)
