"""Who writes to a run's folder: one run at a time, known by host and process, alive by a lock and a heartbeat.

In a store (`Claim`) there are no locks: an object that is made only where there is none, and a heartbeat beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from pathlib import Path

from retool_jax.core import storage
from retool_jax.core.errors import UserError

NAME, BEAT = storage.OWN
BEAT_S, STALE_S = 5.0, 60.0  # a store that several hosts share may show a file's time half a minute late


class Owner:
    """Holds a folder that is there, until `close`.

    A lock ends with its process, so a killed run stands in nobody's way. Where the file system has no locks, or keeps
    them from other hosts, the process of the same host is looked for, and that of another host is believed for
    STALE_S after its last heartbeat.

    Raises:
      UserError: another run holds the folder; its host and process are named.
    """

    def __init__(self, directory: Path):
        self.path, self.token = directory / NAME, secrets.token_hex(8)
        self._descriptor = _take(self.path, self.token)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='heartbeat', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the folder free."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone by now
            self.path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def token(directory: Path) -> str:
    """What the owner of a folder is known by, '' where none is seen from here."""
    try:
        return json.loads((directory / NAME).read_text())['token']
    except (OSError, ValueError, KeyError):
        return ''


def _take(path: Path, token: str) -> int:
    """A descriptor of the file, which names this process and is locked where it can be."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            refused = _held(descriptor, path)
            if refused:
                raise UserError(refused)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):  # not one that its owner has just removed
                    try:
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, _me(token), 0)
                    except OSError:
                        path.unlink()
                        raise
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _me(token: str) -> bytes:
    """What an owner's file says of this process."""
    me = {'host': socket.gethostname(), 'pid': os.getpid(), 'started': _started(os.getpid()), 'token': token}
    return json.dumps(me).encode()


def _held(descriptor: int, path: Path) -> str | None:
    """Why the folder cannot be taken, if so; else the lock is held, where there are locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = False
    except BlockingIOError:
        locked = True
    except OSError:  # a file system without locks
        locked = False
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0) or b'{}')
        host, pid, started = owner.get('host'), owner.get('pid'), owner.get('started')
    except (ValueError, AttributeError):
        host = pid = started = None
    if not locked:
        if host is None or (host, pid) == (socket.gethostname(), os.getpid()):
            return None
        if host == socket.gethostname():
            if _started(pid) is None or _started(pid) != started:  # gone, or its number is another's by now
                return None
        elif _age(descriptor, path) > STALE_S:
            return None
    who = f'process {pid} on {host}' if host else 'another process'
    return f'run.dir={str(path.parent)!r} is in use by {who}; stop that run, or choose another folder'


class Claim:
    """Holds a run's folder in a store, until `close`.

    The object that says so is made only where there is none, which the store itself decides. One whose process of this
    host is gone, or that has had no heartbeat for STALE_S by the clocks of store and host, is replaced. Two that
    replace it within the same second may both go on until one publishes, which `check` refuses; a run whose host has
    stood still for longer than STALE_S hears of it there too. What orbax writes meanwhile is not protected.

    Raises:
      UserError: another run holds the folder; its host, process and age are named; or what the store refuses.
    """

    def __init__(self, address: str):
        self.address, self.token = address, secrets.token_hex(8)
        self._fs, self._root = storage.reach('run.dir', address)
        with storage.told('run.dir', address):
            while not self._take():
                pass
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='heartbeat', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the folder free."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # whoever comes next sees that this process is gone
            if _stored(self.address).get('token') == self.token:
                self._remove()

    def _take(self) -> bool:
        try:
            self._fs.pipe_file(f'{self._root}/{NAME}', _me(self.token), mode='create')
        except FileExistsError:
            if refused := self._refusal():
                raise UserError(refused) from None
            self._remove()
            return False
        return True

    def _remove(self) -> None:
        for name in (BEAT, NAME):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f'{self._root}/{name}')

    def _refusal(self) -> str | None:
        """Why the folder cannot be taken, if so."""
        owner, age = _stored(self.address), self._age()
        host, pid, started = owner.get('host'), owner.get('pid'), owner.get('started')
        if host is None or (host != socket.gethostname() and age > STALE_S):
            return None
        if host == socket.gethostname() and (pid == os.getpid() or _started(pid) is None or _started(pid) != started):
            return None
        return (
            f'run.dir={self.address!r} is in use by process {pid} on {host}, heard of {age:.0f} s ago; stop that run, '
            'or choose another folder'
        )

    def _age(self) -> float:
        """Seconds since the last heartbeat, or since the folder was taken."""
        times = []
        for name in (NAME, BEAT):
            with contextlib.suppress(FileNotFoundError):
                times.append(self._fs.modified(f'{self._root}/{name}').timestamp())
        return max(0.0, time.time() - max(times, default=0.0))

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the next one may come through
                self._fs.pipe_file(f'{self._root}/{BEAT}', self.token.encode())


def check(address: str, token: str) -> None:
    """Raises a UserError where a folder of a store is not held under this token any more."""
    with storage.told('run.dir', address):
        owner = _stored(address)
    if owner.get('token') != token:
        by = f'by process {owner["pid"]} on {owner["host"]}' if 'pid' in owner else 'or removed'
        raise UserError(f'run.dir={address!r} was taken over {by}; this run ends, and what it has published is intact')


def _stored(address: str) -> dict:
    """What the owner's object in a store says, {} without one."""
    fs, root = storage.reach('run.dir', address)
    try:
        found = json.loads(fs.cat_file(f'{root}/{NAME}'))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _started(pid: object) -> str | None:
    """When a process of this host was started, in the kernel's ticks; '' where that is not told; None: no such one."""
    try:
        stat = Path(f'/proc/{pid}/stat').read_text()
        return stat.rpartition(')')[2].split()[19]
    except (OSError, IndexError):
        if Path('/proc/self/stat').exists():
            return None
    try:
        os.kill(int(str(pid)), 0)
    except PermissionError:
        return ''
    except (OSError, ValueError):
        return None
    return ''


def _age(descriptor: int, path: Path) -> float:
    """Seconds since the last heartbeat by the file system's own clock; hosts may disagree about the time."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime
