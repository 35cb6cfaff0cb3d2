"""Evaluation: scores against counting by hand, and intervals."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from retool_jax.core.records import Problem, Reward, Stop, ToolCall, Verdict
from retool_jax.tasks import summary
from retool_jax.tasks.grader import Grader
from tests.train import small


def make(problem, right, answer=None, family='f', sample=0, **fields):
    """An episode that answers; its prompt and answer are three tokens each."""
    answer = ('1' if right else '2') if answer is None else answer
    episode = small.make_episode(np.random.default_rng(0), problem, 3, 3, sample=sample, reward=1.0 if right else -1.0)
    episode.problem = Problem(problem, 'Q?', '1', 'test', family)
    episode.reward = Reward(1.0 if right else -1.0, right, right, right, answer)
    for name, value in fields.items():
        setattr(episode, name, value)
    return episode


def call(verdict, code='print(1)'):
    return ToolCall(0, code, verdict, '', '', '', 3, 0.1)


@pytest.mark.parametrize('samples', [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        marks = [True] * correct + [False] * (samples - correct)
        expected = np.mean([any(chosen) for chosen in itertools.combinations(marks, k)])
        assert summary.pass_at(k, correct, samples) == pytest.approx(expected)


@pytest.mark.parametrize(('answers', 'expected'), [
    (['1', '1', '2'], 1.0), (['1', '2', '2'], 0.0), (['1', '2'], 0.5), (['1', '2', '3'], 1 / 3),
    (['2', '2', '3', '3'], 0.0), (['', '', '1'], 1.0), (['', ''], 0.0), ([], 0.0)])  # fmt: skip
def test_the_majority_is_the_most_frequent_answer_and_ties_share(answers, expected):
    episodes = [make('p', answer == '1', answer) for answer in answers]
    for seed in range(3):
        random.Random(seed).shuffle(episodes)
        assert summary.majority(episodes) == pytest.approx(expected)


@pytest.fixture(scope='module')
def grader():
    with Grader() as opened:
        yield opened


MAJORITY = Path(__file__).parents[3] / 'shared/cases/turn2/majority.jsonl'


def vote(grader, gold, texts):
    episodes = [make('p', False) for _ in texts]
    for episode, reward in zip(episodes, grader.grade_many(texts, [gold] * len(texts))):
        episode.reward = reward
    return episodes


@pytest.mark.parametrize(
    ('gold', 'answers', 'expected'),
    [
        ('0.5', ['0.5', r'\frac{1}{2}', ' 0.5 ', r'\frac12', '2', '2'], 1.0),
        ('25', ['25', '025', '25 ', '$25$', '7', '7'], 1.0),
        ('25', ['7', '7.0', '25'], 0.0),
        ('25', ['7', '7.0', '25', '25.0'], 0.5),
        ('25', [r'\frac{14}{2}', '7', '8', '25'], 0.0),
        ('(1,2)', ['(1, 2)', r'\left(1,2\right)', '(2,1)', '(2, 1)', r'(\frac{4}{2},1)'], 0.0),
        (r'\text{Friday}', ['friday', 'Friday', 'Monday', r'\text{monday}', 'Sunday'], 0.5),
    ],
)
def test_equal_answers_are_one_vote_however_they_are_written(grader, gold, answers, expected):
    episodes = vote(grader, gold, [rf'\boxed{{{answer}}}' for answer in answers])
    for seed in range(2):
        random.Random(seed).shuffle(episodes)
        assert summary.majority(episodes, grader.equal) == pytest.approx(expected)
    found = summary.summarise(episodes, grader.equal)['by_problem']['p']
    assert found['maj'] == pytest.approx(expected)
    assert found['answer'] in [episode.reward.answer for episode in episodes]


@pytest.mark.skipif(not MAJORITY.is_file(), reason='no file of votes')
def test_votes_that_others_lost_to_spelling_are_counted(grader):
    rows = [json.loads(line) for line in MAJORITY.read_text().splitlines()]
    found = [summary.majority(vote(grader, row['gold'], row['texts'])) for row in rows]
    assert rows and found == [row['majority'] for row in rows]


def test_an_interval_covers_the_mean_as_the_normal_distribution_would():
    values = np.random.default_rng(1).random(400) < 0.3
    low, high = summary.interval(values)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert summary.interval(values) == [low, high]  # the same every time
    wide = summary.interval(values[:40])
    assert wide[1] - wide[0] > 2 * (high - low)


def test_intervals_of_nothing_and_of_equal_values_have_no_width():
    assert summary.interval([0.5] * 9) == [0.5, 0.5]
    assert summary.interval([0.25]) == [0.25, 0.25] and summary.interval([]) == [0.0, 0.0]


def test_a_summary_is_what_counting_by_hand_gives():
    episodes = [
        make('a', True, family='x', calls=[call(Verdict.OK), call(Verdict.ERROR)], turns=3),
        make('b', False, family='y', stop=Stop.LENGTH, void=True),
        make('a', False, family='x', sample=1, calls=[call(Verdict.FORMAT, code='')]),
        make('b', False, answer='', family='y', sample=1, stop=Stop.ANSWER),
        make('c', True, family='y'),
        make('c', True, family='y', sample=1),
    ]
    found = summary.summarise(episodes)
    assert (found['k'], found['problems']) == (2, 3)
    assert {name: r['avg'] for name, r in found['by_problem'].items()} == {'a': 0.5, 'b': 0.0, 'c': 1.0}
    assert found['avg'] == found['exact'] == found['lenient'] == 0.5
    assert found['by_problem']['a'] == {
        'avg': 0.5,
        'maj': 0.5,
        'exact': 0.5,
        'lenient': 0.5,
        'gold': '1',
        'answer': '1',
        'family': 'x',
        'code': 0.5,
        'calls': 1.5,
        'length': 3.0,
        'truncated': 0.0,
    }
    assert found['pass_at'] == pytest.approx({'1': 0.5, '2': 2 / 3})
    assert found['verdicts'] == {'error': 1, 'format': 1, 'ok': 1}
    assert found['stops'] == {'answer': 1, 'eos': 4, 'length': 1}
    assert found['families'] == {'x': 0.5, 'y': 0.5}
    expected = {
        'pass': 2 / 3,
        'maj': 0.5,
        'exact': 0.5,
        'code_ratio': 1 / 6,
        'calls': 0.5,
        'call_failures': 2 / 3,
        'format': 4 / 6,
        'truncated': 1 / 6,
        'void': 1 / 6,
        'length': 3.0,
        'turns': 8 / 6,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    for score, ci in (
        ('avg', 'ci'),
        ('pass', 'pass_ci'),
        ('maj', 'maj_ci'),
        ('exact', 'exact_ci'),
        ('lenient', 'lenient_ci'),
    ):
        assert found[ci][0] <= found[score] <= found[ci][1] and found[ci][0] < found[ci][1]
    assert summary.as_metrics('set', found) == {
        'val/set/avg@2': 0.5,
        'val/set/pass@2': found['pass'],
        'val/set/maj@2': 0.5,
    }


def test_problems_with_unequal_samples_are_refused():
    with pytest.raises(ValueError, match=r'problems have \[1, 2\] samples; all must have the same number'):
        summary.summarise([make('a', True), make('b', True), make('b', True, sample=1)])
