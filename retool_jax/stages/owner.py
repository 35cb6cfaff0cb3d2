"""Who writes to a run's folder: one run at a time, known by host and process, alive by a lock and a heartbeat."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
from pathlib import Path

from retool_jax.core.errors import UserError

NAME = 'owner.json'
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
                    me = {'host': socket.gethostname(), 'pid': os.getpid(), 'started': _started(os.getpid())}
                    me['token'] = token
                    try:
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, json.dumps(me).encode(), 0)
                    except OSError:
                        path.unlink()
                        raise
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


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
