"""On a GPU (JAX_PLATFORMS=cuda): attention by cuDNN over packed rows, and by our kernel over a cache, is that of the
reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.model import attention, decoding, kernels
from tests.model.attention_test import allowed, reference
from tests.model.decoding_test import decode_inputs, decode_reference
from tests.model.kernels_test import LENGTH, PACKED, PADDED, inputs

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU'),
    pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated'),
]
MANY = np.array([[1] * 7 + [2] * 120 + [3] * 90 + [4] * 39, [1] * LENGTH])
HOLES = np.array([[1] * 100 + [2] * 60 + [0] * 96, [0] * LENGTH])
CASES = [(PADDED, 1), (PACKED, 2), (PACKED, 16), (MANY, 4), (HOLES, 3)]


@pytest.mark.parametrize('head_dim', [64, 128])
@pytest.mark.parametrize('segments, count', CASES, ids=['padded', 'packed', 'few', 'many', 'an empty row'])
def test_cudnn_is_the_reference(segments, count, head_dim):
    q, k, v = inputs(dtype=jnp.bfloat16, head_dim=head_dim)
    out = np.asarray(jax.jit(functools.partial(kernels.cudnn, segments=count))(q, k, v, segments), np.float64)
    real = segments > 0
    np.testing.assert_allclose(out[real], reference(q, k, v, allowed(segments))[real], atol=3e-2)
    assert (out[~real] == 0).all()


@pytest.mark.parametrize('segments, count', CASES, ids=['padded', 'packed', 'few', 'many', 'an empty row'])
def test_cudnn_has_the_gradients_of_dense_attention(segments, count):
    q, k, v = inputs(dtype=jnp.bfloat16)
    weight = inputs()[0] * (segments > 0)[:, :, None, None]

    def gradients(form, *x):
        loss = lambda *x: (form(*x, segments).astype(jnp.float32) * weight).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*x)

    exact = gradients(attention.dense, *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(gradients(functools.partial(kernels.cudnn, segments=count), q, k, v), exact):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('head_dim', [64, 128])
@pytest.mark.parametrize('heads, kv_heads', [(12, 2), (28, 4), (8, 8), (4, 1)])
def test_the_decode_kernel_is_the_reference(heads, kv_heads, head_dim, dtype):
    lengths = [1, 64, 65, 250, 256, 257, 600, 1000, 1023, 1024, 700, 3]
    q, k, v, length = decode_inputs(heads, kv_heads, head_dim, 1024, lengths, dtype)
    assert decoding.choose(k, q.dtype.name, None).tile == decoding.TILE
    out = np.asarray(jax.jit(lambda *x: decoding.triton_decode(*x, 1024))(q, k, v, length), np.float64)
    np.testing.assert_allclose(out, decode_reference(q, k, v, length), atol=2e-2)


def test_the_decode_kernel_gives_a_row_the_same_whatever_the_bound():
    q, k, v, length = decode_inputs(12, 2, 128, 1024, [70, 250, 3], jnp.bfloat16)
    run = lambda bound: jax.jit(lambda *x: decoding.triton_decode(*x, bound))(q, k, v, length)
    np.testing.assert_array_equal(run(256), run(1024))
