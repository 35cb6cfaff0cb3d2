"""Docstrings name the errors that a caller gets: what a public function raises itself is said there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'retool_jax'
CALLERS = {'ValueError', 'UserError', 'OSError'}  # the others are faults of ours, or of the machine
BASES = {'UserError': 'ValueError'}


def functions(node: ast.AST, docs: str = '', name: str = '') -> Iterator[tuple[str, str, ast.AST]]:
    """(dotted name, docstring, function) of every public function; `__init__` may be told of in its class."""
    for child in getattr(node, 'body', []):
        own = f'{name}.{child.name}'.strip('.') if hasattr(child, 'name') else ''
        if isinstance(child, ast.ClassDef) and not child.name.startswith('_'):
            yield from functions(child, ast.get_docstring(child) or '', own)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            begins = child.name == '__init__'  # what __post_init__ refuses stands beside the fields
            if begins or not child.name.startswith('_'):
                yield own, (ast.get_docstring(child) or '') + (docs if begins else ''), child


def raised(node: ast.AST, caught: frozenset[str] = frozenset()) -> Iterator[str]:
    """Errors for callers that the statements below a node raise and do not catch; inner functions aside."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                continue
            here = caught
            if isinstance(node, ast.Try) and field == 'body':
                here |= {word for h in node.handlers for word in (ast.unparse(h.type).strip('()').split(', '))}
            if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                name = ast.unparse(child.exc.func)
                if name in CALLERS and not {name, BASES.get(name), 'Exception'} & here:
                    yield name
            yield from raised(child, here)


def untold(tree: ast.Module) -> list[str]:
    """Public functions whose docstrings do not name what they raise, with the error."""
    found = []
    for name, said, function in functions(tree):
        found += [f'{name}: {error}' for error in sorted(set(raised(function))) if error not in said]
    return found


def test_errors_that_a_public_function_raises_stand_in_its_docstring():
    paths = sorted(PACKAGE.rglob('*.py'))
    assert len(paths) > 50
    assert [
        f'{path.relative_to(PACKAGE)} {line}' for path in paths for line in untold(ast.parse(path.read_text()))
    ] == []


@pytest.mark.parametrize(
    'source, found',
    [
        ('def f():\n    raise ValueError("no")', ['f: ValueError']),
        ('def f():\n    """Does. Raises: UserError for no."""\n    raise OSError()', ['f: OSError']),
        ('class A:\n    """Raises: ValueError."""\n    def __init__(self):\n        raise ValueError()', []),
        ('class A:\n    """Raises: ValueError."""\n    def f(self):\n        raise ValueError()', ['A.f: ValueError']),
        ('def f():\n    try:\n        raise UserError()\n    except (TypeError, ValueError):\n        pass', []),
        (
            'def f():\n    try:\n        g()\n    except KeyError:\n        raise ValueError() from None',
            ['f: ValueError'],
        ),
        ('def f():\n    def g():\n        raise ValueError()', []),
        ('def _f():\n    raise ValueError()', []),
    ],
)
def test_a_silence_is_heard(source, found):
    assert untold(ast.parse(source)) == found
