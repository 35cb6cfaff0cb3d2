"""Memory, process and CPU accounting by control groups: v1 or v2, whichever may be written.

One tree per supervisor, which holds a lock on it as long as it lives, so that a later one can sweep
what the dead left, whichever pid namespaces they are in; in it leases: groups that snippets have one
after another (making and removing memory groups per snippet costs more than the snippet).

Not covered: CPU time is counted and never throttled (child.py ends what has spent too much); disks, of which a snippet
sees none that it can write; memory of the kernel that it charges to nobody. A controller that may not be written here
enforces nothing and its counters read 0: `Groups.missing` names it. Version 2 is tested on a tree of plain files only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import re
import signal
import time
from pathlib import Path

_PREFIX = 'retool_jax'
_V1 = ('memory', 'pids', 'cpuacct')
# What a snippet may leave charged (names looked for in vain, cached pages) in a group that is used again: about what
# the kernel charges ahead per core. With more the group is given up, and the kernel frees it when it needs the memory.
_LEFT_BYTES = 4 << 20
SCARCE = (errno.EMFILE, errno.ENFILE)  # this process, or the machine, has no descriptors left


def start_time(pid: int) -> str | None:
    """The kernel's start time of a process; with the pid it names a process for good. None if gone."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        return None


def expose(pid: int) -> None:
    """Has the kernel end this process first where the machine's memory runs out: rather a snippet than a worker.

    Raises:
        OSError: no descriptor is left. Whatever else forbids it is passed over.
    """
    try:
        # No Path: Python 3.12 keeps the parts of every path for good, 440 bytes a snippet.
        with open(f'/proc/{pid}/oom_score_adj', 'w') as file:
            file.write('1000')
    except OSError as error:
        if error.errno in SCARCE:
            raise


def _mounts() -> list[tuple[str, str, set[str], str]]:
    """(mount point, root within the hierarchy, options, type) of the mounted control groups."""
    found = []
    for line in Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        kind, _, options = right.split(' ', 2)
        if kind in ('cgroup', 'cgroup2'):
            fields = left.split()
            found.append((fields[4], fields[3], set(options.split(',')), kind))
    return found


def _bases(mount: str, root: str, own: str) -> list[Path]:
    """Where a tree may be made: the process's own group first, the mount point last."""
    relative = os.path.relpath(own, root) if root != '/' and own.startswith(root) else own.lstrip('/')
    return [Path(mount, relative), Path(mount)]


def _own_groups() -> dict[str, str]:
    groups = {}
    for line in Path('/proc/self/cgroup').read_text().splitlines():
        _, names, path = line.split(':', 2)
        for name in names.split(','):
            groups[name] = path
    return groups


def cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quotas of its control groups, rounded up."""
    if not hasattr(os, 'sched_getaffinity'):  # macOS
        return os.cpu_count() or 1
    found = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        own = _own_groups()
        for mount, root, options, kind in _mounts():
            if kind == 'cgroup2' or 'cpu' in options:
                at = _bases(mount, root, own.get('' if kind == 'cgroup2' else 'cpu', '/'))[0]
                for group in [at, *at.parents]:
                    if group == Path(mount).parent:
                        break
                    found = min(found, _quota(group))
    return max(1, math.ceil(found))


def _quota(group: Path) -> float:
    """The cores that one group allows; infinite where it sets no limit."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: 'max'
        quota, period = map(int, (group / 'cpu.max').read_text().split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):
        quota = int((group / 'cpu.cfs_quota_us').read_text())
        return quota / int((group / 'cpu.cfs_period_us').read_text()) if quota > 0 else math.inf
    return math.inf


class Groups:
    """The tree of one supervisor; `missing` names what no group enforces here."""

    def __init__(self):
        # A pid means something within its namespace alone.
        namespace = os.stat('/proc/self/ns/pid').st_ino
        self.name = f'{_PREFIX}_{os.getpid()}_ns{namespace}_{start_time(os.getpid())}'
        self._locks: dict[Path, int] = {}  # one for each tree: the sign of life
        self.roots: dict[str, Path] = {}  # controller → this supervisor's directory
        self.version = 0
        own = _own_groups()
        mounts = _mounts()
        for controller in _V1:
            for mount, root, options, kind in mounts:
                # The first will do: one mounted twice has the same files, and its lock would wait for ours.
                if kind == 'cgroup' and controller in options and controller not in self.roots:
                    self._adopt(controller, _bases(mount, root, own.get(controller, '/')))
        if self.roots:
            self.version = 1
        else:
            bases = [
                base
                for mount, root, _, kind in mounts
                if kind == 'cgroup2'
                for base in _bases(mount, root, own.get('', '/'))
            ]
            if self._adopt_v2(bases, move=False) or self._adopt_v2(bases, move=True):
                self.version = 2
        self.missing = [c for c in _V1 if c not in self.roots]
        self._free: list[Lease] = []
        self._made = 0

    def _adopt(self, controller: str, bases: list[Path]) -> None:
        for base in bases:
            _sweep(base)
            with contextlib.suppress(OSError):
                self.roots[controller] = self._make(base)
                return

    def _adopt_v2(self, bases: list[Path], move: bool) -> bool:
        for base in bases:
            _sweep(base)
            with contextlib.suppress(OSError):
                available = (base / 'cgroup.controllers').read_text().split()
                if not {'memory', 'pids'} <= set(available):
                    continue
                if not {'memory', 'pids'} <= set((base / 'cgroup.subtree_control').read_text().split()):
                    _delegate(base, move)
                root = self._make(base)
                (root / 'cgroup.subtree_control').write_text('+memory +pids')
                self.roots = {c: root for c in _V1}
                return True
        return False

    def _make(self, base: Path) -> Path:
        """This supervisor's directory below `base`, locked for as long as it lives.

        Raises:
            OSError: nothing can be made or locked there.
        """
        root = base / self.name
        while root not in self._locks:
            root.mkdir(exist_ok=True)
            lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(root).st_ino == os.fstat(lock).st_ino:
                    self._locks[root] = lock
                    continue
            os.close(lock)  # another swept it before it was locked
        return root

    def adopt(self, pid: int, name: str) -> None:
        """Puts a process (a zygote) into a group of its own, so that the tree holds all there is."""
        for root in set(self.roots.values()):
            (root / name).mkdir(exist_ok=True)
            (root / name / 'cgroup.procs').write_text(str(pid))

    def take(self) -> Lease:
        """An empty lease; give it back when its processes are gone."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return Lease(self.roots, self.version, f'lease{self._made}')

    def give(self, lease: Lease) -> None:
        """Takes a lease back for the next snippet; one that is not empty is given up."""
        if lease.is_empty():
            self._free.append(lease)
        else:
            lease.close()

    def remove(self) -> None:
        """Kills what is left in the tree and removes it."""
        for root in set(self.roots.values()):
            _remove(root)
        while self._locks:
            os.close(self._locks.popitem()[1])


class Lease:
    """One snippet's limits and counters. Without groups every counter reads 0."""

    def __init__(self, roots: dict[str, Path], version: int, name: str):
        self.version = version
        self._files: dict[str, int] = {}
        self._procs: list[int] = []
        self._paths = {root / name for root in roots.values()}
        self._base = (0.0, 0, 0)
        try:
            self._open({c: root / name for c, root in roots.items()})
        except OSError:
            self.close()
            raise

    def _open(self, paths: dict[str, Path]) -> None:
        version = self.version
        for path in self._paths:
            path.mkdir(exist_ok=True)
            self._procs.append(os.open(path / 'cgroup.procs', os.O_WRONLY | os.O_CLOEXEC))
        names = {1: (('memory', 'memory.limit_in_bytes', 'limit'), ('memory', 'memory.usage_in_bytes', 'usage'),
                     ('memory', 'memory.oom_control', 'oom'), ('memory', 'memory.max_usage_in_bytes', 'peak'),
                     ('memory', 'memory.memsw.limit_in_bytes', 'swap'), ('pids', 'pids.max', 'pids_max'),
                     ('pids', 'pids.current', 'pids'), ('cpuacct', 'cpuacct.usage', 'cpu')),
                 2: (('memory', 'memory.max', 'limit'), ('memory', 'memory.current', 'usage'),
                     ('memory', 'memory.events', 'oom'), ('memory', 'memory.peak', 'peak'),
                     ('memory', 'memory.swap.max', 'swap'), ('memory', 'pids.max', 'pids_max'),
                     ('memory', 'pids.current', 'pids'), ('memory', 'cpu.stat', 'cpu'))}.get(version, ())  # fmt: skip
        for controller, file, key in names:
            if controller in paths:
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    try:
                        self._files[key] = os.open(paths[controller] / file, os.O_RDWR | os.O_CLOEXEC)
                    except PermissionError:  # a read-only file, for all but root
                        self._files[key] = os.open(paths[controller] / file, os.O_RDONLY | os.O_CLOEXEC)
        if version == 2:
            self._write('swap', 0)
            with contextlib.suppress(OSError):
                (paths['memory'] / 'memory.oom.group').write_text('1')

    def close(self) -> None:
        """Removes the groups and lets go of them; one with processes in it stays until the tree goes."""
        for descriptor in [*self._procs, *self._files.values()]:
            os.close(descriptor)
        self._procs, self._files = [], {}
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.rmdir()

    def is_empty(self) -> bool:
        """Whether no process and next to no memory is left here, so that the next snippet's limits are its own."""
        try:
            return self._read('pids') == 0 and self._read('usage') <= _LEFT_BYTES
        except OSError:
            return False

    def place(self, pid: int) -> None:
        """Moves a process here.

        Raises:
            OSError: the kernel refuses, as where the process is gone.
        """
        for descriptor in self._procs:
            os.pwrite(descriptor, str(pid).encode(), 0)

    def place_myself(self) -> None:
        """For a child between fork and exec."""
        self.place(0)

    def arm(self, memory_bytes: int, processes: int) -> None:
        """Sets the snippet's limits above what its process has brought, and starts its counters."""
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


def _delegate(base: Path, move: bool) -> None:
    """Turns the controllers on below `base`; with `move` its own processes go to a leaf first.

    v2 allows processes only in leaves: needed at a container's root and in a user's scope, nowhere else.
    """
    if move:
        leaf = base / f'{_PREFIX}_host'
        leaf.mkdir(exist_ok=True)
        for pid in _pids(base):
            with contextlib.suppress(OSError):
                (leaf / 'cgroup.procs').write_text(str(pid))
    (base / 'cgroup.subtree_control').write_text('+memory +pids')


def _pids(group: Path) -> list[int]:
    """The group's processes that this pid namespace knows: version 2 calls all others 0, which to kill() is us."""
    return [int(pid) for pid in (group / 'cgroup.procs').read_text().split() if int(pid) > 0]


def _sweep(base: Path) -> None:
    """Removes the trees of supervisors that no longer live: those that nobody holds a lock on."""
    with contextlib.suppress(OSError):
        for path in base.glob(f'{_PREFIX}_*_ns*_*'):
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)
                finally:
                    os.close(lock)


def _remove(root: Path) -> None:
    """Kills what is in a tree, by the kernel's own means where there are (version 2), and removes it."""
    for attempt in range(50):
        with contextlib.suppress(OSError), open(root / 'cgroup.kill', 'r+') as file:
            file.write('1')
        groups = sorted((Path(d) for d, _, _ in os.walk(root)), reverse=True)
        for group in groups:
            with contextlib.suppress(OSError):
                for pid in _pids(group):
                    if pid != os.getpid():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                group.rmdir()
        if not root.exists():
            return
        time.sleep(0.02 * (attempt + 1) if attempt < 5 else 0.1)
