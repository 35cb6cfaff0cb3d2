"""Exact operations on sympy expressions whose results stay small enough to be judged: what would not is refused."""

from __future__ import annotations

import sympy

BITS = 1_000_000  # of the largest integer: 300,000 digits
DEPTH = 60  # of the deepest expression
FACTORIAL = 20_000  # 20,000! has 256,000 bits

INVERSES = {'sin': 'asin', 'cos': 'acos', 'tan': 'atan', 'cot': 'acot', 'sec': 'asec', 'csc': 'acsc', 'sinh': 'asinh',
            'cosh': 'acosh', 'tanh': 'atanh'}  # fmt: skip
_FUNCTIONS = {name: getattr(sympy, name) for name in (
    *INVERSES, *INVERSES.values(), 'exp', 'floor', 'ceiling', 're', 'im')}  # fmt: skip
_FUNCTIONS |= {'arc' + name: getattr(sympy, inverse) for name, inverse in INVERSES.items() if len(name) == 3}
_FUNCTIONS |= {'abs': sympy.Abs, 'Abs': sympy.Abs, 'ceil': sympy.ceiling, 'ln': sympy.log}


class Unreadable(Exception):
    """A text that is no mathematics of the kind a reader knows, or too large to judge."""


def number(text: str) -> sympy.Rational:
    """A number as written, exactly: '0.10' is 1/10, '1e-3' 1/1000."""
    digits, _, exponent = text.lower().partition('e')
    if len(digits) > 10_000 or abs(int(exponent or 0)) > 10_000:
        raise Unreadable('a number of too many digits')
    whole, _, part = digits.partition('.')
    value = sympy.Integer(int((whole + part) or '0'))
    shift = int(exponent or 0) - len(part)
    return value * sympy.Integer(10) ** shift


def check(value: sympy.Expr) -> sympy.Expr:
    """The value, unless it is undefined."""
    if value is sympy.nan or value is sympy.zoo or ((value.is_Add or value.is_Mul) and value.has(sympy.nan, sympy.zoo)):
        raise Unreadable('undefined')
    return value


def divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """a/b; nothing is divided by 0."""
    if b.is_zero:
        raise Unreadable('divided by 0')
    return check(a / b)


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """base**exponent, where the result has no more than `BITS` bits."""
    if base.is_Rational and exponent.is_Rational and abs(base) not in (0, 1):
        bits = max(abs(base.p).bit_length(), base.q.bit_length())
        if bits * abs(exponent) > BITS:
            raise Unreadable('a power too large')
    if base.is_zero and (exponent.is_negative or exponent.is_zero):
        raise Unreadable('undefined')
    return check(sympy.Pow(base, exponent))


def root(value: sympy.Expr, degree: sympy.Expr) -> sympy.Expr:
    """The root of a number: the real one where there is one, as the radical sign means it."""
    if degree.is_zero:
        raise Unreadable('undefined')
    if degree.is_Integer and degree.p % 2 and value.is_number and value.is_negative:
        return -power(-value, 1 / degree)
    return power(value, 1 / degree)


def factorial(value: sympy.Expr) -> sympy.Expr:
    """value!, of a number up to `FACTORIAL`."""
    if value.is_number and not (value.is_Integer and 0 <= value <= FACTORIAL):
        raise Unreadable('a factorial too large, or of no whole number')
    return sympy.factorial(value)


def binomial(n: sympy.Expr, k: sympy.Expr) -> sympy.Expr:
    """n choose k."""
    if n.is_number and k.is_number and not (n.is_Integer and k.is_Integer and abs(n) <= FACTORIAL):
        raise Unreadable('a binomial coefficient too large')
    return sympy.binomial(n, k)


def apply(name: str, values: list[sympy.Expr], in_degrees: sympy.Symbol | None = None) -> sympy.Expr:
    """A function by its name in LaTeX or Python."""
    if in_degrees is not None and name in ('sin', 'cos', 'tan', 'cot', 'sec', 'csc'):
        values = [value.subs(in_degrees, sympy.pi / 180) for value in values]
    many = {'gcd': sympy.gcd, 'lcm': sympy.lcm, 'max': sympy.Max, 'min': sympy.Min}
    if name in many and values:
        if name in ('gcd', 'lcm') and not all(v.is_Integer for v in values):
            raise Unreadable(f'{name} of what is no integer')
        return many[name](*values) if name in ('max', 'min') else many[name](list(values))
    if name in ('binomial', 'comb') and len(values) == 2:
        return binomial(*values)
    if name == 'log' and len(values) == 2:
        return divide(logarithm(values[0]), logarithm(values[1]))
    if len(values) != 1:
        raise Unreadable(f'{name} of {len(values)} values')
    (value,) = values
    if name in ('log', 'ln'):
        return logarithm(value)
    if name in ('lg', 'log10', 'log2'):
        return divide(logarithm(value), sympy.log(2 if name == 'log2' else 10))
    if name in ('sqrt', 'cbrt'):
        return root(value, sympy.Integer(2 if name == 'sqrt' else 3))
    if name == 'factorial':
        return factorial(value)
    if name == 'exp':
        return power(sympy.E, value)
    if name not in _FUNCTIONS:
        raise Unreadable(name)
    return check(_FUNCTIONS[name](value))


def logarithm(value: sympy.Expr) -> sympy.Expr:
    """The natural logarithm; of 0 there is none."""
    if value.is_zero:
        raise Unreadable('undefined')
    return sympy.log(value)
