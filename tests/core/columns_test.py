"""Columns read like the lists they were, and messages hold them as they lie."""

import math
import pickle
import tracemalloc

import numpy as np
import pytest

from retool_jax.core import columns
from retool_jax.core.columns import Column
from retool_jax.core.records import Episode, Problem, ToolCall, Verdict

COLUMNS = ('tokens', 'acted', 'logprobs', 'versions')


def make(seed: int, length: int = 50, logprob=lambda rng: float(np.float32(-rng.random()))) -> Episode:
    """An episode of a prompt, a turn, a tool's output and a turn."""
    rng = np.random.default_rng(seed)
    episode = Episode(Problem(f'p{seed}', 'why?', '7', 'test', ''), sample=seed, step=3, prompt_length=length)
    for acted in (False, True, False, True):
        ids = rng.integers(0, 152_000, length).tolist()
        logprobs = [logprob(rng) for _ in ids] if acted else None
        episode.append(ids, acted, logprobs, 3 if acted else -1)
    episode.calls.append(ToolCall(0, 'print(7)', Verdict.OK, '7\n', '', '7', 2 * length, 0.25))
    return episode


def settled(*args, **kwargs) -> Episode:
    episode = make(*args, **kwargs)
    columns.settle(episode)
    return episode


def test_a_whole_episode_reads_as_it_did_in_lists():
    written, whole = make(1), settled(1)
    assert written == whole and whole == written and whole != settled(2)
    assert written.segments() == whole.segments() and written.acted_count == whole.acted_count
    for name in COLUMNS:
        numbers, column = getattr(written, name), getattr(whole, name)
        assert isinstance(column, Column) and list(column) == numbers and len(column) == len(numbers)
        assert column[3] == numbers[3] and column[-1] == numbers[-1] and column[2:9] == numbers[2:9]
        assert {type(x) for x in column} == {type(x) for x in numbers} == {type(column[0])}
        assert column == numbers and numbers == column and column != numbers[1:] and column != 'text'
        assert np.shares_memory(np.asarray(column), column.array)
        assert np.asarray(column, float).dtype == float
        assert max(column) == max(numbers)
    columns.settle(whole)  # twice is once
    assert whole == written


def test_logprobs_that_no_f32_holds_stay_as_they_are():
    assert settled(1).logprobs.array.dtype == np.float32
    exact = settled(1, logprob=lambda rng: 0.1 + rng.random())
    assert exact.logprobs.array.dtype == np.float64 and exact == make(1, logprob=lambda rng: 0.1 + rng.random())
    unknown = settled(1, logprob=lambda rng: math.nan)
    assert unknown.logprobs.array.dtype == np.float32 and math.isnan(unknown.logprobs[60])


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_column_is_pickled_with_its_numbers(protocol):
    assert pickle.loads(pickle.dumps(settled(1), protocol)) == make(1)


def message(item) -> memoryview:
    return memoryview(b''.join(columns.split(item)))


def test_a_message_gives_the_item_back():
    empty = Episode(Problem('p', 'q', 'a', 's', ''), 0, 0)
    columns.settle(empty)
    for item in (None, (), {'a': [1, 'x' * 9000]}, ([settled(1), make(2), empty], 15), np.zeros((3, 0), np.int8)):
        found = columns.join(message(item))
        np.testing.assert_array_equal(found, item) if isinstance(item, np.ndarray) else None
        assert isinstance(item, np.ndarray) or found == item
    ((whole, *_), _) = columns.join(message(([settled(1), make(2)], 15)))
    assert all(getattr(whole, name).array.flags.aligned for name in COLUMNS)


def test_packing_copies_no_column_and_unpacking_takes_none_out_of_its_message():
    made = [settled(i, 25_000) for i in range(8)]
    size = sum(getattr(e, name).array.nbytes for e in made for name in COLUMNS)
    assert size == 8 * 100_000 * 13
    tracemalloc.start()
    try:
        parts = columns.split(made)
        assert tracemalloc.get_traced_memory()[1] < size / 20
        whole = memoryview(b''.join(parts))
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        found = columns.join(whole)
        assert tracemalloc.get_traced_memory()[1] - held < size / 20
    finally:
        tracemalloc.stop()
    assert found == made and len(whole) < size * 1.01
