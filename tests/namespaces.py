"""Whether this machine gives a test a user namespace of its own, found out without what the test is about."""

from __future__ import annotations

import shutil
import subprocess

OWN = ('unshare', '--user', '--map-root-user', '--mount')  # what a command goes behind


def small_disk(folder: object, size: str) -> tuple[str, ...]:
    """The command that makes a folder a file system of that size, within a namespace."""
    return ('mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder))


def allow(*command: str) -> bool:
    """Whether a command succeeds in such a namespace, which ends with it."""
    return shutil.which(OWN[0]) is not None and subprocess.run([*OWN, *command], capture_output=True).returncode == 0
