"""The model on meshes: every factorisation computes what one device computes, and moves no more than it must."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retool_jax.core import sharding
from retool_jax.core.pytrees import Batch, KVCache
from retool_jax.model import decoder, kv_cache
from retool_jax.train.learner import Learner
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.state import init_state
from tests.model.sizes import make_config, make_params, make_tokens

DEVICES = 8
CONFIG = make_config('qwen2', num_attention_heads=8, num_key_value_heads=2, head_dim=8, intermediate_size=64)
BIASED = dataclasses.replace(CONFIG, model_type='llama', attention_bias=True, mlp_bias=True)
FORWARD = ForwardSettings(
    dtype='float32',
    gradient_dtype='float32',
    attention='dense',
    remat='none',
    unroll=1,
    logprob_chunk=8,
    vocab_chunk=40,
    micro_rows=8,
    row_width=16,
    row_segments=2,
)
SIZES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == DEVICES]
QUICK = ((1, 2, 4),)  # more tensor parts than KV heads
LR = 1e-2
# Plain descent keeps no moments that the donated gradients could become.
pytestmark = pytest.mark.filterwarnings('ignore:optax.global_norm', 'ignore:Some donated buffers')


def make_mesh(sizes, devices=None):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices)


def make_batch() -> Batch:
    """Rows of two episodes and padding, acted on and off."""
    tokens = make_tokens(CONFIG, 16, 16)
    ends = np.random.default_rng(0).integers(2, 8, (16, 2)).cumsum(axis=1)
    place = np.arange(16)
    segments = 1 + (place >= ends[:, :1]) - 2 * (place >= ends[:, 1:])
    segments = np.maximum(segments, 0).astype(np.int32)
    positions = np.where(segments == 2, place - ends[:, :1], place).astype(np.int32)
    acted = (np.random.default_rng(1).random((16, 16)) < 0.7) & (segments > 0) & (positions > 0)
    n = (16, 2)
    return Batch(
        tokens_BT=tokens,
        segment_ids_BT=segments,
        positions_BT=positions,
        acted_BT=acted,
        sampler_logprob_BT=np.zeros((16, 16), np.float32),
        reward_BN=np.zeros(n, np.float32),
        group_BN=np.zeros(n, np.int32),
        baseline_BN=np.ones(n, bool),
        update_BN=np.ones(n, bool),
    )


def step_on(mesh, optimizer, config=CONFIG):
    """Parameters before and after one supervised step, and its metrics."""
    rules = decoder.fit_rules(config, mesh, sharding.TRAIN_RULES)
    params = {
        'policy': jax.device_put(make_params(config), sharding.shardings(mesh, decoder.logical_axes(config), rules))
    }
    before = jax.device_get(params)
    learner = Learner(config, FORWARD, optimizer, mesh)
    state, metrics = learner.sft_step(init_state(params, optimizer), make_batch())
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params)):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    return before, jax.device_get(state.params), jax.device_get(metrics)


@functools.cache
def on_one_device(kind: str, config=CONFIG):
    return step_on(make_mesh((1, 1, 1), jax.devices()[:1]), optimizer_of(kind), config)


def optimizer_of(kind: str) -> optax.GradientTransformation:
    # Plain descent by 1 turns parameters into gradients.
    return optax.sgd(1.0) if kind == 'gradient' else optax.adamw(LR, weight_decay=0.1)


def distance(found, expected) -> float:
    """‖Δ‖ / ‖·‖ over all leaves."""
    total = lambda tree: np.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in jax.tree.leaves(tree)))
    return total(jax.tree.map(np.subtract, found, expected)) / total(expected)


@pytest.mark.parametrize(
    'config, sizes',
    [
        *(pytest.param(CONFIG, s, marks=() if s in QUICK else pytest.mark.slow) for s in SIZES),
        pytest.param(BIASED, (2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=lambda x: 'x'.join(map(str, x)) if isinstance(x, tuple) else x.model_type,
)
def test_loss_and_gradients_are_those_of_one_device(config, sizes):
    before, after, metrics = step_on(make_mesh(sizes), optimizer_of('gradient'), config)
    start, end, expected = on_one_device('gradient', config)
    assert metrics['sft/loss'] == pytest.approx(expected['sft/loss'], rel=1e-5)
    gradient, reference = jax.tree.map(np.subtract, before, after), jax.tree.map(np.subtract, start, end)
    assert distance(gradient, reference) < 1e-5
    for leaf in jax.tree.leaves(reference):
        assert np.abs(leaf).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 2, 4)], ids=str)
def test_parameters_after_adamw_are_those_of_one_device(sizes):
    _, after, _ = step_on(make_mesh(sizes), optimizer_of('adamw'))
    _, expected, _ = on_one_device('adamw')
    errors = np.concatenate([np.abs(a - b).ravel() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected))])
    assert errors.mean() < 0.05 * LR
    assert errors.max() <= 2 * LR


def test_a_size_that_does_not_divide_is_refused_by_name_and_kv_heads_are_replicated():
    rules = decoder.fit_rules(CONFIG, make_mesh((1, 2, 4)), sharding.TRAIN_RULES)
    assert rules == sharding.TRAIN_RULES | {'kv_heads': ()}
    assert decoder.fit_rules(CONFIG, make_mesh((2, 2, 2)), sharding.TRAIN_RULES) == sharding.TRAIN_RULES
    for field, value in [('num_attention_heads', 6), ('intermediate_size', 50), ('vocab_size', 98)]:
        config = dataclasses.replace(CONFIG, **{field: value})
        with pytest.raises(ValueError, match=f'^mesh: {field}={value} does not divide over tensor=4'):
            decoder.fit_rules(config, make_mesh((1, 2, 4)), sharding.TRAIN_RULES)
    with pytest.raises(ValueError, match='^mesh: hidden_size=36 does not divide over fsdp=8'):
        decoder.fit_rules(dataclasses.replace(CONFIG, hidden_size=36), make_mesh((1, 8, 1)), sharding.TRAIN_RULES)


def test_every_weight_has_its_words_and_no_large_one_is_left_whole():
    axes, shapes = decoder.logical_axes(CONFIG), decoder.abstract_params(CONFIG)
    is_axes = lambda x: isinstance(x, tuple)
    flat = jax.tree.leaves(axes, is_leaf=is_axes)
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(shapes)
    for words, shape in zip(flat, jax.tree.leaves(shapes)):
        assert len(words) == len(shape.shape)
        matrix = len(set(words) - {'layers', 'head_dim'}) == 2
        mesh_axes = [a for word in words for a in sharding.TRAIN_RULES[word]]
        assert sorted(mesh_axes) == ['fsdp', 'tensor'] or not matrix


def test_a_weight_is_gathered_over_fsdp_in_the_matmuls_dtype_and_its_gradient_is_split_again():
    mesh, put = make_mesh((1, 2, 4)), jax.P('fsdp', 'tensor')
    w = jax.device_put(jnp.ones((8, 16)), jax.NamedSharding(mesh, put))

    def gather(w, *words):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sharding.gather(w, jnp.bfloat16, *words)

    out, whole = jax.jit(lambda w: gather(w, 'embed', 'mlp'))(w), jax.NamedSharding(mesh, jax.P(None, 'tensor'))
    assert out.dtype == jnp.bfloat16 and out.sharding.is_equivalent_to(whole, 2)
    gradient = jax.jit(jax.grad(lambda w: jnp.square(gather(w, 'embed', 'mlp').astype(jnp.float32)).sum()))(w)
    assert gradient.dtype == jnp.float32 and gradient.sharding.is_equivalent_to(w.sharding, 2)
    heads = jax.device_put(jnp.ones((8, 2, 4)), jax.NamedSharding(mesh, jax.P('fsdp')))  # 2 do not divide by 4
    assert jax.jit(lambda w: gather(w, 'embed', 'kv_heads', 'head_dim'))(heads).sharding.is_fully_replicated
    alone = sharding.gather(w, jnp.bfloat16, 'embed', 'mlp')  # no mesh in scope
    assert alone.dtype == jnp.bfloat16 and alone.sharding.is_equivalent_to(w.sharding, 2)


COLLECTIVE = re.compile(r'= (\S+).*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[-\w]*\(')
SLOTS = 40  # a number that is no other dimension


def collectives(compiled) -> list[tuple[str, str]]:
    """(kind, shape of the result) of every collective of a compiled program."""
    return [(kind, shape) for shape, kind in COLLECTIVE.findall(compiled.as_text())]


def sharded_cache(mesh):
    rules = decoder.fit_rules(CONFIG, mesh, sharding.SAMPLE_RULES)
    place = lambda shape, dtype, *words: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, sharding.spec(words, rules))
    )
    kv = lambda: [place((8, 2, SLOTS, 8), jnp.float32, 'batch', 'kv_heads', None, 'head_dim') for _ in range(2)]
    return KVCache(k=kv(), v=kv(), length_B=place((8,), jnp.int32, 'batch')), place


def test_the_cache_is_written_without_a_collective():
    cache, place = sharded_cache(make_mesh((4, 1, 2)))
    new = place((8, 1, 2, 8), jnp.float32, 'batch', None, 'kv_heads', 'head_dim')
    slot = place((8, 1), jnp.int32, 'batch', None)
    compiled = jax.jit(kv_cache.write, donate_argnums=0).lower(cache.k[0], new, slot).compile()
    assert collectives(compiled) == []
    # The way that looks simpler gathers; so the pattern above sees what there is to see.
    naive = lambda kv, new, slot: kv.at[jnp.arange(8)[:, None], :, slot].set(new)
    assert 'all-gather' in {kind for kind, _ in collectives(jax.jit(naive).lower(cache.k[0], new, slot).compile())}


def test_a_step_of_decoding_moves_activations_alone():
    mesh = make_mesh((4, 1, 2))
    cache, place = sharded_cache(mesh)
    shapes = jax.eval_shape(lambda p: decoder.to_sampling(CONFIG, p), decoder.abstract_params(CONFIG))
    axes = decoder.logical_axes(CONFIG)
    one_layer = jax.tree.map(lambda words: words[1:], axes['layers'], is_leaf=lambda x: isinstance(x, tuple))
    sampling_axes = axes | {'layers': [one_layer] * 2, 'lm_head': {'weight': ('embed', 'vocab')}}
    params = jax.tree.map(lambda shape, words: place(shape.shape, shape.dtype, *words), shapes, sampling_axes)
    fed = place((8, 1), jnp.int32, 'batch', None)
    count = place((8,), jnp.int32, 'batch')

    def step(params, cache, fed, count):
        hidden, cache = decoder.extend(CONFIG, params, cache, fed, count, SLOTS)
        return decoder.unembed(params, hidden[:, 0]), cache

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(step, donate_argnums=1).lower(params, cache, fed, count).compile()
    found = collectives(compiled)
    assert any(kind == 'all-reduce' for kind, _ in found)  # after o_proj and down_proj
    for kind, shape in found:
        assert str(SLOTS) not in re.findall(r'\d+', shape.split('{')[0]), (kind, shape)


def test_training_gathers_no_logits_of_the_whole_vocabulary():
    mesh = make_mesh((2, 2, 2))
    rules = decoder.fit_rules(CONFIG, mesh, sharding.TRAIN_RULES)
    placed = sharding.shardings(mesh, decoder.logical_axes(CONFIG), rules)
    params = {
        'policy': jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), decoder.abstract_params(CONFIG), placed
        )
    }
    learner = Learner(CONFIG, FORWARD, optax.sgd(1.0), mesh)
    rows = jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype, sharding=rows), make_batch())
    compiled = jax.jit(learner._add_sft).lower(params, params, micro, jnp.float32(1)).compile()
    found = collectives(compiled)
    assert {'all-gather', 'all-reduce'} <= {kind for kind, _ in found}
    assert [x for x in found if is_logits(x[1])] == []
    # Logits that are asked for whole are gathered, and seen.
    whole = jax.NamedSharding(mesh, jax.P(('data', 'fsdp'), None, None))
    naive = (
        jax.jit(lambda x, w: x @ w, out_shardings=whole)
        .lower(jax.ShapeDtypeStruct((8, 8, 32), jnp.float32, sharding=rows), params['policy']['lm_head']['weight'])
        .compile()
    )
    assert [x for x in collectives(naive) if is_logits(x[1])]


def is_logits(shape: str) -> bool:
    """Rows × positions × the vocabulary; the table of embeddings has two dimensions."""
    sizes = re.findall(r'\d+', re.sub(r'[a-z]+\d+\[', '[', shape.split('{')[0]))
    return len(sizes) >= 3 and str(CONFIG.vocab_size) in sizes
