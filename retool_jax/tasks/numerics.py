"""Whether two expressions are equal: exactly where they are rational, else by 60 and then 1,000 digits.

Sixty digits tell nearly all unequal pairs apart at once; a thousand digits at every point are what equality is
taken from. A decimal stands for the numbers that round to it.
"""

from __future__ import annotations

import zlib

import mpmath
import sympy

from retool_jax.tasks.bounded import Unreadable

RELATIVE = sympy.Rational(1, 10**6)  # how far a decimal may be from the number that it stands for
DOUBLE = sympy.Rational(1, 10**12)  # the same with 15 digits or more: what a float has lost on its way
ROUGH, FINE = 60, 1000  # digits
# Values of the variables: both signs, below and above 1; numbers of no special form.
POINTS = ('0.3718281', '1.9142135', '-0.6180339', '4.2360679', '-2.7182818', '0.8090169')

_FUNCTIONS = {
    sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan, sympy.cot: mpmath.cot, sympy.sec: mpmath.sec,
    sympy.csc: mpmath.csc, sympy.asin: mpmath.asin, sympy.acos: mpmath.acos, sympy.atan: mpmath.atan,
    sympy.acot: mpmath.acot, sympy.asec: mpmath.asec, sympy.acsc: mpmath.acsc, sympy.sinh: mpmath.sinh,
    sympy.cosh: mpmath.cosh, sympy.tanh: mpmath.tanh, sympy.asinh: mpmath.asinh, sympy.acosh: mpmath.acosh,
    sympy.atanh: mpmath.atanh, sympy.exp: mpmath.exp, sympy.log: mpmath.log, sympy.Abs: mpmath.fabs,
    sympy.floor: mpmath.floor, sympy.ceiling: mpmath.ceil, sympy.factorial: mpmath.factorial,
    sympy.binomial: mpmath.binomial, sympy.gamma: mpmath.gamma, sympy.re: mpmath.re, sympy.im: mpmath.im,
    sympy.Max: max, sympy.Min: min, sympy.sign: mpmath.sign, sympy.arg: mpmath.arg, sympy.conjugate: mpmath.conj,
    sympy.LambertW: mpmath.lambertw, sympy.sinc: mpmath.sinc, sympy.coth: mpmath.coth, sympy.sech: mpmath.sech,
    sympy.csch: mpmath.csch,
}  # fmt: skip
_CONSTANTS = {sympy.pi: lambda: +mpmath.pi, sympy.E: lambda: +mpmath.e, sympy.I: lambda: mpmath.mpc(0, 1),
              sympy.GoldenRatio: lambda: +mpmath.phi, sympy.EulerGamma: lambda: +mpmath.euler}  # fmt: skip


def evaluate(expr: sympy.Expr, point: dict) -> mpmath.mpf | mpmath.mpc:
    """The value at a point, in mpmath's working precision; Unreadable where there is none."""
    if expr.is_Rational:
        return mpmath.mpf(int(expr.p)) / int(expr.q)
    if expr.is_Symbol:
        return point[expr]
    if expr in _CONSTANTS:
        return _CONSTANTS[expr]()
    values = [evaluate(arg, point) for arg in expr.args]
    try:
        if expr.is_Add:
            return mpmath.fsum(values)
        if expr.is_Mul:
            return mpmath.fprod(values)
        if expr.is_Pow:
            return mpmath.power(*values)
        if isinstance(expr, sympy.core.function.AppliedUndef):  # some function, the same for the same name
            return mpmath.sin(values[0] * (1 + zlib.crc32(expr.func.__name__.encode()) % 97)) + 2
        return _FUNCTIONS[expr.func](*values)
    except (KeyError, ZeroDivisionError, ValueError, TypeError, OverflowError) as error:
        raise Unreadable(f'no value: {error}') from None


def points(*exprs: sympy.Expr) -> list[dict]:
    """Points at which expressions are compared, each variable with a value of its own; one empty point without any."""
    symbols = sorted(set().union(*(e.free_symbols for e in exprs)), key=str)
    if not symbols:
        return [{}]
    spread = lambda symbol: mpmath.mpf(1 + zlib.crc32(str(symbol).encode()) % 9973) / 100_003
    values = [[mpmath.mpf(base) + spread(s) for s in symbols] for base in POINTS]
    # Not all variables have the same sign at every point.
    return [{s: -v if (i * k) % 3 == 2 else v for k, (s, v) in enumerate(zip(symbols, row))}
            for i, row in enumerate(values)]  # fmt: skip


def near(a: mpmath.mpf, b: mpmath.mpf, digits: int) -> bool:
    """Whether two values agree in so many digits (of the larger; nothing is near 0 but what vanishes)."""
    larger = max(abs(a), abs(b))
    return abs(a - b) <= larger * mpmath.mpf(10) ** -digits


def same(a: sympy.Expr, b: sympy.Expr, decimal: bool = False) -> bool:
    """Whether two expressions have the same values; with `decimal` within `RELATIVE`."""
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return decimal and bool(abs(a - b) <= RELATIVE * max(abs(a), abs(b)))
    if a.has(sympy.oo, -sympy.oo) or b.has(sympy.oo, -sympy.oo):
        return False
    if decimal:
        return _agree(a, b, ROUGH, 6)
    return _agree(a, b, ROUGH, ROUGH - 20) and _agree(a, b, FINE, FINE - 200)


def _agree(a: sympy.Expr, b: sympy.Expr, working: int, digits: int) -> bool:
    """Whether values agree at all points where both are real, or at all where they have values if too few are."""
    with mpmath.workdps(working):
        computed = list(filter(None, (_at(a, b, point) for point in points(a, b))))
        lost = mpmath.mpf(10) ** (15 - working)  # what cancellation may leave of a part that vanishes
        real = [pair for pair in computed if all(abs(mpmath.im(v)) <= lost * abs(v) for v in pair)]
        pairs = real if len(real) >= 2 else computed
        return bool(pairs) and all(
            near(x, y, digits) or (max(abs(x), abs(y)) < lost and sympy.simplify(a - b) == 0) for x, y in pairs
        )


def _at(a: sympy.Expr, b: sympy.Expr, point: dict):
    try:
        x, y = evaluate(a, point), evaluate(b, point)
    except Unreadable:
        return None
    return (x, y) if mpmath.isfinite(x) and mpmath.isfinite(y) else None


def proportional(a: sympy.Expr, b: sympy.Expr, positive: bool) -> bool:
    """Whether a is b times a constant that is not 0 (above 0 with `positive`)."""
    with mpmath.workdps(ROUGH):
        pairs = list(filter(None, (_at(a, b, point) for point in points(a, b))))
        ratios = [x / y for x, y in pairs if abs(x) > 1e-30 and abs(y) > 1e-30]
        if len(ratios) < 3 or len(ratios) < len(pairs):
            return False
        if positive and not (mpmath.im(ratios[0]) == 0 and mpmath.re(ratios[0]) > 0):
            return False
        return all(near(r, ratios[0], ROUGH - 20) for r in ratios)
