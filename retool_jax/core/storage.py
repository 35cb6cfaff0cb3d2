"""Addresses of a store (gs://bucket/…) beside paths of a file system.

What a run reads comes to this machine as long as its process lives (`local`, `model_files`), weights excepted: ranges
of them are read (`read_range`). What it writes is core/mirror.py's.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retool_jax.core.checks import STORE
from retool_jax.core.errors import UserError

PATIENCE_S = 30.0  # in which a store has to answer first
FULL = (errno.ENOSPC, errno.EDQUOT)  # of this machine's disk
PACKAGES = {'gs': 'gcs'}  # extras of setup.py, by the beginning of an address
OWN = ('owner.json', 'owner.beat')  # of the claim (stages/owner.py), which no mirror touches
WEIGHTS = ('*.safetensors', '*.bin', '*.pth', '*.gguf')
PIECE, PIECES = 16 << 20, 8  # bytes of one request for a range, requests at once

type FileSystem = Any  # fsspec.AbstractFileSystem


def is_store(path: str | os.PathLike) -> bool:
    """Whether that is the address of a store."""
    return STORE.match(os.fspath(path)) is not None


@contextlib.contextmanager
def told(field: str, address: str) -> Iterator[None]:
    """Makes what a store refuses one line for the user; the block does nothing else. A path's errors stay as they are.

    Raises:
      UserError: naming field, address and remedy.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        ours = not isinstance(error, OSError | ImportError) and type(error).__module__ == 'builtins'
        if ours or not is_store(address) or getattr(error, 'errno', None) in FULL:
            raise
        raise UserError(f'{field}={address!r}: {_reason(error, address)}') from error


def _reason(error: Exception, address: str) -> str:
    """What a store's error means, with the remedy."""
    text, kind = ' '.join(str(error).split()), address.partition(':')[0]
    if isinstance(error, ImportError):
        extra = f"pip install 'retool_jax[{PACKAGES[kind]}]'" if kind in PACKAGES else text
        return f'{kind}:// needs a package that is not installed: {extra}'
    if isinstance(error, TimeoutError):
        return f'the store does not answer within {PATIENCE_S:g} s; check the network, and start the same command again'
    if getattr(error, 'code', None) in (401, 403) or isinstance(error, PermissionError) or 'Forbidden' in text:
        return (
            f'the store forbids it ({text[:200]}); log in (gcloud auth application-default login), or give the account '
            'the right to read and write objects there'
        )
    if isinstance(error, FileNotFoundError):
        return f'there is no such bucket or object ({text[:200]}); make it, or correct the address'
    return f'the store fails: {type(error).__name__}: {text[:200]}; start the same command again'


def _within[T](work: Callable[[], T]) -> T:
    """`work` in a thread that is given up after PATIENCE_S: libraries try again for minutes."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name='store', daemon=True).start()
    return future.result(PATIENCE_S)


@functools.cache
def reach(field: str, address: str) -> tuple[FileSystem, str]:
    """The file system of an address, which has answered, and the path in it. Raises: UserError (`told`)."""
    import fsspec

    with told(field, address):
        fsspec.get_filesystem_class(address.partition(':')[0])  # its import is not the store's time
        logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
        return _within(lambda: _reach(address))


def _reach(address: str) -> tuple[FileSystem, str]:
    import fsspec

    fs, root = fsspec.core.url_to_fs(address, use_listings_cache=False)  # others write there too
    if root.strip('/'):
        fs.find(f'{root.rstrip("/")}/owner.json')  # cheap, and refused where the bucket is not there or closed
    return fs, root.rstrip('/')


def names(field: str, address: str) -> list[str]:
    """What lies right below an address, but for a claim."""
    fs, root = reach(field, address)
    with told(field, address), contextlib.suppress(FileNotFoundError):
        found = (path.rstrip('/').rpartition('/')[2] for path in fs.ls(root, detail=False))
        return sorted(name for name in found if name and name not in OWN)
    return []


def remove(field: str, address: str, names: Iterable[str]) -> None:
    """Removes objects right below an address; those that are not there need not be removed."""
    fs, root = reach(field, address)
    with told(field, address):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(f'{root.rstrip("/")}/{name}')


@functools.cache
def scratch() -> Path:
    """A folder that ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix='retool_jax_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def local(field: str, address: str, but: Sequence[str] = ()) -> Path:
    """A path of this file system with what is at an address, a file or a folder; a path is returned as it is.

    but: patterns of files that are left where they are. A process fetches an address once.

    Raises:
      UserError: there is nothing, or what `told` says.
    """
    if not is_store(address):
        return Path(address)
    fs, root = reach(field, address)
    target = scratch() / hashlib.sha256(f'{address} {but}'.encode()).hexdigest()[:16] / root.rpartition('/')[2]
    with told(field, address):
        found = [path for path in fs.find(root) if not path.endswith('/')]  # consoles make objects in place of folders
        if not found:
            raise FileNotFoundError(address)
        wanted = [path for path in found if not any(fnmatch.fnmatch(path, pattern) for pattern in but)]
        fetch(fs, wanted, [target / path[len(root) :].strip('/') for path in wanted])
    return target


def model_files(field: str, address: str) -> Path:
    """`local` of a model's directory, without its weights."""
    return local(field, address, WEIGHTS)


def path(address: str | os.PathLike) -> Any:
    """An address or a path as an object to join, open and look at: an epath.Path or a pathlib.Path."""
    if not is_store(address):
        return Path(address)
    from etils import epath

    return epath.Path(address)


def read_range(address: str | os.PathLike, start: int, size: int) -> np.ndarray:
    """`size` bytes of an object from `start` on, uint8[size]; several requests are on their way at once."""
    fs, root = reach('model.path', os.fspath(address))
    data = np.empty(size, np.uint8)
    with told('model.path', os.fspath(address)):
        for begin in range(0, size, PIECE * PIECES):
            starts = list(range(begin, min(begin + PIECE * PIECES, size), PIECE))
            ends = [min(s + PIECE, size) for s in starts]
            pieces = fs.cat_ranges([root] * len(starts), [start + s for s in starts], [start + e for e in ends])
            for s, e, piece in zip(starts, ends, pieces):
                if isinstance(piece, Exception):
                    raise piece
                data[s:e] = np.frombuffer(piece, np.uint8)
    return data


def fetch(fs: FileSystem, remote: Sequence[str], here: Sequence[Path]) -> None:
    """Brings files to this machine."""
    for folder in {file.parent for file in here}:
        folder.mkdir(parents=True, exist_ok=True)
    if remote:
        fs.get(list(remote), [str(file) for file in here])
