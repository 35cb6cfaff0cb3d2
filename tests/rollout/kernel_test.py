"""Rows that attend by a kernel when they decode: read where they lie, and their bits depend on nothing around them."""

from __future__ import annotations

import dataclasses
import functools
import random

import jax
import pytest

from retool_jax.model import decoder, decoding
from retool_jax.rollout import rows
from retool_jax.rollout.sampler import Sampler
from tests.rollout import engine_test
from tests.rollout.engine_test import (  # noqa: F401 – a fixture
    CONFIG,
    SIZES,
    TABLE,
    TOKENIZER,
    every_turn_is_a_snippet,
    requests,
    same,
)


def runs_alike(sampler: Sampler, monkeypatch) -> tuple[set[int], set[int]]:
    """Runs requests twice, in another order and with slower tools, and holds each episode to the other run's and to the
    trainer's logprobs. Returns the bounds of the programs that decoded and of what was taken out of the cache."""
    taken, inner = set(), rows.take
    monkeypatch.setattr(rows, 'take', lambda state, row_R, bound: taken.add(bound) or inner(state, row_R, bound))
    compiled, decode = set(), sampler._decode
    sampler._decode = lambda **given: compiled.add(given['bound']) or decode(**given)
    params, rng = decoder.init(CONFIG, jax.random.key(0)), random.Random(0)
    reference, _ = engine_test.run(sampler, params)
    order = list(range(len(requests())))
    rng.shuffle(order)
    again, _ = engine_test.run(sampler, params, order=order, latency_s=lambda code: rng.random() * 0.05)
    assert all(same(reference[k], again[k]) for k in reference)
    assert engine_test.gaps(params, list(reference.values())).max() < 1e-4
    return compiled, taken


def make_sampler(decode_rows: int, min_bound: int) -> Sampler:
    settings = dataclasses.replace(SIZES, decode_rows=decode_rows, min_bound=min_bound)
    return Sampler(CONFIG, settings, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)


@pytest.mark.parametrize(
    ('decode_rows', 'bounded', 'programs', 'taken'),
    [(0, False, {256}, {256}), (0, True, {64, 128, 256}, {256}), (4, True, {64, 128, 256}, {64, 128, 256})],
)
def test_rows_attend_by_the_kernel_that_there_is(monkeypatch, decode_rows, bounded, programs, taken):
    attend = functools.partial(decoding.triton_decode, interpret=True)
    kernel = decoding.Kernel(attend, decoding.TILE, bounded)
    monkeypatch.setattr(decoding, 'choose', lambda *_: kernel)
    sampler = make_sampler(decode_rows, 64)
    compiled, bounds = runs_alike(sampler, monkeypatch)
    assert compiled <= programs and max(compiled) > 64 and bounds <= taken
    sampler.fused = False
    assert sampler.kernel(sampler.empty().cache) is None


@pytest.mark.parametrize(
    ('decode_rows', 'programs', 'taken'),
    [(0, {32, 64, 256}, {32, 64, 256}), (4, {32, 64, 128, 256}, {32, 64, 128, 256})],
)
def test_long_rows_attend_block_by_block_on_a_cpu(monkeypatch, decode_rows, programs, taken):
    """What fits the head is taken out of the cache; longer rows are read where they lie, by one program."""
    monkeypatch.setattr(decoding, 'HEAD', 64)
    monkeypatch.setattr(decoding, 'BLOCK', 32)
    monkeypatch.setattr(decoding, 'LONG', 256)
    sampler = make_sampler(decode_rows, 32)
    compiled, bounds = runs_alike(sampler, monkeypatch)
    assert compiled <= programs and min(compiled) <= 64 < max(compiled) and bounds <= taken
    assert sampler.kernel(sampler.empty().cache).tile == 32
