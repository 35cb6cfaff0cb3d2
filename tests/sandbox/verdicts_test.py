"""No snippet chooses to be counted as our fault: each has one run and a verdict of its own, on both paths."""

from __future__ import annotations

import os
import signal
import time

import pytest

from retool_jax.core.records import Fault, Verdict
from retool_jax.sandbox.pool import Job, Pool, run_all
from tests.sandbox.conftest import children_of
from tests.sandbox.given import LIMITS, tiny

LOWERED = 'import resource as r\nprint("a", flush=True)\nr.setrlimit(r.RLIMIT_CPU, ({0}, {0}))\nwhile True: pass'
HELD = """import array, os, socket
a, b = socket.socketpair()
a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [a.fileno(), b.fileno(), 1, 2]))])
print('a', flush=True)
"""
TIMER = """import ctypes, struct, time
c, t = ctypes.CDLL(None), ctypes.c_int()
print('a', flush=True)
c.syscall(222, 1, struct.pack('qiii', 0, 9, 0, 0) + bytes(44), ctypes.byref(t))
c.syscall(223, t.value, 0, struct.pack('qqqq', 0, 10**7, 0, 10**7), None)
time.sleep(0.3)
"""
EVERY_LIMIT = """import resource as r
print('a', flush=True)
for name in [n for n in dir(r) if n.startswith('RLIMIT_') and n != 'RLIMIT_CPU']:
    try: r.setrlimit(getattr(r, name), (0, 0))
    except (OSError, ValueError): pass
x = [bytearray(1 << 20) for _ in range(50)]
"""
OUR_OWN = {  # what a policy could try in order to be counted as a fault
    'its own CPU limit': LOWERED.format(1),
    'a CPU limit of 0': LOWERED.format(0),
    'a timer that kills': TIMER,
    'stdout held by a cycle of sockets': HELD + 'os._exit(0)',
    'the same, killed for its time': HELD + 'while True: pass',
    'every other limit at 0': EVERY_LIMIT,
    'every descriptor closed': 'import os\nprint("a", flush=True)\nos.closerange(0, 256)\nwhile True: pass',
    'its group and everybody killed': (
        'import os, signal\nprint("a", flush=True)\nfor p in (0, -1, 1, os.getppid(), os.getpid()):\n'
        '    for s in (signal.SIGSTOP, signal.SIGKILL, signal.SIGABRT):\n        try: os.kill(p, s)\n'
        '        except OSError: pass\nos.killpg(0, signal.SIGKILL)'
    ),
    'children that stop each other': (
        'import os, signal, time\nprint("a", flush=True)\nfor _ in range(20):\n    if os.fork() == 0:\n'
        '        os.kill(os.getpid(), signal.SIGSTOP)\nos._exit(3)'
    ),
    'a fork bomb of vfork': (
        'import ctypes, os\nprint("a", flush=True)\nc = ctypes.CDLL(None)\nwhile True:\n'
        '    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: pass'
    ),
    'descriptors in flight': (
        'import array, os, socket\nprint("a", flush=True)\nkeep = []\nwhile True:\n    a, b = socket.socketpair()\n'
        '    keep += [a, b]\n    try: a.sendmsg([b"x"], [(1, 1, array.array("i", [1] * 200))])\n'
        '    except OSError: os._exit(4)'
    ),
    'a full pipe without a reader': (
        'import fcntl, os\nprint("a", flush=True)\nfcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)\n'
        'os.write(1, bytes(200000))\nos._exit(5)'
    ),
    'an unknown architecture': (
        'import ctypes, mmap\nprint("a", flush=True)\nm = mmap.mmap(-1, 4096, prot=7)\n'
        'm.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))\n'
        'ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()'
    ),
} | {
    f'signal {n}': f'import os\nprint("a", flush=True)\nos.kill(os.getpid(), {n})' for n in (4, 6, 7, 8, 11, 15, 24, 31)
}


@pytest.mark.parametrize('path', ['warm', pytest.param('cold', marks=pytest.mark.slow)])
def test_no_snippet_is_a_fault_of_ours_or_run_twice(path, pools):
    pool = pools(path)
    pool.submit('print(1)').result(60)
    before = pool.stats()
    for name, code in OUR_OWN.items():
        result = pool.submit_job(Job(code=code, cpu_s=2.0, wall_s=6.0)).result(60).result
        told = (name, result)
        assert result.verdict is not Verdict.SANDBOX_ERROR and result.fault is None, told
        assert result.stdout.startswith('a\n'), told
        assert pool.submit('print(6 * 7)').result(60).stdout == '42\n', name
    after = pool.stats()
    assert after['retried'] == before['retried'] and after['respawned'] == before['respawned']


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_a_cpu_limit_of_its_own_is_the_snippets_signal(path, pools):
    result = pools(path).submit_job(Job(code=LOWERED.format(1), cpu_s=4.0, wall_s=12.0)).result(60).result
    assert (result.verdict, result.signal, result.stdout) == (Verdict.SIGNAL, signal.SIGKILL, 'a\n')


def test_the_answer_comes_with_the_end_of_the_process_whatever_holds_its_pipes(pools):
    for _ in range(3):
        result = pools('warm').submit(HELD + 'os._exit(7)').result(60)
        assert (result.exit_code, result.stdout) == (7, 'a\n')  # one that waited would end as a timeout


def test_output_beyond_the_limit_is_told_also_where_it_is_found_after_the_end(pools):
    pool = pools('warm')
    code = 'import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)\nos.write(1, b"x" * 600000)\nos._exit(0)'
    result = pool.submit(code).result(60)
    assert (result.verdict, len(result.stdout)) == (Verdict.OUTPUT_LIMIT, pool.settings.output_bytes)


def test_a_dump_of_all_frames_shows_none_of_ours(pools):
    for path in ('warm', 'cold'):
        for code in (
            'import faulthandler, ctypes\nfaulthandler.enable()\nctypes.string_at(0)',
            'import faulthandler, time\nfaulthandler.dump_traceback_later(0.2, exit=True)\ntime.sleep(30)',
            'import traceback\ndef f(): traceback.print_stack()\nf()',
        ):
            shown = pools(path).submit(code).result(60).stderr
            assert 'File "<cell>"' in shown and '/runner/' not in shown and '<string>' not in shown, shown


def test_a_dying_worker_costs_its_snippets_a_retry_and_then_a_fault_of_its_kind():
    with Pool(tiny(zygotes=1, retries=0, **LIMITS)) as pool:
        future = pool.submit('import time\ntime.sleep(2)')
        time.sleep(0.7)
        os.kill(children_of(pool._process.pid)[0], signal.SIGKILL)  # nsjail
        result = future.result(60)
        assert (result.verdict, result.fault) == (Verdict.SANDBOX_ERROR, Fault.WORKER)
        assert pool.submit('print(1)').result(60).stdout == '1\n'
        assert pool.stats()['retried'] == 0  # none was run again


def test_recycled_workers_lose_no_snippet_even_without_retries():
    with Pool(tiny(zygotes=2, spares=2, recycle=5, retries=0, **LIMITS)) as pool:
        for _ in range(25):
            assert {r.verdict for r in run_all(pool, ['import time\ntime.sleep(0.02)'] * 6)} == {Verdict.OK}
        assert pool.stats()['recycled'] > 0
