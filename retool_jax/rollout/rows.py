"""Rows of a sampler's state: taken out for a decode call, put back changed.

A decode call works on copies of the slots it may read: slicing them inside its loop would copy them every step. Only
where a kernel takes the cache whole, or all its slots are read, there is nothing to take.
`take` and `put` see the rows of one engine; `choose` and `calls` those of all that run side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core.pytrees import KVCache, SampleState
from retool_jax.model import kv_cache


def choose(live: Sequence[int], rows: int, count: int, engines: int) -> np.ndarray:
    """Row numbers that take part in a decode call of `count` of the `rows`: int32 [count], padded out of range.

    Rows are taken in the order of `live`, at most count ÷ engines from each engine, a block of rows ÷ engines rows.
    Where all rows take part, row r is the call's r-th.
    """
    row_R = np.full(count, rows, np.int32)
    if count == rows:
        row_R[live] = live
        return row_R
    taken, each = [0] * engines, count // engines
    for row in live:
        engine = row * engines // rows
        if taken[engine] < each:
            row_R[engine * each + taken[engine]] = row
            taken[engine] += 1
    return row_R


def calls(rows: Sequence[int], each: int, engines: int, count: int) -> Iterator[np.ndarray]:
    """Row numbers of calls that take `count` rows of each engine, int32 [engines · count], padded out of range.

    An engine's rows, of which it has `each`, keep their order; its places are a block.
    """
    own = [[r for r in rows if r // each == engine] for engine in range(engines)]
    for first in range(0, max(map(len, own)), count):
        row_R = np.full(engines * count, engines * each, np.int32)
        for engine, mine in enumerate(own):
            part = mine[first : first + count]
            row_R[engine * count : engine * count + len(part)] = part
        yield row_R


def take(state: SampleState, row_R: jax.Array | None, bound: int) -> SampleState:
    """Copies rows `row_R` (None: all, in order) and their first `bound` slots; a row out of range is not live."""
    last = len(state.live_B) - 1
    inside_R = None if row_R is None else jnp.clip(row_R, 0, last)
    pick = lambda x: x if row_R is None else x[inside_R]
    read = lambda kv: kv_cache.read(kv, bound, inside_R)
    cache = KVCache(
        k=[read(k) for k in state.cache.k], v=[read(v) for v in state.cache.v], length_B=pick(state.cache.length_B)
    )
    part = jax.tree.map(pick, dataclasses.replace(state, cache=None))
    live_B = part.live_B if row_R is None else part.live_B & (row_R <= last)
    return dataclasses.replace(part, cache=cache, live_B=live_B)


def put(state: SampleState, part: SampleState, row_R: jax.Array | None, start_R: jax.Array, quota: int) -> SampleState:
    """The state with `part`, which `take` took and a call changed, put back: of its cache the slots from `start_R` on,
    at most `quota` a row."""
    slots = kv_cache.slots(state.cache)
    if row_R is None and kv_cache.slots(part.cache) == slots:
        return part
    slot_RQ = start_R[:, None] + jnp.arange(quota)
    slot_RQ = jnp.where(slot_RQ < part.cache.length_B[:, None], slot_RQ, slots)  # out of range: dropped
    back = lambda old, new: new if row_R is None else old.at[row_R].set(new, mode='drop')
    restore = lambda kv, new: kv_cache.restore(kv, new, slot_RQ, row_R)
    cache = KVCache(
        k=[restore(*k) for k in zip(state.cache.k, part.cache.k)],
        v=[restore(*v) for v in zip(state.cache.v, part.cache.v)],
        length_B=back(state.cache.length_B, part.cache.length_B),
    )
    rest = [dataclasses.replace(x, cache=None) for x in (state, part)]
    return dataclasses.replace(jax.tree.map(back, *rest), cache=cache)
