"""The life of a pool: deaths are forgiven while there is work done between them, a broken pool says so."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox import pool as pool_lib
from retool_jax.sandbox.frames import pack
from retool_jax.sandbox.job import Job
from retool_jax.sandbox.pool import Pool, PoolFull
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
        beside = pool.submit('import time\ntime.sleep(1)\nprint("beside")')
        monkeypatch.setattr(Job, 'frame', lambda self, id_, settings: (
            pack({'op': 'run', 'id': id_, 'seed': 0, 'fetch': [], 'code': 0, 'stdin': 0, 'files': [], 'cpu_s': 'x'})
            if self.code == 'stumble' else frame(self, id_, settings)))  # fmt: skip
        start = time.monotonic()
        result = pool.submit('stumble').result(60)
        assert result.verdict is Verdict.SANDBOX_ERROR and 'TypeError' in result.stderr
        assert time.monotonic() - start < 1.0 and pool.stats()['retried'] == 0
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
