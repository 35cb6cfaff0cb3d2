"""The allowlist of system calls: the program by an interpreter of its own, and what snippets can reach through it."""

from __future__ import annotations

import struct
import time

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox.inside import seccomp

PROGRAM = list(struct.iter_unpack('=HBBI', seccomp.program()))


def _verdict(number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """Interprets the BPF program for one call."""
    data = struct.pack('=iIQ6Q', number, arch, 0, *(arguments + (0,) * 6)[:6])
    at = accumulator = 0
    while True:
        kind, yes, no, value = PROGRAM[at]
        at += 1
        if kind == 0x20:
            accumulator = struct.unpack_from('=I', data, value)[0]
        elif kind == 0x06:
            return value
        else:
            held = {0x15: accumulator == value, 0x45: bool(accumulator & value)}[kind]
            at += yes if held else no


ALLOW, KILL, EPERM = 0x7FFF0000, 0x80000000, 0x50001


def _values(arguments: dict[int, tuple[int, ...]], **changed: int) -> tuple[int, ...]:
    """Arguments that a rule allows, with some of them changed (`a1=7`)."""
    return tuple(changed.get(f'a{i}', arguments.get(i, (0,))[-1]) for i in range(6))


def test_the_filter_allows_exactly_the_table():
    for name, number in seccomp.ALLOWED.items():
        assert _verdict(number) == ALLOW, name
        assert _verdict(number | 0x40000000) == EPERM, name
        assert _verdict(number, arch=0x40000003) == KILL, name
    named = {
        *seccomp.ALLOWED.values(),
        *(n for n, *_ in seccomp.BY_ARGUMENT.values()),
        *(n for n, _ in seccomp.REFUSED.values()),
        56,
    }
    for number in set(range(600)) - named:
        assert _verdict(number) == EPERM, number
    for name, (number, error) in seccomp.REFUSED.items():
        assert _verdict(number) == 0x50000 | error, name


def test_the_filter_looks_at_arguments():
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert _verdict(56, (flag | 17,)) == EPERM
    assert _verdict(56, (0x3D0F00,)) == ALLOW  # a thread
    for name, (number, arguments, error) in seccomp.BY_ARGUMENT.items():
        for argument, values in arguments.items():
            for value in values:
                assert _verdict(number, _values(arguments, **{f'a{argument}': value})) == ALLOW, name
            assert _verdict(number, _values(arguments, **{f'a{argument}': 0x7777})) == 0x50000 | error, name
    assert _verdict(53, (2, 1)) == _verdict(53, (30, 1)) == EPERM  # pairs of other families
    assert _verdict(53, (1, 5)) == _verdict(53, (1, 3)) == EPERM  # and of other types
    assert _verdict(54, (9, 1, 16)) == _verdict(54, (9, 1, 76)) == EPERM  # what gives a socket a name


def test_locks_of_records_are_answered_and_not_done():
    for number, argument, values in seccomp.PRETENDED.values():
        for value in values:
            assert _verdict(number, (0,) * argument + (value,)) == 0x50000
    for command in (1024, 1026, 1036, 1038):  # F_SETLEASE, F_NOTIFY, hints
        assert _verdict(72, (3, command)) == EPERM
    assert _verdict(73, (3, 2)) == 0x50000  # flock


def test_no_number_stands_twice():
    numbers = [
        *seccomp.ALLOWED.values(),
        *(n for n, *_ in seccomp.BY_ARGUMENT.values()),
        *(n for n, _ in seccomp.REFUSED.values()),
    ]
    assert len(set(numbers)) == len(numbers)


HELD = """
import fcntl, struct, time
f = open("/python/bin/python3", "rb")
fcntl.flock(f, fcntl.LOCK_EX)
fcntl.lockf(f, fcntl.LOCK_SH)
fcntl.fcntl(f, 37, struct.pack("hhqqi", fcntl.F_RDLCK, 0, 0, 0, 0))
time.sleep(1.5)
"""
SEEN = """
import fcntl, struct
f = open("/python/bin/python3", "rb")
fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
print([struct.unpack("hhqqi4x", fcntl.fcntl(f, command, asked))[0] == fcntl.F_UNLCK for command in (5, 36)])
for command in (1024, 1026):
    try:
        fcntl.fcntl(f, command, 1)
        print("done")
    except PermissionError:
        print("no")
"""


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_no_snippet_sees_a_lock_of_another_on_the_shared_root(path, pools):
    pool = pools(path)
    held = pool.submit(HELD)
    time.sleep(0.5)
    assert pool.submit(SEEN).result(60).stdout == '[True, True]\nno\nno\n'
    assert held.result(60).verdict is Verdict.OK, held.result().stderr


NAMELESS = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    for option in (16, 76):
        try:
            a.setsockopt(socket.SOL_SOCKET, option, 1)
        except PermissionError:
            pass
    b.close()
    for _ in range(2):
        try:
            a.send(b"x")
        except OSError:
            pass
    print(repr(a.getsockname()))
"""


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_no_socket_gets_a_name(path, pools):
    assert pools(path).submit(NAMELESS).result(60).stdout == "''\n''\n"


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_times_of_devices_cannot_be_set_and_devices_still_work(path, pools):
    code = (
        'import os\nfor d in ("null", "zero", "full", "random", "urandom"):\n    try:\n        os.utime("/dev/" + d)\n'
        '        print("touched")\n    except OSError:\n        pass\n'
        'open("/dev/null", "w").write("x")\nprint(len(open("/dev/urandom", "rb").read(5)))'
    )
    assert pools(path).submit(code).result(60).stdout == '5\n'
