"""A run's folder in a store, with a working copy on this machine's disk.

What reads and writes files goes on with paths of the copy; what a run changes there goes to the store where the run
makes things durable (`publish`). An object is replaced whole, so a killed host leaves each as it was or as it is now;
nothing is renamed or appended to there. Checkpoints alone are written to the address itself, by orbax, each process its
shards (`place`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retool_jax.core import storage
from retool_jax.core.errors import UserError
from retool_jax.core.signals import uninterrupted
from retool_jax.core.storage import OWN, WEIGHTS, told

CHECKPOINTS = 'checkpoints'  # folder of a run that orbax writes itself
CONFIGS = ('config.json', 'adapter_config.json')  # a model's folder is there once one of them is
HEAD = 4096  # bytes that hold the first line of a compressed part


class Mirror:
    """A run's folder in a store and its working copy on this machine.

    Of a run's processes each has its own and publishes what it changed itself, as each writes its own files into one
    folder where there is no store.

    Args:
      address: the folder in the store.
      folder: where the working copy lies; what a killed run has left there is put right.
      brief: patterns of files that nothing reads again in this life: of a part of episodes the header is brought here,
        of others an empty file. So are weights always.
      guard: called before anything is written; raises where the folder is another run's by now, and says no where
        the run is over and has cleared it away.

    Raises:
      UserError: what the store refuses.
    """

    def __init__(
        self,
        address: str,
        folder: Path,
        brief: Sequence[str] = (),
        guard: Callable[[], bool] = lambda: True,
        field: str = 'run.dir',
    ):
        self.address, self.folder, self.field = address.rstrip('/'), folder, field
        self._fs, self._root = storage.reach(field, address)
        self._brief, self._guard = (*brief, *WEIGHTS), guard
        self._known: dict[str, tuple[int, ...]] = {}  # files that the store holds as they are here: `_sign`
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        left, remote = self._tidy(), self._remote()
        self._fetch(remote)
        if 'config.json' in remote:  # else the run is another
            self._add(left)

    def refresh(self) -> None:
        """Brings files here that other processes have published since."""
        self._fetch({name: size for name, size in self._remote().items() if not (self.folder / name).exists()})

    def publish(self) -> None:
        """Makes the store's files what they are here. Killed at any moment it leaves what a run can go on from.

        A part of episodes is there once its text is, a model once its config.json is, and metrics.jsonl counts on
        everything before it: each comes behind the others. What is gone here goes last.
        """
        with self._lock, told(self.field, self.address):
            signs = {name: _sign(self.folder / name) for name in self._files()}
            changed = [name for name, sign in signs.items() if self._known.get(name) != sign]
            gone = [name for name in self._known if name not in signs]
            if not changed and not gone:
                return
            if not self._guard():
                return
            self._remove([name for name in changed if name in self._known and name.endswith('.jsonl.gz')])
            for wave in range(4):
                names = [name for name in changed if _wave(name) == wave]
                if names:
                    self._put(names)
                self._known |= {name: signs[name] for name in names}
            self._remove(sorted(gone, key=lambda name: (not name.endswith('.jsonl.gz'), name == 'config.json')))
            for name in gone:
                del self._known[name]

    def close(self) -> None:
        """Publishes, and removes the working copy."""
        self.publish()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _at(self, name: str) -> str:
        return f'{self._root}/{name}'

    def _files(self) -> list[str]:
        """Files of the working copy that belong into the store."""
        names = [str(file.relative_to(self.folder)) for file in self.folder.rglob('*') if file.is_file()]
        return [name for name in names if _mirrored(name)]

    def _remote(self) -> dict[str, int]:
        """{name: bytes} of the store's files, but for what no run has finished writing."""
        with told(self.field, self.address):
            found = self._fs.find(self._root, detail=True)
        names = {path[len(self._root) + 1 :]: info['size'] for path, info in found.items() if not path.endswith('/')}
        folders = {name.rpartition('/')[0] for name in names if fnmatch.fnmatch(name, WEIGHTS[0])}
        begun = {folder for folder in folders if not any(f'{folder}/{config}' in names for config in CONFIGS)}
        return {name: size for name, size in names.items() if _mirrored(name) and name.rpartition('/')[0] not in begun}

    def _tidy(self) -> dict[str, bytes]:
        """Removes what lies in the working copy; returns the journals that a killed run has left there."""
        left = {}
        for file in [file for file in self.folder.rglob('*') if file.is_file()]:
            if fnmatch.fnmatch(file.name, 'journal*.jsonl'):
                left[file.name] = file.read_bytes()
            file.unlink()
        return left

    def _add(self, journals: dict[str, bytes]) -> None:
        """What tools have answered here since the journals were published stays known: it was acted upon."""
        for name, data in journals.items():
            file = self.folder / name
            there = file.read_bytes() if file.exists() else b''
            known = set(there.splitlines(keepends=True))
            new = [line for line in data.splitlines(keepends=True) if line.endswith(b'\n') and line not in known]
            if new:
                file.write_bytes(b''.join(new) + there)  # of a call the last line counts

    def _fetch(self, remote: dict[str, int]) -> None:
        brief = [name for name in remote if any(fnmatch.fnmatch(name, pattern) for pattern in self._brief)]
        whole = [name for name in remote if name not in brief]
        with told(self.field, self.address):
            storage.fetch(self._fs, [self._at(name) for name in whole], [self.folder / name for name in whole])
            texts = [name for name in brief if name.endswith('.jsonl.gz')]
            ends = [min(HEAD, remote[name]) for name in texts]
            heads = self._fs.cat_ranges([self._at(name) for name in texts], [0] * len(texts), ends) if texts else ()
            for name in brief:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(b'')
            for name, head in zip(texts, heads):
                first = zlib.decompressobj(31).decompress(head).partition(b'\n')[0]
                (self.folder / name).write_bytes(gzip.compress(first + b'\n'))
        self._known |= {name: _sign(self.folder / name) for name in remote}

    def _put(self, names: Sequence[str]) -> None:
        self._fs.put([str(self.folder / name) for name in names], [self._at(name) for name in names])

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))


def _mirrored(name: str) -> bool:
    """Whether a file of a run's folder is the mirror's: not orbax's, the claim's, or half written."""
    first = name.partition('/')[0]
    return first != CHECKPOINTS and name not in OWN and not first.endswith('.partial') and not name.endswith('.new')


def _sign(file: Path) -> tuple[int, ...]:
    """What changes with a file."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _wave(name: str) -> int:
    """When a file is published, after those that it counts on."""
    folder, _, base = name.rpartition('/')
    if folder:
        return 1 if base.endswith('.jsonl.gz') or base in CONFIGS else 0
    return 3 if base in ('metrics.jsonl', 'summary.json') else 2


def working_folder(address: str, process: int) -> Path:
    """Where the working copy of a run's folder lies for one of its processes, below TMPDIR."""
    address = address.rstrip('/')
    name = f'{hashlib.sha256(address.encode()).hexdigest()[:16]}-{process}'
    return Path(tempfile.gettempdir()) / f'retool_jax-{os.getuid()}' / name / address.rpartition('/')[2]


_mirrors: list[Mirror] = []  # that are open in this process


@contextlib.contextmanager
def mirrored(mirror: Mirror) -> Iterator[Path]:
    """The working copy of a mirror, for a block; whatever ends the block, what it has changed is published."""
    _mirrors.append(mirror)
    try:
        yield mirror.folder
    finally:
        with uninterrupted():
            mirror.close()
            _mirrors.remove(mirror)


def _mirror_of(file: Path) -> Mirror | None:
    return next((mirror for mirror in _mirrors if file.is_relative_to(mirror.folder)), None)


@contextlib.contextmanager
def visited(address: str | os.PathLike) -> Iterator[Path]:
    """A folder of a run that another process may work in, for a block that writes files of its own into it.

    Raises:
      UserError: there is no run at that address.
    """
    if not storage.is_store(address):
        yield Path(address)
        return
    address = os.fspath(address).rstrip('/')
    if 'config.json' not in storage.names('RUN_DIR', address):
        raise UserError(f'RUN_DIR={address!r} holds no run, which begins with a config.json; give the address of one')
    aside = ('alarms/*', 'carried/*', 'profile/*', 'stopped/*', 'tensorboard/*', 'journal*')
    copy = Path(tempfile.mkdtemp(dir=storage.scratch())) / address.rpartition('/')[2]
    with mirrored(Mirror(address, copy, aside, field='RUN_DIR')) as folder:
        yield folder


def publish(directory: Path) -> None:
    """Brings to the store what was written below a folder, if it is the working copy of one; else it is durable."""
    if mirror := _mirror_of(directory):
        mirror.publish()


def refresh(directory: Path) -> None:
    """Brings what other processes have published into a working copy; a folder without a store is what it is."""
    if mirror := _mirror_of(directory):
        mirror.refresh()


def place(file: Path) -> Any:
    """Where a file of a run's folder is for others: the address of one in a working copy, an epath.Path."""
    if mirror := _mirror_of(file):
        return storage.path(f'{mirror.address}/{file.relative_to(mirror.folder)}'.removesuffix('/.'))
    return file
