"""A run's folder: who may write to it, and what it was made with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from retool_jax.core import settings
from retool_jax.core.cli import UserError


def claim(config: ConfigDict, free: Sequence[str] = ()) -> pathlib.Path:
    """Makes `run.dir` with its config.json, or goes on in one that the same configuration made.

    free: keys or blocks that may differ from last time. Errors: UserError naming the keys that differ.
    """
    directory = pathlib.Path(config.run.dir)
    file = directory / 'config.json'
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise UserError(f'run.dir={str(directory)!r}: config.json is damaged; choose another folder') from None
        found = settings.differences(before, config, ignore=('run.dir', *free))
        if found:
            raise UserError(f'run.dir={str(directory)!r} holds a run of another configuration '
                            f'({settings.describe(found)}); choose another folder')
    elif directory.is_dir() and any(directory.iterdir()):
        raise UserError(f'run.dir={str(directory)!r} holds other files; choose a new or empty folder')
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings.to_json(config), indent=2))
    return directory
