"""Sets of real numbers: what intervals, inequalities and finite sets say, as sympy sets."""

from __future__ import annotations

import sympy

from retool_jax.tasks.values import Number, Region, Relation, Sequence, Value

_SIGNS = {'<': sympy.Lt, '<=': sympy.Le, '>': sympy.Gt, '>=': sympy.Ge, '!=': sympy.Ne, '=': sympy.Eq}


def region_of(value: Value) -> sympy.Set | None:
    """A value as a set of real numbers; None for a value that is no such set."""
    if isinstance(value, Region):
        return value.points
    if isinstance(value, Sequence):
        return _of_sequence(value)
    if isinstance(value, Relation):
        return _of_relation(value)
    return None


def _of_sequence(value: Sequence) -> sympy.Set | None:
    if value.kind == 'list' and all(isinstance(item, Sequence) and item.kind != 'list' for item in value.items):
        parts = [_of_sequence(item) for item in value.items]
        return None if None in parts else sympy.Union(*parts)
    if not all(isinstance(item, Number) and item.expr.is_number for item in value.items):
        return None
    ends = [item.expr for item in value.items]
    if value.kind == 'set':
        return sympy.FiniteSet(*ends)
    if len(ends) != 2 or value.kind not in ('()', '[]', '(]', '[)') or not all(e.is_extended_real for e in ends):
        return None
    return sympy.Interval(*ends, value.kind[0] == '(', value.kind[1] == ')')


def _of_relation(value: Relation) -> sympy.Set | None:
    if not all(isinstance(side, Number) for side in value.sides) or '~' in value.signs:
        return None
    sides = [side.expr for side in value.sides]
    symbols = set().union(*(s.free_symbols for s in sides))
    if len(symbols) != 1:
        return None
    real = sympy.Symbol('x', real=True)
    sides = [s.xreplace({symbols.copy().pop(): real}) for s in sides]
    region = sympy.S.Reals
    for left, sign, right in zip(sides, value.signs, sides[1:]):
        solved = _solve(left, sign, right, real)
        if solved is None:
            return None
        region = sympy.Intersection(region, solved)
    return region


def _solve(left: sympy.Expr, sign: str, right: sympy.Expr, symbol: sympy.Symbol) -> sympy.Set | None:
    relation = _SIGNS[sign](left, right)
    if relation in (sympy.true, sympy.false):
        return sympy.S.Reals if relation == sympy.true else sympy.S.EmptySet
    try:
        if sign in ('=', '!='):
            roots = sympy.solveset(left - right, symbol, sympy.S.Reals)
            region = roots if sign == '=' else sympy.S.Reals - roots
        else:
            region = sympy.solve_univariate_inequality(relation, symbol, relational=False)
    except Exception:  # whatever sympy raises at an inequality that it cannot solve
        return None
    return None if region.has(sympy.ConditionSet) else region
