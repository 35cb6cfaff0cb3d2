"""Worked solutions become snippets: their equations, under names, in Python that really gives the answer."""

from __future__ import annotations

import contextlib
import io
import platform
from pathlib import Path

import pytest

from retool_jax.core.records import Problem, Verdict
from retool_jax.sandbox.pool import Pool
from retool_jax.tasks import files, gym, problems, solutions
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import wrap_answer
from tests.sandbox.given import tiny

GSM8K = Path(__file__).parents[3] / 'shared/data/gsm8k_train.jsonl'


@pytest.fixture(scope='module')
def grader():
    with Grader() as grader:
        yield grader


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


def code_of(question: str, worked: str, answer: str) -> list[str]:
    told = solutions.tell(ask(answer, question), worked)
    assert not told.reason and run(told.code) == told.printed
    return told.code.splitlines()


def test_a_result_that_the_question_names_too_is_written_as_a_number():
    worked = (
        'He has 10 * 5 = 50 coins.\nHe doubles 50 * 2 = 100 coins.\nShe gives 40 + 1 = 41 coins.\n100 + 41 = 141 coins'
    )
    code = code_of('He has 10 boxes of 5, and doubles them. She has 40 and gets 1.', worked, '141')
    assert code[1:3] == ['coins2 = coins * 2', 'coins3 = 40 + 1']
    code = code_of('He has 10 boxes of 5, twice. She has 100.', '10*5=50 coins\n50*2=100 cups\n100+100=200 cups', '200')
    assert code == ['coins = 10 * 5', 'cups = coins * 2', 'cups2 = cups + 100', 'print(cups2)']


@pytest.mark.parametrize(
    'question, worked, answer, line',
    [  # a result that nothing else takes up: a term of a sum goes before a factor
        ('3 pens for 1 dollar, 4 books for 3', '3*1=3 pens\n4*3=12 books\n3+12=15 dollars', '15', 'pens + books'),
        ('Tyson is 20', '20*2=40 years\n40-20=20 years\n20+5=25 years', '25', 'years2 + 5'),
        # two results of one value
        ('2 boxes of 3, 1 box of 6', '2*3=6 cups\n1*6=6 jugs\n6+6=12 things', '12', 'cups + jugs'),
        # numbers of a percentage are no results
        ('', '50*2=100 cups\n20/100*100=20 jugs\n100-20=80 cups', '80', 'cups - jugs'),
        ('', '50+60=110 cups\n110*(110/100)=121 cups', '121', 'cups * (110 / 100)'),
        ('Half of 8', '8-5=3 cups\n3-2=1 cup\n1/4*8+1=3 jugs', '3', '1 / 4 * 8 + cup'),
        ('', '8-5=3 cups\n5+2(3)=11 jugs', '11', '5 + 2 * cups'),
    ],
)
def test_later_lines_take_up_results_by_name(question, worked, answer, line):
    assert code_of(question, worked, answer)[-2].partition(' = ')[2] == line


@pytest.mark.parametrize(
    'worked, answer, last, printed',
    [
        ('48/2=24 cups', '24', 'print(cups)', '24.0'),
        ('0.1+0.2=0.3 cups', '0.3', 'print(round(cups, 1))', '0.3'),  # float noise
        ('3*.1=.3 cups\n.3*10=3 jugs', '3', 'print(round(jugs))', '3'),
        (
            '10/3=3.33 dollars',
            '3.33',
            'print(round(dollars, 2))',
            '3.33',
        ),  # the answer is rounded, and the print says so
        ('10/3=3.33 cups\n3.33*3=10 jugs', '10', 'print(jugs)', '10.0'),  # on the way nothing is rounded
        ('24*0.6666666666666666=16 cups', '16', 'print(cups)', '16.0'),  # what a float shows of 2/3
        ('2^3=8 cups', '8', 'print(cups)', '8'),
        ('5-8=-3 degrees', '-3', 'print(degrees)', '-3'),
        ('5/20=25% of it', '25', 'print(percent)', '25.0'),
    ],
)
def test_what_is_printed_is_the_answer_as_a_number(grader, worked, answer, last, printed):
    told = solutions.tell(ask(answer), worked)
    assert (told.code.splitlines()[-1], told.printed) == (last, printed) and run(told.code) == printed
    assert grader.equal(printed, answer)


@pytest.mark.parametrize(
    'worked, answer, reason',
    [
        ('He simply knows it.', '5', solutions.NO_EQUATION),
        ('2x + 3 = 13, so x = 5', '5', solutions.NO_EQUATION),
        ('x=<<5=5>>5', '5', solutions.NO_EQUATION),
        ('2*2=5 cups', '5', solutions.WRONG),
        ('2*2=5 cups\n5+1=6 cups', '6', solutions.WRONG),  # right by itself, of a value that is not
        ('2*2=5 cups\n5+1=6 cups\n6*2=12 jugs', '12', solutions.WRONG),
        ('13*0.5=6 tubes\n6+30=36 tubes', '36', solutions.ASTRAY),  # 6.5 that was cut to 6
        ('768/50=15.36 minutes, or 15', '15', solutions.ASTRAY),
        ('10/3=3 cups', '3', solutions.ASTRAY),
        ('2*2=4 cups', '5', solutions.ASTRAY),
        # with nothing rounded the third is 0, and the fourth divides by it
        ('10/3=3.33 m\n10/3=3.333 m\n3.333-3.33=0.003 m\n3/0.003=1000 m', '1000', solutions.ASTRAY),
        ('2*2=4 cups', 'four', solutions.ASTRAY),
    ],
)
def test_why_a_solution_cannot_be_told(worked, answer, reason):
    told = solutions.tell(ask(answer, 'He has 30.'), worked)
    assert told == ('', '', reason) and reason in solutions.REASONS
    assert solutions.snippet(ask(answer, 'He has 30.'), worked) is None


def test_a_wrong_equation_beside_the_way_is_left_out():
    assert code_of('2 and 3', '2*2=5 jugs\n2+3=4 cups\n2*3=6 cups', '6') == ['cups = 2 * 3', 'print(cups)']
    assert code_of('2 and 3', '2*2=5 cups\n2+3=5 cups\n5+1=6 cups', '6')[0] == 'cups = 2 + 3'  # found rightly after all


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
    noted = solutions.trace(problem, '200*0.75=<<200*0.75=150>>150 goblins, 2*150=$<<2*150=300>>300', 'mental')
    assert noted.parts[0][1] == '200*0.75=150 goblins, 2*150=$300\n'


def test_a_lead_says_what_is_computed_and_no_result():
    worked = """First find the cost of both pens: 2*3=<<2*3=6>>6 dollars
Now: 6+1=<<6+1=7>>7 dollars. He had 10 dollars before. Then take the 7 dollars away: 10-7=<<10-7=3>>3 dollars"""
    problem = ask('3', 'He has 10 dollars, 2 pens cost 3 each, a book 1. What is left?')
    trace = solutions.trace(problem, worked, 'code', lead=True)
    assert [kind for kind, _ in trace.parts] == ['text', 'code', 'text']
    assert trace.parts[0][1] == 'First find the cost of both pens:\nHe had 10 dollars before.\n'
    assert trace.parts[1:] == solutions.trace(problem, worked, 'code').parts
    assert solutions.trace(ask('5'), '2 + 3 = 5 cups', 'code', lead=True).parts[0][0] == 'code'


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


def executed(pairs: list[tuple[Problem, str]]) -> tuple[float, list[str]]:
    """The share of worked solutions that become snippets, and the ids of those whose last output in a real sandbox is
    not the gold answer, or not what `tell` says."""
    told = [(problem, told) for problem, worked in pairs if not (told := solutions.tell(problem, worked)).reason]
    wrong = []
    with Pool(tiny()) as pool, Grader() as grader:
        for start in range(0, len(told), 256):
            batch = told[start : start + 256]
            for (problem, said), future in zip(batch, [pool.submit(said.code) for _, said in batch]):
                result = future.result()
                printed = result.stdout.split()
                as_told = result.verdict == Verdict.OK and printed[-1:] == [said.printed]
                if not (as_told and grader.equal(printed[-1], problem.answer)):
                    wrong.append(problem.id)
    return len(told) / len(pairs), wrong


needs_pool = pytest.mark.skipif(
    platform.system() != 'Linux' or platform.machine() != 'x86_64', reason='the local pool needs Linux on x86_64'
)


@pytest.mark.slow
@needs_pool
@pytest.mark.skipif(not GSM8K.is_file(), reason='no shared problem files: GSM8K is not there')
def test_of_gsm8k_ninety_five_solutions_in_a_hundred_run_to_the_gold_answer_and_none_to_another():
    worked = [row['answer'] for _, row in files.read_rows(GSM8K)]
    share, wrong = executed(list(zip(problems.read(GSM8K), worked, strict=True)))
    assert share > 0.95 and not wrong


@pytest.mark.slow
@needs_pool
def test_of_gsm_symbolic_nine_solutions_in_ten_run_to_the_gold_answer_and_none_to_another():
    share, wrong = executed(gym.worked('reasoning_gym:gsm_symbolic?size=2000'))
    assert share > 0.9 and not wrong
