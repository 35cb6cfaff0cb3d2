"""Snippets whose exact output proves that a sandbox isolates, and does so before it is trusted."""

from __future__ import annotations

import dataclasses

from retool_jax.core.records import ExecResult, Verdict


@dataclasses.dataclass(frozen=True)
class Canary:
    """A claim about the sandbox, with a snippet that prints `expected` only where the claim holds."""

    claim: str
    code: str
    expected: str


CANARIES = (
    Canary('right answers',
           'import math\nprint(math.factorial(20) % 1000007, sum(range(10**5)))', '794133 4999950000\n'),
    Canary('no file of the host',
           'import os\nprint([os.path.exists(p) for p in ("/etc/passwd", "/root", "/home", "/sys", '
           '"/proc/1")])', '[False, False, False, False, False]\n'),
    Canary('nothing writable but /box',
           'def probe(path):\n    try:\n        open(path, "w").close()\n        return True\n'
           '    except OSError:\n        return False\n'
           'print([probe(p) for p in ("/x", "/python/x", "/runner/x", "/dev/x", "/box/x")])',
           '[False, False, False, False, True]\n'),
    Canary('no network', 'import socket\nfor family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):\n    try:\n'
           '        socket.socket(family)\n        print("open")\n    except PermissionError:\n        print("denied")',
           'denied\n' * 3),
    Canary('dangerous system calls denied', 'import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n'
           'print([c.syscall(n, 0, 0, 0, 0, 0) for n in (101, 165, 272, 308, 321, 425, 250, 317)])',
           f'{[-1] * 8}\n'),
    Canary('no capabilities, a process namespace of its own',
           'import ctypes, os, struct\nc = ctypes.CDLL(None)\nd = ctypes.create_string_buffer(24)\n'
           'c.syscall(125, struct.pack("Ii", 0x20080522, 0), d)\n'
           'print(d.raw == bytes(24), os.getpid(), os.getuid() != 0)',
           'True 1 True\n'),
)  # fmt: skip


def combined() -> Canary:
    """All of them as one snippet."""
    code = '\n'.join(f'exec({canary.code!r}, {{}})' for canary in CANARIES)
    return Canary('isolation', code, ''.join(canary.expected for canary in CANARIES))


def passed(canary: Canary, result: ExecResult) -> bool:
    """Whether the result is what the claim needs."""
    return result.verdict is Verdict.OK and result.stdout == canary.expected
