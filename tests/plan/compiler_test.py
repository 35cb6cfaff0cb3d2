"""The tiny run's own programs through the TPU compiler: phases, exchanged bytes, exit status and remedy are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.model.config import TINY
from retool_jax.plan import chips

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {'sync', 'apply', 'score policy', 'update policy', 'score critic', 'update critic', 'extend', 'decode'}
WEIGHTS = 4 * TINY.parameter_count()  # bytes in f32
TENSOR = FSDP = 2
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    chips.compiler() is None, reason='needs the TPU compiler: bash launch/baselines.sh plan')]


def plan(*overrides: str) -> tuple[int, dict]:
    """Exit status and numbers of launch/plan.py for two by two v5e."""
    command = [sys.executable, 'launch/plan.py', '--config=configs/ppo.py:tiny', '--topology=v5e:2x2', '--json',
               '--config.mesh.tensor=2', '--config.ppo.critic=backbone', '--config.ppo.offload=True', *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env=os.environ | {'XLA_FLAGS': ''})
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def fitting() -> dict:
    status, found = plan()
    assert status == 0
    return found


def test_every_program_is_compiled_and_every_phase_holds_its_largest(fitting):
    programs = {p['name']: p for p in fitting['programs']}
    assert set(programs) == PROGRAMS and not fitting['estimated'] and fitting['fits'] and fitting['cpu_s'] > 1
    for phase in fitting['phases']:
        mine = [p for p in programs.values() if p['phase'] == phase['name']]
        assert phase['temporaries'] == max(p['temporaries'] for p in mine) > 0
        assert phase['total'] == sum(phase['resident'].values()) + phase['temporaries']
    for name in ('policy', 'critic'):  # what the compiler counts as arguments is what the table says is there
        update, resident = programs[f'update {name}'], fitting['phases'][2]['resident']
        assert update['arguments'] == pytest.approx(2 * resident[name], rel=0.1)
    assert programs['apply']['arguments'] == pytest.approx(sum(
        fitting['phases'][2]['resident'][key] for key in ('policy', 'critic', 'optimizer', 'gradients')), rel=0.1)


def test_what_is_exchanged_is_what_the_layout_asks_for(fitting):
    sent = {p['name']: p['sent'] for p in fitting['programs']}
    share = WEIGHTS / TENSOR * (FSDP - 1) / FSDP  # what a chip lacks of its tensor part of the weights
    assert share * 0.9 < sent['sync']['all-gather'] < share * 1.5  # a tied head is gathered once more
    assert sum(sent['apply'].values()) < 1e5  # norms of gradients: numbers, no arrays
    forwards = sum(sent['score policy'].values())
    assert share * 0.9 < forwards < sum(sent['update policy'].values()) / 2
    settings = {'rows': 64, 'quota': 16}  # of the tiny sampler: two sums a layer and token, nothing else that is large
    sums = 2 * TINY.num_hidden_layers * settings['rows'] * settings['quota'] * TINY.hidden_size * 4
    assert sums * 0.9 < sent['decode']['all-reduce'] * TENSOR / (2 * (TENSOR - 1)) < sums * 1.5


def test_a_cache_that_does_not_fit_is_said_with_a_number_of_rows_that_does():
    status, found = plan('--config.sampler.rows=40000')  # 20 GiB of keys and values on chips of 16
    rollout, score, update = found['phases']
    assert status == 1 and not found['fits'] and not rollout['fits'] and score['fits'] and update['fits']
    assert 'decode' in rollout['refused'] and rollout['share'] > 0.9
    remedy = rollout['remedies'][0]
    assert remedy.startswith('sampler.rows=')
    status, found = plan(f'--config.{remedy.split()[0]}')
    assert status == 0 and 0.5 < found['phases'][0]['share'] <= 0.9
