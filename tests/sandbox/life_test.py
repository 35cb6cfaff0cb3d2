"""The life of a pool: deaths are forgiven while there is work done between them, a broken pool says so."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox import pool as pool_lib
from retool_jax.sandbox.cgroups import start_time
from retool_jax.sandbox.frames import pack
from retool_jax.sandbox.job import Job
from retool_jax.sandbox.pool import Pool, PoolFull, run_all
from tests.sandbox.conftest import children_of
from tests.sandbox.given import LIMITS, tiny

SMALL = dict(zygotes=1, spares=1, concurrency=1, preload=(), **LIMITS)


def kill(pool: Pool) -> None:
    """The supervisor dies as by the kernel's hand."""
    process = pool._process
    os.kill(process.pid, signal.SIGKILL)
    while pool._process is process and not pool.ailing():
        time.sleep(0.01)


def test_any_number_of_deaths_is_survived_with_work_done_between_them():
    with Pool(tiny(**SMALL)) as pool:
        for i in range(6):
            kill(pool)
            assert pool.submit(f'print({i})').result(60).stdout == f'{i}\n'
        assert pool.ailing() == ''


def test_deaths_in_a_row_break_the_pool_and_it_says_so_to_all():
    with Pool(tiny(**SMALL)) as pool:
        futures = [pool.submit('import time\ntime.sleep(3)') for _ in range(3)]
        struck = None
        while not pool.ailing():
            if pool._process is not struck:
                struck = pool._process
                os.kill(struck.pid, signal.SIGKILL)
            time.sleep(0.01)
        for future in futures:
            with pytest.raises(RuntimeError, match=r'supervisor died 4 times in a row \(status -9\)'):
                future.result(10)
        with pytest.raises(RuntimeError, match='died 4 times'):
            pool.submit('print(1)')
        assert 'died 4 times' in pool.ailing() and pool.stats()['waiting'] == 0


def test_a_snippet_that_was_there_at_every_death_is_answered_and_the_others_run():
    with Pool(tiny(**SMALL | {'retries': 1, 'concurrency': 2, 'wall_s': 60.0})) as pool:
        there = pool.submit('import time\ntime.sleep(50)')
        for i in range(2):
            assert pool.submit(f'print({i})').result(60).stdout == f'{i}\n'
            kill(pool)
        assert there.result(30).verdict is Verdict.SANDBOX_ERROR
        assert pool.submit('print(2)').result(60).stdout == '2\n'


def test_a_supervisor_that_says_nothing_ails_and_is_replaced(monkeypatch):
    monkeypatch.setattr(pool_lib, '_SILENT_S', 2.0)
    monkeypatch.setattr(pool_lib, '_DEAF_S', 4.0)
    with Pool(tiny(**SMALL)) as pool:
        time.sleep(2.5)
        assert pool.ailing() == ''  # it speaks without being asked
        os.kill(pool._process.pid, signal.SIGSTOP)
        future = pool.submit('print(1)')
        deadline = time.monotonic() + 10
        while 'silent' not in pool.ailing():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert future.result(60).stdout == '1\n' and pool.ailing() == ''


def test_a_request_that_our_code_stumbles_over_costs_itself_alone(monkeypatch):
    frame = Job.frame
    with Pool(tiny(**SMALL | {'concurrency': 2})) as pool:
        beside = pool.submit('import time\ntime.sleep(2)\nprint("beside")')
        monkeypatch.setattr(Job, 'frame', lambda self, id_, settings: (
            pack({'op': 'run', 'id': id_, 'seed': 0, 'fetch': [], 'code': 0, 'stdin': 0, 'files': [], 'cpu_s': 'x'})
            if self.code == 'stumble' else frame(self, id_, settings)))  # fmt: skip
        result = pool.submit('stumble').result(60)
        assert result.verdict is Verdict.SANDBOX_ERROR and 'TypeError' in result.stderr
        assert not beside.done() and pool.stats()['retried'] == 0
        assert pool.submit('print(1)').result(60).stdout == '1\n'
        assert beside.result(60).stdout == 'beside\n' and pool.stats()['respawned'] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason='limits of another process')
def test_a_worker_that_cannot_be_started_at_the_moment_is_started_later():
    with Pool(tiny(**SMALL | {'zygotes': 4})) as pool:  # so many are tried twelve times, once a second
        assert pool.submit('print(1)').result(60).stdout == '1\n'
        supervisor = pool._process.pid
        limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        few = 8  # numbers that are in use for good
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (few, limits[1]))
        with open(f'/proc/{supervisor}/task/{supervisor}/children') as children:
            [os.kill(int(pid), signal.SIGKILL) for pid in children.read().split()]
        future = pool.submit('print(2)')
        time.sleep(1.5)
        assert not future.done() and pool.ailing() == ''
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
        assert future.result(30).stdout == '2\n' and pool._process.pid == supervisor


def test_what_waits_is_bounded_by_its_bytes_and_held_once():
    with Pool(tiny(**SMALL | {'queue_mb': 100, 'wall_s': 30.0})) as pool:
        for _ in range(4):
            pool.submit('print(1)').result(60)
        before = sum(map(_resident_mb, (os.getpid(), *children_of(os.getpid()))))
        first = pool.submit('import time\ntime.sleep(4)')
        code = 'print(2)\n#' + 'x' * (8 << 20)
        futures = [pool.submit(code) for _ in range(12)]
        with pytest.raises(PoolFull, match=r'sandbox\.queue_mb'):
            pool.submit(code)
        time.sleep(1.0)
        grown = sum(map(_resident_mb, (os.getpid(), *children_of(os.getpid())))) - before
        assert grown < 200, f'{grown} MB for 96 MB, of which the supervisor has four'
        futures[0].cancel()
        futures.append(pool.submit(code))  # its bytes are free again
        assert first.result(60).verdict is Verdict.OK
        assert [f.result(60).stdout for f in futures[1:]] == ['2\n'] * 12
        assert pool._bytes == pool._sent == 0


def _resident_mb(pid: int) -> float:
    with open(f'/proc/{pid}/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def test_a_job_larger_than_the_queue_runs_on_an_idle_pool():
    with Pool(tiny(**SMALL | {'queue_mb': 1})) as pool:
        assert pool.submit('print(1)\n#' + 'x' * (2 << 20)).result(60).stdout == '1\n'


def test_cancelling_at_any_time_frees_the_window():
    with Pool(tiny(**SMALL)) as pool:
        hurry = lambda: [pool.submit('print(1)').cancel() for _ in range(50)]
        threads = [threading.Thread(target=hurry) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert pool.submit('print(2)').result(60).stdout == '2\n'
        assert pool._sent == pool._bytes == pool.stats()['waiting'] == 0


def _workers(pool: Pool) -> list[int]:
    """Pids of nsjail and of the zygotes below it; a snippet that is killed itself is told so, not run again."""
    with open(f'/proc/{pool._process.pid}/task/{pool._process.pid}/children') as file:
        jails = [int(pid) for pid in file.read().split()]
    zygotes = []
    for pid in jails:
        with contextlib.suppress(OSError), open(f'/proc/{pid}/task/{pid}/children') as file:
            zygotes += [int(pid) for pid in file.read().split()]
    return jails + zygotes


def _survives_kills(count: int, seed: int) -> None:
    rng = random.Random(seed)
    most_s = 0.01 * os.cpu_count()  # of sleep: many cores take no less time than two, or the kills come too late
    with Pool(tiny(zygotes=2, retries=50, **LIMITS)) as pool:
        futures = [
            pool.submit(f'import time\ntime.sleep({rng.random() * most_s})\nprint({i} ** 2)') for i in range(count)
        ]
        struck_at = 0  # snippets done when the last worker was killed
        while (done := sum(f.done() for f in futures)) < count:
            # Only a pool that answers again is struck again: one that is killed faster than it starts gives up.
            if done > struck_at and (workers := _workers(pool)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    struck_at = done
            time.sleep(0.05 + rng.random() * 0.5 * (struck_at == done))
        assert [f.result().stdout for f in futures] == [f'{i**2}\n' for i in range(count)]
        stats = pool.stats()
        assert stats['respawned'] > 0 and stats['verdicts'] == {'ok': count}


def test_killed_workers_lose_no_snippet():
    _survives_kills(150, seed=0)


@pytest.mark.slow
def test_killed_workers_lose_none_of_2000_snippets():
    _survives_kills(2000, seed=1)


def test_a_killed_supervisor_is_replaced():
    with Pool(tiny(zygotes=1, **LIMITS)) as pool:
        first = pool._process.pid
        futures = [pool.submit(f'import time\ntime.sleep(0.3)\nprint({i})') for i in range(20)]
        time.sleep(0.2)  # before the first can have ended, however many run at once
        os.kill(first, signal.SIGKILL)
        assert [f.result(120).stdout for f in futures] == [f'{i}\n' for i in range(20)]
        assert pool._process.pid != first
        assert not _alive_groups(first)


def _alive_groups(pid: int) -> list[Path]:
    """Control groups of a supervisor that still exist."""
    return [p for p in Path('/sys/fs/cgroup').glob(f'**/retool_jax_{pid}_*')]


TRAINER = """
import os, sys, time
from retool_jax.sandbox.pool import Pool
from tests.sandbox.given import tiny
pool = Pool(tiny()).start()
futures = [pool.submit('import os\\nos.fork()\\nwhile True: pass') for _ in range(4)]
time.sleep(1)
print(pool._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize('number', [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_nothing_survives_a_killed_trainer(number):
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen(
        [sys.executable, '-c', TRAINER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, 'PYTHONPATH': root},
    )
    with trainer, trainer.stdout:
        supervisor = int(trainer.stdout.readline())
        below = {pid: start_time(pid) for pid in [supervisor, *children_of(supervisor)]}
        assert len(below) > 6
        trainer.send_signal(number)
        trainer.wait(30)
    deadline = time.monotonic() + 30
    while alive := [pid for pid, born in below.items() if born and start_time(pid) == born]:
        assert time.monotonic() < deadline, f'{len(alive)} processes survive'
        time.sleep(0.05)
    while groups := _alive_groups(supervisor):
        assert time.monotonic() < deadline, groups
        time.sleep(0.05)


@pytest.mark.slow
def test_a_single_zygote_may_be_recycled_or_killed_again_and_again():
    with Pool(tiny(zygotes=1, spares=4, recycle=6, **LIMITS)) as pool:
        for _ in range(3):
            recycled = pool.stats().get('recycled', 0)
            while pool.stats().get('recycled', 0) == recycled:
                assert [r.stdout for r in run_all(pool, ['print(1)', 'print(2)'])] == ['1\n', '2\n']
        for i in range(4):
            os.kill(_workers(pool)[0], signal.SIGKILL)
            assert pool.submit(f'print({i})').result(60).stdout == f'{i}\n'


@pytest.mark.parametrize('concurrency', [8, 1])  # 1: others wait for the one that runs
def test_a_snippet_of_a_killed_worker_is_not_given_to_one_child_of_it_after_the_other(concurrency):
    with Pool(tiny(zygotes=1, spares=4, retries=1, concurrency=concurrency, **LIMITS)) as pool:
        for _ in range(2):
            assert pool.submit('print(1)').result(60).stdout == '1\n'
            futures = [pool.submit(f'import time\ntime.sleep(1)\nprint({i})') for i in range(2)]
            time.sleep(0.4)
            os.kill(_workers(pool)[0], signal.SIGKILL)
            assert [f.result(60).stdout for f in futures] == ['0\n', '1\n']


def test_a_snippet_behind_thousands_of_cancelled_ones_waits_for_none_of_them():
    count = 16000
    with Pool(tiny(**SMALL | {'wall_s': 300.0})) as pool:
        blocking = pool.submit('import time\ntime.sleep(300)')
        futures = [pool.submit('print(1)') for _ in range(count)]
        random.Random(0).shuffle(futures)
        before = time.process_time(), _cpu_s(pool._process.pid)
        assert all(future.cancel() for future in futures)
        last = pool.submit('print(2)')
        assert blocking.cancel() and last.result(60).stdout == '2\n'
        # A walk through the queue for each of them would take 10⁸ steps. CPU time means the same on a busy machine.
        assert time.process_time() - before[0] < 4.0 and _cpu_s(pool._process.pid) - before[1] < 1.0
        assert pool.stats()['waiting'] == pool._sent == pool._bytes == 0


def _cpu_s(pid: int) -> float:
    with open(f'/proc/{pid}/stat') as file:
        return sum(map(int, file.read().rpartition(')')[2].split()[11:13])) / os.sysconf('SC_CLK_TCK')


@pytest.mark.skipif(os.geteuid() != 0, reason='limits of another process')
@pytest.mark.parametrize('free', range(6, 10))  # one child holds five; of those of the next, one to four arrive
def test_descriptors_that_do_not_arrive_cost_no_snippet_and_no_worker(free, capfd):
    """A message whose descriptors the kernel had to leave out (MSG_CTRUNC): the child is let go, all others go on."""
    # No retries: a child that finds no descriptor for its limits costs its snippet no try.
    with Pool(tiny(**SMALL | {'spares': 4, 'concurrency': 4, 'wall_s': 60.0, 'retries': 0})) as pool:
        assert [r.stdout for r in run_all(pool, ['print(1)'] * 16)] == ['1\n'] * 16  # their groups are made
        supervisor = pool._process.pid
        limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        used = _descriptors_at_rest(supervisor)
        few = [number for number in range(500) if number not in used][free]
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (few, limits[1]))
        results = run_all(pool, ['import time\ntime.sleep(0.3)\nprint(2)'] * 8)
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
        assert [(r.verdict, r.stdout) for r in results] == [(Verdict.OK, '2\n')] * 8
        assert pool._process.pid == supervisor and pool.stats()['respawned'] == 0
    told = capfd.readouterr().err
    assert 'out of descriptors' in told and 'Traceback' not in told


def _descriptors_at_rest(supervisor: int) -> set[int]:
    """Numbers in use when four spares wait beside their zygote and nsjail, and nothing is on its way."""
    used, since = set(), time.monotonic()
    while time.monotonic() - since < 0.5:
        now = {int(name) for name in os.listdir(f'/proc/{supervisor}/fd')}
        if now != used or len(children_of(supervisor)) != 6:
            used, since = now, time.monotonic()
        time.sleep(0.02)
    return used
