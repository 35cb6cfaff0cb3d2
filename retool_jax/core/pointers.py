"""Files that a person names: what stands in for one whose contents were never downloaded."""

from __future__ import annotations

import pathlib

from retool_jax.core.errors import UserError

# First bytes of a Git LFS pointer (git-lfs/docs/spec.md) and of a git-annex one: text of a line or three.
POINTERS = {b'version https://git-lfs': ('Git LFS', 'git lfs pull'), b'/annex/objects/': ('git-annex', 'git annex get')}


def refuse(path: str | pathlib.Path) -> None:
    """Raises UserError, naming the file, where a pointer lies in the place of its contents; a file that cannot be
    opened is left to its reader."""
    try:
        with open(path, 'rb') as file:
            begin = file.read(max(map(len, POINTERS)))
    except OSError:
        return
    for sign, (system, command) in POINTERS.items():
        if begin.startswith(sign):
            raise UserError(f'{path} is a pointer of {system}, its contents were never downloaded; run `{command}` in '
                            'its folder, or download the file again')
