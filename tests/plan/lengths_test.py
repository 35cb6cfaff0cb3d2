"""Episodes' lengths have the distribution that is asked for, and rows are followed as the scheduler fills them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from retool_jax.plan import lengths
from retool_jax.plan.lengths import Course, Engine, Flight

PLAIN = Engine(rows=2, call=4, stretches=1, samples=1, chunk=3, feed_rows=2)


def follow(tokens, engine: Engine, piece: int, tile: int = 1) -> Course:
    return lengths.follow(lengths.in_flight(np.array(tokens), engine), engine, piece, tile)


def goes_on(tokens: int, begun: int, engine: Engine) -> Course:
    """One episode, of which earlier steps have made some calls."""
    flight = Flight(np.array([tokens]), np.array([begun]), np.array([0]), 0.0)
    return lengths.follow(flight, engine, piece=4)


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
    course = follow([8, 20, 12, 4], PLAIN, piece=4)
    assert course.steps == 24 and course.steps_P.tolist() == [4] * 6
    assert course.busy_P.tolist() == [2, 2, 2, 2, 2, 1]
    assert course.longest_P.tolist() == [4, 8, 12, 16, 20, 4]
    assert course.live_P.tolist() == [4 + 4, 8 + 8, 12 + 4, 16 + 8, 20 + 12, 4]
    # Both first prompts are fed by one call, the others by one each.
    assert (course.extends_F.tolist(), course.reach_F.tolist()) == ([1, 1, 1], [3, 3, 3])


def test_a_row_stands_still_until_the_end_of_its_call_and_while_a_tool_answers():
    engine = dataclasses.replace(PLAIN, rows=1, stretches=2)
    # Two stretches of 5 tokens take two calls each, the tool one more: five calls for ten tokens.
    course = follow([10], engine, piece=4)
    assert course.steps == 20 and course.longest_P.tolist() == [2, 4, 6, 8, 10]
    assert (course.extends_F.tolist(), course.reach_F.tolist()) == ([1, 1], [3, 5 + 3])


def test_pieces_are_averaged_over_their_calls_and_slots_are_read_in_tiles():
    course = follow([8, 20], PLAIN, piece=8, tile=16)
    assert course.steps_P.tolist() == [8, 8, 4]  # five calls, two in a piece
    assert course.busy_P.tolist() == [2, 1, 1]
    assert course.longest_P.tolist() == [8, 16, 20]
    assert course.live_P.tolist() == [16 + 16, 16, 32]


def test_samples_of_a_problem_share_the_feeding_of_their_prompt():
    tokens = np.full(8, 40)
    engine = dataclasses.replace(PLAIN, rows=8)
    assert follow(tokens, engine, 4).extends_F.sum() == 4
    assert follow(tokens, dataclasses.replace(engine, samples=4), 4).extends_F.sum() == 1


def test_no_row_is_longer_than_the_budget_and_all_tokens_are_written():
    engine = Engine(rows=64, call=5, stretches=8, samples=16, chunk=256, feed_rows=8)
    tokens = lengths.draw(8192, 6144, 0.6, 16384)
    course = follow(tokens, engine, piece=64)
    assert course.longest_P.max() == 16384 and course.busy_P.max() <= 64
    assert (course.live_P <= course.busy_P * 16384).all()
    written = tokens.sum() / (64 * course.steps)  # the rest: the ends of calls, tools, and the last episodes
    assert 0.9 < written < (course.busy_P * course.steps_P).sum() / (64 * course.steps) <= 1
    answers = 7 * 8192
    assert answers / 8 + 512 / 8 <= course.extends_F.sum() <= answers + 512


def test_an_episode_goes_on_where_the_step_before_has_left_it():
    engine = dataclasses.replace(PLAIN, quanta=2)
    course = goes_on(20, 2, engine)  # five calls, the third and the fourth of which are made
    assert course.steps == 8 and course.longest_P.tolist() == course.live_P.tolist() == [12, 16] and course.tokens == 8
    # Its 8 tokens of earlier steps are three chunks of one row.
    assert (course.extends_F.tolist(), course.reach_F.tolist()) == ([3], [8])
    last = goes_on(20, 4, engine)
    assert last.steps == 4 and last.longest_P.tolist() == [20] and last.extends_F.tolist() == [6]


def test_a_tools_answer_comes_in_the_step_that_goes_on_behind_it():
    engine = dataclasses.replace(PLAIN, rows=1, stretches=2)  # of ten tokens: two calls, an answer, two calls
    course = goes_on(10, 1, dataclasses.replace(engine, quanta=2))
    assert (
        course.steps == 12 and course.tokens == 5 and course.longest_P.tolist() == [5, 6, 8]
    )  # of 10 · (1 + 2i/3) / 4
    assert (course.extends_F.tolist(), course.reach_F.tolist()) == ([1, 1], [2, 5 + 3])
    ended = goes_on(10, 2, dataclasses.replace(engine, quanta=2))  # the answer is among what is fed again
    assert ended.steps == 8 and (ended.extends_F.tolist(), ended.reach_F.tolist()) == ([2], [5])


def test_a_step_of_partial_rollouts_is_one_of_all_that_groups_live():
    # In calls: 2 and 5, 1 and 1, 3 and 9. With two in a step groups live three, one and five steps: nine, of which a
    # step holds three, so that one group ends.
    engine = dataclasses.replace(PLAIN, samples=2, quanta=2)
    flight = lengths.in_flight(np.array([8, 20, 4, 4, 12, 36]), engine)
    calls = -(-flight.tokens_E // 4)
    assert flight.ended == 1.0 and set(flight.group_E.tolist()) == {0, 1, 2}
    assert (flight.begun_E < calls).all() and (flight.begun_E % 2 == 0).all()
    for group in range(3):
        own = flight.part(group, group + 1)
        assert len(set(own.begun_E.tolist())) == 1
        whole = next(pair for pair in ([8, 20], [4, 4], [12, 36]) if set(own.tokens_E.tolist()) <= set(pair))
        assert own.tokens_E.tolist() == [n for n in whole if -(-n // 4) > own.begun_E[0]]


@pytest.mark.parametrize('samples', [1, 16])
def test_as_many_tokens_are_written_as_end_and_fewer_rows_stand_still(samples):
    tokens = lengths.draw(4096, 6144, 0.6, 16384)
    busy = []
    for quanta in (0, 256, 64):
        engine = Engine(rows=64, call=16, stretches=8, samples=samples, chunk=256, feed_rows=8, quanta=quanta)
        flight = lengths.in_flight(tokens, engine)
        course = lengths.follow(flight, engine, piece=64)
        assert course.tokens == pytest.approx(flight.ended * samples * tokens.mean(), rel=0.05)
        busy.append(course.tokens / (64 * course.steps))
    assert busy[0] < busy[1] < busy[2]


def test_enough_quanta_end_every_episode_in_its_step():
    engine = dataclasses.replace(PLAIN, quanta=5)
    flight = lengths.in_flight(np.array([8, 20, 12, 4]), engine)
    assert flight.ended == 4 and sorted(flight.tokens_E.tolist()) == [4, 8, 12, 20] and not flight.begun_E.any()
