"""Numbers in 8 bits with a scale: the sampler's matrices, one scale for each output channel.

A matmul multiplies by the integers themselves, which bf16 holds exactly, and scales what comes out, so that no matrix
of another dtype need lie in memory: XLA widens them on their way into the matmul.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retool_jax.core.pytrees import Int8Weight


def split(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(int8 values, f32 scale over the other axes): the scale is the largest magnitude along `axes` ÷ 127, and values ×
    scale is off by at most half of it."""
    x32 = x.astype(jnp.float32)
    scale = jnp.abs(x32).max(axis=axes) / 127
    each = jnp.expand_dims(jnp.maximum(scale, 1e-30), axes)
    return jnp.round(x32 / each).astype(jnp.int8), scale


def quantise(weight: jax.Array, inputs: int) -> Int8Weight:
    """A matrix whose first `inputs` axes are its inputs."""
    return Int8Weight(*split(weight, tuple(range(inputs))))


def multiply(x: jax.Array, weight: Int8Weight, dtype) -> jax.Array:
    """x · weight over the last axes of `x`, in `dtype`.

    The sum leaves the matmul in `dtype`, as it does with weights of that dtype, and is scaled in f32.
    """
    inputs = weight.values.ndim - weight.scale.ndim
    # Without the barrier XLA widens all matrices before a loop of decode steps, and keeps the copies through it.
    x, values = jax.lax.optimization_barrier((x, weight.values))
    over = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    y = jax.lax.dot_general(x, values.astype(x.dtype), (over, ((), ())), preferred_element_type=dtype)
    return (y.astype(jnp.float32) * weight.scale).astype(dtype)
