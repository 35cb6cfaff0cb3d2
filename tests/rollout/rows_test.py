"""Decode calls of some rows: who takes part changes nothing of what anybody writes."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.bench.timing import compilations
from retool_jax.core.pytrees import Int8KV
from retool_jax.model import decoder
from retool_jax.rollout import rows
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.stats import Timeline
from tests.rollout import engine_test, partial_test
from tests.rollout.engine_test import (  # noqa: F401 – a fixture
    CONFIG,
    SIZES,
    TABLE,
    TOKENIZER,
    every_turn_is_a_snippet,
    make_engine,
    requests,
    same,
)

SOME = dataclasses.replace(SIZES, decode_rows=4)


def make_sampler(settings, mesh=None):
    return Sampler(CONFIG, settings, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids, mesh)


@pytest.fixture(scope='module')
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def test_the_first_in_line_are_chosen_as_far_as_their_shards_have_room():
    assert rows.choose([6, 1, 3], rows=8, count=4, engines=1).tolist() == [6, 1, 3, 8]
    assert rows.choose([6, 1, 3, 0, 2], rows=8, count=4, engines=1).tolist() == [6, 1, 3, 0]
    assert rows.choose([6, 1], rows=8, count=8, engines=2).tolist() == [8, 1, 8, 8, 8, 8, 6, 8]
    assert rows.choose([6, 1, 3, 0, 2], rows=8, count=4, engines=2).tolist() == [1, 3, 6, 8]
    assert rows.choose([6, 1, 3, 0, 7, 5], rows=8, count=4, engines=4).tolist() == [1, 3, 5, 6]
    assert rows.choose([], rows=8, count=2, engines=2).tolist() == [8, 8]


def test_a_call_has_places_for_rows_of_each_engine():
    found = rows.calls([0, 9, 1, 2, 8], each=4, engines=3, count=2)
    assert [row_R.tolist() for row_R in found] == [[0, 1, 12, 12, 9, 8], [2, 12, 12, 12, 12, 12]]
    assert [row_R.tolist() for row_R in rows.calls([3, 1, 2], each=4, engines=1, count=2)] == [[3, 1], [2, 4]]
    assert list(rows.calls([], each=4, engines=2, count=2)) == []


@pytest.mark.parametrize('cache', ['float32', 'int8'])
@pytest.mark.parametrize('bound', [32, 256])
def test_what_is_taken_is_put_back_and_nothing_else_is_touched(cache, bound):
    state = make_sampler(dataclasses.replace(SOME, cache_dtype=cache)).empty()
    rng = np.random.default_rng(0)
    noise = lambda x: (
        x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else jnp.asarray(rng.integers(0, 2 if x.dtype == bool else 20, x.shape).astype(x.dtype))
    )
    state = jax.tree.map(noise, state)
    row_R = np.array([6, 1, 8, 3], np.int32)
    part = rows.take(state, row_R, bound)
    assert part.live_B.tolist() == [bool(state.live_B[6]), bool(state.live_B[1]), False, bool(state.live_B[3])]
    longer_B = part.cache.length_B + jnp.array([2, 0, 1, 3])
    written = dataclasses.replace(
        part, cache=dataclasses.replace(part.cache, k=jax.tree.map(lambda x: x + 1, part.cache.k), length_B=longer_B)
    )
    after = rows.put(state, written, row_R, part.cache.length_B, 4)
    values = lambda kv: np.asarray(kv.values if isinstance(kv, Int8KV) else kv)
    for old, new in zip(state.cache.k, after.cache.k):
        changed = values(new) != values(old)
        expected = np.zeros_like(changed)
        for row, count in ((6, 2), (1, 0), (3, 3)):
            expected[row, :, int(state.cache.length_B[row]) : int(state.cache.length_B[row]) + count] = True
        assert (changed == expected).all()
    for old, new in zip(jax.tree.leaves(state.cache.v), jax.tree.leaves(after.cache.v)):
        assert (old == new).all()
    moved = np.asarray(after.cache.length_B - state.cache.length_B)
    assert moved.tolist() == [0, 0, 0, 3, 0, 0, 2, 0]
    assert (after.logits_BV == state.logits_BV).all() and (after.live_B == state.live_B).all()


@pytest.mark.parametrize('cache', ['float32', 'int8'])
def test_more_rows_than_decode_rows_write_what_as_many_rows_write(params, cache):
    """Bit for bit: four rows decode at a time, of four or of eight, in any order and under any latencies."""
    few = make_sampler(dataclasses.replace(SIZES, rows=4, cache_dtype=cache))
    many = make_sampler(dataclasses.replace(SOME, cache_dtype=cache))
    reference, _ = engine_test.run(few, params)
    rng = random.Random(0)
    order = list(range(len(requests())))
    for latency_s in (0.0, lambda code: rng.random() * 0.05):
        again, engine = engine_test.run(many, params, order=order, latency_s=latency_s)
        assert all(same(reference[k], again[k]) for k in reference)
        assert engine.stats.row_steps % 4 == 0 and engine.stats.occupancy <= 1
        rng.shuffle(order)


def test_carried_episodes_are_cut_where_they_are_under_any_latencies(params):
    sampler, rng = make_sampler(SOME), random.Random(0)
    weights = sampler.sync(params)
    reference = partial_test.in_parts(sampler, weights)
    again = partial_test.in_parts(
        sampler, weights, order=list(reversed(range(21))), latency_s=lambda code: rng.random() * 0.05
    )
    assert reference.keys() == again.keys()
    assert all(same(e, again[k]) and e.versions == again[k].versions for k, e in reference.items())


def test_who_decodes_goes_on_until_it_stops_and_no_place_stays_empty(params):
    sampler = make_sampler(SOME)
    engine, calls = make_engine(sampler), []
    decode, engine.timeline = sampler.decode, Timeline()

    def recorded(params, state, row_R, longest, truncate, *steps):
        live = np.flatnonzero(state.live_B)
        state, out = decode(params, state, row_R, longest, truncate, *steps)
        calls.append((set(live), [r for r in row_R if r < 8], out))
        return state, out

    sampler.decode = recorded
    engine.run(sampler.sync(params), 0, requests(), step=4)
    waited = 0
    for (live, chosen, out), (_, later, _) in itertools.pairwise(calls):
        assert len(set(chosen)) == len(chosen) == min(4, len(live)) and set(chosen) <= live
        waited += len(live) > len(chosen)
        goes_on = {row for row, stop in zip(chosen, np.asarray(out.stop_B)) if stop == 0}
        assert goes_on <= set(later)
    assert waited > 5


def test_nothing_compiles_after_warm_up(params):
    sampler = make_sampler(dataclasses.replace(SOME, min_bound=64))
    weights = sampler.sync(params)
    make_engine(sampler).warm_up(weights)
    compiled = compilations()
    assert make_engine(sampler).run(weights, 0, requests(), step=0) and compiled == []


def test_a_number_of_rows_that_is_none_is_refused():
    with pytest.raises(ValueError, match='decode_rows=9 must be from 1 to rows=8, or 0 for all rows'):
        dataclasses.replace(SIZES, decode_rows=9)
