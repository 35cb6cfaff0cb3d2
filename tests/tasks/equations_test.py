"""Which arithmetic is found in a worked solution, in every spelling, and whether it holds."""

from __future__ import annotations

from fractions import Fraction

import pytest

from retool_jax.tasks import equations, expressions


def found(worked: str) -> list[tuple[str, Fraction, bool]]:
    return [(' '.join(step.expression), step.value, step.holds) for step in equations.read(worked)]


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
        ('spools: 124 spools / 248 spools * 100% = 50%', '124 / 248 * 100', 50, 'percent'),
        # GSM8K's notes
        ('Natalia sold 48/2 = <<48/2=24>>24 clips in May.', '48 / 2', 24, 'clips'),
        ('Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.', '12 / 60', Fraction(1, 5), 'money'),
        ('He sells half, so <<.5*40=20>>20 cups', '0.5 * 40', 20, 'cups'),
        ('They have 48 halves = <<(48-8)/2=20>>20 cups', '( 48 - 8 ) / 2', 20, 'cups'),
        ('He has <<2*3=6=6>>6 cups', '2 * 3', 6, 'cups'),
        ('12*2=24<<12*2=24>> pages', '12 * 2', 24, 'pages'),
        ('5*3 = <<5*2=15>>15 cups', '5 * 3', 15, 'cups'),  # a note that does not hold, beside words that do
        ('He has $<<10000/4=2,500>>2,500.', '10000 / 4', 2500, 'money'),
        # spellings of signs and numbers
        ('3 × 4 = 12 cups', '3 * 4', 12, 'cups'),
        ('3x4 = 12 cups', '3 * 4', 12, 'cups'),
        ('3 x $4 = $12', '3 * 4', 12, 'money'),
        ('3 times 4 = 12 cups', '3 * 4', 12, 'cups'),
        ('12 ÷ 4 = 3 cups', '12 / 4', 3, 'cups'),
        ('12 divided by 4 = 3 cups', '12 / 4', 3, 'cups'),
        ('12 − 4 = 8 cups', '12 - 4', 8, 'cups'),
        ('12 \\times 4 = 48 cups', '12 * 4', 48, 'cups'),
        ('[(2 + 3) * 2] = 10 cups', '( ( 2 + 3 ) * 2 )', 10, 'cups'),
        ('2(3 + 4) = 14 cups', '2 * ( 3 + 4 )', 14, 'cups'),
        ('2^3 = 8 cups', '2 ** 3', 8, 'cups'),
        ('2**3 + 1 = 9 cups', '2 ** 3 + 1', 9, 'cups'),
        ('.5 * 8 = 4 cups', '0.5 * 8', 4, 'cups'),
        ('007 + 1 = 8 cups', '7 + 1', 8, 'cups'),
        ('5 - 8 = -3 degrees', '5 - 8', -3, 'degrees'),
        ('-5 + 8 = 3 degrees', '- 5 + 8', 3, 'degrees'),
        ('100 boxes x 100 kg/box = 10 000 kg', '100 * 100', 10000, 'kg'),
        ('1 1/2 * 4 = 6 cups', '( 1 + 1 / 2 ) * 4', 6, 'cups'),
        ('1½ * 4 = 6 cups', '( 1 + 1 / 2 ) * 4', 6, 'cups'),
        ('1/2 + 1/4 = 3/4 of it', '1 / 2 + 1 / 4', Fraction(3, 4), ''),
        ('60 / 3/4 = 80 years', '60 / ( 3 / 4 )', 80, 'years'),
        ('13÷1/2=26 minutes', '13 / ( 1 / 2 )', 26, 'minutes'),
        ('60/3/4 = 5 years', '60 / 3 / 4', 5, 'years'),
        # percent
        ('20% of 50 = 10 cups', '20 / 100 * 50', 10, 'cups'),
        ('20 percent of the $50 = $10', '20 / 100 * 50', 10, 'money'),
        ('2/5 of 50 = 20 cups', '2 / 5 * 50', 20, 'cups'),
        ('10 cups / 20% = 50 cups', '10 / ( 20 / 100 )', 50, 'cups'),
        ('100% - 25% = 75% of it', '100 - 25', 75, 'percent'),
        ('5 / 20 = 25%', '5 / 20 * 100', 25, 'percent'),
        ('1/4 + 1/4 = 50%', '( 1 / 4 + 1 / 4 ) * 100', 50, 'percent'),
        ('80% * 50% = 40%', '80 / 100 * 50 / 100 * 100', 40, 'percent'),
        # chains, and what stands before the arithmetic
        ('5*2 + 3 = 10 + 3 = 13 cups', '5 * 2 + 3', 13, 'cups'),
        ('20% = 20/100 = 0.2 of it', '20 / 100', Fraction(1, 5), ''),
        ('5 hours = 5*60 = 300 minutes', '5 * 60', 300, 'minutes'),
        ('Total cost = 3*5 = $15', '3 * 5', 15, 'money'),
        ('2) 5 + 3 = 8 cups', '5 + 3', 8, 'cups'),
        ('- 5 + 3 = 8 cups', '5 + 3', 8, 'cups'),
        ('He has 20 apples (5 * 4 = 20)', '5 * 4', 20, 'apples'),
        ('The 3-page letters are 2 x 3 = 6 pages', '2 * 3', 6, 'pages'),
    ],
)
def test_an_equation_is_found_between_words_and_units(line, expression, value, counts):
    (step,) = equations.read(line)
    assert (' '.join(step.expression), step.value, step.counts) == (expression, value, counts) and step.holds
    assert abs(expressions.value(expression, {}) - value) == 0


@pytest.mark.parametrize(
    'line',
    [
        'He keeps 20 × (3 − 1) apples', 'x = 5', '2x + 5 = 15', '5 = 5', 'x = <<5=5>>5', 'A - 5 = 3', '<<24>>', '<<=>>',
        '28 cups = 14 pints', '5/0 = 5', '2 ** 999 = 4', '= 5', 'a = b = c', '', '#### 5 + 3 = 8',
    ],
)  # fmt: skip
def test_what_is_no_equation_of_numbers_is_none(line):
    assert found(line) == []


@pytest.mark.parametrize(
    'line, wrong',
    [
        ('Thus 7 * 8 = 57 apples', ('7 * 8', 57)),
        ('He has <<7*8=57>>57 apples', ('7 * 8', 57)),
        ('10 - 2 + 3 = 5 cups', ('10 - 2 + 3', 5)),  # though the end of it holds
        ('0.25 * 10 = 250 cents', ('0.25 * 10', 250)),
        ('25.6 * 1 = 25 cups', ('25.6 * 1', 25)),  # cut, not rounded
        ('10 / 3 = 3.34 cups', ('10 / 3', Fraction('3.34'))),
        ('2.0 * 2.5 = 5.01 cups', ('2.0 * 2.5', Fraction('5.01'))),
    ],
)
def test_an_equation_that_does_not_hold_says_so(line, wrong):
    assert found(line) == [(*wrong, False)]


def test_a_rounded_value_holds_to_the_digits_that_it_has():
    assert [s.holds for s in equations.read('10/3=3\n10/3=3.3\n20/3=6.67\n5/2=3\n5/2=2\n1/8=0.13')] == [True] * 6
    assert not equations.rounds(Fraction(10, 3), '3.30') and equations.rounds(Fraction(10, 3), '3.333')


def test_sides_that_run_on_are_a_step_each():
    assert found('5*2 = 10 + 3 = 13 cups') == [('5 * 2', 10, True), ('10 + 3', 13, True)]
    assert found('5*2=<<5*2=10>>10 cups and 10+3=13 cups') == [('5 * 2', 10, True), ('10 + 3', 13, True)]
    notes = '2*3 + 4*5 = <<2*3=6>>6 + <<4*5=20>>20 = <<6+20=26>>26 cups'
    assert found(notes) == [('2 * 3', 6, True), ('4 * 5', 20, True), ('6 + 20', 26, True)]
    assert found('5*2 = 11 + 3 = 14')[0] == ('5 * 2', 11, False)


def test_what_words_state_against_their_note_does_not_hold():
    assert found('5/100 = $<<5/100=0.05>>5') == [('5 / 100', 5, False), ('5 / 100', Fraction('0.05'), True)]


def test_lines_are_the_words_without_notes():
    assert equations.lines('2*3=<<2*3=6>>6 cups\n\n  so 6\n#### 6') == ['2*3=6 cups', 'so 6']


def test_whole_sentences_before_an_equation_are_kept_with_it():
    steps = equations.read('He has cups. Now count them.\nFirst add: 2+3=5 cups. He doubles that: 5*2=10 and 10-1=9')
    assert [s.before for s in steps] == ['He has cups. Now count them. First add:', 'He doubles that:', '']
