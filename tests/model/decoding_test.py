"""Kernels of decode steps agree with the float64 reference, in interpret mode, and read no row but up to its length."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from retool_jax.core import sharding
from retool_jax.model import decoder, decoding, kv_cache
from tests.model.attention_test import reference
from tests.model.sizes import make_config

triton = functools.partial(decoding.triton_decode, interpret=True)


def paged(*arguments, **more):
    """JAX's kernel takes no argument that says so."""
    with pltpu.force_tpu_interpret_mode():
        return decoding.paged_decode(*arguments, **more)


def decode_inputs(heads, kv_heads, head_dim, slots, lengths, dtype, stale=np.nan):
    """One query a row; what lies beyond a row's length is NaN, or another number."""
    rng, rows = np.random.default_rng(0), len(lengths)
    q = jnp.asarray(head_dim**-0.5 * rng.normal(size=(rows, heads, head_dim)), dtype)
    beyond = (np.arange(slots) >= np.array(lengths)[:, None])[:, None, :, None]
    k, v = (
        jnp.asarray(np.where(beyond, stale, rng.normal(size=(rows, kv_heads, slots, head_dim))), dtype)
        for _ in range(2)
    )
    return q, k, v, jnp.asarray(lengths, jnp.int32)


def decode_reference(q_BNH, k_BKSH, v_BKSH, length_B):
    slots_first = lambda x: np.moveaxis(np.nan_to_num(np.asarray(x, np.float64)), 1, 2)
    there = (np.arange(k_BKSH.shape[2]) < np.asarray(length_B)[:, None])[:, None]
    return reference(q_BNH[:, None], slots_first(k_BKSH), slots_first(v_BKSH), there)[:, 0]


DECODES = [(6, 2, 64, 640, [1, 64, 300, 640]), (14, 2, 16, 320, [65, 257, 320]), (4, 4, 128, 576, [512, 2])]


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('heads, kv_heads, head_dim, slots, lengths', DECODES)
def test_the_gpus_kernel_is_the_reference_and_reads_nothing_beyond(
    heads, kv_heads, head_dim, slots, lengths, dtype, tolerance
):
    q, k, v, length = decode_inputs(heads, kv_heads, head_dim, slots, lengths, dtype)
    out = triton(q, k, v, length, slots)
    np.testing.assert_allclose(np.asarray(out, np.float64), decode_reference(q, k, v, length), atol=tolerance)


@pytest.mark.parametrize(
    ('heads', 'kv_heads', 'slots', 'lengths'),
    [(10, 2, 384, [1, 128, 300]), (16, 2, 512, [512, 2]), pytest.param(3, 3, 1024, [600, 5], marks=pytest.mark.slow)],
)
def test_the_tpus_kernel_is_the_reference_and_reads_no_page_beyond(heads, kv_heads, slots, lengths):
    q, k, v, length = decode_inputs(heads, kv_heads, 128, slots, lengths, jnp.bfloat16, stale=1e4)
    page = decoding.page_of(slots)
    read = np.arange(slots) < -(-np.array(lengths) // page)[:, None] * page
    k, v = (jnp.where(read[:, None, :, None], x, jnp.nan) for x in (k, v))
    out = paged(q, k, v, length, slots)
    assert out.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), decode_reference(q, k, v, length), atol=2e-2)


@pytest.mark.parametrize(
    'kernel, stale, longest',
    [(triton, np.nan, 250), (paged, 0.0, 250), (decoding.block_decode, 0.0, 700)],
    ids=['triton', 'paged', 'blocks'],
)
def test_what_a_row_reads_does_not_change_with_the_length_of_another(kernel, stale, longest):
    q, k, v, length = decode_inputs(4, 2, 128, 768, [70, longest, 3], jnp.bfloat16, stale)
    out = np.asarray(kernel(q, k, v, length, 768).astype(jnp.float32))
    other = np.asarray(kernel(q, k, v, length.at[1].set(3), 768).astype(jnp.float32))
    np.testing.assert_array_equal(out[::2], other[::2])
    assert (out[1] != other[1]).any()


def test_the_gpus_kernel_gives_the_same_whatever_the_bound():
    q, k, v, length = decode_inputs(4, 2, 64, 1280, [70, 250, 3], jnp.bfloat16)
    np.testing.assert_array_equal(triton(q, k, v, length, 256), triton(q, k, v, length, 1280))


def test_a_decode_step_attends_by_the_kernel_that_it_is_given():
    config = make_config(head_dim=16)
    params = decoder.to_sampling(config, decoder.init(config, jax.random.key(0)))
    cache = kv_cache.empty(config, 3, 128)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 9))
    _, cache = decoder.extend(config, params, cache, tokens, np.array([9, 4, 0]), 128)
    step = lambda kernel: decoder.extend(
        config, params, cache, tokens[:, :1], np.array([1, 0, 1]), 128, attend_one=kernel
    )
    calls, (plain, _) = [], step(None)
    found, longer = step(lambda *x: calls.append(x[3].tolist()) or triton(*x))
    assert calls == [[10, 1, 1]] * config.num_hidden_layers  # the second row adds nothing and reads one slot
    assert longer.length_B.tolist() == [10, 4, 1]
    np.testing.assert_allclose(found[::2], plain[::2], atol=2e-5)


@pytest.mark.parametrize('sizes', [(1, 1, 2), (2, 2, 2)], ids=str)
def test_a_kernel_runs_on_each_devices_heads(sizes):
    """Alone, and in a program of several engines, whose rows are apart already."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[: int(np.prod(sizes))])
    q, k, v, length = decode_inputs(4, 2, 64, 128, [1, 64, 100, 128], jnp.float32)
    seen = []

    def kernel(q, k, v, length, bound):
        seen.append((q.shape, k.shape))
        return triton(q, k, v, length, bound)

    attend = functools.partial(decoding.on_each_device(kernel, mesh), bound=128)
    rows = jax.P(('data', 'fsdp'))
    if mesh.shape['data'] > 1:
        attend = jax.shard_map(
            attend, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={'data', 'fsdp'}, check_vma=False
        )
    heads = jax.NamedSharding(mesh, jax.P(('data', 'fsdp'), 'tensor'))
    put = lambda x: jax.device_put(x, heads)
    out = jax.jit(attend)(put(q), put(k), put(v), jax.device_put(length, jax.NamedSharding(mesh, rows)))
    own = 4 // (mesh.shape['data'] * mesh.shape['fsdp'])
    assert seen == [((own, 2, 64), (own, 1, 128, 64))]
    assert out.sharding.spec[1] == 'tensor'
    np.testing.assert_allclose(np.asarray(out, np.float64), decode_reference(q, k, v, length), atol=2e-6)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    'slots, lengths', [(1024, [1, 512, 513, 640, 1024]), (700, [700, 699, 650, 3]), (512, [9, 512])]
)
def test_blocks_on_a_cpu_are_the_reference(slots, lengths, dtype, tolerance):
    q, k, v, length = decode_inputs(6, 2, 16, slots, lengths, dtype, stale=1e4)
    out = jax.jit(decoding.block_decode, static_argnums=4)(q, k, v, length, slots)
    np.testing.assert_allclose(np.asarray(out, np.float64), decode_reference(q, k, v, length), atol=tolerance)


def test_blocks_beyond_a_rows_length_are_not_read():
    q, k, v, length = decode_inputs(4, 2, 16, 1024, [600, 1000, 3], jnp.float32, stale=0.0)
    there = np.arange(1024) < 512 + -(-(np.array([600, 1000, 3])[:, None] - 512) // decoding.BLOCK) * decoding.BLOCK
    k, v = (jnp.where((there | (np.arange(1024) < 512))[:, None, :, None], x, jnp.nan) for x in (k, v))
    assert np.isfinite(decoding.block_decode(q, k, v, length, 1024)).all()


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')
def test_the_gpus_kernel_is_lowered_for_hopper():
    q, k, v, length = decode_inputs(14, 2, 128, 640, [1, 640], jnp.bfloat16)
    chip = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ('one',), abstract_device=chip)):
        exported = jax.export.export(
            jax.jit(lambda *x: decoding.triton_decode(*x, 640)),
            platforms=['cuda'],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call('__gpu$xla.gpu.triton')],
        )(q, k, v, length)
    assert '@__gpu$xla.gpu.triton' in exported.mlir_module()


H100 = types.SimpleNamespace(platform='gpu', compute_capability='9.0')
TPU = types.SimpleNamespace(platform='tpu', num_cores=2)
CPU = types.SimpleNamespace(platform='cpu')


@pytest.mark.parametrize(
    ('tile', 'chip', 'dtype', 'slots', 'head_dim'),
    [
        (64, H100, 'bfloat16', 128, 64),
        (64, types.SimpleNamespace(platform='gpu', compute_capability='10.0'), 'float16', 64, 128),
        (None, types.SimpleNamespace(platform='gpu', compute_capability='8.0'), 'bfloat16', 128, 64),
        (None, CPU, 'bfloat16', 1024, 128),
        (128, CPU, 'float32', 2048, 40),
        (None, H100, 'float32', 128, 64),
        (None, H100, 'bfloat16', 100, 64),
        (None, H100, 'bfloat16', 128, 80),
        (512, TPU, 'bfloat16', 1024, 128),
        (128, TPU, 'bfloat16', 384, 256),
        (None, TPU, 'bfloat16', 1024, 64),
        (None, TPU, 'float16', 1024, 128),
        (None, TPU, 'float32', 1024, 128),
        (None, TPU, 'bfloat16', 192, 128),
        (None, TPU, 'bfloat16', 2**24, 128),  # its table of pages would not fit
    ],
)
def test_each_chip_has_the_kernels_that_it_can_run(monkeypatch, tile, chip, dtype, slots, head_dim):
    monkeypatch.setattr(jax, 'devices', lambda: [chip])
    cache = jax.ShapeDtypeStruct((2, 2, slots, head_dim), jnp.dtype(dtype))
    found = decoding.choose(cache, dtype, None, slots)
    assert (found and found.tile) == tile and (found is None or found.bounded == (chip not in (TPU, CPU)))
    narrow = jax.eval_shape(kv_cache.quantise, cache)
    assert decoding.choose(narrow, dtype, None, slots) is None
    other = jax.ShapeDtypeStruct(cache.shape, jnp.dtype('float32' if dtype != 'float32' else 'bfloat16'))
    assert decoding.choose(other, dtype, None, slots) is None
    whole = jax.sharding.AbstractMesh((1, 1, 4), sharding.AXES)  # two KV heads do not divide over four devices
    assert decoding.choose(cache, dtype, whole, slots) is None


def test_a_kernels_heads_take_the_time_of_whole_units():
    assert [decoding.padded(group) for group in (1, 7, 16, 17)] == [16, 16, 16, 32]
    assert [decoding.padded(group, decoding.PAGED) for group in (1, 128, 129)] == [128, 128, 129]
