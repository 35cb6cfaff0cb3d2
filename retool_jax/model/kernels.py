"""Fused attention of the accelerators: splash attention on TPU, cuDNN on GPU.

Neither holds a matrix of scores, forwards or backwards. Queries come scaled, q·H^-½ (layers.rotate).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from retool_jax.core import sharding
from retool_jax.core.errors import UserError

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Float, Int

LANES = 128  # of a TPU's vector unit: rows of scores come in such widths
BLOCKS = (1024, 512, 256, LANES)  # tiles tried for splash attention, the largest that divides


def splash(
    q_BTNH: Float[Array, 'B T N H'],
    k_BTKH: Float[Array, 'B T K H'],
    v_BTKH: Float[Array, 'B T K H'],
    segment_ids_BT: Int[Array, 'B T'],
    interpret: bool = False,
) -> Float[Array, 'B T N H']:
    """Causal attention within segments by JAX's TPU kernel, each device its own rows and heads.

    interpret: runs the kernel's program on any platform, for tests. Raises: UserError for a length
    that is no multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length = q_BTNH.shape[1]
    block = next((b for b in BLOCKS if length % b == 0), None)
    if block is None:
        raise UserError(
            f'forward.attention: splash needs rows of a multiple of {LANES} tokens, not {length}; '
            'change forward.row_width'
        )
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        mask = kernels.MultiHeadMask([kernels.CausalMask((length, length))] * q_BTNH.shape[2])
        kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        heads_first = lambda x: jnp.moveaxis(x, 2, 1)
        q, k, v = (heads_first(x) for x in (q_BTNH, k_BTKH, v_BTKH))
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(q, k, v, segment_ids_BT)
        return jnp.moveaxis(out, 1, 2)

    return _on_each_device(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def cudnn(
    q_BTNH: Float[Array, 'B T N H'],
    k_BTKH: Float[Array, 'B T K H'],
    v_BTKH: Float[Array, 'B T K H'],
    segment_ids_BT: Int[Array, 'B T'],
    implementation: str = 'cudnn',
) -> Float[Array, 'B T N H']:
    """Causal attention by cuDNN's flash kernel over rows of one right-padded episode each.

    The kernel knows lengths, not segments: forward.row_segments must be 1, a row's second episode comes
    out as NaN. What stands at padding is 0. implementation: 'xla' for tests.
    Raises: UserError in float32, which the kernel does not have.
    """
    if implementation == 'cudnn' and q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f'forward.attention: cudnn has no {q_BTNH.dtype.name} kernel; set forward.dtype=bfloat16')

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        length_B = (segment_ids_BT == 1).sum(axis=1, dtype=jnp.int32)
        out = jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            scale=1.0,
            is_causal=True,
            query_seq_lengths=length_B,
            key_value_seq_lengths=length_B,
            implementation=implementation,
        )
        segment_BTNH = segment_ids_BT[:, :, None, None]  # the kernel leaves what it likes at padding
        return jnp.where(segment_BTNH == 1, out, jnp.where(segment_BTNH == 0, 0, jnp.nan)).astype(out.dtype)

    return _on_each_device(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _on_each_device(
    local: Callable[..., jax.Array], q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Runs a kernel, which the partitioner cannot look into, on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    heads, kv_heads = q_BTNH.shape[2], k_BTKH.shape[2]
    if kv_heads % mesh.shape['tensor']:  # each device needs the KV heads of its own queries
        k_BTKH, v_BTKH = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_BTKH, v_BTKH))
    rows = sharding.spec(('batch', None), sharding.TRAIN_RULES)
    split = sharding.spec(('batch', None, 'heads', None), sharding.TRAIN_RULES)
    ways = math.prod(mesh.shape[axis] for axis in sharding.TRAIN_RULES['batch'])
    if q_BTNH.shape[0] % ways:
        raise UserError(
            f'forward.micro_rows: {q_BTNH.shape[0]} rows do not divide over {ways} devices '
            f'({" × ".join(sharding.TRAIN_RULES["batch"])}); choose a multiple'
        )
    return jax.shard_map(local, mesh=mesh, in_specs=(split, split, split, rows), out_specs=split, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
    )
