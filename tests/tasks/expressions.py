"""Pairs of expressions from a seed, as a model might write them: equal by construction, or unequal by 50 digits."""

from __future__ import annotations

import random

import sympy

SYMBOLS = sympy.symbols('x y t')
PRINTERS = {'latex': sympy.latex, 'python': str}


def pairs(seed: int, count: int) -> list[tuple[str, str, bool, str]]:
    """(answer, gold, whether they are equal, how they were made), half of them unequal."""
    rng = random.Random(seed)
    made = []
    while len(made) < count:
        expr = draw(rng, rng.randint(1, 3))
        other, kind = rewrite(rng, expr)
        unequal = len(made) % 2 == 1
        if unequal:
            other, kind = change(rng, other), f'{kind}, changed'
            if not differs(expr, other):
                continue
        if any(e.has(sympy.nan, sympy.zoo, sympy.oo) or len(str(e)) > 250 for e in (expr, other)):
            continue
        one, two = rng.choice(list(PRINTERS)), rng.choice(list(PRINTERS))
        made.append((PRINTERS[one](other), PRINTERS[two](expr), not unequal, f'{kind}: {one}, {two}'))
    return made


def draw(rng: random.Random, depth: int) -> sympy.Expr:
    """A random expression of numbers, radicals, powers, functions and variables."""
    if depth == 0:
        number = sympy.Rational(rng.randint(-12, 12) or 7, rng.choice((1, 1, 1, 2, 3, 5, 8)))
        return rng.choice((number, number, sympy.sqrt(rng.choice((2, 3, 5, 8))), sympy.pi, *SYMBOLS))
    a, b = draw(rng, depth - 1), draw(rng, depth - 1)
    kind = rng.randrange(9)
    if kind < 2:
        return a + b
    if kind < 5:
        return a * b
    if kind == 5:
        return a / b if b != 0 else a
    if kind == 6:
        return a ** rng.choice((2, 3, -1)) if a != 0 else b
    if kind == 7:
        return rng.choice((sympy.sin, sympy.cos, sympy.exp))(rng.choice(SYMBOLS) * rng.randint(1, 3)) * a
    return sympy.sqrt(a**2 + 1) + b


def rewrite(rng: random.Random, expr: sympy.Expr) -> tuple[sympy.Expr, str]:
    """The expression in another form of the same value."""
    kind, form = rng.choice(
        (
            ('as it is', lambda e: e),
            ('expanded', sympy.expand),
            ('factored', sympy.factor),
            ('over one denominator', sympy.together),
            ('cancelled', sympy.cancel),
        )
    )
    return form(expr), kind


def change(rng: random.Random, expr: sympy.Expr) -> sympy.Expr:
    """The expression with another value: shifted, scaled, turned around, or with one number changed."""
    kind = rng.randrange(5)
    if kind == 0:
        return expr + rng.choice((1, -1, sympy.Rational(1, 10**6), sympy.Rational(1, 2)))
    if kind == 1:
        return expr * rng.choice((2, -1, sympy.Rational(1000001, 1000000)))
    if kind == 2 and expr != 0:
        return 1 / expr
    numbers = sorted(expr.atoms(sympy.Rational) - {sympy.S.Zero}, key=str)
    if kind == 3 and numbers:
        number = rng.choice(numbers)
        return expr.subs(number, number + 1)
    symbols = sorted(expr.free_symbols, key=str)
    return expr.subs(symbols[0], symbols[0] + 1) if symbols else expr + 3


def differs(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether values to 50 digits differ at three points, or at one where there are no variables."""
    for shift in range(3):
        point = {s: sympy.Rational(7 + 5 * i + 3 * shift, 4) for i, s in enumerate(SYMBOLS)}
        x, y = (sympy.N(e.subs(point), 50) for e in (a, b))
        if not (x.is_finite and y.is_finite) or abs(x - y) <= abs(x + y) * sympy.Float('1e-40', 50):
            return False
    return True
