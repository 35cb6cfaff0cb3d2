"""What is asked of the sandbox: a snippet with its input, its files and its limits, checked before anything runs.

A job is checked once, where it is handed in, and travels as one frame of bytes: what waits is held once.
"""

from __future__ import annotations

import dataclasses
import operator
import posixpath
import reprlib
from collections.abc import Iterable, Mapping

from retool_jax.sandbox import frames
from retool_jax.sandbox.settings import MOST, SandboxSettings

_CODE_BYTES = 64 << 20  # of code and standard input together
_NAME_BYTES, _PATH_BYTES = 255, 4095  # Linux: of one component, of a path
_FETCH_NAMES, _FETCH_PARTS = 1024, 16384  # a part costs a system call between two snippets
_BLOCK = 4096  # tmpfs takes whole pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A snippet with what a server's request may add to it; None takes the setting."""

    code: str
    seed: int = 0
    stdin: bytes = b''
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # path below /box → content
    fetch: tuple[str, ...] = ()  # paths below /box to return; what is no regular file there is left out
    cpu_s: float | None = None
    wall_s: float | None = None
    memory_mb: float | None = None

    def frame(self, id_: int, settings: SandboxSettings) -> bytes:
        """The job for the supervisor.

        Raises:
            ValueError: the field that cannot be run, and why.
        """
        if not isinstance(self.code, str):
            raise ValueError(f'code: must be a string, not {type(self.code).__name__}')
        code, stdin = self.code.encode('utf-8', 'surrogatepass'), _content('stdin', self.stdin)
        if len(code) + len(stdin) > _CODE_BYTES:
            raise ValueError(f'code and stdin: {len(code) + len(stdin)} bytes; at most {_CODE_BYTES} can be run')
        limits = {
            name: number(name, getattr(self, name), MOST[name]) for name in MOST if getattr(self, name) is not None
        }
        if not isinstance(self.files, Mapping):
            raise ValueError(f'files: must map names to bytes, not {type(self.files).__name__}')
        files = _places(self.files.items())
        _fits(files.values(), len(files) + len(_directories(files)), stdin, limits.get('memory_mb'), settings)
        header = {
            'op': 'run',
            'id': id_,
            'seed': _seed(self.seed),
            'fetch': _names(self.fetch),
            'code': len(code),
            'stdin': len(stdin),
            'files': [[n, len(c)] for n, c in files.items()],
            **limits,
        }
        return frames.pack(header, code, stdin, *files.values())


def number(name: str, value: object, most: float) -> float:
    """A finite number greater than 0, of whatever type.

    Raises:
        ValueError: it is none, or above `most`; the field is named.
    """
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{name}={reprlib.repr(value)}: must be a number') from None
    if not 0 < result <= most:  # NaN is neither
        raise ValueError(f'{name}={reprlib.repr(value)}: must be greater than 0 and at most {most:g}')
    return result


def _seed(value: object) -> int:
    try:
        return operator.index(value) % 2**32
    except TypeError:
        raise ValueError(f'seed={reprlib.repr(value)}: must be a whole number') from None


def _content(name: str, value: object) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise ValueError(f'{name}: must be bytes, not {type(value).__name__}')
    return bytes(value)


def _places(files: Iterable[tuple[object, object]]) -> dict[str, bytes]:
    """Absolute paths below /box with their contents."""
    placed: dict[str, bytes] = {}
    for name, content in files:
        path, shown = _place(name), reprlib.repr(name)
        if path in placed:
            raise ValueError(f'files: {shown}: a second file of this name')
        placed[path] = _content(f'files: {shown}', content)
    for path in placed.keys() & _directories(placed):
        raise ValueError(f'files: {reprlib.repr(path)}: is a file and a directory')
    return placed


def _place(name: object) -> str:
    shown = f'files: {reprlib.repr(name)}'
    if not isinstance(name, str):
        raise ValueError(f'{shown}: a name must be a string')
    if '\0' in name or any('\ud800' <= c <= '\udfff' for c in name):
        raise ValueError(f'{shown}: no file can have a NUL or a lone surrogate in its name')
    path = posixpath.normpath(posixpath.join('/box', name))
    if not path.startswith('/box/') or name.endswith(('/', '/.')):
        raise ValueError(f'{shown}: must name a file below /box')
    parts = path.encode().split(b'/')
    if max(map(len, parts)) > _NAME_BYTES or sum(map(len, parts)) + len(parts) > _PATH_BYTES:
        raise ValueError(f'{shown}: longer than {_NAME_BYTES} bytes, or {_PATH_BYTES} as a path')
    return path


def _directories(paths: Iterable[str]) -> set[str]:
    """All directories between /box and the files."""
    found: set[str] = set()
    for path in paths:
        while (path := posixpath.dirname(path)) != '/box' and path not in found:
            found.add(path)
    return found


def _fits(
    contents: Iterable[bytes], inodes: int, stdin: bytes, memory_mb: float | None, settings: SandboxSettings
) -> None:
    blocks = sum(-(-len(content) // _BLOCK) for content in (*contents, stdin))
    inodes += 1 + bool(stdin)  # /box itself
    if inodes > settings.scratch_inodes:
        raise ValueError(f'files: {inodes} files and directories; /box holds {settings.scratch_inodes}')
    room_mb = min(settings.scratch_mb, memory_mb or settings.memory_mb)  # what is in /box is in memory
    if blocks * _BLOCK > room_mb * 2**20:
        raise ValueError(f'files and stdin: {blocks * _BLOCK} bytes in blocks; there is room for {room_mb:g} MiB')


def _names(fetch: object) -> list[str]:
    """Names to fetch, each once. One that no file can have is no mistake: it is not found."""
    if isinstance(fetch, (str, bytes)) or not isinstance(fetch, Iterable):
        raise ValueError('fetch: must be a sequence of names')
    names, parts = {}, 0
    for name in fetch:
        if not isinstance(name, str):
            raise ValueError(f'fetch: {reprlib.repr(name)}: a name must be a string')
        if name not in names:
            names[name] = None
            parts += name.count('/') + 1
        if len(names) > _FETCH_NAMES or parts > _FETCH_PARTS:
            raise ValueError(f'fetch: more than {_FETCH_NAMES} names, or than {_FETCH_PARTS} directories in them')
    return list(names)
