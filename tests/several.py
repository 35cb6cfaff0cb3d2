"""Runs of several processes on this machine, with eight virtual devices among them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from retool_jax.core.cli import ROOT

DEVICES = 8
PATIENCE_S = 3000
GRACE_S = 5


def run(count: int, arguments: Sequence[str], devices: int = DEVICES) -> list[str]:
    """`python ARGUMENTS` in so many processes at once; what each wrote to stderr. All have to end well.

    A program that is not in the compilation cache is compiled by the first process and sent to the others: with each
    compiling for itself on a loaded machine, one may reach a collective more than 30 s before another, which is as
    long as the CPU's collectives wait.
    """
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
    env = os.environ | {'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices // count}',
                        'JAX_SHARE_BINARY_BETWEEN_HOSTS': 'true'}
    if count > 1:
        env |= {'RETOOL_PROCESSES': str(count), 'RETOOL_COORDINATOR': f'127.0.0.1:{port}'}
    with contextlib.ExitStack() as stack:
        texts = [stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(count)]  # a full pipe would block
        children = [subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env | {'RETOOL_PROCESS': str(i)},
                                     stdout=subprocess.DEVNULL, stderr=text) for i, text in enumerate(texts)]
        try:
            statuses = _statuses(children)
        finally:
            for child in children:
                child.kill()
                child.wait()
        for text in texts:
            text.seek(0)
        written = [text.read() for text in texts]
    assert statuses == [0] * count, '\n'.join(f'process {i}:\n{text[-4000:]}' for i, text in enumerate(written))
    return written


def _statuses(children: Sequence[subprocess.Popen]) -> list[int | None]:
    """How they ended; where one failed, the others get a moment to say why they cannot go on."""
    began = time.monotonic()
    while (found := [child.poll() for child in children]).count(None) and time.monotonic() - began < PATIENCE_S:
        if any(found):
            time.sleep(GRACE_S)
            return [child.poll() for child in children]
        time.sleep(0.2)
    return found
