"""Fused attention of decode steps: one query a row over the slots that hold the row's tokens, and no others.

On GPU by a Triton kernel of our own, on TPU by JAX's paged attention over the cache as it lies, on CPU, for long rows,
by a loop over blocks of slots. All take the cache whole, as a slice of it would be copied. Queries come scaled, q·H^-½
(layers.rotate).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from retool_jax.core import sharding
from retool_jax.model import kernels
from retool_jax.model.kv_cache import KV

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Float, Int

TILE = 64  # slots that a step of the GPU's kernel takes
PAGES = (512, 256, 128)  # slots that a step of the TPU's takes, the most that divide a row
ENTRIES = 2**16  # of the TPU kernel's table of pages, 4 bytes each: it lies in a memory of 1 MiB
HEAD = 512  # slots of all rows that a CPU reads at once: of these a loop would take twice the time
BLOCK = 128  # slots of a row beyond them that a step of its loop takes
LONG = 2048  # slots of a row from which that is done: the head is copied out of the cache in each step
# Names of the first two as a traced program has them; the second is a function of JAX's.
TRITON, PAGED = 'decode_attention', 'paged_attention'


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for a cache of some shape."""

    # (q [B, N, H], k and v [B, K, S, H], length_B, bound) → [B, N, H]: attention over the first length_B slots of each
    # row, at least one. bound: no length is more.
    attend: Callable[..., jax.Array]
    tile: int  # slots that are read together
    bounded: bool  # it is another program for another bound
    head: int = 0  # slots of all rows that it reads at once, so that a call which needs no more may take those out


def choose(kv_BKSH: KV, dtype: str, mesh: sharding.AnyMesh | None, longest: int) -> Kernel | None:
    """The kernel for queries in `dtype` over such keys and values, None where there is none.

    On GPU from Hopper on, in 16 bits; on TPU in bfloat16 with heads of whole vectors, since JAX's kernel multiplies in
    bfloat16 and takes no others; on CPU where a row has `LONG` slots or more. mesh: over whose tensor axis heads
    are split; None: one device. longest: slots of a row, of which those given may be a part.
    """
    ways = 1 if mesh is None else mesh.shape['tensor']
    if not hasattr(kv_BKSH, 'shape') or kv_BKSH.dtype != jnp.dtype(dtype) or kv_BKSH.shape[1] % ways:
        return None
    rows, kv_heads, slots, head_dim = kv_BKSH.shape
    chip = mesh.devices.flat[0] if isinstance(mesh, jax.sharding.Mesh) else jax.devices()[0]
    capability = kernels.capability(chip)
    if capability >= kernels.HOPPER:
        fits = kv_BKSH.dtype in kernels.HALVES and slots % TILE == 0 and head_dim in (16, 32, 64, 128, 256)
        return Kernel(on_each_device(triton_decode, mesh), TILE, bounded=True) if fits else None
    if capability == 0 and chip.platform == 'cpu':
        by_blocks = Kernel(on_each_device(block_decode, mesh), BLOCK, bounded=False, head=HEAD)
        return by_blocks if longest >= LONG else None
    page = page_of(slots)
    fits = capability == 0 and chip.platform == 'tpu' and dtype == 'bfloat16' and head_dim % kernels.LANES == 0
    if not fits or not page or rows * kv_heads // ways * slots // page > ENTRIES:
        return None
    return Kernel(on_each_device(functools.partial(paged_decode, cores=chip.num_cores), mesh), page, bounded=False)


def on_each_device(attend: Callable[..., jax.Array], mesh: sharding.AnyMesh | None) -> Callable[..., jax.Array]:
    """A kernel, which the partitioner cannot look into, on each device's own heads.

    Inside of rollout/shards.spread the mesh is that of the context, whose other axes are taken already.
    """
    if mesh is None or mesh.shape['tensor'] == 1:
        return attend

    def everywhere(q_BNH, k_BKSH, v_BKSH, length_B, bound):
        inside, split = not jax.sharding.get_abstract_mesh().empty, jax.P(None, 'tensor')
        return jax.shard_map(
            functools.partial(attend, bound=bound),
            mesh=None if inside else mesh,
            in_specs=(split, split, split, jax.P()),
            out_specs=split,
            axis_names=frozenset(['tensor'] if inside else mesh.axis_names),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(q_BNH, k_BKSH, v_BKSH, length_B)

    return everywhere


def page_of(slots: int) -> int | None:
    """Slots of a page of the TPU's kernel; None: rows of so many have none."""
    return next((page for page in PAGES if slots % page == 0), None)


def padded(group: int, name: str = TRITON) -> int:
    """Query heads that a kernel's matmuls take the time of, where `group` share a KV head.

    A GPU's tensor core takes 16 at least. A TPU's matrix unit is given keys and values as it would be weights, which
    takes a step for each of its 128 lines.
    """
    return max(16, 1 << (group - 1).bit_length()) if name == TRITON else max(kernels.LANES, group)


def triton_decode(
    q_BNH: Float[Array, 'B N H'],
    k_BKSH: Float[Array, 'B K S H'],
    v_BKSH: Float[Array, 'B K S H'],
    length_B: Int[Array, ' B'],
    bound: int,
    interpret: bool = False,
) -> Float[Array, 'B N H']:
    """Kernel.attend by Triton, which JAX 0.11 and 0.12 compile, though they call that backend deprecated.

    No slot beyond a row's length is read, and each is read once for all query heads of its KV head. A row's slots are
    shared out among programs, each with a softmax of its own part, which are joined here (Flash-Decoding). How many is
    a matter of B and K alone: what a row gets does not depend on how long the others are. interpret: runs the kernel on
    any platform, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, heads, head_dim = q_BNH.shape
    kv_heads, slots = k_BKSH.shape[1:3]
    group = heads // kv_heads
    part = min(max(256, 1 << (4 * rows * kv_heads - 1).bit_length()), 2048)  # about 1,000 programs with 4,096 slots
    parts = -(-bound // part)
    wide = padded(group)

    def kernel(length_ref, q_ref, k_ref, v_ref, out_ref, top_ref, total_ref):
        first, length, real_G = pl.program_id(2) * part, length_ref[()], jnp.arange(wide) < group
        q_GH = triton.load(q_ref.at[:, :], mask=real_G[:, None], other=0)

        def step(i, carry):
            out_GH, top_G, total_G = carry
            at = first + i * TILE
            inside_S = at + jnp.arange(TILE) < length
            take = lambda ref: triton.load(ref.at[pl.ds(at, TILE), :], mask=inside_S[:, None], other=0)
            score_GS = jnp.where(inside_S[None], triton.dot(q_GH, take(k_ref).T), kernels.MASKED)
            higher_G = jnp.maximum(top_G, score_GS.max(axis=1))
            shrink_G, weight_GS = jnp.exp(top_G - higher_G), jnp.exp(score_GS - higher_G[:, None])
            out_GH = out_GH * shrink_G[:, None] + triton.dot(weight_GS.astype(v_ref.dtype), take(v_ref))
            return out_GH, higher_G, total_G * shrink_G + weight_GS.sum(axis=1)

        steps = jnp.clip(pl.cdiv(length - first, TILE), 0, part // TILE)
        nothing = jnp.zeros(wide, jnp.float32)
        found = (jnp.zeros((wide, head_dim), jnp.float32), nothing + kernels.MASKED, nothing)
        out_GH, top_G, total_G = jax.lax.fori_loop(0, steps, step, found)
        triton.store(out_ref.at[:, :], out_GH, mask=real_G[:, None])
        triton.store(top_ref.at[:], top_G, mask=real_G)
        triton.store(total_ref.at[:], total_G, mask=real_G)

    cache = pl.BlockSpec((None, None, slots, head_dim), lambda b, k, p: (b, k, 0, 0))
    number = pl.BlockSpec((None, None, None, wide), lambda b, k, p: (b, k, p, 0))
    numbers = jax.ShapeDtypeStruct((rows, kv_heads, parts, group), jnp.float32)
    out_BKPGH, top_BKPG, total_BKPG = pl.pallas_call(
        kernel,
        grid=(rows, kv_heads, parts),
        in_specs=[
            pl.BlockSpec((None,), lambda b, k, p: (b,)),
            pl.BlockSpec((None, None, wide, head_dim), lambda b, k, p: (b, k, 0, 0)),
            cache,
            cache,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, wide, head_dim), lambda b, k, p: (b, k, p, 0, 0)),
            number,
            number,
        ],
        out_shape=[jax.ShapeDtypeStruct((*numbers.shape, head_dim), jnp.float32), numbers, numbers],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name=TRITON,
    )(length_B, q_BNH.reshape(rows, kv_heads, group, head_dim), k_BKSH, v_BKSH)
    share_BKPG = jnp.exp(top_BKPG - top_BKPG.max(axis=2, keepdims=True))
    out_BKGH = (share_BKPG[..., None] * out_BKPGH).sum(axis=2) / (share_BKPG * total_BKPG).sum(axis=2)[..., None]
    return out_BKGH.reshape(q_BNH.shape).astype(q_BNH.dtype)


def paged_decode(
    q_BNH: Float[Array, 'B N H'],
    k_BKSH: Float[Array, 'B K S H'],
    v_BKSH: Float[Array, 'B K S H'],
    length_B: Int[Array, ' B'],
    bound: int,
    cores: int = 1,
) -> Float[Array, 'B N H']:
    """Kernel.attend by JAX's paged attention: a cache [B, K, S, H] is the pages of B·K rows of one KV head each.

    No page beyond a row's length is read, and a row is taken by itself. cores: of the chip; two share out the rows.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    rows, heads, head_dim = q_BNH.shape
    kv_heads, slots = k_BKSH.shape[1:3]
    page, own = page_of(slots), rows * kv_heads
    pages = lambda kv_BKSH: kv_BKSH.reshape(1, -1, page, head_dim)
    out = paged_attention(
        q_BNH.reshape(own, heads // kv_heads, head_dim),
        pages(k_BKSH),
        pages(v_BKSH),
        jnp.repeat(length_B, kv_heads),
        jnp.arange(own * slots // page, dtype=jnp.int32).reshape(own, -1),
        pages_per_compute_block=1,
        megacore_mode='batch' if cores == 2 and own % 2 == 0 else None,
    )
    return out.reshape(q_BNH.shape)


def block_decode(
    q_BNH: Float[Array, 'B N H'],
    k_BKSH: Float[Array, 'B K S H'],
    v_BKSH: Float[Array, 'B K S H'],
    length_B: Int[Array, ' B'],
    bound: int,
) -> Float[Array, 'B N H']:
    """Kernel.attend on a CPU: the first `HEAD` slots of all rows at once, then of each row that is longer its blocks,
    one after the other. A row's softmax is joined from its own blocks in their order, whatever the other rows are."""
    rows, heads, head_dim = q_BNH.shape
    kv_heads, slots = k_BKSH.shape[1:3]
    q_BKGH = q_BNH.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    first = min(bound, HEAD)
    head = _partial(q_BKGH, k_BKSH[:, :, :first], v_BKSH[:, :, :first], jnp.arange(first) < length_B[:, None])
    blocks_B = -(-jnp.maximum(length_B - HEAD, 0) // BLOCK)
    ends_B = jnp.cumsum(blocks_B)

    def step(carry):
        i, found = carry
        row = jnp.searchsorted(ends_B, i, side='right')
        start = HEAD + (i - ends_B[row] + blocks_B[row]) * BLOCK
        at = jnp.minimum(start, slots - BLOCK)  # the last block of a row whose slots are no multiple
        slot_S = at + jnp.arange(BLOCK)
        take = lambda x: jax.lax.dynamic_slice(x, (row, 0, at, 0), (1, kv_heads, BLOCK, head_dim))
        inside_S = (slot_S >= start) & (slot_S < length_B[row])
        block = _partial(q_BKGH[row][None], take(k_BKSH), take(v_BKSH), inside_S[None])
        joined = _join(jax.tree.map(lambda x: x[row][None], found), block)
        return i + 1, jax.tree.map(lambda x, y: x.at[row].set(y[0]), found, joined)

    more = lambda carry: carry[0] < ends_B[-1]
    found = jax.lax.while_loop(more, step, (jnp.int32(0), head))[1] if bound > HEAD else head
    out_BKGH, _, total_BKG = found
    return (out_BKGH / total_BKG[..., None]).reshape(q_BNH.shape).astype(q_BNH.dtype)


def _partial(q_BKGH, k_BKSH, v_BKSH, inside_BS) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of some slots: weighted values [B, K, G, H], not yet divided, largest score and sum of weights [B, K, G]."""
    score_BKGS = jnp.einsum('BKGH,BKSH->BKGS', q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    score_BKGS = jnp.where(inside_BS[:, None, None], score_BKGS, kernels.MASKED)
    top_BKG = score_BKGS.max(axis=-1)
    weight_BKGS = jnp.exp(score_BKGS - top_BKG[..., None])
    out_BKGH = jnp.einsum(
        'BKGS,BKSH->BKGH', weight_BKGS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32
    )
    return out_BKGH, top_BKG, weight_BKGS.sum(axis=-1)


def _join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The same of the slots of both."""
    top_BKG = jnp.maximum(a[1], b[1])
    (out_a, total_a), (out_b, total_b) = (
        (out * jnp.exp(top - top_BKG)[..., None], total * jnp.exp(top - top_BKG)) for out, top, total in (a, b)
    )
    return out_a + out_b, top_BKG, total_a + total_b
