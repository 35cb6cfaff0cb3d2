"""Runs that train adapters: what stands in checkpoints, what comes out, and that a stopped one loses nothing."""

from __future__ import annotations

import dataclasses
import json
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import metrics
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.model import convert, hf, lora
from retool_jax.model.config import load_config
from retool_jax.stages import ppo
from tests.stages import sft_test
from tests.train import killable

RANK = {'lora.rank': 4}
folder = sft_test.folder  # with a model, its problems and traces


def reinforce(folder, name, stop_at=None, algorithm='ppo', start='model', **values):
    """A run of three steps from the model in a folder, told to stop when it writes step `stop_at`: (metrics lines,
    model and adapter files)."""
    write = metrics.Metrics.write

    def stopping(self, step, metrics):
        write(self, step, metrics)
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    with killable.tiny_world(folder, name), mock.patch.object(metrics.Metrics, 'write', stopping):
        stage = killable.make_stage(folder, name, algorithm, **RANK | values)
        ppo.run(dataclasses.replace(stage, model=dataclasses.replace(stage.model, path=str(folder / start))))
    clocks = ('time', 'rollout/', 'tools/wait')
    lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in metrics.read(folder / name)]
    files = ('final/model.safetensors', 'adapter/adapter_model.safetensors')
    return lines, [(folder / name / file).read_bytes() for file in files]


def weights_of(path):
    return hf.load(path, load_config(path))


def differing(a, b) -> set[str]:
    """The modules whose weights are not the same."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b))
    return {path[-2].key for (path, x), y in pairs if not np.array_equal(x, y)}


@pytest.fixture(scope='module')
def whole(folder):
    """The undisturbed run."""
    return reinforce(folder, 'lora_whole')


@pytest.mark.slow
def test_a_stopped_run_over_adapters_ends_as_the_undisturbed_one(folder, whole):
    with pytest.raises(KeyboardInterrupt, match='the same command goes on'):
        reinforce(folder, 'lora_stopped', stop_at=1)
    assert len(metrics.read(folder / 'lora_stopped')) == 2
    assert reinforce(folder, 'lora_stopped') == whole


def test_checkpoints_of_a_ppo_run_hold_adapters_alone_and_are_exported_merged_and_for_peft(folder, whole):
    with Checkpoints(folder / 'lora_whole' / 'checkpoints', 1, 'score') as checkpoints:
        stored = checkpoints._orbax.checkpointables_metadata(killable.STEPS).metadata['state']
        assert checkpoints.meta(killable.STEPS)['lora'] == {'rank': 4, 'alpha': 32.0, 'targets': list(lora.PROJECTIONS)}
    leaves = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(stored['params'])}
    assert leaves == {'lora_A', 'lora_B', 'head'}  # and the critic's head
    base, final = weights_of(folder / 'model'), weights_of(folder / 'lora_whole' / 'final')
    assert differing(base, final) == set(lora.PROJECTIONS)
    exported, like = folder / 'exported', folder / 'model'
    convert.run('hf', folder / 'lora_whole' / 'checkpoints', exported / 'merged', like=like, dtype='float32')
    assert (exported / 'merged' / 'model.safetensors').read_bytes() == whole[1][0]
    convert.run('peft', folder / 'lora_whole' / 'checkpoints', exported / 'adapter', like=like)
    assert (exported / 'adapter' / 'adapter_model.safetensors').read_bytes() == whole[1][1]
    said = json.loads((exported / 'adapter' / 'adapter_config.json').read_text())
    assert said == json.loads((folder / 'lora_whole' / 'adapter' / 'adapter_config.json').read_text())
    assert said['base_model_name_or_path'] == str(like) and (said['r'], said['lora_alpha']) == (4, 32.0)


@pytest.mark.slow
def test_fine_tuning_then_grpo_over_adapters_begins_with_the_merged_model_and_is_held_to_it_by_kl(folder):
    lines, _ = sft_test.run(folder, 'lora_sft', **RANK | {'sft.evaluation_share': 0.0})
    losses = [line['sft/loss'] for line in lines]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert differing(weights_of(folder / 'model'), weights_of(folder / 'lora_sft' / 'final')) == set(lora.PROJECTIONS)
    # A random model is never right: nothing but its entropy moves it.
    values = {'loss.kl_coef': 0.1, 'ppo.samples': 2, 'loss.entropy_coef': 0.1}
    lines, _ = reinforce(folder, 'lora_grpo', algorithm='grpo', start='lora_sft/final', **values)
    assert max(line['mismatch/logprob_abs_max'] for line in lines) < 1e-4  # the sampler has the merged weights
    assert lines[-1]['actor/kl'] > lines[0]['actor/kl'] >= 0
    said = json.loads((folder / 'lora_grpo' / 'adapter' / 'adapter_config.json').read_text())
    assert said['base_model_name_or_path'] == str(folder / 'lora_sft' / 'final')


@pytest.mark.slow
def test_over_weights_of_16_bits_sampler_and_trainer_agree_as_over_all_weights(folder):
    bits = {'forward.dtype': 'bfloat16', 'sampler.dtype': 'bfloat16'}
    worst = {}
    for rank in (0, 4):
        with killable.tiny_world(folder, f'half_{rank}'):
            ppo.run(killable.make_stage(folder, f'half_{rank}', **bits | {'lora.rank': rank}))
        worst[rank] = max(line['mismatch/logprob_abs_max'] for line in metrics.read(folder / f'half_{rank}'))
    # Merged weights are rounded, the trainer's are not added up: 3 to 6 times as far apart; left unmerged, 130 times.
    assert worst[4] < 12 * worst[0]
    assert jax.tree.leaves(weights_of(folder / 'half_4' / 'final'))[0].dtype == jnp.float32
