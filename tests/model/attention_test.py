"""Attention in every form agrees with a plain float64 reference."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.model import attention, kernels

PACKED = np.array([[1] * 7 + [2] * 13 + [0] * 4, [1] * 24, [1] * 3 + [2] * 5 + [3] * 8 + [0] * 8])


def reference(q_BTNH, k_BSKH, v_BSKH, allowed_BTS) -> np.ndarray:
    """Float64, one head and one query at a time; queries come scaled."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    b, t, n, _ = q.shape
    group, out = n // k.shape[2], np.zeros(q.shape)
    for row in range(b):
        for head in range(n):
            for i in range(t):
                keys = np.flatnonzero(allowed_BTS[row, i])
                score = k[row, keys, head // group] @ q[row, i, head]
                weight = np.exp(score - score.max())
                out[row, i, head] = weight / weight.sum() @ v[row, keys, head // group]
    return out


def inputs(heads, kv_heads, head_dim=8, length=24, slots=None, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda t, n, scale=1.0: jnp.asarray(scale * rng.normal(size=(3, t, n, head_dim)), dtype)
    return (make(length, heads, head_dim**-0.5), make(slots or length, kv_heads), make(slots or length, kv_heads))


def allowed(segment_ids_BT) -> np.ndarray:
    causal = np.tril(np.ones((segment_ids_BT.shape[1],) * 2, bool))
    return causal & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('heads, kv_heads', [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize('form', ['dense', 'blocked'])
def test_causal_attention_within_segments_is_the_reference(form, heads, kv_heads, dtype, tolerance):
    q, k, v = inputs(heads, kv_heads, dtype=dtype)
    function = attention.dense if form == 'dense' else functools.partial(attention.blocked, block=8)
    out = jax.jit(function)(q, k, v, PACKED)
    expected = reference(q, k, v, allowed(PACKED))
    real = PACKED > 0  # what stands at padding is nobody's, but must be finite
    assert out.dtype == dtype and bool(jnp.isfinite(out).all())
    np.testing.assert_allclose(np.asarray(out, np.float64)[real], expected[real], atol=tolerance)


@pytest.mark.parametrize('block', [8, pytest.param(3, marks=pytest.mark.slow)])
def test_blocked_attention_has_the_gradients_of_dense(block):
    q, k, v = inputs(4, 2)
    target = inputs(4, 2, seed=1)[0]
    loss = lambda form: lambda *x: jnp.sum(form(*x, PACKED) * target)
    expected = jax.jit(jax.grad(loss(attention.dense), argnums=(0, 1, 2)))(q, k, v)
    found = jax.jit(jax.grad(loss(functools.partial(attention.blocked, block=block)), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('form', ['dense', 'blocked'])
def test_a_segment_sees_the_beginning_that_it_goes_on_from_and_no_other(form):
    """Rows of a beginning of 5 and two of its ends, then one of 3 and an end: each end as a row of its own."""
    own = np.repeat([4, 1, 2, 5, 3, 0], [5, 4, 6, 3, 4, 2])[None]
    before = np.repeat([4, 4, 4, 5, 5, 0], [5, 4, 6, 3, 4, 2])[None]
    function = attention.dense if form == 'dense' else functools.partial(attention.blocked, block=8)
    q, k, v = (x[:1] for x in inputs(4, 2, length=24))
    out = jax.jit(function)(q, k, v, own, before)
    for places in ([*range(5), *range(5, 9)], [*range(5), *range(9, 15)], [*range(15, 18), *range(18, 22)]):
        part = [x[:, places] for x in (q, k, v)]
        alone = attention.dense(*part, np.ones((1, len(places)), np.int32))
        np.testing.assert_allclose(out[:, places], alone, atol=2e-6)


def test_fused_attention_shares_nothing():
    assert attention.shares('dense', 512, 'float32') and attention.shares('auto', 16384, 'float32')  # on a CPU: blocked
    assert not any(attention.shares(kind, 512, 'bfloat16') for kind in ('splash', 'cudnn'))


def test_blocked_attention_holds_no_square_of_scores():
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    loss = lambda q, k, v, s: attention.blocked(q, k, v, s, block=256).sum()
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        .lower(shape, shape, shape, jax.ShapeDtypeStruct((1, 4096), jnp.int32))
        .compile()
    )
    block = 2 * 256 * 4096 * 4  # bytes of one block of scores
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * block
    assert 6 * block < 2 * 4096 * 4096 * 4


@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('heads, kv_heads', [(4, 2), (6, 1), (3, 3)])
def test_attention_over_a_cache_reads_each_row_up_to_its_own_queries(heads, kv_heads, dtype, tolerance):
    q, k, v = inputs(heads, kv_heads, length=5, slots=32, dtype=dtype)
    positions_BC = np.array([0, 9, 27])[:, None] + np.arange(5)
    cache = lambda x: jnp.moveaxis(x, 1, 2)  # slots after heads
    out = jax.jit(attention.cached)(q, cache(k), cache(v), positions_BC)
    expected = reference(q, k, v, np.arange(32) <= positions_BC[:, :, None])
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)


def test_slots_beyond_the_queries_may_hold_anything_finite():
    q, k, v = inputs(4, 2, length=2, slots=16)
    positions_BC = np.array([[3, 4], [0, 1], [7, 8]])
    stale = np.arange(16) > positions_BC.max(axis=1)[:, None]
    cache = lambda x, fill: jnp.moveaxis(jnp.where(stale[:, :, None, None], fill, x), 1, 2)
    run = jax.jit(attention.cached)
    np.testing.assert_array_equal(
        run(q, cache(k, 0.0), cache(v, 0.0), positions_BC), run(q, cache(k, 1e30), cache(v, -1e30), positions_BC)
    )


def test_the_choice_is_by_name_or_by_length():
    assert attention.choose('dense', 4096) is attention.dense
    assert attention.choose('auto', 1024) is attention.dense
    assert attention.choose('auto', 16384) is attention.blocked
    assert set(attention.KINDS) - {'auto'} == {'dense', 'blocked', 'splash', 'cudnn'}
    assert all(callable(attention.choose(kind, 10)) for kind in attention.KINDS)


@pytest.mark.parametrize(
    'kind, platform, capability, length, dtype',
    [
        ('cudnn', 'gpu', '9.0', 16384, jnp.bfloat16),
        ('cudnn', 'gpu', '10.3', 16384, jnp.float16),
        ('cudnn', 'gpu', '9.0', 16384, 'bfloat16'),
        ('cudnn', 'gpu', '9.0', 1025, jnp.bfloat16),
        ('blocked', 'gpu', '9.0', 16384, jnp.float32),
        ('blocked', 'gpu', '8.9', 16384, jnp.bfloat16),
        ('blocked', 'gpu', 'gfx942', 16384, jnp.bfloat16),  # AMD's
        ('dense', 'gpu', '9.0', 1024, jnp.bfloat16),
        ('splash', 'tpu', None, 16384, jnp.bfloat16),
        ('blocked', 'tpu', None, 16385, jnp.bfloat16),
        ('blocked', 'cpu', None, 16384, jnp.bfloat16),
    ],
)
def test_auto_is_the_fastest_form_that_the_device_has(monkeypatch, kind, platform, capability, length, dtype):
    words = {} if capability is None else {'compute_capability': capability}
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(platform=platform, **words)])
    chosen = attention.choose('auto', length, 1, dtype)
    assert chosen is {'splash': kernels.splash, 'cudnn': kernels.cudnn}.get(kind, getattr(attention, kind, None))
