"""Which answers are equal: a table of our own, expressions from a seed, other people's rows, every gold answer."""

import collections
import json
from pathlib import Path

import pytest

from retool_jax.tasks import problems
from retool_jax.tasks.grader import Grader
from tests.tasks import expressions

TABLE = [json.loads(line) for line in (Path(__file__).parent / 'answer_table.jsonl').read_text().splitlines()]
SHARED = Path(__file__).parents[3] / 'shared'
GRADING = SHARED / 'cases/turn2/grading.jsonl'


@pytest.fixture(scope='module')
def grader():
    with Grader(time_limit_s=20) as opened:
        yield opened


def wrong(grader, rows):
    """The rows whose verdict is not that of the row."""
    return [row for row in rows if grader.equal(row['answer'], row['gold']) != row['equal']]


def check_table(grader, rows):
    turned = [row | {'answer': row['gold'], 'gold': row['answer']} for row in rows]
    assert wrong(grader, rows) == wrong(grader, turned) == []
    assert grader.timeouts == grader.deaths == 0


def test_every_sixth_pair_of_the_table_is_judged_right_either_way_round(grader):
    assert len(TABLE) >= 300 and 0.45 < sum(row['equal'] for row in TABLE) / len(TABLE) < 0.55
    check_table(grader, TABLE[::6])


@pytest.mark.slow
def test_every_pair_of_the_table_is_judged_right_either_way_round(grader):
    check_table(grader, TABLE)


@pytest.mark.skipif(not GRADING.is_file(), reason='no file of pairs')
def test_pairs_that_other_systems_judged_wrong_are_judged_right(grader):
    rows = [json.loads(line) for line in GRADING.read_text().splitlines()]
    assert rows and wrong(grader, rows) == []


def check_expressions(grader, seed, count):
    """No unequal pair is accepted and at most one in a hundred equal ones refused, of whatever kind."""
    accepted, refused = [], collections.Counter()
    for answer, gold, equal, kind in expressions.pairs(seed, count):
        verdict = grader.equal(answer, gold)
        if verdict and not equal:
            accepted.append((answer, gold, kind))
        refused[kind] += equal and not verdict
    assert accepted == []
    assert refused.total() <= count / 2 / 100, refused.most_common()


def test_five_hundred_pairs_of_expressions_are_judged_right(grader):
    check_expressions(grader, seed=1, count=500)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(100, 120))
def test_ten_thousand_pairs_of_expressions_are_judged_right(grader, seed):
    check_expressions(grader, seed, count=500)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / 'data').is_dir(), reason='no data sets')
@pytest.mark.parametrize(
    'name', ['math500.jsonl', 'aime24.jsonl', 'gsm8k_test.jsonl', 'gsm8k_train.jsonl', 'svamp.json']
)
def test_every_gold_answer_equals_itself_boxed_and_in_the_judge(grader, name):
    golds = [problem.answer for problem in problems.read(SHARED / 'data' / name)]
    assert len(golds) >= 30
    rewards = grader.grade_many([rf'so \boxed{{{gold}}}' for gold in golds], golds)
    assert all(reward.correct and reward.exact for reward in rewards)
    assert all(grader.parses(gold) for gold in golds)
    assert all(grader._ask(gold, gold)['equal'] for gold in sorted(set(golds)))
