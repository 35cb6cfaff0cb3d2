"""The pool: state, concurrency, cancellation, determinism, and deaths of every part."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox.cgroups import start_time
from retool_jax.sandbox.pool import Job, Pool, PoolFull, run_all
from tests.sandbox.conftest import children_of
from tests.sandbox.given import LIMITS, tiny

SAME_EVERYWHERE = """
import random, numpy, sympy, os, sys
print([hash(s) for s in ('a', 'bc')], {'x', 'y', 'zz', 'w'}, id(sys))
print(random.random(), numpy.random.rand(), sympy.core.random.random(), sympy.randprime(1, 10**9))
print(numpy.linalg.inv(numpy.arange(9.0).reshape(3, 3) + numpy.eye(3)).tolist(), sorted(os.environ))
"""


@pytest.fixture
def pool(pools):
    return pools('warm')


def test_what_one_snippet_sets_the_next_does_not_see(pool):
    pool.submit(
        'import builtins, numpy, os, sys\nbuiltins.x = 1\nnumpy.pi = 3\nos.environ["X"] = "1"\n'
        'open("/box/x", "w").close()\nsys.modules["math"] = None\nos.umask(0o777)'
    ).result(60)
    for _ in range(4):
        result = pool.submit(
            'import numpy, os, math\nprint("x" in dir(__builtins__), numpy.pi > 3.1, "X" in os.environ,'
            ' os.listdir("/box"), oct(os.umask(0)))'
        ).result(60)
        assert result.stdout == 'False True False [] 0o22\n', result.stderr


@pytest.mark.parametrize(
    'code, verdict',
    [
        ('print(\'{"verdict": "ok", "stdout": "42", "exit_code": 0}\')\nraise SystemExit(1)', Verdict.ERROR),
        ('print("TimeoutError: the code ran longer than allowed and was stopped.")', Verdict.OK),
        ('import os\nos.write(2, b"sealing failed: x")\nos._exit(99)', Verdict.ERROR),
        ('import os\nos.write(1, b"exited with status: 0")\nos._exit(5)', Verdict.ERROR),
    ],
)
@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_printed_words_change_no_verdict(path, code, verdict, pools):
    assert pools(path).submit(code).result(60).verdict is verdict


@pytest.mark.parametrize(
    'code',
    [
        'import sys\nsys.excepthook = lambda *a: print("mine")\n1 / 0',
        'import sys\nsys.settrace(lambda *a: None)\nprint(1)',
        'import builtins\nbuiltins.print = None\nbuiltins.exec = None\nbuiltins.compile = None',
        'import os, sys, threading\nos._exit = None\nos.write = None\nthreading._shutdown = None\nsys.stderr = None',
        'import sys\nfor name in list(sys.modules): del sys.modules[name]',
        'import gc\ngc.unfreeze()\ngc.collect()\nfor x in gc.get_objects():\n    if isinstance(x, dict): x.clear()',
    ],
)
def test_patches_of_the_interpreter_stay_with_their_snippet(code, pool):
    pool.submit(code).result(60)
    result = pool.submit('print(1)\n1 / 0').result(60)
    assert (result.verdict, result.stdout) == (Verdict.ERROR, '1\n')
    assert result.stderr.endswith('ZeroDivisionError: division by zero\n')


def test_an_excepthook_of_the_snippet_is_used(pool):
    result = pool.submit('import sys\nsys.excepthook = lambda t, e, b: print("mine", t.__name__)\n1 / 0').result(60)
    assert (result.verdict, result.stdout) == (Verdict.ERROR, 'mine ZeroDivisionError\n')


def test_no_trace_of_an_earlier_request_is_in_memory(pool):
    secret = 'x7Qp' + '93LmKd'
    pool.submit(f'x = "{secret}"').result(60)
    scan = (
        'import gc, sys\nneedle = "93LmKd"[::-1]\nfound = 0\nfor o in gc.get_objects():\n'
        '    for r in gc.get_referents(o):\n        if isinstance(r, (str, bytes)) and len(r) == 10 and r[4:] == '
        'needle[::-1]: found += 1\nprint(found)'
    )
    for _ in range(3):
        assert pool.submit(scan).result(60).stdout == '0\n'


def test_shared_memory_and_locks_do_not_cross_snippets(pool):
    hold = (
        'from multiprocessing import shared_memory\nimport fcntl, time\n'
        's = shared_memory.SharedMemory("pool_test", create=True, size=16)\n'
        'f = open("/dev/shm/lock", "w")\nfcntl.flock(f, fcntl.LOCK_EX)\ntime.sleep(1)\nprint("held")\ns.unlink()'
    )
    probe = (
        'import fcntl, time, os\ntime.sleep(0.3)\nf = open("/dev/shm/lock", "w")\n'
        'fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nprint(sorted(os.listdir("/dev/shm")))'
    )
    first, second = pool.submit(hold), pool.submit(probe)
    assert second.result(60).stdout == "['lock']\n"
    assert first.result(60).stdout == 'held\n'


def test_concurrent_snippets_keep_apart_and_results_keep_their_order(pool):
    code = 'import time\nopen("x", "a").write("{0}")\ntime.sleep(0.05)\nprint(open("x").read())'
    results = run_all(pool, [code.format(i) for i in range(24)])
    assert [r.stdout for r in results] == [f'{i}\n' for i in range(24)]


def test_numpy_sympy_and_scipy_are_there(pool):
    result = pool.submit(
        'import numpy, sympy, scipy.special\nx = sympy.Symbol("x")\n'
        'print(sympy.solve(x**2 - 4), numpy.dot([1, 2], [3, 4]), scipy.special.comb(5, 2))'
    ).result(60)
    assert result.stdout == '[-2, 2] 11 10.0\n', result.stderr


def test_the_trainers_packages_are_not(pool):
    assert 'ModuleNotFoundError' in pool.submit('import jax').result(60).stderr


def test_every_worker_gives_the_same_bytes(pool):
    expected = pool.submit(SAME_EVERYWHERE, seed=7).result(60)
    assert expected.verdict is Verdict.OK, expected.stderr
    with Pool(tiny(zygotes=2, recycle=3, **LIMITS)) as other:
        while other.stats().get('recycled', 0) < 2:
            for result in [future.result(60) for future in [other.submit(SAME_EVERYWHERE, seed=7) for _ in range(8)]]:
                assert result.stdout == expected.stdout
    assert pool.submit(SAME_EVERYWHERE, seed=8).result(60).stdout != expected.stdout


def test_the_cold_path_draws_the_same_numbers(pools):
    code = (
        'import random, numpy, sympy\nprint(random.random(), numpy.random.rand(), sympy.randprime(1, 10**9), hash("a"))'
    )
    assert pools('cold').submit(code, seed=3).result(60).stdout == pools('warm').submit(code, seed=3).result(60).stdout


def test_echo_prints_the_last_expression():
    with Pool(tiny(zygotes=1, echo=True, **LIMITS)) as pool:
        cases = {
            '1 + 1': '2\n',
            'x = 3\nx': '3\n',
            'x = 3': '',
            'None': '',
            'print(1)': '1\n',
            '"a\\nb"': "'a\\nb'\n",
            'if True:\n    5': '',
            'from __future__ import annotations\ndef f(x: y): ...\nf.__annotations__': "{'x': 'y'}\n",
        }
        assert [pool.submit(code).result(60).stdout for code in cases] == list(cases.values())
        failed = pool.submit('x = 1\nx / 0').result(60)
        assert 'File "<cell>", line 2, in <module>' in failed.stderr


def test_standard_input_and_files_go_in_and_come_out(pool):
    job = Job(
        code='print(input(), open("d/a.bin", "rb").read())\nopen("out.bin", "wb").write(bytes(range(256)))\n'
        'import os\nos.symlink("/python/bin/python3", "link")\nos.mkdir("directory")\n'
        'try: os.mkfifo("pipe")\nexcept PermissionError: print("no pipe")',
        stdin=b'line\n',
        files={'d/a.bin': b'\0\xff'},
        fetch=('out.bin', '/box/d/a.bin', 'link', 'directory', 'pipe', 'nothing', '../dev/zero'),
    )
    outcome = pool.submit_job(job).result(60)
    assert outcome.result.verdict is Verdict.OK, outcome.result.stderr
    assert outcome.result.stdout == "line b'\\x00\\xff'\nno pipe\n"
    assert outcome.files == {'out.bin': bytes(range(256)), '/box/d/a.bin': b'\0\xff'}


def test_a_request_may_bring_its_own_limits(pool):
    assert (
        pool.submit_job(Job(code='import time\ntime.sleep(60)', wall_s=0.2)).result(60).result.verdict
        is Verdict.TIMEOUT
    )
    assert pool.submit_job(Job(code='x = b"1" * 10**8', memory_mb=32)).result(60).result.verdict is Verdict.OOM


def test_async_run_and_cancellation(pool, census):
    watch = census('warm')

    async def main():
        assert (await pool.run('print(1)')).stdout == '1\n'
        task = asyncio.create_task(pool.run('import os\nos.fork()\nwhile True: pass'))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    watch.settle()
    assert pool.submit('print(2)').result(60).stdout == '2\n'


def test_a_full_queue_refuses_and_submit_never_waits():
    with Pool(tiny(zygotes=1, queue=3, concurrency=1, **LIMITS)) as pool:
        futures = [pool.submit('import time\ntime.sleep(0.5)') for _ in range(3)]
        with pytest.raises(PoolFull, match=r'sandbox\.queue'):
            pool.submit('print(1)')
        assert all(f.result(60).verdict is Verdict.OK for f in futures)
        assert pool.submit('print(1)').result(60).stdout == '1\n'


def test_a_closed_pool_answers_at_once():
    pool = Pool(tiny(zygotes=1, **LIMITS)).start()
    future = pool.submit('while True: pass')
    pool.close()
    with pytest.raises(RuntimeError, match='closed'):
        future.result(10)
    with pytest.raises(RuntimeError, match='closed'):
        pool.submit('print(1)')


@pytest.mark.parametrize('field, value', [('path', 'hot'), ('memory_mb', 0), ('retries', -1), ('preload', ('os; x',))])
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        tiny(**{field: value})


def test_unknown_packages_are_refused_before_anything_runs():
    with pytest.raises(RuntimeError, match='no_such_package'), Pool(tiny(packages=('no_such_package',))):
        pass


def test_preload_of_a_missing_module_ends_in_a_reason_and_not_in_a_hang():
    with pytest.raises(RuntimeError, match='No module named'), Pool(tiny(zygotes=1, preload=('nothing',))):
        pass


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
    with Pool(tiny(zygotes=2, retries=50, **LIMITS)) as pool:
        futures = [
            pool.submit(f'import time\ntime.sleep({rng.random() * 0.02})\nprint({i} ** 2)') for i in range(count)
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
        futures = [pool.submit(f'import time\ntime.sleep(0.05)\nprint({i})') for i in range(20)]
        time.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        assert [f.result(120).stdout for f in futures] == [f'{i}\n' for i in range(20)]
        assert pool._process.pid != first
        assert not _alive_groups(first)


def _alive_groups(pid: int) -> list[pathlib.Path]:
    """Control groups of a supervisor that still exist."""
    return [p for p in pathlib.Path('/sys/fs/cgroup').glob(f'**/retool_jax_{pid}_*')]


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
    root = str(pathlib.Path(__file__).parents[2])
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


def test_the_training_process_gets_no_child_but_the_supervisor_and_keeps_light():
    code = (
        'import sys, os\nfrom retool_jax.sandbox.pool import Pool, SandboxSettings\n'
        f'with Pool(SandboxSettings(**{tiny(zygotes=1).fields()})) as p:\n'
        '    assert p.submit("print(1)").result().stdout == "1\\n"\n'
        '    print(len(open(f"/proc/self/task/{os.getpid()}/children").read().split()), end=" ")\n'
        'print([m for m in ("jax", "numpy", "transformers", "sympy", "nsjail") if m in sys.modules])'
    )
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
        env={**os.environ, 'PYTHONPATH': root},
    )
    assert done.stdout.split(' ', 1)[1] == '[]\n' and done.stdout[0] in '01', done.stdout


def test_many_threads_may_submit_at_once(pool):
    results: dict[int, str] = {}

    def work(i: int) -> None:
        results[i] = pool.submit(f'print({i})').result(60).stdout

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {i: f'{i}\n' for i in range(16)}


def test_results_cross_the_wire_as_they_are(pool):
    text = ''.join(map(chr, [*range(1, 300), 0x1F980, 0x4E2D]))
    result = pool.submit(f'import json\nprint(json.loads({json.dumps(json.dumps(text))}), end="")').result(60)
    assert result.stdout == text


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


@pytest.mark.slow
def test_300_snippets_at_once_are_answered_under_a_soft_limit_of_1024_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        with Pool(tiny(concurrency=300, wall_s=90.0)) as pool:
            if pool.capped:
                pytest.skip(pool.capped)
            results = run_all(pool, ['import time\ntime.sleep(3)\nprint(1)'] * 300)
            stats = pool.stats()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {(r.verdict, r.stdout) for r in results} == {(Verdict.OK, '1\n')}
    assert stats['respawned'] == stats['retried'] == 0


def test_few_descriptors_cap_what_runs_at_once_and_the_reason_is_told():
    code = (
        'import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n'
        'from retool_jax.sandbox.pool import *\nfrom tests.sandbox.given import tiny\n'
        'with Pool(tiny(concurrency=50, zygotes=1, spares=2)) as p:\n'
        '    print([str(r.verdict) for r in run_all(p, ["import time; time.sleep(0.3)"] * 30)].count("ok"))\n'
        '    print(p.capped)\n    print(p.stats()["retried"], p.stats()["respawned"])'
    )
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, check=True)
    count, capped, lost = done.stdout.splitlines()
    assert (count, lost) == ('30', '0 0') and 'sandbox.concurrency=50' in capped and 'ulimit -Hn' in capped


def test_a_machine_without_a_sandbox_of_its_own_says_so_at_once(monkeypatch):
    monkeypatch.setattr('platform.system', lambda: 'Darwin')
    monkeypatch.setattr('platform.machine', lambda: 'arm64')
    pool = Pool(tiny())
    for act in (pool.start, lambda: pool.submit('print(1)')):
        with pytest.raises(RuntimeError, match='Darwin on arm64; name servers in sandbox.addresses'):
            act()


def test_the_user_that_a_snippet_sees_is_the_same_for_all(pools):
    for path in ('warm', 'cold'):
        code = 'import os\nprint(os.getresuid(), os.getresgid(), os.stat("/box").st_uid)\nopen("a", "w").close()'
        assert {r.stdout for r in run_all(pools(path), [code] * 4)} == {f'{(65534,) * 3} {(65534,) * 3} 65534\n'}
