"""Matrices in 8 bits: how far off they are, that a forward pass is that of the numbers they stand for, and where they
lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.core.pytrees import Int8Weight
from retool_jax.model import decoder, int8, kv_cache, lora
from retool_jax.rollout import hosts, sync
from retool_jax.rollout.sync import Sync
from tests.model.lora_test import LORA, make_adapters
from tests.model.sizes import make_config, make_params, make_tokens

CONFIGS = {
    'qwen2': make_config('qwen2'),
    'qwen3': make_config('qwen3', tie_word_embeddings=True),
    'llama': make_config('llama', attention_bias=True, mlp_bias=True),
}
quantised = lambda x: isinstance(x, Int8Weight)


def wide(weights):
    """The same tree with the numbers that matrices in 8 bits stand for."""
    return jax.tree.map(lambda x: x.values * x.scale if quantised(x) else x, weights, is_leaf=quantised)


def narrow(config, dtype='float32', params=None):
    return Sync(config, dtype, weights='int8')(make_params(config) if params is None else params)


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def run(config, weights, tokens, dtype=jnp.float32):
    """Logits of a prompt and of one token after it, [B, 2, V]."""
    b, t = tokens.shape
    cache = kv_cache.empty(config, b, t + 1, dtype)
    first, cache = decoder.extend(config, weights, cache, tokens, np.full(b, t), t + 1)
    second, _ = decoder.extend(config, weights, cache, tokens[:, :1], np.ones(b, np.int32), t + 1)
    return decoder.unembed(weights, jnp.stack([first[:, -1], second[:, 0]], axis=1))


@pytest.mark.parametrize('kind', CONFIGS)
def test_every_channel_is_off_by_half_a_step_at_most_and_all_else_is_as_it_was(kind):
    config = CONFIGS[kind]
    plain, found = Sync(config, 'float32')(make_params(config)), narrow(config)
    pairs = zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(found, is_leaf=quantised), strict=True)
    matrices = set()
    for (path, w), q in pairs:
        if not quantised(q):
            np.testing.assert_array_equal(q, w)
            continue
        matrices.add(jax.tree_util.keystr(path, simple=True, separator='.').split('.')[-2])
        assert q.values.dtype == jnp.int8 and q.values.shape == w.shape and q.scale.dtype == jnp.float32
        inputs = w.ndim - q.scale.ndim
        assert q.scale.shape == w.shape[inputs:] and inputs == (2 if 'o_proj' in str(path) else 1)
        assert (np.abs(np.asarray(q.values * q.scale - w)) <= np.asarray(q.scale) * 0.5001).all()
        largest = np.abs(np.asarray(q.values)).max(axis=tuple(range(inputs)))
        assert (largest == 127).all(), path  # each channel's own scale: none wastes a bit
    attention, mlp = {'q_proj', 'k_proj', 'v_proj', 'o_proj'}, {'gate_proj', 'up_proj', 'down_proj'}
    assert matrices == attention | mlp | {'lm_head'}


def test_a_channel_of_zeros_stays_zero():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)), jnp.float32).at[:, :, 2].set(0.0)
    q = int8.quantise(w, 2)
    assert q.scale[2] == 0 and not np.asarray(q.values)[:, :, 2].any()
    np.testing.assert_array_equal(int8.multiply(jnp.ones((1, 4, 3)), q, jnp.float32)[0, 2], 0.0)


@pytest.mark.parametrize('kind', CONFIGS)
def test_a_forward_pass_is_that_of_the_numbers_that_8_bits_stand_for(kind):
    config, tokens = CONFIGS[kind], make_tokens(CONFIGS[kind], 3, 12)
    weights = narrow(config)
    found, wanted = run(config, weights, tokens), run(config, wide(weights), tokens)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    off = np.abs(wanted - run(config, Sync(config, 'float32')(make_params(config)), tokens)).max()
    assert 1e-3 * np.abs(wanted).max() < off < 0.1 * np.abs(wanted).max()  # the check above sees 8 bits


def test_16_bits_hold_the_integers_and_sums_are_scaled_in_32():
    config, tokens = CONFIGS['qwen2'], make_tokens(CONFIGS['qwen2'], 3, 12)
    weights = narrow(config, 'bfloat16')
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.bfloat16)
    q = weights['layers'][0]['mlp']['up_proj']['weight']
    exact = np.asarray(x, np.float64) @ (np.asarray(q.values, np.float64) * np.asarray(q.scale, np.float64))
    for dtype, bits in ((jnp.float32, 20), (jnp.bfloat16, 7)):
        y = int8.multiply(x, q, dtype)
        assert (
            y.dtype == dtype and (np.abs(np.asarray(y, np.float64) - exact) <= 2.0**-bits * np.abs(exact).max()).all()
        )
    found, wanted = run(config, weights, tokens, jnp.bfloat16), run(config, wide(narrow(config)), tokens)
    assert found.dtype == jnp.float32 and np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_a_row_does_not_depend_on_the_others_to_the_last_bit():
    config = CONFIGS['qwen2']
    weights, tokens = narrow(config), make_tokens(config, 4, 12)
    others = np.where(np.arange(4)[:, None] == 2, tokens, make_tokens(config, 4, 12, seed=7))
    found, again = (np.asarray(run(config, weights, x)) for x in (tokens, others))
    np.testing.assert_array_equal(found[2], again[2])
    assert (found[[0, 1, 3]] != again[[0, 1, 3]]).any(axis=(1, 2)).all()


def test_adapters_are_merged_before_8_bits_are_taken():
    config = CONFIGS['llama']
    frozen = decoder.cast(make_params(config), jnp.bfloat16)
    weights = lora.over(frozen, make_adapters(config, size=0.02), LORA.scale)
    merged = Sync(config, 'float32')(weights)  # in f32, rounded nowhere
    for form, found in zip(merged['layers'], narrow(config, 'bfloat16', weights)['layers'], strict=True):
        for part, name in (('self_attn', 'o_proj'), ('mlp', 'down_proj'), ('self_attn', 'k_proj')):
            q, w = found[part][name]['weight'], form[part][name]['weight']
            assert (np.abs(np.asarray(q.values * q.scale - w)) <= np.asarray(q.scale) * 0.5001).all()
            assert found[part][name]['bias'].dtype == jnp.bfloat16
    plain = narrow(config, 'bfloat16', frozen)['layers'][0]['mlp']['down_proj']['weight']
    assert not np.array_equal(
        plain.values, narrow(config, 'bfloat16', weights)['layers'][0]['mlp']['down_proj']['weight'].values
    )


@pytest.mark.parametrize('engines', [False, True])
def test_a_mesh_holds_the_same_bits_and_a_scale_lies_as_its_channels(engines):
    config = make_config('qwen2', num_attention_heads=8, head_dim=8, intermediate_size=64)
    mesh, params = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 4}), make_params(config)
    rules = decoder.fit_rules(config, mesh, sharding.TRAIN_RULES)
    spread = jax.device_put(params, sharding.shardings(mesh, decoder.logical_axes(config), rules))
    one = Sync(config, 'float32', weights='int8')(params)
    every = hosts.make_sync if engines else Sync  # by way of the training layout, as processes of their own have it
    found = every(config, 'float32', mesh, weights='int8')(spread)
    jax.tree.map(np.testing.assert_array_equal, found, one)
    layer = found['layers'][1]
    parts = lambda module: [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(module['weight'])]
    assert parts(layer['self_attn']['q_proj']) == [(32, 2, 8), (2, 8)]
    assert parts(layer['self_attn']['k_proj']) == [(32, 2, 8), (2, 8)]  # two KV heads do not divide by four
    assert parts(layer['self_attn']['o_proj']) == [(2, 8, 32), (32,)]
    assert parts(layer['mlp']['up_proj']) == [(32, 16), (16,)]
    assert parts(layer['mlp']['down_proj']) == [(16, 32), (32,)]
    assert parts(found['lm_head']) == [(32, 24), (24,)]
    tokens = make_tokens(config, 4, 12)
    np.testing.assert_allclose(run(config, found, tokens), run(config, one, tokens), rtol=1e-4, atol=1e-4)


def test_where_they_lie_is_said_for_every_array():
    config, mesh = CONFIGS['qwen3'], sharding.make_mesh({'data': 4, 'fsdp': 1, 'tensor': 2})
    for form in ('float', 'int8'):
        shapes = jax.eval_shape(
            functools.partial(decoder.to_sampling, config, weights=form), decoder.abstract_params(config)
        )
        found = sync.shardings(config, mesh, sharding.SAMPLE_RULES, form)
        assert jax.tree.structure(found) == jax.tree.structure(shapes)
        jax.tree.map(lambda x, lies: lies.shard_shape(x.shape), shapes, found)
