"""Every hostile case on the warm and the cold path: one verdict, and nothing left behind."""

from __future__ import annotations

import pytest

from retool_jax.sandbox.pool import Job
from tests.sandbox import cases

PARAMETERS = [
    pytest.param(path, case, id=f'{path}-{case.name}', marks=() if case.quick else pytest.mark.slow)
    for case in cases.ALL
    for path in ('warm', 'cold')
]


@pytest.mark.parametrize('path, case', PARAMETERS)
def test_hostile_case_gets_its_verdict_and_leaves_nothing(path, case, pools, census):
    watch = census(path)
    pool = pools(path)
    result = pool.submit_job(Job(code=case.code, **case.limits)).result(120).result
    told = f'{result.stdout[-300:]!r} {result.stderr[-300:]!r}'
    assert result.verdict == case.verdict, told
    if callable(case.out):
        assert case.out(result.stdout), told
    elif case.out is not None:
        assert result.stdout == case.out, told
    assert case.err in result.stderr, told
    if case.exit_code is not None:
        assert result.exit_code == case.exit_code
    assert len(result.stdout) <= pool.settings.output_bytes and len(result.stderr) <= pool.settings.output_bytes
    # CPU time, unlike wall time, means the same on a busy machine. A fork bomb goes on spending it, on every core,
    # until the watch has had its turn and 64 processes are dead.
    assert result.cpu_s <= case.limits.get('cpu_s', pool.settings.cpu_s) + 1.0
    following = pool.submit('print(6 * 7)').result(120)
    assert (following.verdict, following.stdout, following.stderr) == (cases.OK, '42\n', '')
    watch.settle()


def test_names_are_unique_and_a_third_runs_in_the_fast_tier():
    names = [case.name for case in cases.ALL]
    assert len(set(names)) == len(names)
    assert len(names) / 4 <= sum(case.quick for case in cases.ALL) <= len(names) / 2
