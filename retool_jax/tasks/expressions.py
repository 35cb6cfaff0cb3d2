"""Numbers and expressions of them as texts, computed exactly or as Python would, never executed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from fractions import Fraction

NUMBER = r'(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)'
LONGEST = 500  # characters of an expression that is computed
POWER = 64  # the largest exponent that is computed
HUGE = 10**60  # a larger value is none that a worked solution has
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow}  # fmt: skip


def number(text: str) -> Fraction | None:
    """A plain number, its thousands in groups or not, or a fraction of two; None for any other text."""
    text = re.sub(r'(?<=\d) (?=\d{3}(?!\d))', '', text.strip())  # 10 000
    if re.fullmatch(rf'-?{NUMBER}', text) or re.fullmatch(r'-?\d+/0*[1-9]\d*', text):
        return Fraction(text.replace(',', ''))
    return None


def value[T: (Fraction, float)](text: str, names: Mapping[str, T], of: type[T] = Fraction) -> T | None:
    """The value of an expression of numbers, names, + - * / ** and brackets; None for anything else.

    Args:
      of: Fraction for the exact value, float for what Python's own arithmetic makes of it (an int where it would be
        one).
    """
    if len(text) > LONGEST:
        return None
    try:
        return _walk(ast.parse(text, mode='eval').body, names, of)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, KeyError):
        return None


def _walk[T: (Fraction, float)](node: ast.expr, names: Mapping[str, T], of: type[T]) -> T:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # The text of a decimal is exact, its float is not; repr gives the digits back.
        return Fraction(repr(node.value)) if of is Fraction else node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        found = _walk(node.operand, names, of)
        return -found if isinstance(node.op, ast.USub) else found
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _walk(node.left, names, of), _walk(node.right, names, of)
        if isinstance(node.op, ast.Pow) and (right != int(right) or abs(right) > POWER or abs(left) > HUGE):
            raise ValueError(ast.unparse(node))
        found = _OPERATORS[type(node.op)](left, right)
        if abs(found) > HUGE:
            raise ValueError(ast.unparse(node))
        return found
    raise ValueError(ast.dump(node))
