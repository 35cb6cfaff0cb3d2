"""Fused kernels agree with the float64 reference: TPU's in interpret mode, cuDNN's through its XLA twin."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.model import attention, kernels
from retool_jax.plan import chips
from tests.model.attention_test import allowed, reference

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 256
PACKED = np.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * LENGTH])
PADDED = np.array([[1] * 100 + [0] * 156, [1] * LENGTH])
splash = functools.partial(kernels.splash, interpret=True)
twin = functools.partial(kernels.cudnn, implementation='xla')


def inputs(rows=2, heads=4, kv_heads=2, head_dim=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(scale * rng.normal(size=(rows, LENGTH, n, head_dim)), dtype)
        for n, scale in ((heads, head_dim**-0.5), (kv_heads, 1.0), (kv_heads, 1.0))
    ]


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 5e-6), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize('form, segments', [(splash, PACKED), (twin, PADDED)], ids=['splash', 'cudnn'])
def test_a_kernel_is_the_reference(form, segments, dtype, tolerance):
    q, k, v = inputs(dtype=dtype)
    out = np.asarray(jax.jit(form)(q, k, v, segments), np.float64)
    expected = reference(q, k, v, allowed(segments))
    real = segments > 0
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[real], expected[real], atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('form, segments', [(splash, PACKED), (twin, PADDED)], ids=['splash', 'cudnn'])
def test_a_kernel_has_the_gradients_of_dense_attention(form, segments):
    q, k, v = inputs()
    weight = inputs()[0] * (segments > 0)[:, :, None, None]
    gradients = lambda f: jax.jit(jax.grad(lambda *x: (f(*x, segments) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(gradients(form), gradients(attention.dense)):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize('sizes', [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize('form, segments', [(splash, PACKED), (twin, PADDED)], ids=['splash', 'cudnn'])
def test_a_kernel_runs_on_each_devices_rows_and_heads(form, segments, sizes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    segments = np.concatenate([segments, segments[::-1]])
    q, k, v = inputs(rows=4)

    def run(q, k, v, s):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return form(q, k, v, s)

    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(('data', 'fsdp'))))
    compiled = jax.jit(run).lower(*map(place, (q, k, v, segments))).compile()
    out = compiled(*map(place, (q, k, v, segments)))
    assert out.sharding.spec[2] == 'tensor'
    real = segments > 0
    expected = jax.jit(attention.dense)(q, k, v, segments)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=5e-6)


def test_a_second_episode_in_a_row_is_never_taken_silently_by_a_kernel_without_segments():
    out = np.asarray(jax.jit(twin)(*inputs(), PACKED))
    assert np.isnan(out[0, 100:220]).all() and np.isfinite(out[1]).all()
    assert (out[0, 220:] == 0).all()


def test_bounds_are_where_each_episode_lies():
    segments = np.array([[1] * 3 + [2] * 4 + [0], [1] * 8, [0] * 8])
    length, first = kernels.bounds(segments, 3)
    assert length.tolist() == [[3, 4, -1], [8, -1, -1], [-1, -1, -1]]
    assert first.tolist() == [[0, 3, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]]


def test_rows_of_several_episodes_are_a_packed_call_of_cudnn_forwards_and_backwards(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91200)  # no GPU here: it is lowered, not run
    monkeypatch.setattr(fused, 'check_compute_capability', lambda capability: True)
    monkeypatch.setattr(fused, 'is_cuda_compute_capability_equal', lambda capability: False)
    q, k, v = inputs(dtype=jnp.bfloat16)
    loss = lambda q, k, v, s: kernels.cudnn(q, k, v, s, segments=2).astype(jnp.float32).sum()
    exported = jax.export.export(
        jax.jit(jax.grad(loss, (0, 1, 2))),
        platforms=['cuda'],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call('__cudnn$fmhaSoftmax'),
            jax.export.DisabledSafetyCheck.custom_call('__cudnn$fmhaSoftmaxBackward'),
        ],
    )(q, k, v, jnp.asarray(PACKED))
    text = exported.mlir_module().replace('\\22', '"')  # as MLIR writes quotes in strings
    for call in ('__cudnn$fmhaSoftmax(', '__cudnn$fmhaSoftmaxBackward('):
        assert call in text
    for words in ('"max_seg_per_batch": 2', '"mask_type": "PADDING_CAUSAL"'):
        assert text.count(words) == 2, words


def test_what_a_kernel_cannot_do_is_refused_by_name():
    q, k, v = inputs()
    with pytest.raises(ValueError, match='cudnn has no float32 kernel; set forward.dtype=bfloat16'):
        kernels.cudnn(q, k, v, PADDED)
    with pytest.raises(ValueError, match='splash needs rows of a multiple of 128 tokens, not 200; change forward.row'):
        splash(q[:, :200], k[:, :200], v[:, :200], PACKED[:, :200])
    mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(ValueError, match='forward.micro_rows: 2 rows do not divide over 8 devices'),
    ):
        splash(q, k, v, PACKED)


def test_the_choice_knows_the_kernels_by_name():
    assert attention.choose('splash', 16384) is kernels.splash
    assert attention.choose('cudnn', 16384) is kernels.cudnn
    assert attention.choose('cudnn', 16384, 16).keywords == {'segments': 16}


COMPILE = """
from retool_jax.plan import chips
devices = chips.open_slice('v5p:2x2x1').devices
import jax, jax.numpy as jnp
from retool_jax.core import sharding
from retool_jax.model import kernels
mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2}, devices)
rows = jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))
shape = lambda *s, t=jnp.bfloat16: jax.ShapeDtypeStruct(s, t, sharding=rows)
def loss(q, k, v, s):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return kernels.splash(q, k, v, s).astype(jnp.float32).sum()
compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
    shape(2, 32768, 8, 128), shape(2, 32768, 2, 128), shape(2, 32768, 2, 128),
    shape(2, 32768, t=jnp.int32)).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(chips.compiler() is None, reason='needs the TPU compiler: bash launch/baselines.sh plan')
def test_the_tpu_compiler_takes_32768_tokens_without_a_matrix_of_scores():
    child = subprocess.run(
        [sys.executable, '-c', COMPILE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert int(child.stdout.split()[-1]) < 32768 * 32768 * 2 / 4  # one head's scores in bfloat16, a quarter of it
