"""How a model uses code: the paper's six metrics (P §3.3), self-correction and what snippets are for."""

from __future__ import annotations

import ast
import collections
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence

from retool_jax.core.records import ToolCall, Verdict
from retool_jax.report.runs import Transcript

# Verdicts of snippets that ran and failed through their own fault.
FAILED = (Verdict.ERROR, Verdict.SIGNAL, Verdict.TIMEOUT, Verdict.OOM, Verdict.OUTPUT_LIMIT)
ALIKE = 0.5  # share of common words from which on a later snippet is a revision of an earlier one
LONGEST_CODE = 20_000  # characters; beyond it a snippet is not parsed


@dataclasses.dataclass(frozen=True, slots=True)
class CodeUse:
    """The analysis of one set of answers. None where there was nothing to count."""

    answers: int
    correct: float  # share of right answers
    response_length: float  # mean tokens that the model wrote
    code_ratio: float  # share of answers with code
    code_lines: float  # lines of code per answer, blank ones and comments left out
    correct_codes: int  # snippets of the whole set that ran without a fault
    last_pass_right: float | None  # share of last snippets that ran, among right answers with code
    last_pass_wrong: float | None  # the same among wrong answers
    timing: float | None  # where the first snippet starts, as a share of the answer's characters
    failures: int  # snippets that ran and failed
    repaired: int  # those that a later snippet repaired (see `repairs`)
    repaired_right: int  # those whose answer was then right
    purposes: dict[str, int]  # snippets by purpose (see `purpose`)

    @property
    def self_correction(self) -> float | None:
        """Repaired failures ÷ failures."""
        return self.repaired / self.failures if self.failures else None


def analyse(transcripts: Sequence[Transcript]) -> CodeUse:
    """The metrics of a set of answers; they stand under the same names in the paper.

    Raises: ValueError for an empty set.
    """
    if not transcripts:
        raise ValueError('analysis: no answers; a set must hold at least one')
    n = len(transcripts)
    coded = [t for t in transcripts if t.snippets]
    last = {
        right: [t.snippets[-1].verdict == Verdict.OK for t in coded if t.correct == right] for right in (True, False)
    }
    failures = [(t, call, then) for t in transcripts for call, then in repairs(t.snippets)]
    return CodeUse(
        answers=n,
        correct=sum(t.correct for t in transcripts) / n,
        response_length=sum(t.length for t in transcripts) / n,
        code_ratio=len(coded) / n,
        code_lines=sum(count_lines(call.code) for t in coded for call in t.snippets) / n,
        correct_codes=sum(call.verdict == Verdict.OK for t in coded for call in t.snippets),
        last_pass_right=_mean(last[True]),
        last_pass_wrong=_mean(last[False]),
        timing=_mean([x for x in map(invocation_timing, coded) if x is not None]),
        failures=len(failures),
        repaired=sum(then is not None for _, _, then in failures),
        repaired_right=sum(then is not None and t.correct for t, _, then in failures),
        purposes=dict(collections.Counter(purpose(call.code) for t in coded for call in t.snippets)),
    )


def count_lines(code: str) -> int:
    """Lines of code that are neither blank nor only a comment."""
    return sum(bool(line.strip()) and not line.lstrip().startswith('#') for line in code.splitlines())


def invocation_timing(transcript: Transcript) -> float | None:
    """Where the first `<code>` that was run starts ÷ length of the answer, both in characters, 0 … 1.

    The answer is all that follows the prompt, interpreter output included. None without code.
    """
    answer = [s for s in transcript.segments if s.kind != 'prompt']
    length = sum(len(s.text) for s in answer)
    before = 0
    first = transcript.snippets[0] if transcript.snippets else None
    for segment in answer:
        if segment.kind == 'model' and first is not None:
            inside = segment.text.find(first.code)
            if inside >= 0:
                tag = segment.text.rfind('<code>', 0, inside)
                return (before + (tag if tag >= 0 else inside)) / length
        before += len(segment.text)
    return None


def repairs(snippets: Sequence[ToolCall]) -> Iterator[tuple[ToolCall, ToolCall | None]]:
    """Each failing snippet of one answer, with the one that repaired it or None: self-correction.

    A failing snippet ran and ended in an error, a signal, a time-out, lack of memory or too much output.
    It is repaired by the first later snippet of the same answer that ran without a fault and is a
    revision of it: another text, and of the words, numbers and signs of the two at least half are common
    to both (`alikeness`). A later snippet that passes but does something else repairs nothing.
    """
    for i, call in enumerate(snippets):
        if call.verdict in FAILED:
            yield (
                call,
                next(
                    (
                        then
                        for then in snippets[i + 1 :]
                        if then.verdict == Verdict.OK
                        and then.code != call.code
                        and alikeness(call.code, then.code) >= ALIKE
                    ),
                    None,
                ),
            )


def alikeness(a: str, b: str) -> float:
    """Words, numbers and signs that two snippets share: 2 · common ÷ all of both, 0 … 1 (order is ignored)."""
    first, second = (collections.Counter(re.findall(r'\w+|[^\w\s]', code)) for code in (a, b))
    return 2 * (first & second).total() / max(first.total() + second.total(), 1)


PURPOSES = {
    'verification': 'checks: assert, or prints a comparison',
    'simulation': 'draws random numbers',
    'symbolic': 'computer algebra (sympy)',
    'enumeration': 'goes through cases: loops, comprehensions, itertools, recursion',
    'conversion': 'turns numbers into text or digits and back',
    'library': 'a formula with a function of a library',
    'arithmetic': 'a formula with operators and built-in functions',
    'broken': 'cannot be parsed',
}
_CONVERSIONS = {'str', 'bin', 'hex', 'oct', 'ord', 'chr', 'format', 'join'}
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def purpose(code: str) -> str:
    """What a snippet is for: the first of PURPOSES whose rule its syntax tree meets; nothing is executed.

    verification – an `assert`, or a `print` or last line that is a comparison, `isclose` or `.equals`.
    simulation – imports `random`, `secrets` or `numpy.random`, or uses `np.random`.
    symbolic – imports sympy.
    enumeration – a loop, a comprehension, an import of itertools, or a function that calls itself.
    conversion – calls str, bin, hex, oct, ord, chr, format, join, or int with a base or of a string.
    library – calls a function of an imported module.
    arithmetic – anything else that parses.
    broken – does not parse (or is longer than 20,000 characters).
    """
    tree = _parse(code)
    if tree is None:
        return 'broken'
    nodes = list(ast.walk(tree))
    modules = set(_imports(nodes))
    tops = {name.split('.')[0] for name in modules}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    if any(isinstance(node, ast.Assert) for node in nodes) or any(map(_is_check, _shown(tree, calls))):
        return 'verification'
    if (
        tops & {'random', 'secrets'}
        or 'numpy.random' in modules
        or any(isinstance(node, ast.Attribute) and node.attr == 'random' for node in nodes)
    ):
        return 'simulation'
    if 'sympy' in tops:
        return 'symbolic'
    if 'itertools' in tops or any(isinstance(node, _LOOPS) for node in nodes) or _recurses(nodes):
        return 'enumeration'
    if any(map(_converts, calls)):
        return 'conversion'
    return 'library' if _calls_import(nodes, calls) else 'arithmetic'


def _parse(code: str) -> ast.Module | None:
    if len(code) > LONGEST_CODE:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # code that a model wrote: invalid escapes and the like
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ''
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _shown(tree: ast.Module, calls: Iterable[ast.Call]) -> list[ast.expr]:
    """What a snippet prints, and its last line where that is an expression."""
    shown = [argument for call in calls if _name(call) == 'print' for argument in call.args]
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        shown.append(tree.body[-1].value)
    return shown


def _is_check(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return any(map(_is_check, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return True
    return isinstance(node, ast.Compare) or (
        isinstance(node, ast.Call) and _name(node) in ('isclose', 'allclose', 'equals', 'array_equal')
    )


def _recurses(nodes: Iterable[ast.AST]) -> bool:
    return any(
        isinstance(node, ast.FunctionDef)
        and any(isinstance(inner, ast.Call) and _name(inner) == node.name for inner in ast.walk(node))
        for node in nodes
    )


def _converts(call: ast.Call) -> bool:
    if _name(call) != 'int':
        return _name(call) in _CONVERSIONS
    return len(call.args) > 1 or any(isinstance(a, ast.Constant) and isinstance(a.value, str) for a in call.args)


def _calls_import(nodes: Iterable[ast.AST], calls: Iterable[ast.Call]) -> bool:
    names = {
        alias.asname or alias.name.split('.')[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for call in calls:
        function = call.func
        while isinstance(function, ast.Attribute):
            function = function.value
        if isinstance(function, ast.Name) and function.id in names:
            return True
    return False


def _name(call: ast.Call) -> str:
    """The last part of the called name, '' where there is none."""
    return getattr(call.func, 'id', None) or getattr(call.func, 'attr', '')


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
