"""Filters: nothing is left out unless asked, and what is left out is told with its number."""

import dataclasses

import pytest

from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Problem, ToolCall, Verdict
from retool_jax.traces import filters
from retool_jax.traces.drafts import Draft
from retool_jax.traces.filters import FilterSettings
from retool_jax.traces.verification import Judged

OFF = FilterSettings(
    per_problem=None, pass_rate_low=None, pass_rate_high=None, short_lines=2, short_share=None, min_tokens=None
)


def trace(name, lines=3, tokens=10, reason='kept', calls=1):
    problem = Problem(name, '?', '1', 's', '')
    episode = None
    if reason == 'kept':
        episode = Episode(problem, 0, 0)
        episode.append(range(tokens), acted=True, logprobs=[0.0] * tokens, version=0)
        code = '\n'.join(['x = 1', ''] * lines)
        episode.calls = [ToolCall(0, code, Verdict.OK, '', '', '', 0, 0.0)] * calls
    return Judged(Draft(problem, ('',), ()), reason, '' if reason == 'kept' else 'why', episode=episode)


def sifted(found, **asked):
    return [j.reason for j in filters.apply(found, dataclasses.replace(OFF, **asked))]


def test_nothing_is_left_out_unless_asked():
    found = [trace('a'), trace('a', 1), trace('b', reason='format'), trace('c', tokens=1, calls=0)]
    assert filters.apply(found, OFF) == found


def test_the_first_traces_of_a_problem_stay():
    found = [trace('a'), trace('b'), trace('a', reason='answer'), trace('a'), trace('a')]
    assert sifted(found, per_problem=2) == ['kept', 'kept', 'answer', 'kept', 'filter']
    last = filters.apply(found, dataclasses.replace(OFF, per_problem=2))[-1]
    assert last.detail == 'more than 2 traces of its problem' and last.episode is None


def test_a_problem_is_too_easy_or_too_hard_by_the_share_of_its_candidates_that_hold():
    found = [trace('easy')] * 4 + [trace('hard'), *[trace('hard', reason='answer')] * 3]
    found += [trace('right'), trace('right', reason='format')]
    easy, hard = ['kept'] * 4, ['kept', 'answer', 'answer', 'answer']
    assert sifted(found, pass_rate_high=0.9) == ['filter'] * 4 + hard + ['kept', 'format']
    assert sifted(found, pass_rate_low=0.3) == [*easy, 'filter', *hard[1:], 'kept', 'format']
    assert sifted(found, pass_rate_low=0.25, pass_rate_high=1.0) == [*easy, *hard, 'kept', 'format']


def test_a_share_of_short_snippets_is_kept_and_traces_without_code_do_not_count():
    found = [trace('a', 1), trace('b', 2), trace('c', 3), trace('d', 3), trace('e', calls=0), trace('f', 1)]
    assert sifted(found, short_share=0.5) == ['kept', 'kept', 'kept', 'kept', 'kept', 'filter']
    assert sifted(found, short_share=0.0) == ['filter', 'filter', 'kept', 'kept', 'kept', 'filter']
    assert sifted(found, short_share=0.0, short_lines=3) == ['filter'] * 4 + ['kept', 'filter']


def test_short_traces_are_left_out_before_those_of_one_problem_are_counted():
    found = [trace('a', tokens=3), trace('a', tokens=8), trace('a', tokens=9)]
    assert sifted(found, min_tokens=8, per_problem=1) == ['filter', 'kept', 'filter']


def test_bounds_between_which_nothing_lies_are_refused():
    with pytest.raises(UserError, match='pass_rate_low=0.8 exceeds pass_rate_high=0.2'):
        dataclasses.replace(OFF, pass_rate_low=0.8, pass_rate_high=0.2)
    with pytest.raises(UserError, match='per_problem=0'):
        dataclasses.replace(OFF, per_problem=0)
