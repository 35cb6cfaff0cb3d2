"""Memory, process and CPU accounting by control groups: v1 or v2, whichever may be written.

One tree per supervisor, named after its pid and start time so that a later one can sweep it; in it
a fixed set of slots that snippets use one after another (making and removing memory groups per
snippet costs more than the snippet).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import time

_PREFIX = 'retool_jax'
_V1 = ('memory', 'pids', 'cpuacct')


def start_time(pid: int) -> str | None:
    """The kernel's start time of a process; with the pid it names a process for good. None if gone."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return None


def _mounts() -> list[tuple[str, str, set[str], str]]:
    """(mount point, root within the hierarchy, options, type) of the mounted control groups."""
    found = []
    for line in pathlib.Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        kind, _, options = right.split(' ', 2)
        if kind in ('cgroup', 'cgroup2'):
            fields = left.split()
            found.append((fields[4], fields[3], set(options.split(',')), kind))
    return found


def _bases(mount: str, root: str, own: str) -> list[pathlib.Path]:
    """Where a tree may be made: the process's own group first, the mount point last."""
    relative = os.path.relpath(own, root) if root != '/' and own.startswith(root) else own.lstrip('/')
    return [pathlib.Path(mount, relative), pathlib.Path(mount)]


def _own_groups() -> dict[str, str]:
    groups = {}
    for line in pathlib.Path('/proc/self/cgroup').read_text().splitlines():
        _, names, path = line.split(':', 2)
        for name in names.split(','):
            groups[name] = path
    return groups


class Groups:
    """The tree of one supervisor; `missing` names what no group enforces here."""

    def __init__(self):
        self.name = f'{_PREFIX}_{os.getpid()}_{start_time(os.getpid())}'
        self.roots: dict[str, pathlib.Path] = {}  # controller → this supervisor's directory
        self.version = 0
        own = _own_groups()
        mounts = _mounts()
        for controller in _V1:
            for mount, root, options, kind in mounts:
                if kind == 'cgroup' and controller in options:
                    self._adopt(controller, _bases(mount, root, own.get(controller, '/')))
        if self.roots:
            self.version = 1
        else:
            bases = [base for mount, root, _, kind in mounts if kind == 'cgroup2'
                     for base in _bases(mount, root, own.get('', '/'))]
            if self._adopt_v2(bases, move=False) or self._adopt_v2(bases, move=True):
                self.version = 2
        self.missing = [c for c in _V1 if c not in self.roots]
        self._free: list[Slot] = []
        self._made = 0

    def _adopt(self, controller: str, bases: list[pathlib.Path]) -> None:
        for base in bases:
            _sweep(base)
            with contextlib.suppress(OSError):
                (base / self.name).mkdir(exist_ok=True)
                self.roots[controller] = base / self.name
                return

    def _adopt_v2(self, bases: list[pathlib.Path], move: bool) -> bool:
        for base in bases:
            _sweep(base)
            with contextlib.suppress(OSError):
                available = (base / 'cgroup.controllers').read_text().split()
                if not {'memory', 'pids'} <= set(available):
                    continue
                if not {'memory', 'pids'} <= set((base / 'cgroup.subtree_control').read_text().split()):
                    _delegate(base, move)
                root = base / self.name
                root.mkdir(exist_ok=True)
                (root / 'cgroup.subtree_control').write_text('+memory +pids')
                self.roots = {c: root for c in _V1}
                return True
        return False

    def adopt(self, pid: int, name: str) -> None:
        """Puts a process (a zygote) into a group of its own, so that the tree holds all there is."""
        for root in set(self.roots.values()):
            (root / name).mkdir(exist_ok=True)
            (root / name / 'cgroup.procs').write_text(str(pid))

    def take(self) -> Slot:
        """An empty slot; give it back when its processes are gone."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return Slot(self.roots, self.version, f'slot{self._made}')

    def give(self, slot: Slot) -> None:
        """Takes a slot back for the next snippet."""
        self._free.append(slot)

    def remove(self) -> None:
        """Kills what is left in the tree and removes it."""
        for root in set(self.roots.values()):
            _remove(root)


class Slot:
    """One snippet's limits and counters. Without groups every counter reads 0."""

    def __init__(self, roots: dict[str, pathlib.Path], version: int, name: str):
        self.version = version
        self._files: dict[str, int] = {}
        self._procs: list[int] = []
        paths = {c: root / name for c, root in roots.items()}
        for path in set(paths.values()):
            path.mkdir(exist_ok=True)
            self._procs.append(os.open(path / 'cgroup.procs', os.O_WRONLY | os.O_CLOEXEC))
        names = {1: (('memory', 'memory.limit_in_bytes', 'limit'), ('memory', 'memory.usage_in_bytes', 'usage'),
                     ('memory', 'memory.oom_control', 'oom'), ('memory', 'memory.max_usage_in_bytes', 'peak'),
                     ('memory', 'memory.memsw.limit_in_bytes', 'swap'), ('pids', 'pids.max', 'pids_max'),
                     ('pids', 'pids.current', 'pids'), ('cpuacct', 'cpuacct.usage', 'cpu')),
                 2: (('memory', 'memory.max', 'limit'), ('memory', 'memory.current', 'usage'),
                     ('memory', 'memory.events', 'oom'), ('memory', 'memory.peak', 'peak'),
                     ('memory', 'memory.swap.max', 'swap'), ('memory', 'pids.max', 'pids_max'),
                     ('memory', 'pids.current', 'pids'), ('memory', 'cpu.stat', 'cpu'))}.get(version, ())
        for controller, file, key in names:
            if controller in paths:
                with contextlib.suppress(OSError):
                    try:
                        self._files[key] = os.open(paths[controller] / file, os.O_RDWR | os.O_CLOEXEC)
                    except PermissionError:  # a read-only file, for all but root
                        self._files[key] = os.open(paths[controller] / file, os.O_RDONLY | os.O_CLOEXEC)
        if version == 2:
            self._write('swap', 0)
            with contextlib.suppress(OSError):
                (paths['memory'] / 'memory.oom.group').write_text('1')
        self._base = (0.0, 0, 0)

    def place(self, pid: int) -> None:
        """Moves a process here; raises OSError where the kernel refuses."""
        for descriptor in self._procs:
            os.pwrite(descriptor, str(pid).encode(), 0)

    def place_myself(self) -> None:
        """For a child between fork and exec."""
        self.place(0)

    def arm(self, memory_bytes: int, processes: int) -> None:
        """Sets the snippet's limits above what is charged already, and starts its counters."""
        usage = self._read('usage')
        limit = usage + memory_bytes
        if self.version == 1 and 'swap' in self._files:
            self._write('swap', -1)
        self._write('limit', limit)
        if self.version == 1:
            self._write('swap', limit)
        self._write('pids_max', self._read('pids') + processes)
        with contextlib.suppress(OSError):  # before Linux 6.12 v2 cannot reset its peak
            self._write('peak', 0)
        self._base = (self._cpu(), self._oom(), usage)

    def disarm(self) -> None:
        """Lifts the limits before the next process is placed."""
        self._write('pids_max', 'max')
        if self.version == 1 and 'swap' in self._files:
            self._write('swap', -1)
        self._write('limit', -1 if self.version == 1 else 'max')

    def cpu_s(self) -> float:
        """CPU seconds of all the snippet's processes since `arm`."""
        return self._cpu() - self._base[0]

    def oom_kills(self) -> int:
        """Processes that the kernel killed for memory since `arm`."""
        return self._oom() - self._base[1]

    def peak_mb(self) -> float:
        """Highest charge since `arm`, above the charge at that time."""
        return max(0, self._read('peak') - self._base[2]) / 2**20

    @property
    def enforced(self) -> set[str]:
        """Which of memory, pids and cpu are counted here."""
        return {k for k, file in (('memory', 'limit'), ('pids', 'pids_max'), ('cpu', 'cpu')) if file in self._files}

    def _cpu(self) -> float:
        if 'cpu' not in self._files:
            return 0.0
        text = os.pread(self._files['cpu'], 4096, 0)
        return int(text) / 1e9 if self.version == 1 else int(re.search(rb'usage_usec (\d+)', text)[1]) / 1e6

    def _oom(self) -> int:
        if 'oom' not in self._files:
            return 0
        match = re.search(rb'^oom_kill (\d+)', os.pread(self._files['oom'], 4096, 0), re.M)
        return int(match[1]) if match else 0

    def _read(self, key: str) -> int:
        return int(os.pread(self._files[key], 64, 0)) if key in self._files else 0

    def _write(self, key: str, value: int | str) -> None:
        if key in self._files:
            os.pwrite(self._files[key], str(value).encode(), 0)


def _delegate(base: pathlib.Path, move: bool) -> None:
    """Turns the controllers on below `base`; with `move` its own processes go to a leaf first.

    v2 allows processes only in leaves: needed at a container's root and in a user's scope, nowhere else.
    """
    if move:
        leaf = base / f'{_PREFIX}_host'
        leaf.mkdir(exist_ok=True)
        for pid in (base / 'cgroup.procs').read_text().split():
            with contextlib.suppress(OSError):
                (leaf / 'cgroup.procs').write_text(pid)
    (base / 'cgroup.subtree_control').write_text('+memory +pids')


def _sweep(base: pathlib.Path) -> None:
    """Removes the trees of supervisors that no longer live."""
    with contextlib.suppress(OSError):
        for path in base.glob(f'{_PREFIX}_*_*'):
            _, pid, started = path.name.rsplit('_', 2)
            if pid.isdigit() and start_time(int(pid)) != started:
                _remove(path)


def _remove(root: pathlib.Path) -> None:
    for attempt in range(50):
        groups = sorted((pathlib.Path(d) for d, _, _ in os.walk(root)), reverse=True)
        for group in groups:
            with contextlib.suppress(OSError):
                for pid in (group / 'cgroup.procs').read_text().split():
                    if int(pid) != os.getpid():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                group.rmdir()
        if not root.exists():
            return
        time.sleep(0.02 * (attempt + 1) if attempt < 5 else 0.1)
