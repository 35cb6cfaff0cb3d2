"""Rows of a sampler's state: taken out for a decode call, put back changed.

A decode call works on copies of the slots it may read: slicing them inside its loop would copy them every step.
Where it takes some rows only, each shard of the batch takes its own, so that no KV crosses devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core.pytrees import KVCache, SampleState
from retool_jax.model import kv_cache


def choose(live: Sequence[int], rows: int, count: int, ways: int) -> np.ndarray:
    """Row numbers that take part in a decode call of `count` of the `rows`: int32 [count], padded out of range.

    Rows are taken in the order of `live`, at most count ÷ ways from each shard, a block of rows ÷ ways rows. Where all
    rows take part, row r is the call's r-th.
    """
    row_R = np.full(count, rows, np.int32)
    if count == rows:
        row_R[live] = live
        return row_R
    taken = [0] * ways
    for row in live:
        shard = row * ways // rows
        if taken[shard] < count // ways:
            row_R[shard * (count // ways) + taken[shard]] = row
            taken[shard] += 1
    return row_R


def take(state: SampleState, row_R: jax.Array | None, bound: int, ways: int) -> SampleState:
    """Copies rows `row_R` (None: all, in order) and their first `bound` slots; a row out of range is not live."""
    if row_R is None:
        read = lambda kv: kv_cache.read(kv, bound)
        return dataclasses.replace(
            state,
            cache=KVCache(
                k=[read(k) for k in state.cache.k], v=[read(v) for v in state.cache.v], length_B=state.cache.length_B
            ),
        )

    def of_shard(state: SampleState, row_R: jax.Array) -> SampleState:
        last = len(state.live_B) - 1
        inside_R = jnp.clip(row_R, 0, last)
        pick = lambda x: x[inside_R]
        read = lambda kv: kv_cache.read(kv, bound, inside_R)
        cache = KVCache(
            k=[read(k) for k in state.cache.k], v=[read(v) for v in state.cache.v], length_B=pick(state.cache.length_B)
        )
        part = jax.tree.map(pick, dataclasses.replace(state, cache=None))
        return dataclasses.replace(part, cache=cache, live_B=part.live_B & (row_R <= last))

    return _joined(jax.vmap(of_shard)(_split(state, ways), _local(row_R, len(state.live_B), ways)))


def put(
    state: SampleState, part: SampleState, row_R: jax.Array | None, start_R: jax.Array, quota: int, ways: int
) -> SampleState:
    """The state with `part`, which `take` took and a call changed, put back: of its cache the slots from `start_R` on,
    at most `quota` a row."""
    slots = kv_cache.slots(state.cache)
    if row_R is None and kv_cache.slots(part.cache) == slots:
        return part
    slot_RQ = start_R[:, None] + jnp.arange(quota)
    slot_RQ = jnp.where(slot_RQ < part.cache.length_B[:, None], slot_RQ, slots)  # out of range: dropped

    def of_shard(state: SampleState, part: SampleState, slot_RQ: jax.Array, row_R: jax.Array | None) -> SampleState:
        back = lambda old, new: new if row_R is None else old.at[row_R].set(new, mode='drop')
        restore = lambda kv, new: kv_cache.restore(kv, new, slot_RQ, row_R)
        cache = KVCache(
            k=[restore(*k) for k in zip(state.cache.k, part.cache.k)],
            v=[restore(*v) for v in zip(state.cache.v, part.cache.v)],
            length_B=back(state.cache.length_B, part.cache.length_B),
        )
        rest = [dataclasses.replace(x, cache=None) for x in (state, part)]
        return dataclasses.replace(jax.tree.map(back, *rest), cache=cache)

    if row_R is None:
        return of_shard(state, part, slot_RQ, None)
    return _joined(
        jax.vmap(of_shard)(
            _split(state, ways), _split(part, ways), _split(slot_RQ, ways), _local(row_R, len(state.live_B), ways)
        )
    )


def _split(tree, ways: int):
    return jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[1:]), tree)


def _joined(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _local(row_R: jax.Array, rows: int, ways: int) -> jax.Array:
    """Row numbers counted within each shard, [ways, R ÷ ways]; one out of range stays out of range."""
    return row_R.reshape(ways, -1) - (jnp.arange(ways) * (rows // ways))[:, None]
