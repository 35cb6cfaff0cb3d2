"""Metrics that add up: what a micro-batch reports so that any split of the batch reports the same."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A mean in the making. Both fields are scalars; totals and counts of the parts add."""

    total: jax.Array
    count: jax.Array


class Max(NamedTuple):
    """A maximum in the making, −inf where nothing was seen."""

    value: jax.Array


Tallies = dict[str, Mean | Max]


def _is_tally(x) -> bool:
    return isinstance(x, Mean | Max)


def mean_over(x_BT: jax.Array, mask_BT: jax.Array) -> Mean:
    """Tallies the mean of x over a mask; values outside it are never read, not even NaN."""
    return Mean(jnp.sum(jnp.where(mask_BT, x_BT, 0.0)), jnp.sum(mask_BT).astype(jnp.float32))


def max_over(x_BT: jax.Array, mask_BT: jax.Array) -> Max:
    """Tallies the maximum of x over a mask."""
    return Max(jnp.max(jnp.where(mask_BT, x_BT, -jnp.inf)))


def merge[Tree](a: Tree, b: Tree) -> Tree:
    """Joins the tallies of two parts of a batch: two pytrees of equal structure."""

    def join(x, y):
        return Max(jnp.maximum(x.value, y.value)) if isinstance(x, Max) else Mean(*map(jnp.add, x, y))

    return jax.tree.map(join, a, b, is_leaf=_is_tally)


def empty[Tree](tallies: Tree) -> Tree:
    """Makes the neutral element of `merge` for tallies (or their shapes, as `jax.eval_shape` gives them)."""

    def neutral(x):
        fill = -jnp.inf if isinstance(x, Max) else 0.0
        return type(x)(*(jnp.full(leaf.shape, fill, leaf.dtype) for leaf in x))

    return jax.tree.map(neutral, tallies, is_leaf=_is_tally)


def results(tallies: Tallies) -> dict[str, jax.Array]:
    """Ends the tally: total ÷ count, or the maximum; 0 where nothing was counted."""

    def end(x):
        if isinstance(x, Max):
            return jnp.where(jnp.isneginf(x.value), 0.0, x.value)
        return jnp.where(x.count > 0, x.total / jnp.where(x.count > 0, x.count, 1.0), 0.0)

    return {name: end(x) for name, x in tallies.items()}
