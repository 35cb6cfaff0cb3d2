"""Attention over whole sequences (training) and over a KV cache (sampling).

Queries come scaled, q·H^-½ (layers.rotate): no form scales them again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from retool_jax.core.pytrees import Int8KV
from retool_jax.model import kernels
from retool_jax.model.kv_cache import KV

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Float, Int

KINDS = ('auto', 'dense', 'blocked', 'splash', 'cudnn')
MASKED = kernels.MASKED


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Dot products in f32, [B, K, G, T, S]."""
    b, t, n, h = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h)
    return jnp.einsum('BTKGH,BSKH->BKGTS', q, k_BSKH, preferred_element_type=jnp.float32)


def _mix(score_BKGTS: jax.Array, mask_BTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Softmax over the allowed positions, then the weighted values, [B, T, N, H]."""
    probs = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], score_BKGTS, MASKED), axis=-1)
    out = jnp.einsum('BKGTS,BSKH->BTKGH', probs.astype(v_BSKH.dtype), v_BSKH)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _seen(own_BC: jax.Array, prefix_BC: jax.Array | None, segment_ids_BT: jax.Array) -> jax.Array:
    """Which tokens lie in a query's segment, or in the one that this goes on from, [B, C, T]."""
    lies_in = lambda ids_BC: ids_BC[:, :, None] == segment_ids_BT[:, None, :]
    return lies_in(own_BC) if prefix_BC is None else lies_in(own_BC) | lies_in(prefix_BC)


def dense(
    q_BTNH: Float[Array, 'B T N H'],
    k_BTKH: Float[Array, 'B T K H'],
    v_BTKH: Float[Array, 'B T K H'],
    segment_ids_BT: Int[Array, 'B T'],
    prefix_ids_BT: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T N H']:
    """Causal attention within segments by a whole [T, T] score matrix: for short rows.

    prefix_ids_BT: the segment that a token's own goes on from, whose tokens it sees as well, or its own; None: its own.
    """
    t = q_BTNH.shape[1]
    mask = jnp.tril(jnp.ones((t, t), bool)) & _seen(segment_ids_BT, prefix_ids_BT, segment_ids_BT)
    return _mix(_scores(q_BTNH, k_BTKH), mask, v_BTKH)


def blocked(
    q_BTNH: Float[Array, 'B T N H'],
    k_BTKH: Float[Array, 'B T K H'],
    v_BTKH: Float[Array, 'B T K H'],
    segment_ids_BT: Int[Array, 'B T'],
    prefix_ids_BT: Int[Array, 'B T'] | None = None,
    *,
    block: int = 512,
) -> Float[Array, 'B T N H']:
    """The same, a block of queries at a time, recomputed in the backward pass: memory B·N·block·T."""
    b, t, n, h = q_BTNH.shape
    block = math.gcd(t, block)
    blocks = t // block
    q_blocks = q_BTNH.reshape(b, blocks, block, n, h).swapaxes(0, 1)
    cut = lambda ids_BT: ids_BT.reshape(b, blocks, block).swapaxes(0, 1)

    @jax.checkpoint
    def one(start, q_BCNH, segment_BC, prefix_BC=None):
        causal = (start + jnp.arange(block))[:, None] >= jnp.arange(t)[None, :]
        mask = causal & _seen(segment_BC, prefix_BC, segment_ids_BT)
        return _mix(_scores(q_BCNH, k_BTKH), mask, v_BTKH)

    ids = [cut(ids_BT) for ids_BT in (segment_ids_BT, prefix_ids_BT) if ids_BT is not None]
    _, out = jax.lax.scan(lambda carry, x: (carry, one(*x)), None, (jnp.arange(blocks) * block, q_blocks, *ids))
    return out.swapaxes(0, 1).reshape(b, t, n, h)


def resolve(implementation: str, length: int, platform: str, capability: float = 0.0, dtype=jnp.bfloat16) -> str:
    """What 'auto' stands for: dense up to 1,024 tokens; beyond, splash on a TPU where it fits, cudnn in 16 bits on a
    GPU from Hopper on, else blocked.

    capability: of an NVIDIA GPU (kernels.capability), 0 of anything else.
    """
    if implementation != 'auto':
        return implementation
    if length <= 1024:
        return 'dense'
    if platform == 'tpu' and length % kernels.LANES == 0:
        return 'splash'
    return 'cudnn' if capability >= kernels.HOPPER and jnp.dtype(dtype) in kernels.HALVES else 'blocked'


def _resolved(implementation: str, length: int, dtype) -> str:
    chip = jax.devices()[0]
    return resolve(implementation, length, chip.platform, kernels.capability(chip), dtype)


def shares(implementation: str, length: int, dtype) -> bool:
    """Whether episodes of a row may go on from a beginning that lies there once: fused kernels know segments alone."""
    return _resolved(implementation, length, dtype) in ('dense', 'blocked')


def choose(implementation: str, length: int, segments: int = 1, dtype=jnp.float32) -> Callable[..., jax.Array]:
    """The function that attends over whole sequences, by name.

    'dense' and 'blocked' run anywhere, 'splash' on TPU, 'cudnn' on GPU. segments: the most episodes of a row, which
    cudnn must know. dtype: of queries, keys and values.
    """
    implementation = _resolved(implementation, length, dtype)
    table = {'dense': dense, 'blocked': blocked, 'splash': kernels.splash, 'cudnn': kernels.cudnn}
    if implementation == 'cudnn' and segments > 1:
        return functools.partial(kernels.cudnn, segments=segments)
    return table[implementation]


def cached(
    q_BCNH: Float[Array, 'B C N H'], k_BKSH: KV, v_BKSH: KV, positions_BC: Int[Array, 'B C']
) -> Float[Array, 'B C N H']:
    """Attention over cache slots up to each query's own position, [B, C, N, H].

    The cache already holds the queries' own keys; slots beyond are masked, so stale KV is harmless.
    """
    b, c, n, h = q_BCNH.shape
    k, k_scale = _unpack(k_BKSH)
    v, v_scale = _unpack(v_BKSH)
    kv_heads, slots = k.shape[1:3]
    q = q_BCNH.reshape(b, c, kv_heads, n // kv_heads, h).transpose(0, 2, 1, 3, 4)
    q = q.reshape(b, kv_heads, c * (n // kv_heads), h)  # one matmul a KV head: [C·G, H] × [H, S]
    scores = jnp.einsum('BKXH,BKSH->BKXS', q, k.astype(q.dtype), preferred_element_type=jnp.float32)
    if k_scale is not None:
        scores = scores * k_scale[:, :, None]
    mask_BCS = jnp.arange(slots) <= positions_BC[:, :, None]
    mask = jnp.repeat(mask_BCS, n // kv_heads, axis=1)[:, None]
    probs = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    if v_scale is not None:
        probs = probs * v_scale[:, :, None]
    out = jnp.einsum('BKXS,BKSH->BKXH', probs.astype(q.dtype), v.astype(q.dtype))
    out = out.reshape(b, kv_heads, c, n // kv_heads, h).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, c, n, h)


def _unpack(kv_BKSH: KV) -> tuple[jax.Array, jax.Array | None]:
    """A cache's numbers and, where these are int8, their scales, which multiply scores and weights later."""
    return (kv_BKSH.values, kv_BKSH.scale) if isinstance(kv_BKSH, Int8KV) else (kv_BKSH, None)
