"""The guest's root: an interpreter of its own with pinned packages, copied once and keyed by hash.

The project's environment is never shown to model-written code: it may sit below a private home
(which nsjail cannot bind) and holds the trainer's packages. `python -m retool_jax.sandbox.guest`
builds the root and prints where it is.

Not covered: what the packages are. They are copied as they are installed here, unaudited, and whoever may write to this
environment, or to the root, decides what snippets run on. Requirements behind a marker (`; python_version …`) are not
followed; of libraries that are opened by name at run time only libgcc_s is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from retool_jax.core.errors import UserError

_FORMAT = 5  # raise when the layout below changes
_INSIDE = Path(__file__).parent / 'inside'  # the files that run inside the jail
_STDLIB_LEFT_OUT = frozenset({
    'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'tkinter', 'turtledemo', 'ensurepip',
    'lib2to3', 'pydoc_data', '__pycache__'})  # fmt: skip
_FRESH_S = 86400.0  # a root that was used within it is taken as it is: ageing takes ten days or more
_UNUSED_S = 30 * 86400.0  # and one that was not used for so long is removed
# What snippets can import where nobody says: as in configs/base.py, which this room may not import.
PACKAGES = ('numpy', 'scipy', 'sympy')
_held: dict[Path, int] = {}
DEVICES = ('null', 'zero', 'full', 'random', 'urandom')


@dataclasses.dataclass(frozen=True)
class Guest:
    """Where the guest lives on the host: its root directory and the directory of the runner's files."""

    root: Path
    code: Path


def home() -> Path:
    """Directory that holds guest roots: RETOOL_GUEST_ROOT, or a world-readable place outside any home."""
    if override := os.environ.get('RETOOL_GUEST_ROOT'):
        return Path(override)
    if os.geteuid() == 0:
        return Path('/var/cache/retool_jax')
    return Path(f'/var/tmp/retool_jax-{os.geteuid()}')


def closure(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of `packages` and of what they require, as installed here: the guest gets the same.

    Raises:
      UserError: a package is not installed.
    """
    versions: dict[str, str] = {}
    todo = list(packages)
    while todo:
        given = todo.pop()
        name = re.sub(r'[-_.]+', '-', given).lower()
        if name in versions:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f'sandbox.packages: {given!r} is not installed here; install it or leave it out') from None
        versions[name] = distribution.version
        for requirement in distribution.requires or []:
            if ';' not in requirement:  # markers are extras or other platforms
                todo.append(re.match(r'[\w.-]+', requirement).group())
    return dict(sorted(versions.items()))


def key(packages: tuple[str, ...]) -> str:
    """Hash of all that the root's content depends on: interpreter, C library, packages, layout."""
    facts = [
        _FORMAT,
        sys.version,
        platform.machine(),
        platform.libc_ver(),
        os.path.realpath(sys._base_executable),
        closure(packages),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def ensure(packages: tuple[str, ...], progress: Callable[[str], None] | None = None) -> Guest:
    """Returns the guest for `packages`, building it where it is missing; safe between processes.

    Raises:
      UserError: as `closure`.
    """
    base = home()
    _make_public(base)
    code = _ensure_code(base)
    root = base / 'guest' / key(packages)
    _make_public(root.parent)
    if not _is_whole(root):
        with _lock(root.with_name(f'.{root.name}.lock')):
            if not _is_whole(root):
                shutil.rmtree(root, ignore_errors=True)
                temporary = Path(tempfile.mkdtemp(prefix=f'.{root.name}.', dir=root.parent))
                try:
                    _build(temporary, packages, progress or (lambda line: None))
                    os.rename(temporary, root)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
    for directory in (root, code):
        _hold(directory)
    _prune(root.parent)
    return Guest(root, code)


def _hold(directory: Path) -> None:
    """Says that this process uses a directory, for as long as it lives: neither `_prune` nor the system's ageing of
    /var/tmp (systemd-tmpfiles) touches one that is locked."""
    if directory not in _held:
        _held[directory] = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(_held[directory], fcntl.LOCK_SH)


def _is_whole(root: Path) -> bool:
    """Whether a root may be used as it is; ageing removes file by file, so one of days is asked for all of them."""
    try:
        count, size = map(int, (root / 'complete').read_text().split())
    except (OSError, ValueError):
        return False
    if time.time() - (root / 'complete').stat().st_mtime > _FRESH_S:
        paths = [os.path.join(directory, name) for directory, _, names in os.walk(root) for name in names]
        paths = [path for path in paths if not os.path.islink(path) and path != str(root / 'complete')]
        if (count, size) != (len(paths), sum(map(os.path.getsize, paths))):
            return False
        with contextlib.suppress(OSError):  # another user's root, or a read-only one
            for path in [*paths, root / 'complete']:
                os.utime(path)
    return True


def _prune(place: Path) -> None:
    """Removes roots that nobody uses or has used for long, and what builders that died have left half built."""
    for path in place.iterdir():
        name = path.name.lstrip('.').partition('.')[0]
        with contextlib.suppress(OSError):
            if not path.is_dir() or path in _held:
                continue
            if path.name == name and time.time() - (path / 'complete').stat().st_mtime < _UNUSED_S:
                continue
            with _lock(path.with_name(f'.{name}.lock'), wait=False):  # held by whoever builds it
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(descriptor)


def _make_public(path: Path) -> None:
    """Creates `path` and makes sure that the jail's users can walk to it."""
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o755)
    for parent in [path, *path.resolve().parents]:
        if not parent.stat().st_mode & 0o001:
            raise UserError(
                f'RETOOL_GUEST_ROOT={path}: {parent} is closed to other users (nsjail cannot bind '
                'below it); choose a path whose every directory has mode 0755'
            )


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True):
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _ensure_code(base: Path) -> Path:
    """Copies the runner's files to a directory named after their content."""
    texts = {file.name: file.read_bytes() for file in sorted(_INSIDE.glob('[a-z]*.py'))}
    digest = hashlib.sha256(b'\0'.join(texts.values())).hexdigest()[:16]
    target = base / 'runner' / digest
    if not target.exists():
        _make_public(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{digest}.', dir=target.parent))
        for name, text in texts.items():
            (temporary / name).write_bytes(text)
            (temporary / name).chmod(0o644)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return target


def _build(root: Path, packages: tuple[str, ...], progress: Callable[[str], None]) -> None:
    python = root / 'python'
    version = f'python{sys.version_info.major}.{sys.version_info.minor}'
    library = python / 'lib' / version
    progress('1/5 interpreter and standard library')
    (python / 'bin').mkdir(parents=True)
    shutil.copy2(os.path.realpath(sys._base_executable), python / 'bin' / 'python3')
    (python / 'bin' / 'python').symlink_to('python3')
    stdlib = Path(sysconfig.get_path('stdlib'))
    shutil.copytree(stdlib, library, ignore=_left_out_of_stdlib, symlinks=False)
    dynload = Path(sysconfig.get_config_var('DESTSHARED') or stdlib / 'lib-dynload')
    if not (library / 'lib-dynload').exists() and dynload.exists():
        shutil.copytree(dynload, library / 'lib-dynload')
    for path in library.glob('_sysconfigdata*.py'):  # it names where the host's interpreter was built and lies
        path.write_text(_without_host_paths(path.read_text()))
    progress('2/5 packages: ' + ', '.join(f'{n} {v}' for n, v in closure(packages).items()))
    for name in closure(packages):
        _copy_distribution(name, library / 'site-packages')
    _name_for_debian(library)
    progress('3/5 shared libraries')
    _copy_libraries(root, python)
    progress('4/5 byte code')
    subprocess.run(
        [
            sys.executable,
            '-m',
            'compileall',
            '-q',
            '-j',
            '2',
            '-s',
            str(root),
            '-p',
            '/',
            '--invalidation-mode',
            'unchecked-hash',
            str(library),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )  # odd files may not compile
    progress('5/5 mount points')
    for name in ('box', 'dev', 'runner', 'proc'):
        (root / name).mkdir()
    for name in DEVICES:
        (root / 'dev' / name).touch()
    (root / 'tmp').symlink_to('/box')
    (root / 'dev' / 'shm').symlink_to('/box')
    for directory, _, files in os.walk(root):
        os.chmod(directory, 0o755)
        for name in files:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755 if os.access(path, os.X_OK) else 0o644)
    sizes = [
        os.path.getsize(os.path.join(directory, name))
        for directory, _, names in os.walk(root)
        for name in names
        if not os.path.islink(os.path.join(directory, name))
    ]
    (root / 'complete').write_text(f'{len(sizes)} {sum(sizes)}')
    (root / 'complete').chmod(0o644)


def _name_for_debian(library: Path) -> None:
    """Gives the packages their second name where the interpreter is Debian's or Ubuntu's, which knows no other."""
    if 'dist-packages' in (library / 'site.py').read_text():
        (library / 'dist-packages').symlink_to('site-packages')


def _without_host_paths(text: str) -> str:
    """The interpreter's build-time variables with its home as the guest sees it, and no other directory of the host."""
    text = text.replace(sys.base_prefix, '/python')
    return re.sub(r'/(?:root|home|tmp|build|work|usr/src|opt|var|mnt|data|github|__w)/[^\s\'":,]*', '/python', text)


def _left_out_of_stdlib(directory: str, names: list[str]) -> list[str]:
    return [n for n in names if n in _STDLIB_LEFT_OUT or n.startswith(('config-', '_tkinter', '_test', '_xxtest'))]


def _copy_distribution(name: str, target: Path) -> None:
    distribution = importlib.metadata.distribution(name)
    if not distribution.files:
        raise UserError(f'sandbox.packages: {name!r} has no list of files (an editable install?); install its wheel')
    for file in distribution.files:
        parts = file.parts
        # numpy.testing imports from numpy's tests; the others' tests are dead weight.
        if '..' in parts or file.suffix == '.pyc' or ('tests' in parts and name != 'numpy'):
            continue
        destination = target / file
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file.locate(), destination)


def _copy_libraries(root: Path, python: Path) -> None:
    """Copies the closure of shared libraries that `ldd` names and that the tree does not hold."""
    objects = [str(p) for p in python.rglob('*.so*') if p.is_file()]
    environment = {**os.environ, 'LD_LIBRARY_PATH': os.path.join(sys.base_prefix, 'lib')}
    output = subprocess.run(
        ['ldd', str(python / 'bin' / 'python3'), *objects],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    ).stdout
    needed = set(re.findall(r'=> (/\S+) \(0x', output))
    loaders = set(re.findall(r'^\s(/\S*ld-\S+) \(0x', output, re.M)) | set(re.findall(r'=> (/\S*/ld-linux\S+)', output))
    if not loaders:
        raise UserError('sandbox: ldd names no dynamic loader; the guest needs a glibc build of Python')
    for path in list(needed):  # opened by glibc when a thread ends, named by no ldd line
        if os.path.basename(path) == 'libc.so.6':
            needed.add(os.path.join(os.path.dirname(path), 'libgcc_s.so.1'))
    for loader in loaders:
        destination = root / loader.lstrip('/')
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(loader), destination)
    for path in needed:
        destination = python / 'lib' / os.path.basename(path)
        inside = Path(path).is_relative_to(root)
        if not inside and not destination.exists() and os.path.exists(path):
            shutil.copy2(os.path.realpath(path), destination)


def main(argv: list[str]) -> int:
    """Builds the guest root for the packages named on the command line (none: PACKAGES)."""
    start = time.monotonic()
    packages = tuple(argv) or PACKAGES
    guest = ensure(packages, lambda line: print(f'guest root: {line} ({time.monotonic() - start:.0f} s)', flush=True))
    print(f'guest root: {guest.root} ready')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
