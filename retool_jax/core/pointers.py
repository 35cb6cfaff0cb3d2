"""Pointers of Git LFS and git-annex, which stand in the place of files that were never downloaded."""

from __future__ import annotations

from pathlib import Path

from retool_jax.core.errors import UserError

# First bytes of a Git LFS pointer (git-lfs/docs/spec.md) and of a git-annex one: text of a line or three.
POINTERS = {b'version https://git-lfs': ('Git LFS', 'git lfs pull'), b'/annex/objects/': ('git-annex', 'git annex get')}


def refuse(path: str | Path) -> None:
    """Refuses a file in whose place a pointer lies; one that cannot be opened is left to its reader.

    Raises: UserError naming the file and the command that downloads it.
    """
    try:
        with open(path, 'rb') as file:
            begin = file.read(max(map(len, POINTERS)))
    except OSError:
        return
    for sign, (system, command) in POINTERS.items():
        if begin.startswith(sign):
            raise UserError(
                f'{path} is a pointer of {system}, its contents were never downloaded; run `{command}` in '
                'its folder, or download the file again'
            )
