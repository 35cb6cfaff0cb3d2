"""Engines side by side on eight virtual devices: each writes what it writes alone, and none sees another's rows."""

from __future__ import annotations

import dataclasses
import math
import random
import re

import jax
import numpy as np
import pytest

from retool_jax.bench.timing import compilations
from retool_jax.core import sharding
from retool_jax.core.records import Problem
from retool_jax.model import decoder
from retool_jax.rollout import shards
from retool_jax.rollout.requests import Queue, Request
from retool_jax.rollout.sampler import Chunks, Sampler
from tests.rollout import engine_test, partial_test, prompts_test
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

FEW = dataclasses.replace(SIZES, rows=4, feed_rows=2)  # of one engine


def make_sampler(settings, mesh=None):
    return Sampler(CONFIG, settings, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids, mesh)


def mesh_of(data: int, fsdp: int, tensor: int):
    count = data * fsdp * tensor
    return sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor}, jax.devices()[:count])


@pytest.fixture(scope='module')
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def test_a_prompt_is_dealt_to_one_engine_and_shared_where_another_would_idle():
    asked = [Request(Problem(f'p{p}', 'q', 'a', 's', ''), s, (p,)) for p in range(2) for s in range(3)]
    queue = Queue(asked, 3)
    assert [index for index, _ in queue] == list(range(6)) and queue
    assert [queue.take(engine)[0] for engine in (0, 1, 0)] == [0, 3, 1]
    assert queue.take(2)[0] == 5  # nothing is left that nobody has begun with: the last of the one that has most
    assert sorted(index for index, _ in queue) == [2, 4]
    assert [queue.take(2)[0], queue.take(2)[0]] == [2, 4] and not queue
    alone = Queue(asked, 1)
    assert [alone.take(0) for _ in asked] == list(enumerate(asked))


@pytest.mark.parametrize(('cache', 'decode_rows'), [('float32', 0), pytest.param('int8', 2, marks=pytest.mark.slow)])
def test_engines_side_by_side_write_what_one_writes(params, cache, decode_rows):
    """Bit for bit: their rows, their order and their tools' latencies change nothing."""
    settings = dataclasses.replace(FEW, cache_dtype=cache, decode_rows=decode_rows)
    reference, _ = engine_test.run(make_sampler(settings), params)
    sampler, rng = make_sampler(settings, mesh_of(2, 2, 1)), random.Random(0)
    assert (sampler.engines, sampler.rows, sampler.feed_rows) == (4, 16, 8)
    assert sampler.decode_rows == 4 * (decode_rows or 4)
    order = list(range(len(requests())))
    for latency_s in (0.0, lambda code: rng.random() * 0.05):
        again, engine = engine_test.run(sampler, params, order=order, latency_s=latency_s)
        assert all(same(reference[k], again[k]) for k in reference)
        assert engine.rows == 16 and engine.stats.row_steps % sampler.decode_rows == 0
        rng.shuffle(order)


@pytest.mark.slow
def test_episodes_carried_over_are_cut_where_one_engine_cuts_them(params):
    one, four = make_sampler(FEW), make_sampler(FEW, mesh_of(4, 1, 1))
    reference = partial_test.in_parts(one, one.sync(params))
    again = partial_test.in_parts(four, four.sync(params), order=list(reversed(range(21))))
    assert all(same(e, again[k]) and e.versions == again[k].versions for k, e in reference.items())


@pytest.mark.slow
def test_what_prompts_have_in_common_is_fed_to_each_engine_once(params):
    asked, found = prompts_test.requests(), {}
    for mesh in (None, mesh_of(2, 1, 1)):
        sampler = make_sampler(SIZES, mesh)
        engine = make_engine(sampler)
        engine.common = prompts_test.COMMON
        found[sampler.engines] = engine.run(sampler.sync(params), 0, asked, step=4)
        assert engine.stats.prefix_feeds == sampler.engines
    assert all(same(a, b) for a, b in zip(found[1], found[2]))


@pytest.mark.slow
def test_with_their_weights_over_several_devices_they_write_it_too(params):
    reference, _ = engine_test.run(make_sampler(FEW), params)
    found, engine = engine_test.run(make_sampler(FEW, mesh_of(2, 2, 2)), params)
    assert engine.rows == 16
    equal = [found[k].tokens == reference[k].tokens for k in reference]
    assert sum(equal) >= len(equal) - 2  # sums of other shapes round otherwise
    assert engine_test.gaps(params, list(found.values())).max() < 1e-4


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(params):
    sampler = make_sampler(dataclasses.replace(FEW, min_bound=128, decode_rows=2), mesh_of(2, 1, 2))
    weights = sampler.sync(params)
    make_engine(sampler).warm_up(weights)
    compiled = compilations()
    assert make_engine(sampler).run(weights, 0, requests(), step=0) and compiled == []


CALLS = ('extend', 'decode', 'fork')


def compiled(sampler: Sampler, weights, name: str) -> jax.stages.Compiled:
    """A call that reads or writes the cache, as it is compiled with the longest reads."""
    s, state, count = sampler.settings, sampler.empty(), sampler.feed_rows
    row_R, logits_EV = np.zeros(count, np.int32), np.zeros((sampler.engines, CONFIG.vocab_size), np.float32)
    chunks = Chunks(row_R, np.zeros((count, s.chunk), np.int32), row_R, row_R > 0, row_R, row_R)
    decode = dict(table=sampler.table, stops=sampler.stops, row_R=sampler.choose([]) if sampler.chooses else None)
    given = {
        'extend': dict(params=weights, chunks=chunks),
        'decode': dict(params=weights, steps=np.int32(8), truncate=False, **decode),
        'fork': dict(source_R=row_R, target_R=row_R, length=np.int32(1), logits_EV=logits_EV, allowance_R=row_R),
    }
    return getattr(sampler, f'_{name}').lower(state=state, bound=128, **given[name]).compile()


def largest_sent(program: jax.stages.Compiled) -> int:
    """Numbers in the largest array that a collective moves."""
    kinds = 'all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter'
    lines = re.findall(rf' = (.+?) (?:{kinds})(?:-start)?\(', program.as_text())
    shapes = [shape for line in lines for shape in re.findall(r'\w+\[([\d,]*)\]', line)]
    return max((math.prod(int(n) for n in shape.split(',') if n) for shape in shapes), default=0)


@pytest.mark.parametrize('decode_rows', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_no_cache_crosses_devices_and_no_chunk_is_computed_twice(params, decode_rows, monkeypatch):
    settings = dataclasses.replace(FEW, min_bound=128, decode_rows=decode_rows)
    of_row = 128 * CONFIG.head_dim  # what a row may read of one head
    alone, apart, together = (make_sampler(settings, mesh) for mesh in (None, mesh_of(2, 2, 1), mesh_of(2, 2, 2)))
    for name in CALLS:
        program = compiled(apart, apart.sync(params), name)
        # What rows wrote goes to all devices, and nothing else anywhere.
        assert largest_sent(program) == (apart.decode_rows * settings.quota if name == 'decode' else 0)
        # Each device has as much to compute, and to hold, as in an engine alone.
        reference = compiled(alone, alone.sync(params), name)
        assert program.cost_analysis()['flops'] == pytest.approx(reference.cost_analysis()['flops'], rel=0.01)
        held, expected = (p.memory_analysis().temp_size_in_bytes for p in (program, reference))
        assert held <= 1.05 * expected
    weights = together.sync(params)
    assert 0 < largest_sent(compiled(together, weights, 'decode')) < of_row
    # The check above can fail: left to the partitioner, rows that a call chooses come from all devices.
    monkeypatch.setattr(shards, 'spread', lambda function, *_: function)
    monkeypatch.setattr(shards, 'any_engine', lambda flag, *_: flag)
    if decode_rows:
        assert largest_sent(compiled(make_sampler(settings, mesh_of(2, 2, 2)), weights, 'decode')) >= of_row
