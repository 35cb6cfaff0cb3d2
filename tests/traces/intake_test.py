"""Text traces: which answer they say themselves, and that those are dropped whose own answer is not the gold one."""

import pytest

from retool_jax.core.records import Problem
from retool_jax.tasks import answers
from retool_jax.traces import intake


@pytest.mark.parametrize(
    'words, said',
    [
        ('So 48 + 24 = 72.\n#### 72', '72'),
        ('He pays $18.\n#### 1,800\n', '1,800'),
        ('Thus it is \\boxed{\\frac{1}{2}}.', '\\frac{1}{2}'),
        ('First \\boxed{3}, no: \\boxed{4}.\n#### 5', '4'),  # a box goes before everything else
        ('We add.\nThe final answer is 42.', '42'),
        ('We add.\nAnswer: **12 apples**', '12 apples'),
        ('The answer is $x = 5$.', 'x = 5'),
        ('The answer is 3.14', '3.14'),
        ('The answer is what we look for.\na\nb\nc\nd', None),  # not in the last lines
        ('48 + 24 = 72 clips.', None),
        ('', None),
    ],
)
def test_the_answer_that_a_trace_says_itself_is_found(words, said):
    assert intake.stated(words) == said


def test_a_trace_that_says_another_answer_goes_no_further():
    problem = Problem('p', 'How many?', '72', 's', '')
    pairs = [(problem, '#### 72'), (problem, '#### 73'), (problem, 'no answer'), (problem, '\\boxed{72.0}')]
    kept, dropped = intake.verify(pairs, lambda answer, gold: answers.equal_at_sight(answer.removesuffix('.0'), gold))
    assert [words for _, words in kept] == ['#### 72', 'no answer', '\\boxed{72.0}']
    (one,) = dropped
    assert (one.reason, one.draft.turns, one.episode) == ('trace', ('#### 73',), None)
    assert "'73'" in one.detail and "'72'" in one.detail
