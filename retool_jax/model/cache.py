"""The KV cache: allocation, writes at each row's own length, copies between rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retool_jax.core.pytrees import KVCache
from retool_jax.model.config import QwenConfig


def empty(config: QwenConfig, rows: int, slots: int, dtype=jnp.float32) -> KVCache:
    """An empty cache of `rows` × `slots`."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    zeros = lambda: [jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)]
    return KVCache(k=zeros(), v=zeros(), length_B=jnp.zeros(rows, jnp.int32))


def write(kv_BKSH: jax.Array, new_BCKH: jax.Array, slot_BC: jax.Array) -> jax.Array:
    """Stores a chunk at each row's own slots; a slot out of range drops the entry.

    The vmap over rows keeps the batch axis local under sharding (an index array over rows makes
    the partitioner gather the cache).
    """
    store = lambda kv_KSH, new_CKH, slot_C: kv_KSH.at[:, slot_C].set(
        new_CKH.swapaxes(0, 1).astype(kv_KSH.dtype), mode='drop', unique_indices=False)
    return jax.vmap(store)(kv_BKSH, new_BCKH, slot_BC)


def copy_rows(kv_BKSH: jax.Array, source_R: jax.Array, target_R: jax.Array, bound: int) -> jax.Array:
    """Copies the first `bound` slots of rows `source_R` to rows `target_R` (out of range: dropped)."""
    return kv_BKSH.at[target_R, :, :bound].set(kv_BKSH[source_R, :, :bound], mode='drop')
