"""The bench of accelerators at sizes for a CPU: all kinds of cases run, and one that fails takes no other with it."""

import json
import os
import subprocess
import time

import pytest

from retool_jax.bench import accelerator
from retool_jax.bench.accelerator import Group
from retool_jax.core.cli import ROOT


def test_shares_are_of_the_floor_the_matmul_rate_and_the_other_side():
    ours = accelerator.derive(
        {'case': 'decode 7B × 64', 'step_s': 0.01, 'weight_bytes': 6e9, 'kv_bytes': 2e9},
        {},
        bandwidth=2e12,
        matmul=8e14,
    )
    assert ours['floor_step_s'] == pytest.approx(0.004) and ours['share_of_floor'] == pytest.approx(0.4)
    theirs = accelerator.derive({'case': 'transformers 7B × 64', 'step_s': 0.03}, {ours['case']: ours}, 2e12, 8e14)
    assert theirs['ours_over_theirs'] == pytest.approx(3)
    update = accelerator.derive({'case': 'update', 'flops': 4e14}, {}, 2e12, 8e14)
    assert update['share_of_matmul'] == pytest.approx(0.5)
    assert update['share_of_peak'] == pytest.approx(4e14 / accelerator.PEAK)


def test_cases_are_named_once_and_the_device_comes_first():
    for toy in (False, True):
        names = [case['case'] for group in accelerator.groups(toy) for case in group.cases]
        assert names[0] == 'device' and len(set(names)) == len(names)


def test_contexts_fit_their_slots_to_the_last_call():
    for toy in (False, True):
        for case in (case for group in accelerator.groups(toy) for case in group.cases):
            if case.get('kind') == 'decode':
                assert case['high'] + case['quota'] * (1 + case['calls']) <= case['slots'], case
            if case.get('kind') == 'extend':
                assert case['start'] + case['chunk'] * (1 + case['calls']) <= case['slots'], case


@pytest.mark.slow
def test_a_case_that_fails_and_one_that_hangs_take_no_other_with_them(tmp_path):
    good = {'kind': 'device', 'bytes': 4096, 'repeats': 1}
    hangs = {'case': 'hangs', 'kind': 'device', 'bytes': 4096, 'repeats': 10**9}
    cases = [{'case': 'wrong', 'kind': 'device'}, {'case': 'first'} | good, hangs, {'case': 'last'} | good]
    with open(tmp_path / 'log', 'w') as log:
        found = {x['case']: x for x in accelerator.run(Group(cases, limit=60), time.monotonic() + 600, log)}
    assert list(found) == ['wrong', 'first', 'hangs', 'last']
    assert found['wrong']['error'].startswith('TypeError: device() missing')
    assert found['hangs']['error'] == 'no result within 60 s'
    assert found['first']['matmul_flops'] > 0 and found['last']['matmul_flops'] > 0


@pytest.mark.slow
def test_all_kinds_of_cases_run_and_are_on_disk(tmp_path):
    done = subprocess.run(
        ['bash', ROOT / 'launch/bench_accelerator.sh', f'--out={tmp_path}', '--toy'],
        text=True,
        capture_output=True,
        env=os.environ | {'XLA_FLAGS': ''},
    )  # one device
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])['results']
    failed = {name: x['error'] for name, x in results.items() if 'error' in x}
    if not accelerator.PEER.exists():
        assert set(failed.values()) == {'torch and transformers are not here: make baselines'}
        failed = {}
    assert not failed
    assert all(x['tokens_per_s'] > 0 for name, x in results.items() if name.startswith(('decode', 'extend', 'update')))
    assert max(results['attention, row of 128, blocked']['errors'].values()) < 1e-2
    written = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [x['case'] for x in written] == list(results)
