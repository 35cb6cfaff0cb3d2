"""Starts the real binaries quickly: one process imports what all of them import and forks for each start.

Run as a program it reads one JSON request a line and answers with the exit status of the forked child, which
runs the file in launch/ as `__main__` with its own arguments, environment, directory and streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MS_NOSUID_NODEV = 6


@dataclasses.dataclass(frozen=True)
class Done:
    """How a start ended."""

    returncode: int
    stdout: str
    stderr: str


class Launcher:
    """The parent's end."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self._process, self._folder = process, folder

    def __call__(
        self, name: str, *arguments, env: dict[str, str] | None = None, disk: str = '', namespaces: bool = True
    ) -> Done:
        """Runs launch/NAME.py to its end.

        disk: a directory that becomes a file system of 32 KiB, for this start alone; namespaces: whether the
        machine seems to have user namespaces.
        """
        streams = [self._folder / 'out', self._folder / 'err']
        request = {
            'script': str(ROOT / 'launch' / f'{name}.py'),
            'arguments': list(map(str, arguments)),
            'env': env or {},
            'disk': disk,
            'namespaces': namespaces,
            'streams': list(map(str, streams)),
        }
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return Done(status, *(stream.read_text() for stream in streams))


@contextlib.contextmanager
def start() -> Iterator[Launcher]:
    """A launcher that ends with its block."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
        )
        try:
            yield Launcher(process, Path(folder))
        finally:
            process.stdin.close()
            process.wait(30)
            process.stdout.close()


def serve() -> None:

    answers = os.fdopen(os.dup(1), 'w')
    for line in sys.stdin:
        request = json.loads(line)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of JAX, about forks: no device has been touched here
            child = os.fork()
        if child == 0:
            become(request)  # ends as the binary ends
        _, status = os.waitpid(child, 0)
        answers.write(f'{os.waitstatus_to_exitcode(status)}\n')
        answers.flush()


def become(request: dict) -> None:
    for number, path in zip((0, 1, 2), ('/dev/null', *request['streams'])):
        os.dup2(os.open(path, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(request['env'])
    if request['disk'] or not request['namespaces']:
        shrink(request['disk'], request['namespaces'])
    sys.argv = [request['script'], *request['arguments']]
    sys.path[0] = str(ROOT / 'launch')
    runpy.run_path(request['script'], run_name='__main__')
    sys.exit(0)


def shrink(disk: str, namespaces: bool) -> None:
    """A user namespace of its own, in which file systems can be mounted and further namespaces forbidden."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
    Path('/proc/self/setgroups').write_text('deny')
    Path('/proc/self/uid_map').write_text(f'{user} {user} 1')
    Path('/proc/self/gid_map').write_text(f'{group} {group} 1')
    if disk and ctypes.CDLL(None, use_errno=True).mount(b'none', disk.encode(), b'tmpfs', MS_NOSUID_NODEV, b'size=32k'):
        raise OSError(ctypes.get_errno(), 'mount')
    if not namespaces:
        Path('/proc/sys/user/max_user_namespaces').write_text('0')


if __name__ == '__main__':
    serve()
