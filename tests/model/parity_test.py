"""The model is the real one: logits of transformers' own Llama, Qwen2 and Qwen3, full and cached."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from retool_jax.model import decoder, hf, kv_cache
from retool_jax.model.config import load_config
from retool_jax.model.tensor_files import INDEX
from tests.model.sizes import make_config, make_params

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).parent / 'fixtures'
CASES = ('llama_grouped', 'llama_one_kv_head', 'llama_own_head_dim', 'llama_biased', 'llama_llama3', 'llama_yarn',
         'qwen2_grouped', 'qwen2_tied', 'qwen2_yarn', 'qwen3_grouped', 'qwen3_tied', 'qwen3_yarn', 'qwen3_biased',
)  # fmt: skip
TOLERANCE = 1e-4  # of the largest logit


def full_logits(config, params, tokens_BT, lengths_B):
    valid_BT = (np.arange(tokens_BT.shape[1]) < lengths_B[:, None]).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    hidden_BTD = jax.jit(functools.partial(decoder.forward, config))(params, tokens_BT, positions_BT, valid_BT)
    return np.asarray(decoder.unembed(params, hidden_BTD))


def cached_logits(config, params, tokens_BT, lengths_B):
    """The same through the KV cache, a token at a time; rows end at their own lengths."""
    rows, width = tokens_BT.shape
    slots = 32
    cache = kv_cache.empty(config, rows, slots)
    params = decoder.to_sampling(config, params)
    step = jax.jit(functools.partial(decoder.extend, config), static_argnums=(4,))
    found = []
    for t in range(width):
        hidden_BCD, cache = step(params, cache, tokens_BT[:, t : t + 1], (lengths_B > t).astype(np.int32), slots)
        found.append(decoder.unembed(params, hidden_BCD))
    np.testing.assert_array_equal(cache.length_B, lengths_B)
    return np.concatenate(found, axis=1)


def assert_close(logits_BTV, golden):
    valid = np.arange(golden['tokens'].shape[1]) < golden['lengths'][:, None]
    error = np.abs(logits_BTV - golden['logits'])[valid].max() / np.abs(golden['logits']).max()
    assert error <= TOLERANCE
    # A model that ignores its weights or its context would not come near.
    assert np.abs(golden['logits'][valid] - golden['logits'][valid].mean(axis=0)).max() > 0.3


def check(directory: Path) -> None:
    config = load_config(directory)
    params = hf.load(directory, config)
    golden = np.load(directory / 'golden.npz')
    tokens, lengths = golden['tokens'], golden['lengths']
    assert_close(full_logits(config, params, tokens, lengths), golden)
    assert_close(cached_logits(config, params, tokens, lengths), golden)


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers_in_full_and_incrementally(case):
    check(FIXTURES / case)


def test_fixtures_hold_what_their_names_say():
    configs = {case: load_config(FIXTURES / case) for case in CASES}
    kinds = {case: type(c.rope_scaling).__name__ for case, c in configs.items() if c.rope_scaling is not None}
    assert kinds == {
        'llama_yarn': 'YarnScaling',
        'qwen2_yarn': 'YarnScaling',
        'qwen3_yarn': 'YarnScaling',
        'llama_llama3': 'Llama3Scaling',
    }
    assert {case for case, c in configs.items() if c.attention_bias} == {'llama_biased', 'qwen3_biased'}
    assert {case for case, c in configs.items() if c.mlp_bias} == {'llama_biased'}
    for kind in ('llama', 'qwen2', 'qwen3'):
        assert {case for case, c in configs.items() if c.model_type == kind} == {c for c in CASES if c.startswith(kind)}
        assert {c.tie_word_embeddings for c in configs.values() if c.model_type == kind} == {True, False}
    groups = {c.num_attention_heads // c.num_key_value_heads for c in configs.values()}
    assert groups == {1, 2, 3, 4, 7}


@pytest.mark.parametrize('case', ['llama_biased', 'llama_llama3', 'qwen2_grouped', 'qwen3_grouped', 'qwen2_yarn'])
def test_parity_would_notice_a_bias_a_norm_a_head_or_a_rotation_left_out(case):
    config = load_config(FIXTURES / case)
    params, golden = hf.load(FIXTURES / case, config), np.load(FIXTURES / case / 'golden.npz')
    attention = params['layers']['self_attn']
    part = 'k_norm' if config.qk_norm else 'o_proj' if config.attention_bias else 'v_proj'
    name = 'bias' if 'bias' in attention[part] else 'weight'
    broken = [
        params
        | {
            'layers': params['layers']
            | {'self_attn': attention | {part: attention[part] | {name: attention[part][name] * 0.9}}}
        }
    ]
    o_LNHD = attention['o_proj']['weight']
    broken.append(
        params
        | {
            'layers': params['layers']
            | {'self_attn': attention | {'o_proj': attention['o_proj'] | {'weight': o_LNHD[:, ::-1]}}}
        }
    )
    if config.mlp_bias:
        mlp = params['layers']['mlp']
        broken += [
            params | {'layers': params['layers'] | {'mlp': mlp | {part: mlp[part] | {'bias': mlp[part]['bias'] * 0.9}}}}
            for part in mlp
        ]
    tried = [(config, changed) for changed in broken]
    if config.rope_scaling is not None:
        tried.append((dataclasses.replace(config, rope_scaling=None), params))
    for used, changed in tried:
        with pytest.raises(AssertionError):
            assert_close(full_logits(used, changed, golden['tokens'], golden['lengths']), golden)
    moved = np.array(golden['tokens'])
    moved[:, :2] = moved[:, 1::-1]
    with pytest.raises(AssertionError):
        assert_close(full_logits(config, params, moved, golden['lengths']), golden)


def peer() -> str | None:
    """A Python that has torch and transformers: this one, or that of `make baselines`."""
    if importlib.util.find_spec('torch'):
        return sys.executable
    side = ROOT / '.baselines' / 'torch' / 'bin' / 'python'
    return str(side) if side.exists() else None


def run_peer(*arguments, script: str = 'make_fixtures.py') -> None:
    if peer() is None:
        pytest.skip('needs torch and transformers: make baselines')
    child = subprocess.run(
        [peer(), str(Path(__file__).parent / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    )
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.slow
def test_logits_are_those_of_the_transformers_that_is_installed(tmp_path):
    for scale, seed in ((1, 100), (2, 200)):
        folder = tmp_path / str(scale)
        run_peer(folder, '--seed', seed, '--scale', scale)
        for case in CASES:
            check(folder / case)


@pytest.mark.slow
def test_logits_of_random_shapes_of_every_family_are_those_of_transformers(tmp_path):
    run_peer(tmp_path, '--seed', 7, '--random', 6)
    made = sorted(directory.name for directory in tmp_path.iterdir())
    assert made == [f'{kind}_{number}' for kind in ('llama', 'qwen2', 'qwen3') for number in range(6)]
    for case in made:
        check(tmp_path / case)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_what_is_exported_transformers_loads_with_the_same_logits(tmp_path, case):
    config = load_config(FIXTURES / case)
    params = make_params(config, seed=3)
    hf.save(tmp_path / 'model', config, params, 'float32', file_bytes=10_000)
    assert (tmp_path / 'model' / INDEX).is_file()
    run_peer(tmp_path / 'model', '--read')
    check(tmp_path / 'model')


@pytest.mark.slow
def test_a_bfloat16_export_means_the_same_to_transformers(tmp_path):
    config = make_config('qwen3', tie_word_embeddings=True)
    hf.save(tmp_path / 'model', config, make_params(config), 'bfloat16')
    run_peer(tmp_path / 'model', '--read')
    check(tmp_path / 'model')
