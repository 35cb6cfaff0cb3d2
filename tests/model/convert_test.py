"""Checkpoints to Hugging Face directories and back, through the binary as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.pytrees import TrainState
from retool_jax.model import convert, hf
from retool_jax.train.state import init_state
from tests.model.sizes import make_config, make_params

ROOT = Path(__file__).resolve().parents[2]
CONFIG = make_config('qwen3', tie_word_embeddings=True)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.fixture
def model(tmp_path) -> Path:
    hf.save(tmp_path / 'hf', CONFIG, make_params(CONFIG), 'float32', file_bytes=10_000)
    (tmp_path / 'hf' / 'tokenizer.json').write_text('{}')
    return tmp_path / 'hf'


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, 'launch/convert.py', *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )


@pytest.mark.slow
def test_the_binary_goes_both_ways_bit_for_bit_and_overwrites_nothing(model, tmp_path):
    forth = run('--to=orbax', f'--source={model}', f'--target={tmp_path / "orbax"}')
    assert forth.returncode == 0, forth.stderr
    back = [
        '--to=hf',
        f'--source={tmp_path / "orbax"}',
        f'--target={tmp_path / "again"}',
        f'--like={model}',
        '--dtype=float32',
    ]
    child = run(*back)
    assert child.returncode == 0, child.stderr
    assert child.stderr.endswith(f'{tmp_path / "again"}: written\n')
    assert same(hf.load(tmp_path / 'again', CONFIG), hf.load(model, CONFIG))
    assert (tmp_path / 'again' / 'tokenizer.json').is_file()
    child = run(*back)
    assert child.returncode == 2
    assert child.stderr.splitlines()[-1] == (
        f'error: {tmp_path / "again"} already exists and is never overwritten; give another directory'
    )
    child = run('--to=hf', f'--source={tmp_path / "orbax"}', f'--target={tmp_path / "other"}')
    assert (child.returncode, child.stderr) == (2, 'error: --like is missing; see --help\n')
    sorted(model.glob('*.safetensors'))[0].unlink()
    child = run('--to=orbax', f'--source={model}', f'--target={tmp_path / "third"}')
    assert child.returncode == 2 and 'is missing, model.safetensors.index.json lists it' in child.stderr
    assert not (tmp_path / 'third').exists()


def test_the_policy_of_a_training_state_is_exported_without_its_optimizer_and_critic(model, tmp_path):
    params = {'policy': hf.load(model, CONFIG), 'critic': {'head': {'weight': jnp.zeros((32, 1))}}}
    state = init_state(params, optax.adamw(1e-3))
    assert isinstance(state, TrainState)
    with Checkpoints(tmp_path / 'run', keep_last=2) as checkpoints:
        checkpoints.save(3, state, {})
        later = jax.tree.map(lambda x: x + 1, params)
        checkpoints.save(7, TrainState(step=state.step, params=later, opt_state=state.opt_state), {}, wait=True)
    convert.to_hf(tmp_path / 'run', tmp_path / 'old', model, step=3, dtype='float32')
    assert same(hf.load(tmp_path / 'old', CONFIG), params['policy'])
    convert.to_hf(tmp_path / 'run', tmp_path / 'new', model, dtype='float32')
    assert same(hf.load(tmp_path / 'new', CONFIG), later['policy'])
    convert.to_orbax(tmp_path / 'new', tmp_path / 'orbax')
    with Checkpoints(tmp_path / 'orbax', keep_last=1) as checkpoints:
        tree, meta = checkpoints.restore(0, {'params': {'policy': params['policy']}})
    assert same(tree['params']['policy'], later['policy'])
    assert meta['config']['num_hidden_layers'] == 2


def test_what_does_not_fit_is_named(model, tmp_path):
    params = hf.load(model, CONFIG)
    export = lambda **more: convert.to_hf(tmp_path / 'run', tmp_path / 'out', model, **more)
    with pytest.raises(ValueError, match="run' is no directory"):
        export()
    params['layers']['mlp'].pop('up_proj')
    params['norm'] = {'weight': jnp.ones(5), 'bias': jnp.ones(32)}
    with Checkpoints(tmp_path / 'run', keep_last=2) as checkpoints:
        checkpoints.save(1, {'params': {'policy': params}}, {}, wait=True)
    with pytest.raises(ValueError, match='no checkpoint of step 4; there are: 1'):
        export(step=4)
    with pytest.raises(
        ValueError, match=r'all weights were trained \(lora.rank=0\), there are no adapters; use --to=hf'
    ):
        convert.to_peft(tmp_path / 'run', tmp_path / 'out', model)
    with pytest.raises(ValueError, match='params.actor is not in this checkpoint; there is policy'):
        export(part='params.actor')
    with pytest.raises(ValueError) as caught:
        export()
    assert (
        'layers.mlp.up_proj.weight is missing; norm.bias is not part of this architecture; '
        'norm.weight is [5], config.json makes it [32]' in str(caught.value)
    )
    assert not (tmp_path / 'out').exists()
