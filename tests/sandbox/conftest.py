"""Pools that the sandbox's tests share, and a census of what a pool keeps alive."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from retool_jax.sandbox.pool import Pool
from tests.sandbox.given import LIMITS, tiny

collect_ignore = ['cases.py']


@pytest.fixture(scope='session')
def pools():
    """The two paths with the suite's limits, started when first asked for."""
    if platform.system() != 'Linux' or platform.machine() != 'x86_64':
        pytest.skip('the local pool needs Linux on x86_64')
    started: dict[str, Pool] = {}

    def get(path: str) -> Pool:
        if path not in started:
            started[path] = Pool(tiny(path=path, zygotes=1, spares=2, concurrency=2, **LIMITS)).start()
        return started[path]

    yield get
    for pool in started.values():
        pool.close()


def children_of(pid: int) -> list[int]:
    """All descendants of a process, by the kernel's table."""
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rpartition(')')[2].split()
            parents[int(path.parent.name)] = int(fields[1])
        except (OSError, IndexError):
            continue
    found, todo = [], [pid]
    while todo:
        at = todo.pop()
        below = [child for child, parent in parents.items() if parent == at]
        found += below
        todo += below
    return found


class Census:
    """What a pool holds when idle; `settle` waits until it holds no more than at the start."""

    def __init__(self, pool: Pool):
        self.pid = pool._process.pid
        self.name = f'retool_jax_{self.pid}_'
        deadline = time.monotonic() + 20
        self.base = self.count()
        while time.monotonic() < deadline:  # the spares are still being made
            time.sleep(0.3)
            now = self.count()
            if now == self.base:
                break
            self.base = now

    def count(self) -> dict[str, int]:
        descendants = children_of(self.pid)
        return {
            'processes': len(descendants),
            'descriptors': len(os.listdir(f'/proc/{self.pid}/fd')),
            'jail descriptors': sum(_descriptors(pid) for pid in descendants),
            'mounts': len(Path('/proc/self/mountinfo').read_text().splitlines()),
        }

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            now = self.count()
            grown = {k: (self.base[k], v) for k, v in now.items() if v > self.base[k]}
            # A lease that is had for the first time keeps its counters' descriptors.
            grown.pop('descriptors', None) if now['descriptors'] <= self.base['descriptors'] + 44 else None
            if not grown:
                return
            assert time.monotonic() < deadline, f'left behind: {grown}'
            time.sleep(0.05)


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f'/proc/{pid}/fd'))
    except OSError:
        return 0


@pytest.fixture(scope='session')
def census(pools):
    """`census(path)` gives the idle census of a pool, taken once."""
    taken: dict[str, Census] = {}

    def get(path: str) -> Census:
        if path not in taken:
            pools(path).submit('print(1)').result(120)
            taken[path] = Census(pools(path))
        return taken[path]

    return get
