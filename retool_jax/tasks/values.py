"""What an answer can be: numbers and expressions, words, sequences, sets, relations, matrices, and written forms."""

from __future__ import annotations

import dataclasses

import sympy


@dataclasses.dataclass(frozen=True)
class Number:
    """A number or an expression with variables."""

    expr: sympy.Expr
    decimal: bool = False  # a decimal fraction stands in it: a rounded number
    place: sympy.Rational | None = None  # of a plain decimal: one unit of its last place
    percent: bool = False  # written with a percent sign; `expr` is the hundredth part
    unit: str = ''  # name from `units`


@dataclasses.dataclass(frozen=True)
class Text:
    """Words, with what is mathematics between them: strings and values in their order."""

    parts: tuple


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Several values: 'list' (bare, without order), 'set', '()', '[]', '(]', '[)' or 'angle'."""

    kind: str
    items: tuple


@dataclasses.dataclass(frozen=True)
class Region:
    """A set of real numbers: unions of intervals, the solutions of an inequality."""

    points: sympy.Set


@dataclasses.dataclass(frozen=True)
class Relation:
    """Sides with a sign between each two: '=', '<', '<=', '>', '>=', '!=' or '~' (approximately)."""

    signs: tuple[str, ...]
    sides: tuple


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Rows of equal lengths."""

    rows: tuple[tuple, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form that is part of the answer: 'base' (value, base), 'clock' (minutes, half of the day), 'ratio' (…)."""

    kind: str
    parts: tuple


@dataclasses.dataclass(frozen=True)
class Raw:
    """What nothing could read: equal to its own text alone."""

    text: str


Value = Number | Text | Sequence | Region | Relation | Matrix | Form | Raw
