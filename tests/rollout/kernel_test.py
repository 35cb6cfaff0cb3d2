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


@pytest.mark.parametrize(
    ('decode_rows', 'bounded', 'programs', 'taken'),
    [(0, False, {256}, {256}), (0, True, {64, 128, 256}, {256}), (4, True, {64, 128, 256}, {64, 128, 256})],
)
def test_rows_attend_by_the_kernel_that_there_is(monkeypatch, decode_rows, bounded, programs, taken):
    attend = functools.partial(decoding.triton_decode, interpret=True)
    kernel = decoding.Kernel(attend, decoding.TILE, bounded)
    monkeypatch.setattr(decoding, 'choose', lambda *_: kernel)
    bounds, inner = [], rows.take
    monkeypatch.setattr(rows, 'take', lambda state, row_R, bound: bounds.append(bound) or inner(state, row_R, bound))
    settings = dataclasses.replace(SIZES, decode_rows=decode_rows, min_bound=64)
    sampler = Sampler(CONFIG, settings, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)
    compiled, decode = set(), sampler._decode
    sampler._decode = lambda **given: compiled.add(given['bound']) or decode(**given)
    params, rng = decoder.init(CONFIG, jax.random.key(0)), random.Random(0)
    reference, _ = engine_test.run(sampler, params)
    order = list(range(len(requests())))
    rng.shuffle(order)
    again, _ = engine_test.run(sampler, params, order=order, latency_s=lambda code: rng.random() * 0.05)
    assert all(same(reference[k], again[k]) for k in reference)
    assert engine_test.gaps(params, list(reference.values())).max() < 1e-4
    assert compiled <= programs and max(compiled) > 64 and set(bounds) <= taken
    sampler.fused = False
    assert sampler.kernel(sampler.empty().cache) is None
