"""The guest root: no path of the host in it, used while it is whole, rebuilt where files went, removed when unused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from retool_jax.sandbox import guest

OLD = 40 * 86400


@pytest.fixture
def base(monkeypatch):
    """A home of guest roots, with a build that takes no time."""
    place = Path(tempfile.mkdtemp(prefix='retool_jax-test-', dir='/var/tmp'))
    place.chmod(0o755)
    monkeypatch.setenv('RETOOL_GUEST_ROOT', str(place))
    built = []

    def build(root, packages, progress):
        built.append(root)
        (root / 'python').mkdir()
        (root / 'python' / 'a').write_text('123')
        (root / 'complete').write_text('1 3')

    monkeypatch.setattr(guest, '_build', build)
    monkeypatch.setattr(guest, '_held', {})
    yield place, built
    shutil.rmtree(place)


def _age(root: Path, seconds: float) -> None:
    for path in [root / 'complete', root / 'python' / 'a']:
        at = path.stat().st_mtime - seconds
        os.utime(path, (at, at))


def _forget() -> None:
    """As if the processes that use the roots had ended."""
    for descriptor in guest._held.values():
        os.close(descriptor)
    guest._held.clear()


def test_a_root_of_days_is_used_and_refreshed_where_it_is_whole_and_rebuilt_where_not(base):
    _, built = base
    root = guest.ensure(('numpy',)).root
    _age(root, 9 * 86400)
    assert guest.ensure(('numpy',)).root == root and len(built) == 1
    assert os.stat(root / 'python' / 'a').st_mtime > os.stat(root).st_ctime - 100  # as young as can be
    _age(root, 9 * 86400)
    (root / 'python' / 'a').unlink()  # the system's ageing
    assert guest.ensure(('numpy',)).root == root and len(built) == 2 and (root / 'python' / 'a').exists()


def test_what_is_unused_or_half_built_goes_and_what_is_used_or_being_built_stays(base):
    place, _ = base
    used, unused = guest.ensure(('numpy',)).root, guest.ensure(('sympy',)).root
    half, building = place / 'guest' / '.k1.abc', place / 'guest' / '.k2.abc'
    half.mkdir(), building.mkdir()
    for root in (used, unused):
        _age(root, OLD)
    _forget()
    lock = place / 'guest' / '.k2.lock'
    with (
        subprocess.Popen(['flock', str(lock), 'sh', '-c', 'echo; cat'], stdin=-1, stdout=-1) as builder,
        subprocess.Popen(['flock', '-s', str(used), 'sh', '-c', 'echo; cat'], stdin=-1, stdout=-1) as user,
    ):
        builder.stdout.readline(), user.stdout.readline()
        guest.ensure(('mpmath',))
        assert used.exists() and building.exists() and not unused.exists() and not half.exists()
        builder.stdin.close(), user.stdin.close()
    guest._prune(place / 'guest')
    assert not used.exists() and not building.exists()


def test_no_directory_of_the_host_stands_in_the_guests_build_variables(pools):
    result = (
        pools('warm')
        .submit(
            'import sysconfig\nprint(*[v for v in sysconfig.get_config_vars().values() if isinstance(v, str)])\n'
            'print(sysconfig.get_path("stdlib"))'
        )
        .result(60)
    )
    assert result.stdout and sys.base_prefix not in result.stdout
    assert not any(f'{place}/' in result.stdout for place in ('/root', '/home', '/tmp'))
    assert result.stdout.endswith(f'/python/lib/python3.{sys.version_info.minor}\n')


def test_an_interpreter_of_debian_finds_the_packages_under_the_name_that_it_knows(tmp_path):
    """Ubuntu's and Debian's site.py looks into dist-packages alone."""
    rule = Path(sysconfig.get_path('stdlib'), 'site.py').read_text()
    for name, known in (('python.org', 'site-packages'), ('Debian', 'dist-packages')):
        library = tmp_path / name / 'lib'
        (library / 'site-packages').mkdir(parents=True)
        (library / 'site-packages' / 'numpy.py').touch()
        (library / 'site.py').write_text(re.sub('(site|dist)-packages', known, rule))
        guest._name_for_debian(library)
        assert (library / 'dist-packages' / 'numpy.py').exists() == (name == 'Debian')
