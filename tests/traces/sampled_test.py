"""Traces of a model's own: where hints go, what is taken, and which problems the tool mattered for."""

import pytest

from retool_jax.core.records import Problem
from retool_jax.tasks import answers
from retool_jax.text.template import wrap_answer, wrap_snippet
from retool_jax.traces import sampled
from retool_jax.traces.drafts import Draft
from retool_jax.traces.sampled import Written
from retool_jax.traces.verification import Judged

CALL = f'Let me see.\n{wrap_snippet("print(2)")}\n<interpreter>\n2\n</interpreter>\n\n{wrap_answer("2")}'


@pytest.mark.parametrize(
    'text, place, hinted',
    [
        ('It is 5. Wait, is it? It is 4.\n<answer>', 'wait', 'It is 5. Wait, HINT'),
        ('I await it.\n<answer>\n\\boxed{4}', 'wait', 'I await it.\nHINT'),  # no such word: before the answer
        ('It is 4.\n<answer>\n\\boxed{4}\n</answer>', 'answer', 'It is 4.\nHINT'),
        ('We add.\nSo \\boxed{4}.', 'answer', 'We add.\nHINT'),  # the line of the box gives the answer away
        ('\\boxed{4}', 'answer', 'HINT'),
        ('I do not know', 'answer', ''),
        ('Wait. \\boxed{4}', 'think', ''),  # it began with its hint
        ('Wait. \\boxed{4}', '', ''),
    ],
)
def test_a_hint_stands_where_its_place_says(text, place, hinted):
    assert sampled._hinted(text, 'HINT', place) == hinted


def test_places_take_turns_over_the_candidates():
    assert [sampled._place(('think', 'answer'), n) for n in range(4)] == ['think', 'answer', 'think', 'answer']
    assert sampled._place((), 3) == ''


def test_what_ran_no_code_or_answered_before_is_not_taken():
    problem = Problem('p', '?', '2', 's', '')
    taken = sampled.read(Written('p', 1, CALL, 1), problem)
    assert isinstance(taken, Draft) and (taken.rewriter, taken.candidate, taken.codes) == ('self', 1, ['print(2)'])
    for text, calls, why in (
        (wrap_answer('2'), 0, 'no code was run'),
        (f'It is \\boxed{{2}}.\n{CALL}', 1, 'an answer stands before the first call'),
        (f'{wrap_answer("2")}\n{CALL}', 1, 'an answer stands before the first call'),
    ):
        refused = sampled.read(Written('p', 0, text, calls), problem)
        assert (refused.reason, refused.detail, refused.draft.turns) == ('rewriter', why, (text,))


def test_a_problem_is_left_out_that_is_solved_as_often_without_the_tool():
    def judged(name, reason):
        return Judged(Draft(Problem(name, '?', '2', 's', ''), ('',), ()), reason)

    found = [judged('hard', 'kept'), judged('hard', 'answer'), judged('easy', 'kept'), judged('easy', 'answer')]
    right, wrong = wrap_answer('2'), wrap_answer('3')
    without = [Written('hard', 0, wrong, 0), Written('hard', 1, 'nothing', 0)]
    without += [Written('easy', 0, right, 0), Written('easy', 1, wrong, 0)]
    kept = sampled.mattered(found, without, answers.equal_at_sight)
    assert [j.reason for j in kept] == ['kept', 'answer', 'filter', 'answer']
    assert kept[2].detail == '0.50 are right without the interpreter, 0.50 are kept with it'
