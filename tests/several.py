"""Runs of several processes on this machine, with eight virtual devices among them."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from retool_jax.core.cli import ROOT

DEVICES = 8
PATIENCE_S = 3000
GRACE_S = 5


def run(count: int, arguments: Sequence[str], devices: int = DEVICES) -> list[str]:
    """Runs a script (…/NAME.py) or a module in so many processes at once; what each wrote to stderr.

    arguments: the script or module, and what it is called with. All processes have to end well.
    """
    with started(count, arguments, devices) as (children, read):
        statuses = _statuses(children)
        for child in children:
            child.kill()
            child.wait()
        written = read()
    assert statuses == [0] * count, '\n'.join(f'process {i}:\n{text[-4000:]}' for i, text in enumerate(written))
    return written


@contextlib.contextmanager
def started(
    count: int, arguments: Sequence[str], devices: int = DEVICES, places: Sequence[Path] | None = None
) -> Iterator[tuple[list[subprocess.Popen], Callable[[], list[str]]]]:
    """The processes of a run, and what reads all that each has written to stderr; they end with the block.

    places: the folder in which each is started, instead of this project's.
    """
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
    patience = [f'--xla_cpu_collective_{name}timeout_seconds={PATIENCE_S}' for name in ('', 'call_terminate_')]
    env = os.environ | {
        'XLA_FLAGS': ' '.join([flags, *patience, f'--xla_force_host_platform_device_count={devices // count}']),
        'PYTHONPATH': str(ROOT),
    }
    if count > 1:
        env |= {
            'RETOOL_PROCESSES': str(count),
            'RETOOL_COORDINATOR': f'127.0.0.1:{port}',
            'JAX_SHARE_BINARY_BETWEEN_HOSTS': 'true',
        }
    with contextlib.ExitStack() as stack:
        texts = [stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(count)]  # a full pipe would block
        children = [
            subprocess.Popen(
                [sys.executable, '-m', 'tests.several', *arguments],
                cwd=places[i] if places else ROOT,
                env=env | {'RETOOL_PROCESS': str(i)},
                stdout=subprocess.DEVNULL,
                stderr=text,
            )
            for i, text in enumerate(texts)
        ]

        def read() -> list[str]:
            return [os.pread(text.fileno(), 2**20, 0).decode(errors='replace') for text in texts]

        try:
            yield children, read
        finally:
            for child in children:
                child.kill()
                child.wait()


def _statuses(children: Sequence[subprocess.Popen]) -> list[int | None]:
    """How they ended; where one failed, the others get a moment to say why they cannot go on."""
    began = time.monotonic()
    while (found := [child.poll() for child in children]).count(None) and time.monotonic() - began < PATIENCE_S:
        if any(found):
            time.sleep(GRACE_S)
            return [child.poll() for child in children]
        time.sleep(0.2)
    return found


def _main() -> None:
    """A process of `run`: what is not in the compilation cache one compiles for all, so that none is left behind.

    The collectives of the CPU wait for a process no longer than 30 s, and on a loaded machine two that compile
    the same program are further apart. JAX sends a program by its key in the cache; on CPU that key holds a fingerprint
    of the process, which is left out here (nor would the others ever find in the cache what the first has written).
    """
    from jax._src import cache_key

    def kinds(hasher, devices) -> None:
        for device in devices.flat:
            hasher.update(f'{device.device_kind} of {os.environ.get("RETOOL_PROCESSES", "1")};'.encode())

    cache_key._hash_accelerator_config = kinds
    del sys.argv[0]
    if sys.argv[0].endswith('.py'):
        runpy.run_path(sys.argv[0], run_name='__main__')
    else:
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    _main()
