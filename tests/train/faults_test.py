"""A real sandbox that fails, hangs and dies in the middle of a step: training goes on and nothing false is learnt."""

import contextlib
import dataclasses
import os
import signal
import zlib
from concurrent.futures import Future

import pytest

from retool_jax.core import episode_files, metrics
from retool_jax.core.errors import UserError
from retool_jax.core.records import ExecResult, Stop, Verdict
from retool_jax.sandbox.guard import Guard
from retool_jax.sandbox.pool import Pool
from retool_jax.stages import ppo
from tests.sandbox.given import tiny
from tests.train import killable

SMALL = tiny(zygotes=1, spares=2, preload=(), memory_mb=128)
UNSTARTABLE = dataclasses.replace(SMALL, preload=('no_such_module',))


class Faulty:
    """A pool of which a share of calls fails, by a hash of the code; at some calls its supervisor is sent a signal."""

    def __init__(self, pool: Pool, share: float, accidents: dict[int, int]):
        self.pool, self.share, self.accidents, self.calls = pool, share, accidents, 0

    def submit(self, code):
        if zlib.crc32(code.encode('utf-8', 'replace')) % 100 < 100 * self.share:
            future = Future()
            future.set_result(ExecResult(Verdict.SANDBOX_ERROR, '', 'injected'))
            return future
        self.calls += 1
        future = self.pool.submit(code)
        if self.calls in self.accidents:
            os.kill(self.pool._process.pid, self.accidents[self.calls])
        return future

    def close(self):
        self.pool.close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('faults') / 'files'
    killable.make_model(folder)
    return folder


def run(folder, name, share, accidents, **values):
    """Two steps; returns (episodes of the first, metrics, guard)."""
    stage = killable.make_stage(
        folder,
        name,
        **{'ppo.steps': 2, 'ppo.problems_per_step': 12, 'watch.faults': 'warn', 'watch.failures': 'ignore'} | values,
    )
    first = Faulty(Pool(SMALL), share, accidents)
    with first.pool, Guard(first, lambda: Faulty(Pool(SMALL), share, {}), stall_s=4) as guard:
        with killable.tiny_world(folder, name, executor=guard):
            ppo.run(stage)
        return episode_files.read(folder / name / 'episodes', 'train_00000'), metrics.read(folder / name), guard


def same(a, b):
    return a.tokens == b.tokens and a.logprobs == b.logprobs and a.stop == b.stop and a.reward == b.reward


@pytest.mark.slow
def test_faults_are_counted_and_leave_the_other_episodes_as_they_were(folder):
    clean, calm, _ = run(folder, 'clean', 0.0, {})
    assert sum(len(e.calls) for e in clean) > 9 and calm[0]['tools/fault_frequency'] == 0
    episodes, lines, guard = run(folder, 'faulty', 0.3, {2: signal.SIGSTOP})
    assert guard.renewals == 1
    assert [line['step'] for line in lines] == [0, 1] and lines[0]['tools/fault_frequency'] > 0
    lost = [e.stop == Stop.FAULT for e in episodes]
    assert 0 < sum(lost) < len(lost)
    for before, after, fault in zip(clean, episodes, lost):
        if not fault:
            assert same(before, after)
        else:  # it ends where the fault was, and none of the sandbox's words are in it
            assert after.calls[-1].verdict == Verdict.SANDBOX_ERROR and after.calls[-1].feedback == ''
            assert after.tokens == before.tokens[: len(after.tokens)]


@pytest.mark.slow
def test_a_sandbox_that_dies_again_and_again_costs_no_more_than_time(folder):
    clean, _, _ = run(folder, 'clean2', 0.0, {})
    killed, lines, _ = run(folder, 'killed', 0.0, {2: signal.SIGKILL, 4: signal.SIGKILL, 7: signal.SIGKILL})
    assert all(same(a, b) for a, b in zip(clean, killed)) and len(lines) == 2


def test_a_sandbox_that_only_fails_stops_the_run_by_name(folder):
    with pytest.raises(UserError, match=r'step 0: faults: tools/fault_frequency 1.00 exceeds 0.5.*alarms/faults_00000'):
        run(folder, 'hopeless', 1.0, {}, **{'watch.faults': 'stop'})
    assert all(
        e.stop == Stop.FAULT or not e.calls for e in episode_files.read(folder / 'hopeless' / 'alarms', 'faults_00000')
    )


def test_a_pool_that_breaks_and_cannot_be_replaced_rings_with_its_reason(folder):
    stage = killable.make_stage(
        folder,
        'broken',
        **{'ppo.steps': 1, 'ppo.problems_per_step': 12, 'watch.faults': 'stop', 'watch.failures': 'ignore'},
    )
    with Pool(SMALL) as pool, Guard(pool, lambda: Pool(UNSTARTABLE), stall_s=60) as guard:
        assert guard.submit('print(1)').result(60).stdout == '1\n'
        while not pool.ailing():  # its supervisor dies again and again
            with contextlib.suppress(ProcessLookupError):
                os.kill(pool._process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match='step 0: faults'), killable.tiny_world(folder, 'broken', executor=guard):
            ppo.run(stage)
    calls = [c for e in episode_files.read(folder / 'broken' / 'alarms', 'faults_00000') for c in e.calls]
    assert calls and {c.verdict for c in calls} == {Verdict.SANDBOX_ERROR}
