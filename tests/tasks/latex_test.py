"""LaTeX to expressions: the grammar, and what it refuses instead of guessing."""

import pytest
import sympy

from retool_jax.tasks import latex, notation
from retool_jax.tasks.bounded import Unreadable

X, Y = sympy.symbols('x y')


def read(text):
    return latex.read(notation.clean(text))


@pytest.mark.parametrize(
    'text, expr',
    [
        (r'2\frac34', sympy.Rational(11, 4)), ('1 1/2', sympy.Rational(3, 2)), (r'\frac12', sympy.Rational(1, 2)),
        (r'\frac{1}{2}x', X / 2), ('5xy', 5 * X * Y), ('2^10', 1024), (r'x^{-1}', 1 / X), (r'-x^2', -(X**2)),
        (r'\sin^{2}{\left(x \right)}', sympy.sin(X) ** 2), (r'\sin 2x \cos y', sympy.sin(2 * X) * sympy.cos(Y)),
        (r'\sin^{-1} x', sympy.asin(X)), (r'\sin 30^\circ', sympy.Rational(1, 2)), (r'\log_2 8', 3),
        (r'\sqrt[3]{-8}', -2),
        (r'|x|-|y|', abs(X) - abs(Y)), (r'\left|-3\right|', 3), (r'\lfloor 3.7\rfloor', 3), ('(5-2)!', 6),
        (r'{10 \choose 3}', 120), ('√12', 2 * sympy.sqrt(3)), ('2sqrt(3)', 2 * sympy.sqrt(3)), ('½x²', X**2 / 2),
        (r'a_{1}+a_1', 2 * sympy.Symbol('a_1')), (r'e^{i\pi}', -1), (r'\sum_{k=1}^{10} k', 55), ('x^y^2', X ** (Y**2)),
        (r'\gcd(12, 18)', 6), (r'\operatorname{asin}{\left(x \right)}', sympy.asin(X)), (r'\infty', sympy.oo),
    ],
)  # fmt: skip
def test_expressions_are_read_as_written(text, expr):
    assert sympy.simplify(read(text) - expr) == 0 if expr != sympy.oo else read(text) == expr


@pytest.mark.parametrize(
    'text',
    ['3 4', 'x2', '1/2x', r'1/2\pi', r'\foo', r'\frac{1}{', '2+', '', '(1', '1)', r'\frac{1}{0}', '9^{9^{9^9}}',
     '10000000!',
     r'\binom{100000000}{50000000}', '(' * 100 + '1' + ')' * 100, r'\begin{cases}1\\2\end{cases}', r'\frac{d}{dx}x',
     '1,2',
     r'\text{north}', '0^0', '@', r'\sqrt{' * 150 + '2' + '}' * 150],
    ids=lambda text: ascii(text[:16]),
)  # fmt: skip
def test_what_is_unknown_ambiguous_or_huge_is_refused(text):
    with pytest.raises(Unreadable):
        read(text)
