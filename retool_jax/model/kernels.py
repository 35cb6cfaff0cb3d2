"""Fused attention of training: splash attention on TPU, cuDNN on GPU (of decode steps: decoding.py).

Neither holds a matrix of scores, forwards or backwards. Queries come scaled, q·H^-½ (layers.rotate).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest import mock

import jax
import jax.numpy as jnp

from retool_jax.core import sharding
from retool_jax.core.errors import UserError

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Float, Int

LANES = 128  # of a TPU's vector unit: rows of scores come in such widths
HOPPER = 9.0  # compute capability from which cuDNN takes packed rows
MASKED = -1e30  # finite, so that a fully masked (padding) row stays free of NaN
HALVES = (jnp.dtype('bfloat16'), jnp.dtype('float16'))  # dtypes of cuDNN's kernels
KEPT = 'attention'  # names splash attention's results, and its logarithms of sums, for forward.remat
BLOCKS = (1024, 512, 256, LANES)  # tiles tried for splash attention, the largest that divides


def capability(chip: jax.Device) -> float:
    """An NVIDIA GPU's compute capability; 0 of any other device."""
    words = str(getattr(chip, 'compute_capability', ''))
    return float(words) if re.fullmatch(r'\d+\.\d+', words) else 0.0


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
        kernel = kernels.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
            # The kernel itself gives a logarithm 128 times over: 5 GiB of a 32B policy, were that what is kept.
            residual_checkpoint_name=KEPT,
        )
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
    segments: int = 1,
    implementation: str = 'cudnn',
) -> Float[Array, 'B T N H']:
    """Causal attention by cuDNN's flash kernel over right-padded rows of at most `segments` episodes.

    The kernel knows lengths and, on Hopper and later, where the episodes of a row begin, not segment ids: episodes
    lie one after the other, and one whose id is beyond `segments` comes out as NaN. What stands at padding is 0.
    implementation: 'xla' for tests of rows of one episode.
    Raises: UserError in float32, which the kernel does not have, and for several episodes before Hopper.
    """
    if implementation == 'cudnn' and q_BTNH.dtype not in HALVES:
        raise UserError(f'forward.attention: cudnn has no {q_BTNH.dtype.name} kernel; set forward.dtype=bfloat16')
    chip = jax.devices()[0]
    check_packed(segments, capability(chip), chip.device_kind)

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        segment_BTNH = segment_ids_BT[:, :, None, None]
        if segments > 1:
            # The kernel writes no gradient at padding: what stands there must not get past here.
            clean = lambda x: jnp.where(segment_BTNH > 0, x, 0)
            out = _packed(*map(clean, (q_BTNH, k_BTKH, v_BTKH)), *bounds(segment_ids_BT, segments))
        else:
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
        inside = (segment_BTNH > 0) & (segment_BTNH <= segments)  # the kernel leaves what it likes at padding
        return jnp.where(inside, out, jnp.where(segment_BTNH == 0, 0, jnp.nan)).astype(out.dtype)

    return _on_each_device(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def check_packed(segments: int, capability: float, name: str) -> None:
    """Raises a UserError where the GPU `name` has no cuDNN kernel for rows of so many episodes."""
    if segments > 1 and 0 < capability < HOPPER:
        raise UserError(
            f'forward.row_segments={segments}: cudnn takes several episodes in a row on Hopper and later, not on '
            f'{name}; set it to 1, or forward.attention=blocked'
        )


@contextlib.contextmanager
def traced_anywhere(chip: float | None = None):
    """A block in which `cudnn` is traced without a GPU, whose library JAX asks for its version otherwise.

    chip: the compute capability of the GPU that functions are traced for; None: of this machine's, if any.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    with (
        mock.patch.object(fused, 'check_cudnn_version', lambda: 91200),
        mock.patch.object(fused, 'check_compute_capability', lambda _: True),
        contextlib.nullcontext() if chip is None else mock.patch(f'{__name__}.capability', lambda _: chip),
    ):
        yield


def bounds(segment_ids_BT: Int[Array, 'B T'], segments: int) -> tuple[Int[Array, 'B N'], Int[Array, 'B N1']]:
    """Lengths and first positions of the episodes of each row as cuDNN's interface of JAX wants them: −1 where there
    is none, and one position more, always −1."""
    belongs_BNT = segment_ids_BT[:, None] == jnp.arange(1, segments + 1)[:, None]
    length_BN = belongs_BNT.sum(axis=-1, dtype=jnp.int32)
    first_BN = jnp.argmax(belongs_BNT, axis=-1).astype(jnp.int32)
    there = length_BN > 0
    return jnp.where(there, length_BN, -1), jnp.pad(
        jnp.where(there, first_BN, -1), ((0, 0), (0, 1)), constant_values=-1
    )


def _packed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, length_BN: jax.Array, first_BM: jax.Array):
    """cuDNN's packed layout, which jax.nn does not pass on (0.11.2 and 0.12.0 alike)."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return fused.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=length_BN,
        kv_seqlen=length_BN,
        q_offsets=first_BM,
        kv_offsets=first_BM,
        scale=1.0,
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )


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
