"""When two values are equal; docs/grading.md says it in words."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import sympy

from retool_jax.tasks import numerics, units
from retool_jax.tasks.regions import region_of
from retool_jax.tasks.values import Form, Matrix, Number, Raw, Region, Relation, Sequence, Text, Value

_FLIPPED = {'<': '>', '<=': '>='}


def equal(a: Value, b: Value) -> bool:
    """Whether two values are the same answer; it does not matter which is the gold one."""
    if isinstance(a, Relation) or isinstance(b, Relation):
        return _equal_relations(a, b)
    if isinstance(a, Region) or isinstance(b, Region):
        return _equal_regions(a, b)
    if isinstance(a, Matrix) or isinstance(b, Matrix):
        a, b = _matrix(a), _matrix(b)
        return a is not None and b is not None and len(a) == len(b) and all(map(_pairwise, a, b))
    if isinstance(a, Sequence) or isinstance(b, Sequence):
        return _equal_sequences(a, b)
    if isinstance(a, Form) or isinstance(b, Form):
        return _equal_forms(a, b)
    if (letter := _letter(a)) and letter == _letter(b):
        return True
    a, b = (_constant(x) if isinstance(y, Number) else x for x, y in ((a, b), (b, a)))
    if type(a) is not type(b):
        return False
    if isinstance(a, Number):
        return _equal_numbers(a, b)
    return _equal_words(a, b)


def _equal_numbers(a: Number, b: Number) -> bool:
    if not units.agree(a.unit, b.unit) or (a.percent != b.percent and (a.unit or b.unit)):
        return False
    if a.percent != b.percent:  # 50 % is 0.5, and it is 50 where percents are asked for
        bare, other = (b, a) if a.percent else (a, b)
        hundred = Number(other.expr * 100, other.decimal, None if other.place is None else other.place * 100)
        if bare.expr.is_extended_real and bare.expr.is_number and abs(bare.expr) >= 1 and _close(bare, hundred):
            return True
    return _close(a, b)


def _close(a: Number, b: Number) -> bool:
    """Exact against exact; a decimal is within one unit of its last place and one part in a million."""
    if not (a.decimal or b.decimal):
        return numerics.same(a.expr, b.expr)
    places = [n.place for n in (a, b) if n.place is not None]
    if not places or not (a.expr.is_number and b.expr.is_number):
        return numerics.same(a.expr, b.expr, decimal=True)
    if a.expr == b.expr:
        return True
    return numerics.same(a.expr, b.expr, decimal=True) and bool(abs(a.expr - b.expr) < max(places))


def _letter(value: Value) -> str | None:
    """A single letter, as a choice or a variable; its case does not count."""
    if isinstance(value, Text) and len(value.parts) == 1 and isinstance(value.parts[0], str):
        name = value.parts[0]
    elif isinstance(value, Number) and value.expr.is_Symbol and not value.unit:
        name = value.expr.name
    else:
        name = {sympy.E: 'e', sympy.I: 'i'}.get(value.expr) if isinstance(value, Number) else None
    return name.casefold() if name and len(name) == 1 else None


def _constant(value: Value) -> Value:
    """Euler's number or the imaginary unit for its letter alone."""
    constants = {('e',): sympy.E, ('i',): sympy.I}
    return Number(constants[value.parts]) if isinstance(value, Text) and value.parts in constants else value


def _equal_words(a: Text | Raw, b: Text | Raw) -> bool:
    if isinstance(a, Raw):
        return a.text == b.text
    if len(a.parts) != len(b.parts):
        return False
    return all(x == y if isinstance(x, str) or isinstance(y, str) else equal(x, y) for x, y in zip(a.parts, b.parts))


def _equal_forms(a: Value, b: Value) -> bool:
    kinds = {v.kind for v in (a, b) if isinstance(v, Form)}
    if kinds == {'ratio'}:
        a, b = (v.parts if isinstance(v, Form) else _fraction(v) for v in (a, b))
        if a is None or b is None or len(a) != len(b):
            return False
        return all(numerics.same(x * b[0], y * a[0]) for x, y in zip(a[1:], b[1:]))
    return isinstance(a, Form) and isinstance(b, Form) and a == b


def _fraction(value: Value) -> tuple | None:
    return (value.expr, sympy.S.One) if isinstance(value, Number) and not value.unit else None


def _pairwise(a: Items[Value], b: Items[Value]) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def _matched(a: Items, b: Items, same: Callable) -> bool:
    """Whether the items are the same in some order."""
    if len(a) != len(b):
        return False
    left = list(b)
    for item in a:
        place = next((i for i, other in enumerate(left) if same(item, other)), None)
        if place is None:
            return False
        left.pop(place)
    return True


def _contained(a: Items[Value], b: Items[Value]) -> bool:
    return all(any(equal(x, y) for y in b) for x in a)


def _equal_sequences(a: Value, b: Value) -> bool:
    if not (isinstance(a, Sequence) and isinstance(b, Sequence)):
        several, other = (a, b) if isinstance(a, Sequence) else (b, a)
        return several.kind in ('list', 'set', '[]') and len(several.items) == 1 and equal(several.items[0], other)
    kinds = {a.kind, b.kind}
    if kinds <= {'list', 'set'}:
        if 'set' in kinds:
            return _contained(a.items, b.items) and _contained(b.items, a.items)
        return _matched(a.items, b.items, equal)
    if kinds == {'list', '[]'}:
        return _matched(a.items, b.items, equal)
    if len(kinds) == 1 or kinds in ({'list', '()'}, {'list', 'angle'}, {'()', 'angle'}):
        return _pairwise(a.items, b.items)
    return kinds == {'()', '[]'} and len(a.items) != 2 and _pairwise(a.items, b.items)


def _matrix(value: Value) -> tuple | None:
    if isinstance(value, Matrix):
        return value.rows
    if isinstance(value, Sequence) and value.items:
        rows = tuple(v.items if isinstance(v, Sequence) else None for v in value.items)
        return None if None in rows or value.kind not in ('[]', '()') else rows
    return None


def _equal_regions(a: Value, b: Value) -> bool:
    a, b = region_of(a), region_of(b)
    if a is None or b is None:
        return False
    if a == b:
        return True
    a, b = (sorted(v.args if isinstance(v, sympy.Union) else [v], key=_start) for v in (a, b))
    return len(a) == len(b) and all(map(_same_piece, a, b))


def _start(piece: sympy.Set) -> float:
    return float(piece.inf) if isinstance(piece, sympy.Interval | sympy.FiniteSet) else 0.0


def _same_piece(a: sympy.Set, b: sympy.Set) -> bool:
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return ends and numerics.same(a.start, b.start) and numerics.same(a.end, b.end)
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return len(a) == len(b) and all(any(numerics.same(x, y) for y in b) for x in a)
    return a == b


def _equal_relations(a: Value, b: Value) -> bool:
    one, two = _assigned(a), _assigned(b)
    if isinstance(a, Relation) and isinstance(b, Relation):
        if one is not None and two is not None and one[0] == two[0] and equal(one[1], two[1]):
            return True
        return _same_relation(a, b) or _same_region(a, b)
    relation, value, assigned = (a, b, one) if isinstance(a, Relation) else (b, a, two)
    if assigned is not None:
        return equal(assigned[1], value)
    return _same_region(relation, value)


def _same_region(a: Value, b: Value) -> bool:
    if any(isinstance(v, Relation) and set(v.signs) <= {'=', '~'} for v in (a, b)):
        return False
    return region_of(a) is not None and _equal_regions(a, b)


def _assigned(value: Value) -> tuple[object, Value] | None:
    """The name and the value of `x = 5`, of `5 = x`, and of a chain `x = 2 + 3 = 5` whose parts agree."""
    if not isinstance(value, Relation) or not set(value.signs) <= {'=', '~'}:
        return None
    sides = list(value.sides)
    if not _is_name(sides[0]) and len(sides) == 2 and _is_name(sides[1]) and value.signs == ('=',):
        sides.reverse()
    name = sides.pop(0) if _is_name(sides[0]) else None
    first = sides[0]
    for sign, side in zip(value.signs[-len(sides) + 1 :] if len(sides) > 1 else (), sides[1:]):
        if not (_about(first, side) if sign == '~' else equal(first, side)):
            return None
    if name is None and len(sides) == 1:
        return None
    return name, first


def _about(a: Value, b: Value) -> bool:
    """Whether an approximation is one: within a hundredth."""
    if not (isinstance(a, Number) and isinstance(b, Number) and a.expr.is_number and b.expr.is_number):
        return False
    x, y = sympy.N(a.expr), sympy.N(b.expr)
    return bool(abs(x - y) <= 0.01 * abs(x))


def _is_name(value: Value) -> bool:
    if isinstance(value, Number):
        return value.expr.is_Symbol or isinstance(value.expr, sympy.core.function.AppliedUndef)
    if isinstance(value, Sequence):
        return value.kind == '()' and all(map(_is_name, value.items))
    return isinstance(value, Text) and all(isinstance(p, str) for p in value.parts)


def _same_relation(a: Relation, b: Relation) -> bool:
    """The same signs between sides whose differences are the same but for a factor."""
    if len(a.signs) != len(b.signs) or not all(isinstance(s, Number) for s in (*a.sides, *b.sides)):
        return False
    return _matched(_links(a), _links(b), _same_link)


def _links(value: Relation) -> list[tuple[str, sympy.Expr]]:
    links = []
    for left, sign, right in zip(value.sides, value.signs, value.sides[1:]):
        difference = left.expr - right.expr
        links.append((_FLIPPED[sign], -difference) if sign in _FLIPPED else (sign, difference))
    return links


def _same_link(a: tuple[str, sympy.Expr], b: tuple[str, sympy.Expr]) -> bool:
    return a[0] == b[0] and numerics.proportional(a[1], b[1], positive=a[0] in ('>', '>='))
