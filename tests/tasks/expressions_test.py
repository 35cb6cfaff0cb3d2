"""Numbers and expressions as texts: what they are worth, exactly and to Python."""

from __future__ import annotations

from fractions import Fraction

import pytest

from retool_jax.tasks import expressions


@pytest.mark.parametrize(
    'text, value',
    [('5', 5), ('1,200.50', Fraction('1200.5')), ('.5', Fraction(1, 2)), ('-3', -3), ('3/4', Fraction(3, 4)),
     ('10 000', 10000), ('3/0', None), ('1,2', None), ('five', None), ('', None), ('1e5', None)],
)  # fmt: skip
def test_numbers(text, value):
    assert expressions.number(text) == value


def test_expressions_are_computed_exactly_or_as_python_does():
    assert expressions.value('0.1 + 0.2', {}) == Fraction('0.3')
    assert expressions.value('0.1 + 0.2', {}, float) == 0.1 + 0.2
    assert expressions.value('a / 2 ** -1', {'a': Fraction(3)}) == 6
    assert isinstance(expressions.value('4 * 2', {}, float), int)
    for text in (
        'a + 1',
        '1 / 0',
        '2 ** 65',
        '2 ** 0.5',
        '10 ** 60 * 10',
        'f(1)',
        '1 +',
        'True',
        '(' * 500,
        '1 if 1 else 2',
    ):
        assert expressions.value(text, {}) is None
