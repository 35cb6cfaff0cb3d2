"""A dry run takes a real step, says what it needs and leaves nothing behind."""

import os
import subprocess
import sys

import pytest

from retool_jax.core.cli import ROOT
from retool_jax.stages import dry_run
from tests.train import killable


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rehearsal') / 'files'
    killable.make_model(folder)
    return folder


def test_one_step_on_fake_tools_prints_its_memory_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob('*'))
    stage = killable.make_stage(folder, 'dry', **{'ppo.offload': True, 'loss.kl_coef': 0.1})
    with killable.tiny_world(folder, 'dry'):
        found = dry_run.run(stage)
    assert sorted(path for path in folder.rglob('*') if path.name != 'dry.answered') == before
    policy = found['policy, f32']
    assert found['reference policy'] == policy == found['sampling weights']  # f32 here too
    assert 2 * policy < found['optimizer state'] < 2.2 * policy  # two moments and counters, the critic's as well
    assert found['KV cache'] >= 2 * 4 * 96 * 2 * 16 * 4  # k and v: rows × slots × KV heads × head size × f32
    assert found['peak of the host process'] > 1e8
    printed = capsys.readouterr().out
    assert 'optimizer state' in printed and 'time/update_s' in printed and 'episodes' in printed


def test_a_step_may_sample_with_weights_in_8_bits(folder, capsys):
    stage = killable.make_stage(folder, 'narrow', **{'sampler.weights': 'int8'})
    with killable.tiny_world(folder, 'narrow'):
        found = dry_run.run(stage)
    assert found['sampling weights'] < 0.75 * found['policy, f32']  # its table of embeddings is in f32
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert float(rows['mismatch/logprob_abs_max']) > 1e-4


def test_fake_tools_answer_at_once():
    assert dry_run.FakeTools().submit('print(1)').result(0).stdout == '42\n'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ppo', 'grpo', 'dapo'])
def test_the_binary_rehearses_every_algorithm_with_the_embedded_model(tmp_path, name):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / 'launch/ppo.py',
            f'--config=configs/{name}.py:tiny',
            '--dry_run',
            f'--config.run.dir={tmp_path / "run"}',
            '--config.ppo.problems_per_step=4',
            '--config.turns.max_tokens=128',
            '--config.turns.max_turn_tokens=64',
        ],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert 'fake: every snippet prints 42' in done.stderr and not list(tmp_path.iterdir())
    rows = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if len(line.split()) > 1)
    assert float(rows['policy, f32']) > 0 and float(rows['KV cache']) > 0
    samples = {'ppo': 4, 'grpo': 8, 'dapo': 8}[name]
    assert int(rows['episodes']) == 4 * samples and float(rows['time/update_s']) > 0
    assert float(rows['mismatch/logprob_abs_max']) < 1e-4
