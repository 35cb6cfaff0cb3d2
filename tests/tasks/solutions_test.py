"""Worked solutions become snippets: their equations, under names, in Python that really gives the answer."""

from __future__ import annotations

import contextlib
import io

import pytest

from retool_jax.core.records import Problem
from retool_jax.tasks import gym, solutions
from retool_jax.text.template import wrap_answer


def ask(answer: str, question: str = 'How many?') -> Problem:
    return Problem('p', question, answer, 'test', '')


def run(code: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    return said.getvalue().strip()


GOBLINS = """Frederick slew 0.75 as many goblins as George, or 200*0.75=150 goblins.
Arthur slew 2 as many goblins as Frederick, or 2*150=300 goblins.
#### 300"""


def test_each_equation_is_a_line_under_the_name_of_what_it_counts():
    code, printed = solutions.snippet(ask('300', 'George slew 200, Frederick 0.75 as many, Arthur 2.'), GOBLINS)
    assert code == 'goblins = 200 * 0.75\ngoblins2 = 2 * goblins\nprint(goblins2)'
    assert run(code) == printed == '300.0'


@pytest.mark.parametrize(
    'line, expression, value, counts',
    [
        ('There are 9*2 = 18 black cubes.', '9 * 2', 18, 'black'),
        ('On Monday he walks for 75 minutes because 59 + 16 = 75', '59 + 16', 75, 'minutes'),
        ('which is 116 pages x 1/4 = 29 pages.', '116 * 1 / 4', 29, 'pages'),
        ('so they cost £13 + £24 = £37.', '13 + 24', 37, 'money'),
        ('200 meters / 40 meters/minute = 5 minutes', '200 / 40', 5, 'minutes'),
        ('She earned $1,200 + $300 = $1,500 in all', '1200 + 300', 1500, 'money'),
        ('If Emma is 27 years old, Charlotte is 27+30 = 57 years old.', '27 + 30', 57, 'years'),
        ('spools: 124 spools / 248 spools * 100% = 50%', '124 / 248 * 100', 50, ''),
        ('He keeps 20 × (3 − 1) apples', None, None, None),
        ('Thus 7 * 8 = 57 apples', None, None, None),  # an equation that does not hold
    ],
)
def test_equations_are_found_between_words_and_units(line, expression, value, counts):
    found = [(' '.join(s.expression), s.value, s.counts) for s in solutions.steps(line)]
    assert found == ([] if expression is None else [(expression, value, counts)])


def test_a_result_that_the_question_names_too_is_written_as_a_number():
    worked = 'He has 10 * 5 = 50 coins.\nShe gives 50 + 1 = 51 coins.'
    code, _ = solutions.snippet(ask('51', 'He has 10 boxes of 5. She has 50 and gets 1.'), worked)
    assert code == 'coins = 10 * 5\ncoins2 = 50 + 1\nprint(coins2)'


def test_steps_behind_the_answer_are_left_out_and_solutions_that_miss_it_give_none():
    worked = '2 + 3 = 5 cups\n5 * 2 = 10 cups'
    assert solutions.snippet(ask('5'), worked)[0] == 'cups = 2 + 3\nprint(cups)'
    assert solutions.snippet(ask('7'), worked) is None
    assert solutions.trace(ask('7'), worked, 'code') is None


def test_names_are_python_and_none_hides_a_builtin():
    code, _ = solutions.snippet(ask('9'), '1 + 2 = 3 print\n3 + 4 = 7 class\n7 + 2 = 9 sum')
    assert code.splitlines()[-1] == 'print(total3)' and run(code) == '9'


def test_traces_of_both_kinds_end_in_the_answer():
    problem = ask('300', 'George slew 200, Frederick 0.75 as many, Arthur 2.')
    words, code = (solutions.trace(problem, GOBLINS, kind) for kind in solutions.KINDS)
    assert words.parts == (('text', GOBLINS.partition('####')[0]), ('text', wrap_answer('300')))
    assert [kind for kind, _ in code.parts] == ['code', 'text']
    assert code.parts[1][1] == wrap_answer(run(code.parts[0][1]))


def test_a_question_that_is_an_expression_is_its_own_snippet():
    problem = ask('-4', 'Calculate 2 * (3 - 5).')
    assert solutions.expression(problem) == '2 * (3 - 5)'
    assert solutions.snippet(problem, '')[0] == 'print(2 * (3 - 5))'
    assert solutions.in_words(problem) == '3 - 5 = -2\n2 * (-2) = -4'
    assert solutions.expression(ask('-3', 'Calculate 2 * (3 - 5).')) is None
    assert solutions.in_words(ask('5', 'How many apples are left of 7 - 2 if 3 + 1 are eaten?')) is None


def test_of_the_problems_that_others_wrote_most_become_snippets_that_run_to_the_answer():
    pairs = gym.worked('reasoning_gym:gsm_symbolic?held_out_templates=15&size=200')
    made = [(p, solutions.snippet(p, words)) for p, words in pairs]
    right = [(p, code) for p, code in made if code]
    assert len(right) > 0.9 * len(made)
    for problem, (code, printed) in right:
        assert run(code) == printed and float(printed) == pytest.approx(float(problem.answer))
    templates = {problem.id.rpartition('_')[2] for problem, _ in right}
    assert len(templates) > 55
