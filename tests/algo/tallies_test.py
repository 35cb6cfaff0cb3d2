"""Metrics of parts join to the metrics of the whole."""

import jax
import jax.numpy as jnp
import pytest

from retool_jax.algo import tallies

X = jnp.array([[1.0, -5.0], [3.0, jnp.nan], [jnp.nan, jnp.nan]])
MASK = jnp.array([[True, True], [True, False], [False, False]])


def tally(x, mask):
    return {'mean': tallies.mean_over(x, mask), 'max': tallies.max_over(x, mask)}


def test_tallies_of_any_parts_join_to_the_tally_of_the_whole():
    whole = tallies.results(tally(X, MASK))
    assert float(whole['mean']) == pytest.approx(-1 / 3) and float(whole['max']) == 3
    shapes = jax.eval_shape(tally, X[:1], MASK[:1])
    joined = tallies.empty(shapes)
    for i in (2, 0, 1):
        joined = tallies.merge(joined, jax.jit(tally)(X[i : i + 1], MASK[i : i + 1]))
    assert float(tallies.results(joined)['mean']) == pytest.approx(-1 / 3)
    assert float(tallies.results(joined)['max']) == 3


def test_nothing_counted_ends_as_zero_not_as_nan():
    found = tallies.results(tally(X[2:], MASK[2:]))
    assert float(found['mean']) == 0 and float(found['max']) == 0


def test_a_negative_maximum_is_not_taken_for_nothing():
    assert float(tallies.results(tally(X[:1, 1:], MASK[:1, 1:]))['max']) == -5


def test_tallies_pass_through_a_scan():
    def step(carry, part):
        return tallies.merge(carry, tally(*part)), None

    start = tallies.empty(jax.eval_shape(tally, X[0], MASK[0]))
    found, _ = jax.lax.scan(step, start, (X, MASK))
    assert float(tallies.results(found)['mean']) == pytest.approx(-1 / 3)
