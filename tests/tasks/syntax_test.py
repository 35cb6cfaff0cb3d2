"""Python expressions as a script prints them: read, never run, and refused beyond what is known."""

import pytest
import sympy

from retool_jax.tasks import syntax
from retool_jax.tasks.bounded import Unreadable
from retool_jax.tasks.values import Number, Sequence

X = sympy.Symbol('x')


@pytest.mark.parametrize(
    'text, expr',
    [
        ('pi/2', sympy.pi / 2), ('2**10', 1024), ('10**9+7', 10**9 + 7), ('1e-3', sympy.Rational(1, 1000)),
        ('x**2+1', X**2 + 1), ('exp(2)', sympy.exp(2)), ('2*sqrt(3)', 2 * sympy.sqrt(3)), ('-oo', -sympy.oo),
        ('Fraction(1, 2)', sympy.Rational(1, 2)), ("Decimal('0.25')", sympy.Rational(1, 4)), ('math.pi', sympy.pi),
        ('np.float64(0.5)', sympy.Rational(1, 2)), ('math.comb(5, 2)', 10), ('3 + 4*I', 3 + 4 * sympy.I),
        ('(3+4j)', 3 + 4 * sympy.I), ('E**2', sympy.exp(2)), ('log(8)/log(2)', sympy.log(8) / sympy.log(2)),
        ('alpha + 1', sympy.Symbol('alpha') + 1), ('pow(2, 5)', 32),
        ('x1 + x_2', sympy.Symbol('x_1') + sympy.Symbol('x_2')),
    ],
)  # fmt: skip
def test_what_a_script_prints_is_read_exactly(text, expr):
    found = syntax.read(text)
    assert isinstance(found, Number) and found.expr == expr


def test_sequences_keep_their_brackets():
    found = syntax.read('[(1, 2), [3]]')
    assert isinstance(found, Sequence) and found.kind == '[]' and [item.kind for item in found.items] == ['()', '[]']


@pytest.mark.parametrize(
    'text',
    [
        "__import__('os').system('touch hacked')", "open('hacked', 'w')", '(lambda: 1)()', '[x for x in (1, 2)]',
        'x := 3',
        "().__class__.__bases__", "f'{1}'", "eval('1')", "exec('1')", 'math.__dict__', 'x.real', 'print(1)',
        'x if y else z',
        'foo(1)', 'sqrt(2, *[3])', 'sqrt(x=2)', 'a @ b', '7 // 2', '7 % 2', '~1', 'x < 3', "'text'", 'hello',
        '1_000', '2j',
        '9**9**9', '10**(10**10)', 'factorial(10**9)', 'binomial(10**9, 5*10**8)', '1/0', '0**-1', 'log(0)',
        '1e99999999',
        '(' * 150 + '1' + ')' * 150 + '+', '-' * 1900 + '1', '[' * 1500, '1 +', '', 'x^2', '2(3)', 'x(2)',
    ],
    ids=lambda text: ascii(text[:16]),
)  # fmt: skip
def test_nothing_is_run_and_what_is_unknown_or_huge_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unreadable):
        syntax.read(text)
    assert list(tmp_path.iterdir()) == []
