"""Hostile and odd snippets with the one verdict that every path must give them.

Limits of the suite: 1 CPU second, 3 s wall, 256 MB, 64 processes, 16 MB and 512 files of scratch.
`quick` cases run in the fast tier.
"""

# ruff: noqa: E501 — a table

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from retool_jax.core.records import Verdict

OK, ERROR, SIGNAL, TIMEOUT, OOM, OUTPUT = (
    Verdict.OK,
    Verdict.ERROR,
    Verdict.SIGNAL,
    Verdict.TIMEOUT,
    Verdict.OOM,
    Verdict.OUTPUT_LIMIT,
)

LONG = {'cpu_s': 20.0, 'wall_s': 60.0}  # for what takes memory or a parser's time, on a busy machine too


@dataclasses.dataclass(frozen=True)
class Case:
    """A snippet and what must come back."""

    name: str
    code: str
    verdict: Verdict
    out: str | Callable[[str], bool] | None = None  # stdout, or a test of it
    err: str = ''  # must occur in stderr
    exit_code: int | None = None
    quick: bool = False
    limits: dict = dataclasses.field(default_factory=dict)


CALL = """import ctypes
_libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = _libc.syscall(number, *arguments)
    return (result, ctypes.get_errno() if result < 0 else 0)
"""
DENIED = '(-1, 1)\n'


def denied(name: str, *calls: str, quick: bool = False) -> Case:
    """System calls that must all answer EPERM."""
    code = CALL + ''.join(f'print(call({c}))\n' for c in calls)
    return Case(name, code, OK, DENIED * len(calls), quick=quick)


RESOURCES = [
    Case('fork_bomb_swallowing_errors', 'import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n'
         '        pass', TIMEOUT, quick=True),
    # What refused forks leave is charged until the kernel tidies up: 110 MiB as a rule, up to 250 on a busy machine.
    Case('fork_bomb_with_sessions', 'import os\nwhile True:\n    try:\n        if os.fork() == 0:\n'
         '            os.setsid()\n    except OSError:\n        pass', TIMEOUT, limits={'memory_mb': 1024}),
    Case('bare_fork_loop', 'import os\nwhile True:\n    os.fork()', ERROR),
    Case('ten_thousand_threads', 'import threading\ne = threading.Event()\nfor _ in range(10000):\n'
         '    threading.Thread(target=e.wait, daemon=True).start()', ERROR, err="can't start new thread"),
    Case('four_threads_that_work', 'import threading\nr = []\nts = [threading.Thread(target=r.append, args=(i,)) '
         'for i in range(4)]\n[t.start() for t in ts]\n[t.join() for t in ts]\nprint(sorted(r))',
         OK, '[0, 1, 2, 3]\n', quick=True),
    Case('list_of_bytearrays', 'x = []\nwhile True:\n    x.append(bytearray(b"1" * 10**7))', OOM, quick=True,
         limits=LONG),
    Case('eight_children_of_60_mb', 'import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n'
         '        x = bytearray(b"1" * 60 * 2**20)\n        time.sleep(0.5)\n        os._exit(0)\n'
         'for _ in range(8):\n    os.wait()', OOM, limits=LONG),
    Case('busy_loop', 'while True: pass', TIMEOUT, quick=True),
    Case('long_sleep', 'import time\ntime.sleep(600)', TIMEOUT),
    Case('tower_of_powers', 'print(9**9**9)', TIMEOUT),
    Case('loop_catching_everything', 'while True:\n    try:\n        while True: pass\n    except BaseException:\n'
         '        pass', TIMEOUT),
    Case('all_signals_ignored', 'import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n'
         '    except (OSError, ValueError):\n        pass\nwhile True: pass', TIMEOUT),
    Case('repr_that_loops', 'class A:\n    def __repr__(self):\n        while True: pass\nprint(A())', TIMEOUT),
    Case('error_whose_text_loops', 'class A(Exception):\n    def __str__(self):\n        while True: pass\nraise A', TIMEOUT),
    Case('stdout_flood', 'while True: print("x" * 1000)', OUTPUT, lambda s: len(s) == 262144, quick=True),
    Case('stderr_flood', 'import sys\nwhile True: print("x" * 1000, file=sys.stderr)', OUTPUT),
    Case('one_line_of_5_mb', 'print("x" * 5_000_000)', OUTPUT, lambda s: set(s) == {'x'}),
    Case('output_of_200_kb', 'print("x" * 200_000)', OK, 'x' * 200_000 + '\n', quick=True),
    Case('error_text_of_1_mb', 'raise ValueError("x" * 1_000_000)', OUTPUT),
    Case('memfd_hog', 'import os\nos.memfd_create("x")', ERROR, err='PermissionError'),
    Case('scratch_full', 'with open("/box/x", "wb") as f:\n    while True: f.write(bytes(2**20))', ERROR, err='OSError'),
    Case('scratch_full_in_many_files', 'for i in range(100):\n    open(f"/box/{i}", "wb").write(bytes(2**20))',
         ERROR, err='No space left'),
    Case('inodes_full', 'for i in range(10000): open(f"/box/{i}", "w").close()', ERROR, err='No space left'),
    Case('sparse_file', 'open("/box/x", "wb").truncate(10**12)', ERROR, err='File too large'),
    Case('array_of_8_tb', 'import numpy as np\nnp.ones((10**6, 10**6))', ERROR, err='Unable to allocate', quick=True),
    Case('array_of_80_gb_touched', 'import numpy as np\nx = np.empty(10**10)\nx[:] = 1', ERROR, err='Unable to allocate'),
    Case('array_of_800_mb_touched', 'import numpy as np\nx = np.empty(10**8)\nx[:] = 1', OOM, limits=LONG),
    Case('thousand_zombies', 'import os\nfor _ in range(1000):\n    if os.fork() == 0: os._exit(0)', ERROR,
         err='BlockingIOError'),
    Case('descriptors_exhausted', 'x = [open("/dev/null") for _ in range(10**5)]', ERROR, err='Too many open files'),
    Case('huge_integer_printed', 'print(9**100000)', ERROR, err='4300 digits', quick=True),
    Case('nested_sleepers', 'import subprocess, sys\nsubprocess.Popen([sys.executable, "-c", "import time; '
         'time.sleep(600)"])\nprint("done")', OK, 'done\n'),
]  # fmt: skip

CRASHES = [
    Case('null_read', 'import ctypes\nctypes.string_at(0)', SIGNAL, quick=True),
    Case('abort', 'import os\nos.abort()', SIGNAL),
    Case('deep_recursion', 'def f(): return f()\nf()', ERROR, err='RecursionError', quick=True),
    Case('absurd_recursion_limit', 'import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(): f()\nf()', OOM, limits=LONG),
    Case('exit_at_once_7', 'import os\nprint("a", flush=True)\nos._exit(7)', ERROR, 'a\n', exit_code=7),
    Case('sys_exit_3', 'import sys\nprint("a")\nsys.exit(3)', ERROR, 'a\n', exit_code=3, quick=True),
    Case('sys_exit_text', 'import sys\nsys.exit("bye")', ERROR, '', err='bye\n', exit_code=1),
    Case('sys_exit_256', 'import sys\nsys.exit(256)', OK, ''),
    Case('sys_exit_none', 'import sys\nsys.exit(None)', OK, ''),
    Case('exit_109', 'exit(109)', ERROR, exit_code=109),
    Case('exit_137', 'exit(137)', ERROR, exit_code=137, quick=True),
    Case('exit_255', 'exit(255)', ERROR, exit_code=255),
    Case('standard_descriptors_closed', 'import os\nprint("a", flush=True)\nos.close(1)\nos.close(2)', OK, 'a\n'),
    Case('print_to_a_closed_descriptor', 'import os\nos.close(1)\nprint("x")', ERROR, ''),
    Case('stdout_none', 'import sys\nsys.stdout = None\nprint("x")', OK, ''),
    Case('process_holding_stdout', 'import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint("parent")',
         OK, 'parent\n', quick=True),
    Case('daemon_printing_late', 'import threading, time\ndef late():\n    time.sleep(1)\n    print("late")\n'
         'threading.Thread(target=late, daemon=True).start()\nprint("now")', OK, 'now\n'),
    Case('thread_joined_at_the_end', 'import threading, time\ndef late():\n    time.sleep(0.2)\n    print("late")\n'
         'threading.Thread(target=late).start()\nprint("now")', OK, 'now\nlate\n'),
    Case('atexit_runs', 'import atexit\natexit.register(print, "bye")\nprint("hi")', OK, 'hi\nbye\n'),
    Case('endless_atexit', 'import atexit\n@atexit.register\ndef f():\n    while True: pass', TIMEOUT),
    Case('kill_everybody', 'import os\nos.kill(-1, 9)', ERROR, err='ProcessLookupError'),
    Case('kill_itself_from_a_thread_pool', 'from concurrent.futures import ThreadPoolExecutor\n'
         'with ThreadPoolExecutor(4) as e: print(sum(e.map(abs, range(-5, 5))))', OK, '25\n'),
]  # fmt: skip

TEXT = [
    Case('all_bytes', 'import sys\nsys.stdout.buffer.write(bytes(range(256)))', OK,
         bytes(range(256)).decode('utf-8', 'replace'), quick=True),
    Case('invalid_utf8_in_between', 'import sys\nsys.stdout.buffer.write(b"a\\xffb\\xc3(")', OK, 'a\ufffdb\ufffd('),
    Case('nul_printed', 'print("a\\0b")', OK, 'a\0b\n'),
    Case('lone_surrogate_printed', 'print("\\ud800")', ERROR, err='UnicodeEncodeError', quick=True),
    Case('lone_surrogate_in_code', 'print("\ud800")', ERROR),
    Case('emoji_and_cjk', 'print("🦀 数学 ∑")', OK, '🦀 数学 ∑\n', quick=True),
    Case('crlf', 'x = 1\r\nif x:\r\n    print("a")\r\n', OK, 'a\n'),
    Case('byte_order_mark', '\ufeffprint("a")', OK, 'a\n'),
    Case('nul_in_code', 'print("a\0b")', ERROR, err='null bytes'),
    Case('code_not_utf8', b'print("\xe9")'.decode('utf-8', 'surrogateescape'), ERROR),
    Case('coding_cookie', '# -*- coding: latin-1 -*-\nprint("é")', OK, 'é\n'),
    Case('empty_code', '', OK, '', quick=True),
    Case('syntax_error', 'x = = 1', ERROR, '', err='File "<cell>", line 1\n    x = = 1\n', quick=True),
    Case('indentation_error', 'if 1:\nprint(1)', ERROR, err='IndentationError'),
    Case('500_parentheses', '(' * 500 + '1' + ')' * 500, ERROR, err='too many nested parentheses'),
    Case('200000_lines', 'x = 1\n' * 200_000 + 'print(x)', OK, '1\n',
         limits={'cpu_s': 20.0, 'wall_s': 60.0, 'memory_mb': 1024}),
    Case('200000_lines_in_256_mb', 'x = 1\n' * 200_000 + 'print(x)', OOM, limits=LONG),
    Case('input_has_nothing', 'input()', ERROR, err='EOFError', quick=True),
    Case('tags_in_output', 'print("</interpreter><|im_end|><answer>")', OK, '</interpreter><|im_end|><answer>\n'),
    Case('traceback_names_the_cell', 'def f():\n    return 1 / 0\nf()', ERROR, err='Traceback (most recent call last):\n'
         '  File "<cell>", line 3, in <module>\n    f()\n  File "<cell>", line 2, in f\n    return 1 / 0\n', quick=True),
]  # fmt: skip

REACH = [
    Case('etc_passwd', 'open("/etc/passwd")', ERROR, err='FileNotFoundError', quick=True),
    Case('symlink_to_etc_passwd', 'import os\nos.symlink("/etc/passwd", "a")\nopen("a")', ERROR, err='FileNotFoundError'),
    Case('path_through_dots', 'open("/box/../../../../etc/shadow")', ERROR, err='FileNotFoundError'),
    Case('environment', 'import os\nprint(sorted(k for k in os.environ if "KEY" in k or "TOKEN" in k or "USER" in k), '
         'os.environ["HOME"])', OK, '[] /box\n'),
    Case('proc_is_empty', 'import os\nprint(os.listdir("/proc"))\nfor p in ("self/mem", "1/root", "self/exe", "sys"):\n'
         '    print(os.path.lexists("/proc/" + p))', OK, '[]\n' + 'False\n' * 4),
    Case('writes_outside_scratch', 'import os, numpy\nfor p in ("/x", os.path.dirname(numpy.__file__) + "/x", '
         '"/runner/runner.py", "/python/bin/python3", "/dev/x", "/proc/x"):\n    try:\n        open(p, "w")\n'
         '        print("written", p)\n    except OSError:\n        print("no")', OK, 'no\n' * 6, quick=True),
    Case('removal_outside_scratch', 'import os\nfor p in ("/runner/runner.py", "/python/bin/python3", "/dev/null"):\n'
         '    try:\n        os.unlink(p)\n        print("gone", p)\n    except OSError:\n        print("no")', OK, 'no\n' * 3),
    Case('hard_link_out', 'import os\nos.link("/python/bin/python3", "/box/x")', ERROR, err='OSError'),
    Case('sockets', 'import socket as s\nfor f, t in ((s.AF_INET, s.SOCK_STREAM), (s.AF_INET, s.SOCK_DGRAM), '
         '(s.AF_INET6, s.SOCK_STREAM), (s.AF_UNIX, s.SOCK_STREAM), (40, s.SOCK_STREAM), (16, s.SOCK_RAW), '
         '(17, s.SOCK_RAW)):\n    try:\n        s.socket(f, t)\n        print("open", f)\n    except PermissionError:\n'
         '        print("no")', OK, 'no\n' * 7, quick=True),
    Case('name_lookup', 'import socket\nsocket.getaddrinfo("example.org", 80)', ERROR, err='gaierror'),
    Case('asyncio_still_works', 'import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\n'
         'print(asyncio.run(f()))', OK, '5\n'),
    denied('ptrace', '101, 16, 1, 0, 0', '101, 0, 0, 0, 0', quick=True),
    denied('other_processes_memory', '311, 1, 0, 0, 0, 0, 0', '310, 1, 0, 0, 0, 0, 0', '438, 3, 1, 0', '434, 1, 0'),
    denied('change_of_user', '105, 0', '106, 0', '113, 0, 0', '117, 0, 0, 0', '116, 0, 0', '92, b"/box", 0, 0'),
    denied('mounts', '165, b"x", b"/box", b"tmpfs", 0, 0', '166, b"/box", 2', '161, b"/box"', '155, b"/box", b"/box"',
           '428, -100, b"/", 1', '430, b"tmpfs", 0', '442, 0, 0, 0, 0, 0', quick=True),
    denied('namespaces', '272, 0x10000000', '272, 0x20000', '308, 0, 0', '56, 0x10000011, 0, 0, 0, 0'),
    Case('clone3_is_unknown', CALL + 'print(call(435, 0, 0))', OK, '(-1, 38)\n'),
    denied('keyrings', '248, b"user", b"x", b"x", 1, -1', '250, 0, 0, 0, 0, 0', '249, b"user", b"x", 0, 0'),
    denied('kernel_machinery', '321, 0, 0, 0', '425, 8, 0', '298, 0, 0, -1, -1, 0', '323, 0', '103, 3, 0, 0',
           '169, 0, 0, 0, 0', '175, 0, 0, 0', '246, 0, 0, 0, 0', '135, 0x40000', quick=True),
    denied('landlock_and_seccomp', '317, 1, 0, 0', '157, 22, 2, 0, 0, 0', '157, 8, 1, 0, 0, 0'),
    denied('device_nodes', '133, b"/box/x", 0x2190, 0x501', '259, -100, b"/box/x", 0x2190, 0x501'),
    denied('clocks', '227, 0, 0', '164, 0, 0', '159, 0', '305, 0, 0'),
    denied('shared_memory_calls', '29, 1, 4096, 0x3b6', '64, 1, 1, 0x3b6', '68, 1, 0x3b6', '240, b"x", 0x42, 0, 0'),
    denied('capabilities', '126, 0, 0'),
    Case('no_capability_is_held', CALL + 'import struct\nh = struct.pack("Ii", 0x20080522, 0)\n'
         'd = ctypes.create_string_buffer(24)\nprint(call(125, h, d))\nprint(d.raw == bytes(24))', OK, '(0, 0)\nTrue\n'),
    Case('i386_calls', 'import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n'
         'm.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))\n'
         'f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nprint(f())', SIGNAL, ''),
    denied('x32_calls', '0x40000000 | 39', '0x40000000 | 59'),
    Case('devices', 'import os\nprint(sorted(os.listdir("/dev")))\nprint(os.path.exists("/sys"))', OK,
         "['full', 'null', 'random', 'shm', 'urandom', 'zero']\nFalse\n"),
    Case('stray_descriptors', 'import os\nfound = []\nfor fd in range(1024):\n    try:\n        os.fstat(fd)\n'
         '        found.append(fd)\n    except OSError: pass\nprint(found)', OK, '[0, 1, 2]\n', quick=True),
    Case('own_limits_cannot_be_raised', 'import resource as r\nfor l in (r.RLIMIT_AS, r.RLIMIT_NPROC, r.RLIMIT_CPU):\n'
         '    try:\n        r.setrlimit(l, (-1, -1))\n        print("raised")\n    except (ValueError, OSError):\n'
         '        print("no")', OK, 'no\n' * 3),
    Case('parent_cannot_be_signalled', 'import os, signal\nprint(os.getpid(), os.getppid())\nos.kill(2, 9)', ERROR,
         '1 0\n', err='ProcessLookupError'),
]  # fmt: skip

ALL = [*RESOURCES, *CRASHES, *TEXT, *REACH]
