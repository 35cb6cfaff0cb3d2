"""The KV cache: allocation, writes at each row's own length, reads up to a bound, copies between rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retool_jax.core.pytrees import Int8KV, KVCache
from retool_jax.model import int8
from retool_jax.model.config import ModelConfig

KV = jax.Array | Int8KV  # keys or values of one layer, [B, K, S, H]


def empty(config: ModelConfig, rows: int, slots: int, dtype=jnp.float32) -> KVCache:
    """An empty cache of `rows` × `slots`; int8 keeps one f32 scale per slot and head."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)

    def zeros() -> KV:
        if dtype != jnp.int8:
            return jnp.zeros(shape, dtype)
        return Int8KV(values=jnp.zeros(shape, jnp.int8), scale=jnp.zeros(shape[:3], jnp.float32))

    layers = range(config.num_hidden_layers)
    return KVCache(k=[zeros() for _ in layers], v=[zeros() for _ in layers], length_B=jnp.zeros(rows, jnp.int32))


def slots(cache: KVCache) -> int:
    """S, the slots of a row."""
    return jax.tree.leaves(cache.k[0])[0].shape[2]


def quantise(x: jax.Array) -> Int8KV:
    """8 bits per number, scaled by the largest magnitude along the last axis: off by at most scale ÷ 2."""
    return Int8KV(*int8.split(x, (x.ndim - 1,)))


def write(kv_BKSH: KV, new_RCKH: jax.Array, slot_RC: jax.Array, row_R: jax.Array | None = None) -> KV:
    """Stores a chunk at each row's own slots; a slot or row out of range drops the entry.

    One scatter of single vectors, in which KV heads are batched, and rows too where the chunks are those of all rows in
    order (no `row_R`). So the partitioner keeps them local; a TPU does not copy the cache into a layout with the heads
    of a slot side by side, as it does where heads are part of what is scattered; and no backend moves the heads to the
    front, as jax.vmap over them would have it.
    """
    new = quantise(new_RCKH) if isinstance(kv_BKSH, Int8KV) else new_RCKH.astype(kv_BKSH.dtype)
    return jax.tree.map(lambda x, y: _scatter(x, y.swapaxes(1, 2), slot_RC, row_R), kv_BKSH, new)


def _scatter(x_BKS_: jax.Array, new_RKC_: jax.Array, slot_RC: jax.Array, row_R: jax.Array | None) -> jax.Array:
    index_RKCI = jnp.broadcast_to(slot_RC[:, None], new_RKC_.shape[:3])[..., None]
    if row_R is not None:
        rows = jnp.broadcast_to(row_R[:, None, None, None], index_RKCI.shape)
        index_RKCI = jnp.concatenate([rows, index_RKCI], axis=-1)
    batched, written = ((0, 1), (2,)) if row_R is None else ((1,), (0, 2))
    return jax.lax.scatter(
        x_BKS_,
        index_RKCI,
        new_RKC_,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(3, x_BKS_.ndim)),
            inserted_window_dims=written,
            scatter_dims_to_operand_dims=written,
            operand_batching_dims=batched,
            scatter_indices_batching_dims=batched,
        ),
        mode='drop',
    )


def read(kv_BKSH: KV, bound: int, row_R: jax.Array | None = None) -> KV:
    """The first `bound` slots of all rows, or of rows `row_R` (which must be in range)."""
    take = lambda x: x[:, :, :bound] if row_R is None else x.at[row_R, :, :bound].get(mode='promise_in_bounds')
    return jax.tree.map(take, kv_BKSH)


def restore(kv_BKSH: KV, part_RKSH: KV, slot_RC: jax.Array, row_R: jax.Array | None = None) -> KV:
    """Puts some slots of what `read` took back where they came from; a slot or row out of range drops the entry."""
    take = jax.vmap(lambda x_KS_, slot_C: x_KS_.at[:, slot_C].get(mode='clip'))
    return jax.tree.map(lambda x, part: _scatter(x, take(part, slot_RC), slot_RC, row_R), kv_BKSH, part_RKSH)


def copy_rows(kv_BKSH: KV, source_R: jax.Array, target_R: jax.Array, bound: int) -> KV:
    """Copies the first `bound` slots of rows `source_R` to rows `target_R` (out of range: dropped)."""
    return jax.tree.map(lambda x: x.at[target_R, :, :bound].set(x[source_R, :, :bound], mode='drop'), kv_BKSH)
