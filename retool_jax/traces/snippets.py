"""What a snippet's run shows to be mended in it: names of an earlier snippet, and values that nobody prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from retool_jax.core.records import ExecResult, Verdict

_UNKNOWN = re.compile(r"NameError: name '(\w+)' is not defined")
_BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def mended(codes: Sequence[str], call: int, result: ExecResult) -> tuple[str, str] | None:
    """(rule, script) that may do what a call was meant to do; None where its run shows nothing that can be mended.

    codes: the scripts of the trace's calls. result: that of `codes[call]`.
    """
    code = codes[call]
    if result.verdict == Verdict.ERROR:
        unknown = _UNKNOWN.search((result.stderr.strip().splitlines() or [''])[-1])
        earlier = unknown and next((c for c in reversed(codes[:call]) if unknown[1] in names(c)), None)
        return ('joined', join(earlier, code)) if earlier else None
    if result.verdict == Verdict.OK:
        changed = printing(code, silent=not result.stdout.strip())
        return ('print', changed) if changed else None
    return None


def names(code: str) -> set[str]:
    """What a script defines at its top level."""
    tree, found = _tree(code), set()
    for node in tree.body if tree else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                found.add(inner.id)
            elif isinstance(inner, ast.alias):
                found.add(inner.asname or inner.name.partition('.')[0])
    return found


def join(earlier: str, code: str) -> str:
    """A script behind an earlier one, whose prints are left out: they stand in the trace already."""
    tree = _tree(earlier)
    lines, dropped = earlier.splitlines(), set()
    for node in _prints(tree.body):
        dropped.update(range(node.lineno, node.end_lineno + 1))
    kept = '\n'.join(line for number, line in enumerate(lines, 1) if number not in dropped).rstrip()
    if not _tree(kept) or names(kept) != names(earlier):  # a block lost its body, or statements shared a line
        kept = ast.unparse(_Quiet().visit(tree))
    return f'{kept}\n{code}'


def printing(code: str, silent: bool) -> str | None:
    """A script that prints its last expression; None where that is none, or a call whose script printed something.

    silent: the script printed nothing. A call may print by itself and return nothing that is worth showing.
    """
    tree = _tree(code)
    last = tree.body[-1] if tree and tree.body else None
    if not isinstance(last, ast.Expr) or isinstance(last.value, ast.Yield | ast.YieldFrom | ast.Await):
        return None
    call = isinstance(last.value, ast.Call)
    if call and (_is_print(last) or not silent):
        return None
    raw = code.encode().splitlines(keepends=True)
    start = sum(map(len, raw[: last.lineno - 1])) + last.col_offset
    end = sum(map(len, raw[: last.end_lineno - 1])) + last.end_col_offset
    whole = code.encode()
    return (whole[:start] + b'print(' + whole[start:end] + b')' + whole[end:]).decode()


class _Quiet(ast.NodeTransformer):
    """Takes the prints out of a script, and blocks that hold nothing else; functions stay as they are."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if _is_print(node) else node

    def visit_FunctionDef(self, node: ast.AST) -> ast.AST:
        return node

    visit_ClassDef = visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def generic_visit(self, node: ast.AST) -> ast.AST | None:
        super().generic_visit(node)
        if isinstance(node, _BLOCKS) and not node.body:
            if not isinstance(node, ast.If) or not node.orelse:
                return None
            node.body = [ast.Pass()]
        return node


def _prints(body: Sequence[ast.stmt]) -> list[ast.Expr]:
    """The statements at the top level that print, bare names and the like among them."""
    return [s for s in body if isinstance(s, ast.Expr) and (_is_print(s) or not isinstance(s.value, ast.Call))] + [
        inner
        for s in body
        if isinstance(s, _BLOCKS)
        for inner in ast.walk(s)
        if isinstance(inner, ast.Expr) and _is_print(inner)
    ]


def _is_print(node: ast.Expr) -> bool:
    call = node.value
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == 'print'


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
