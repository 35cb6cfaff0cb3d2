"""Python expressions to values, as a script prints them: parsed by `ast`, walked here, never executed.

Names, calls and operators outside the tables below raise `Unreadable`.
"""

from __future__ import annotations

import ast
import re
import warnings

import sympy

from retool_jax.tasks import bounded
from retool_jax.tasks.bounded import Unreadable
from retool_jax.tasks.notation import FUNCTIONS, GREEK
from retool_jax.tasks.values import Matrix, Number, Region, Relation, Sequence, Value

DEPTH = 150
_MODULES = frozenset((
    'math', 'np', 'numpy', 'sympy', 'sp', 'cmath',
))  # fmt: skip
_CONSTANTS = {'pi': sympy.pi, 'oo': sympy.oo, 'inf': sympy.oo, 'e': sympy.E, 'i': sympy.I}
_UPPER = {'E': sympy.E, 'I': sympy.I}
_SAME = frozenset((
    'Integer', 'Float', 'float', 'float64', 'float32', 'int64', 'int32', 'int', 'mpf', 'complex', 'S',
))  # fmt: skip
_SEQUENCES = {'FiniteSet': 'set', 'set': 'set', 'tuple': '()', 'list': '[]', 'sorted': '[]', 'array': '[]'}
_COMPLEX = re.compile(r'\(?[+-]?\d[\d.]*(?:e[+-]?\d+)?[+-]\d[\d.]*(?:e[+-]?\d+)?j\)?')
_OTHER = re.compile(r'[\\^%!°⟦{}]|\d_\d')  # what no printed expression has, or what means something else in it


def read(text: str) -> Value:
    """The value of an expression. `E` and `I` are constants where `*` shows that Python wrote it."""
    if _OTHER.search(text):
        raise Unreadable('no Python')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', SyntaxWarning)
            tree = ast.parse(text.strip(), mode='eval').body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unreadable('no Python') from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    upper = '*' in text or names <= set(_UPPER) or bool(names & set(FUNCTIONS))
    return _Walk(text, _UPPER if upper else {}, bool(_COMPLEX.fullmatch(text.replace(' ', '')))).value(tree)


class _Walk:
    def __init__(self, text: str, constants: dict, complex_numbers: bool):
        self.text, self.constants, self.complex_numbers = text, constants, complex_numbers
        self.depth, self.decimal = 0, False

    def value(self, node: ast.AST) -> Value:
        """What a whole expression is: a sequence, a matrix, a set, or a number."""
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            kind = {'Tuple': '()', 'List': '[]', 'Set': 'set'}[type(node).__name__]
            return Sequence(kind, tuple(map(self.value, node.elts)))
        if isinstance(node, ast.Call):
            name = self.name(node.func)
            if name in _SEQUENCES:
                items = node.args
                if len(items) == 1 and isinstance(items[0], ast.Tuple | ast.List | ast.Set):
                    items = items[0].elts
                return Sequence(_SEQUENCES[name], tuple(map(self.value, items)))
            if name == 'Matrix' and len(node.args) == 1:
                return self.matrix(node.args[0])
            if name in ('Interval', 'Union', 'open', 'Lopen', 'Ropen'):
                return Region(self.region(node))
            if name == 'Eq' and len(node.args) == 2:
                return Relation(('=',), tuple(map(self.value, node.args)))
        self.decimal = False
        expr = self.expr(node)
        return Number(expr, self.decimal)

    def matrix(self, node: ast.AST) -> Matrix:
        rows = self.value(node)
        if not isinstance(rows, Sequence) or not rows.items:
            raise Unreadable('a matrix without rows')
        made = tuple(r.items if isinstance(r, Sequence) else (r,) for r in rows.items)
        if len(set(map(len, made))) != 1:
            raise Unreadable('rows of unequal lengths')
        return Matrix(made)

    def region(self, node: ast.AST) -> sympy.Set:
        if not isinstance(node, ast.Call):
            raise Unreadable('no set')
        name = self.name(node.func)
        if name == 'FiniteSet':
            return sympy.FiniteSet(*map(self.expr, node.args))
        if name == 'Union':
            return sympy.Union(*map(self.region, node.args))
        ends = [self.expr(n) for n in node.args[:2]]
        if len(ends) != 2 or not all(e.is_extended_real and e.is_number for e in ends):
            raise Unreadable('an interval without two ends')
        shut = {'open': (True, True), 'Lopen': (True, False), 'Ropen': (False, True)}.get(name, (False, False))
        flags = [isinstance(n, ast.Constant) and n.value is True for n in node.args[2:4]]
        left, right = (*flags, False, False)[:2] if name == 'Interval' else shut
        return sympy.Interval(*ends, left, right)

    def name(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return node.id
        owner = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ''
        if owner in _MODULES or (owner == 'Interval' and node.attr in ('open', 'Lopen', 'Ropen')):
            return node.attr
        raise Unreadable('a name with a dot')

    def expr(self, node: ast.AST) -> sympy.Expr:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable('nested too deep')
        made = self.made(node)
        self.depth -= 1
        return made

    def made(self, node: ast.AST) -> sympy.Expr:
        match node:
            case ast.Constant(value=bool() | str() | bytes() | None):
                raise Unreadable('no number')
            case ast.Constant(value=int() | float()):
                written = ast.get_source_segment(self.text.strip(), node)
                if not re.fullmatch(r'[\d.]+(?:[eE][+-]?\d+)?', written):
                    raise Unreadable(written)
                self.decimal |= isinstance(node.value, float)
                return bounded.number(written)
            case ast.Constant(value=complex()) if self.complex_numbers:
                written = ast.get_source_segment(self.text.strip(), node)
                self.decimal |= '.' in written
                return bounded.number(written[:-1]) * sympy.I
            case ast.Name() | ast.Attribute():
                return self.symbol(self.name(node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.expr(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.expr(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(self.expr(left), op, self.expr(right))
            case ast.Call(func=func, args=args, keywords=[]):
                return self.call(self.name(func), args)
        raise Unreadable(type(node).__name__)

    def binary(self, a: sympy.Expr, op: ast.operator, b: sympy.Expr) -> sympy.Expr:
        match op:
            case ast.Add():
                return bounded.check(a + b)
            case ast.Sub():
                return bounded.check(a - b)
            case ast.Mult():
                return bounded.check(a * b)
            case ast.Div():
                return bounded.divide(a, b)
            case ast.Pow():
                return bounded.power(a, b)
        raise Unreadable(type(op).__name__)

    def call(self, name: str, args: list[ast.expr]) -> sympy.Expr:
        if name in ('Fraction', 'Rational', 'Decimal', *_SAME) and args:
            if len(args) == 1 and isinstance(args[0], ast.Constant) and isinstance(args[0].value, str):
                written = args[0].value.strip()
                match = re.fullmatch(r'([+-]?)(\d*\.?\d+)(?:/(\d+))?', written)
                if not match:
                    raise Unreadable(written)
                self.decimal |= '.' in written
                value = bounded.divide(bounded.number(match[2]), bounded.number(match[3] or '1'))
                return -value if match[1] == '-' else value
            values = [self.expr(a) for a in args[: 2 if name in ('Fraction', 'Rational') else 1]]
            return values[0] if len(values) == 1 else bounded.divide(*values)
        values = [self.expr(a) for a in args]
        if name == 'pow' and len(values) == 2:
            return bounded.power(*values)
        return bounded.apply(name, values)

    def symbol(self, name: str) -> sympy.Expr:
        if name in _CONSTANTS or name in self.constants:
            return _CONSTANTS[name] if name in _CONSTANTS else self.constants[name]
        match = re.fullmatch(r'([a-zA-Z]|[a-zA-Z]+)_?(\d*)', name)
        if not match or (len(match[1]) > 1 and match[1] not in GREEK):
            raise Unreadable(name)
        return sympy.Symbol(match[1].removeprefix('var') + ('_' + match[2] if match[2] else ''))
