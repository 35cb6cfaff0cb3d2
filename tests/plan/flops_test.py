"""Work is counted as it runs: scans by length, kernels by grid, devices by mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from retool_jax.core import sharding
from retool_jax.model import decoder, decoding, kernels
from retool_jax.plan import flops
from tests.model.sizes import make_config

X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
LAYERS = 5 * 2 * 8 * 16 * 16


def layers(x, w):
    one = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jax.lax.scan(one, x, w)[0].sum()


def counted(f, *args, **kwargs):
    return flops.count(jax.jit(f).trace(*args).jaxpr, **kwargs)


def test_a_scan_counts_by_its_length_and_recomputation_counts():
    assert counted(layers, X, W) == LAYERS
    assert counted(jax.grad(layers, (0, 1)), X, W) == 4 * LAYERS  # forwards, again, two products backwards


def test_a_loop_without_a_length_counts_as_often_as_it_is_told():
    f = lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w[0], x)
    assert counted(f, X, W, trips=3) == 3 * LAYERS / 5
    f = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])
    assert counted(f, X, W) == 2 * LAYERS / 5


def test_the_body_of_a_shard_map_is_one_devices():
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 4})
    split = jax.shard_map(
        lambda x, w: x @ w[0],
        mesh=mesh,
        in_specs=(jax.P('fsdp'), jax.P(None, None, 'tensor')),
        out_specs=jax.P('fsdp', 'tensor'),
    )
    assert counted(split, X, W) == LAYERS / 5


@pytest.mark.filterwarnings('ignore')
def test_a_causal_kernel_counts_the_blocks_at_and_below_the_diagonal(monkeypatch):
    monkeypatch.setattr(kernels, 'BLOCKS', (128,))
    q = jax.ShapeDtypeStruct((1, 512, 4, 128), jnp.bfloat16)
    s = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    pairs = 512 * 512 * 5 / 8  # 4 × 4 blocks, 10 of which count
    assert counted(kernels.splash, q, q, q, s) == 4 * pairs * 128 * 4


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('heads, kv_heads', [(6, 6), (6, 2), (4, 4)])  # 4: as many as there are blocks
def test_the_gradient_of_a_causal_kernel_counts_half_the_blocks_in_whatever_order_its_grid_has_them(
    monkeypatch, heads, kv_heads
):
    monkeypatch.setattr(kernels, 'BLOCKS', (128,))
    make = lambda heads: jax.ShapeDtypeStruct((2, 512, heads, 128), jnp.bfloat16)
    s = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    loss = lambda q, k, v, s: kernels.splash(q, k, v, s).astype(jnp.float32).sum()
    pairs = 2 * 512 * 512 * 5 / 8  # 4 × 4 blocks of two rows, 10 of which count
    one = 2 * pairs * 128 * heads
    # Forwards scores and mixed values. Backwards one kernel for queries, 3, and one for keys and values, 4, whose grid
    # is (keys, heads, queries). Between them results meet their gradients, position by position.
    found = counted(jax.grad(loss, (0, 1, 2)), make(heads), make(kv_heads), make(kv_heads), s)
    assert found == (2 + 3 + 4) * one + 2 * 2 * 512 * heads * 128


def test_a_kernel_of_decoding_counts_by_the_slots_that_it_is_given_and_is_known_as_one_that_reads_by_length():
    b, n, k, s, h = 3, 14, 2, 320, 64
    make = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    length = jax.ShapeDtypeStruct((b,), jnp.int32)
    attend = lambda q, k, v, length: decoding.triton_decode(q, k, v, length, s)
    jaxpr = jax.make_jaxpr(attend)(make(b, n, h), make(b, k, s, h), make(b, k, s, h), length)
    pairs, cache = b * k * s * h, 2 * b * k * s * h * 2
    assert flops.count(jaxpr) == 2 * 2 * 16 * pairs  # of 7 query heads of a KV head a tensor core makes 16
    queries_and_results = b * n * h * 2 + 2 * b * n * (h + 2) * 4 + b * 4  # two parts of 256 slots, in f32; lengths
    assert flops.traffic(jaxpr) == cache + queries_and_results
    assert flops.by_length(jaxpr) == flops.ByLength(64, flops.count(jaxpr), cache)
    assert flops.by_length(jax.make_jaxpr(layers)(X, W)) == flops.ByLength(0, 0, 0)


def test_the_tpus_kernel_of_decoding_is_counted_likewise_through_loops_and_on_every_device():
    b, n, k, s, h, trips = 3, 10, 2, 768, 128, 5
    mesh = jax.sharding.AbstractMesh((1, 1, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    attend = decoding.on_each_device(decoding.paged_decode, mesh)
    make = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def loop(q, k, v, length):
        step = lambda carry: (carry[0] + 1, attend(carry[1], k, v, length, s))
        return jax.lax.while_loop(lambda carry: carry[0] < length.sum(), step, (0, q))

    jaxpr = jax.make_jaxpr(loop)(
        make(b, n, h), make(b, k, s, h), make(b, k, s, h), jax.ShapeDtypeStruct((b,), jnp.int32)
    )
    pairs, cache = b * k * s * h, 2 * b * k * s * h * 2
    work = trips * 2 * 2 * 128 * pairs  # a matrix unit takes 5 query heads of a KV head as it would take 128
    assert flops.count(jaxpr, trips) == work
    assert flops.by_length(jaxpr, trips) == flops.ByLength(256, work, trips * cache)
    queries_and_results, table = 2 * b * n * h * 2, 2 * (b * (k // 2) * 4 + b * (k // 2) * s // 256 * 4)
    assert flops.traffic(jaxpr, trips) == trips * (cache + queries_and_results + table)


def test_what_is_gathered_is_read_and_written():
    f = lambda x, i: x.at[i, :4].get(mode='promise_in_bounds')
    x, i = jax.ShapeDtypeStruct((8, 16, 2), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert (counted(f, x, i), flops.traffic(jax.make_jaxpr(f)(x, i))) == (0, 2 * 3 * 4 * 2 * 4)


def test_traffic_is_what_matmuls_read_and_write():
    assert flops.traffic(jax.jit(layers).trace(X, W).jaxpr) == 5 * 4 * (8 * 16 + 16 * 16 + 8 * 16)


def test_what_is_widened_from_8_bits_for_a_matmul_is_read_in_8_bits():
    found = lambda f, dtype: flops.traffic(jax.jit(f).trace(X, jax.ShapeDtypeStruct(W.shape, dtype)).jaxpr)
    one = lambda x, w: x @ w.astype(x.dtype)[0].T @ w[1].astype(x.dtype)
    assert found(one, jnp.int8) == found(one, jnp.bfloat16) - (4 - 1) * 16 * 16  # the first is taken out of a wide copy
    ahead = lambda x, w: layers(x, w.astype(x.dtype))  # before the scan, which reads what was written
    assert found(ahead, jnp.int8) == found(ahead, jnp.bfloat16) == 5 * 4 * (8 * 16 + 16 * 16 + 8 * 16)


def test_cudnns_attention_is_causal_and_moves_its_operands_and_results_alone():
    b, t, n, k, h = 2, 256, 8, 2, 64
    make = lambda heads: jax.ShapeDtypeStruct((b, t, heads, h), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((b, t), jnp.int32)
    attend = lambda q, k, v, s: kernels.cudnn(q, k, v, s, segments=4)
    loss = lambda *x: attend(*x).astype(jnp.float32).sum()
    with kernels.traced_anywhere():
        forward = jax.make_jaxpr(attend)(make(n), make(k), make(k), segments)
        both = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(make(n), make(k), make(k), segments)
    one = 2 * b * n * h * t * t / 2  # a matmul of the lower half of all scores
    assert (flops.count(forward), flops.count(both)) == (2 * one, 7 * one)
    read = 2 * b * t * h * (n + 2 * k)
    assert read + 2 * b * t * h * n < flops.traffic(forward) < 1.1 * (read + 2 * b * t * h * n)


def gradient_of(config, remat, attend='cudnn'):
    """The gradient of two layers over a row of 256 tokens, traced."""
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    run = functools.partial(decoder.forward, config, dtype=jnp.bfloat16, attend=attend, segments=4, remat=remat)
    with kernels.traced_anywhere():
        params = decoder.abstract_params(config)
        return jax.make_jaxpr(jax.grad(lambda p, *x: run(p, *x).astype(jnp.float32).sum()))(params, ids, ids, ids)


def test_what_the_backward_pass_keeps_is_not_computed_again():
    config = make_config(hidden_size=64, head_dim=64)
    heads, keys = (n * 64 for n in (config.num_attention_heads, config.num_key_value_heads))
    mlp = 2 * 256 * 64 * 2 * config.intermediate_size  # gate and up
    rest = 2 * 256 * 64 * (2 * heads + 2 * keys)  # q, k, v and o; nothing asks for the MLP's result again
    attention = 2 * 256 * 256 * heads  # the lower half of scores and mixed values
    again = {'full': rest + mlp + attention, 'attention': rest + mlp, 'dots_but_mlp': mlp, 'dots': 0}
    least = flops.count(gradient_of(config, 'none'))
    for remat, more in again.items():
        jaxpr = gradient_of(config, remat)
        assert flops.count(jaxpr) - least == config.num_hidden_layers * more, remat
        passes = 2 if remat == 'full' else 1
        assert str(jaxpr).count(' dot_product_attention_fwd_wrapper[') == passes, (
            remat
        )  # once for all layers of the scan


@pytest.mark.parametrize('remat, runs', [('full', 4), ('attention', 3), ('dots_but_mlp', 3), ('dots', 3)])
def test_splash_attention_is_kept_with_one_logarithm_a_query(remat, runs):
    config = make_config(hidden_size=128, head_dim=128)
    text = str(gradient_of(config, remat, 'splash'))
    assert text.count(' pallas_call[') == runs  # forwards, and two backwards
    stacked = f'f32[{config.num_hidden_layers},1,{config.num_attention_heads},256'
    assert (f'{stacked}]' in text) == (remat != 'full') and f'{stacked},128]' not in text
