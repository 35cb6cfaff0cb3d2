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
from collections.abc import Callable
from pathlib import Path

from retool_jax.core import console, storage
from retool_jax.core.errors import UserError
from retool_jax.core.signals import uninterrupted

NAME, BEAT = storage.OWN
BEAT_S, STALE_S = 5.0, 60.0  # a store that several hosts share may show a file's time half a minute late
PATIENCE_S = 2 * STALE_S  # an NFS server keeps the locks of a client that was lost for 90 s
POLL_S = 1.0


class Held(UserError):
    """A folder has an owner. heard: when it last gave a sign, by the folder's clock; None: it runs on this host."""

    def __init__(self, line: str, heard: float | None):
        super().__init__(line)
        self.heard = heard


def patiently(take: Callable[[], None]) -> None:
    """Calls `take`, which takes a folder, and again while its owner is on another host and gives no sign.

    A job that is begun anew elsewhere meets the heartbeat of the process that was lost, for up to STALE_S.

    Raises:
      Held: the owner runs on this host, has given a sign meanwhile, or keeps its lock for PATIENCE_S.
    """
    began, heard = time.monotonic(), None
    while True:
        try:
            with uninterrupted():
                return take()
        except Held as held:
            late = time.monotonic() - began > PATIENCE_S
            if held.heard is None or late or (heard is not None and held.heard != heard):
                raise
            if heard is None:
                heard = held.heard
                console.say(f'{str(held).partition(";")[0]}; waiting to see whether that still runs')
        time.sleep(POLL_S)


class Owner:
    """Holds a folder that is there, until `close`.

    A lock ends with its process, so a killed run stands in nobody's way. Where the file system has no locks, or keeps
    them from other hosts, the process of the same host is looked for, and that of another host is believed for
    STALE_S after its last heartbeat.

    Raises:
      Held: another run holds the folder; its host and process are named.
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
            _check_free(descriptor, path)
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


def _check_free(descriptor: int, path: Path) -> None:
    """Raises Held where the folder cannot be taken; else the lock is held, where there are locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = False
    except BlockingIOError:
        locked = True
    except OSError:  # a file system without locks
        locked = False
    try:
        owner = dict(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):  # being written, or damaged
        owner = {}
    heard = os.fstat(descriptor).st_mtime
    if not locked and _gone(owner, _now(path.parent) - heard):
        return
    who = f'process {owner["pid"]} on {owner["host"]}' if _whole(owner) else 'another process'
    line = f'run.dir={str(path.parent)!r} is in use by {who}; stop that run, or choose another folder'
    raise Held(line, heard if _whole(owner) and owner['host'] != socket.gethostname() else None)


class Claim:
    """Holds a run's folder in a store, until `close`.

    The object that says so is made only where there is none, which the store itself decides. One whose process of this
    host is gone, or that has had no heartbeat for STALE_S by the clocks of store and host, is replaced. Two that
    replace it within the same second may both go on until one publishes, which `check` refuses; a run whose host has
    stood still for longer than STALE_S hears of it there too. What orbax writes meanwhile is not protected.

    Raises:
      Held: another run holds the folder; its host, process and age are named.
      UserError: what the store refuses.
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
            self._check_free()
            self._remove()
            return False
        return True

    def _remove(self) -> None:
        for name in (BEAT, NAME):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f'{self._root}/{name}')

    def _check_free(self) -> None:
        """Raises Held where the folder cannot be taken."""
        owner, heard = _stored(self.address), self._heard()
        age = max(0.0, time.time() - heard)
        if _gone(owner, age):
            return
        line = (
            f'run.dir={self.address!r} is in use by process {owner["pid"]} on {owner["host"]}, heard of {age:.0f} s '
            'ago; stop that run, or choose another folder'
        )
        raise Held(line, None if owner['host'] == socket.gethostname() else heard) from None

    def _heard(self) -> float:
        """When the last heartbeat was, or the folder was taken, by the store's clock."""
        times = []
        for name in (NAME, BEAT):
            with contextlib.suppress(FileNotFoundError):
                times.append(self._fs.modified(f'{self._root}/{name}').timestamp())
        return max(times, default=0.0)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the next one may come through
                self._fs.pipe_file(f'{self._root}/{BEAT}', self.token.encode())


def check(address: str, token: str, leads: bool = True) -> bool:
    """Whether a process may write into a folder of a store that its run took under this token.

    The one that leads gives the folder free without waiting for the others, which may be dead: nobody holds it then,
    and the others may write where the run has left a trace. Raises: UserError where the folder is held under another
    token or, asked by the one that leads, by nobody.
    """
    with storage.told('run.dir', address):
        owner = _stored(address)
    if not owner and not leads:
        return 'config.json' in storage.names('run.dir', address)
    if owner.get('token') != token:
        by = f'by process {owner["pid"]} on {owner["host"]}' if 'pid' in owner else 'or removed'
        raise UserError(f'run.dir={address!r} was taken over {by}; this run ends, and what it has published is intact')
    return True


def _stored(address: str) -> dict:
    """What the owner's object in a store says, {} without one."""
    fs, root = storage.reach('run.dir', address)
    try:
        found = json.loads(fs.cat_file(f'{root}/{NAME}'))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(owner: dict) -> bool:
    """Whether this says who it is."""
    return {'host', 'pid', 'started'} <= owner.keys()


def _gone(owner: dict, age: float) -> bool:
    """Whether the owner that wrote this holds nothing any more, if it has no lock. age: seconds since its last sign."""
    if not _whole(owner):
        return True
    if owner['host'] != socket.gethostname():
        return age > STALE_S
    started = _started(owner['pid'])  # the number may be another's by now
    return owner['pid'] == os.getpid() or started is None or started != owner['started']


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


def _now(directory: Path) -> float:
    """The time by the file system's own clock; hosts may disagree about it."""
    with tempfile.TemporaryFile(dir=directory) as now:
        return os.fstat(now.fileno()).st_mtime
