"""Episodes' lengths have the distribution that is asked for, and rows are followed as the scheduler fills them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from retool_jax.plan import lengths
from retool_jax.plan.lengths import Engine

PLAIN = Engine(rows=2, call=4, stretches=1, samples=1, chunk=3, feed_rows=2)


@pytest.mark.parametrize('episodes, mean, budget', [(1024, 6144, 16384), (256, 3072, 8192), (64, 10400, 16384)])
def test_lengths_are_log_normal_with_the_mean_that_is_asked_for_after_the_cut(episodes, mean, budget):
    tokens = lengths.draw(episodes, mean, 0.6, budget)
    assert tokens.shape == (episodes,) and tokens.min() >= 1 and tokens.max() == budget
    assert tokens.mean() == pytest.approx(mean, abs=0.5)
    below = np.log(np.sort(tokens)[: episodes // 2])  # the lower half is not cut
    quarter, half = below[episodes // 4 - 1], below[-1]
    assert half - quarter == pytest.approx(0.6 * 0.6745, rel=0.03)  # of a normal distribution
    np.testing.assert_array_equal(tokens, lengths.draw(episodes, mean, 0.6, budget))
    assert (np.diff(tokens) < 0).sum() > episodes / 4  # shuffled


@pytest.mark.parametrize('mean', [0, 1, 200, 6144])
def test_a_mean_that_the_budget_does_not_allow_is_refused_by_name(mean):
    with pytest.raises(ValueError, match=f'^--tokens={mean} must lie between 1 and turns.max_tokens=200'):
        lengths.draw(8, mean, 0.6, 200)


def test_rows_are_filled_in_order_and_the_last_episode_runs_alone():
    # In calls of 4 steps: 2, 5, 3 and 1. The third takes the first row when it is free, the fourth either at 5.
    course = lengths.follow(np.array([8, 20, 12, 4]), PLAIN, piece=4)
    assert course.steps == 24 and course.steps_P.tolist() == [4] * 6
    assert course.busy_P.tolist() == [2, 2, 2, 2, 2, 1]
    assert course.longest_P.tolist() == [4, 8, 12, 16, 20, 4]
    assert course.live_P.tolist() == [4 + 4, 8 + 8, 12 + 4, 16 + 8, 20 + 12, 4]
    # Both first prompts are fed by one call, the others by one each.
    assert (course.extends_F.tolist(), course.reach_F.tolist()) == ([1, 1, 1], [3, 3, 3])


def test_a_row_stands_still_until_the_end_of_its_call_and_while_a_tool_answers():
    engine = dataclasses.replace(PLAIN, rows=1, stretches=2)
    # Two stretches of 5 tokens take two calls each, the tool one more: five calls for ten tokens.
    course = lengths.follow(np.array([10]), engine, piece=4)
    assert course.steps == 20 and course.longest_P.tolist() == [2, 4, 6, 8, 10]
    assert (course.extends_F.tolist(), course.reach_F.tolist()) == ([1, 1], [3, 5 + 3])


def test_pieces_are_averaged_over_their_calls_and_slots_are_read_in_tiles():
    course = lengths.follow(np.array([8, 20]), PLAIN, piece=8, tile=16)
    assert course.steps_P.tolist() == [8, 8, 4]  # five calls, two in a piece
    assert course.busy_P.tolist() == [2, 1, 1]
    assert course.longest_P.tolist() == [8, 16, 20]
    assert course.live_P.tolist() == [16 + 16, 16, 32]


def test_samples_of_a_problem_share_the_feeding_of_their_prompt():
    tokens = np.full(8, 40)
    engine = dataclasses.replace(PLAIN, rows=8)
    assert lengths.follow(tokens, engine, 4).extends_F.sum() == 4
    assert lengths.follow(tokens, dataclasses.replace(engine, samples=4), 4).extends_F.sum() == 1


def test_no_row_is_longer_than_the_budget_and_all_tokens_are_written():
    engine = Engine(rows=64, call=5, stretches=8, samples=16, chunk=256, feed_rows=8)
    tokens = lengths.draw(8192, 6144, 0.6, 16384)
    course = lengths.follow(tokens, engine, piece=64)
    assert course.longest_P.max() == 16384 and course.busy_P.max() <= 64
    assert (course.live_P <= course.busy_P * 16384).all()
    written = tokens.sum() / (64 * course.steps)  # the rest: the ends of calls, tools, and the last episodes
    assert 0.9 < written < (course.busy_P * course.steps_P).sum() / (64 * course.steps) <= 1
    answers = 7 * 8192
    assert answers / 8 + 512 / 8 <= course.extends_F.sum() <= answers + 512
