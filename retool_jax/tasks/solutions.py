"""Worked solutions in words turned into traces that compute: the cold start's rewriting step, without a large model.

A step is an equation of numbers in a line ("200*0.75=150 goblins"). Each becomes one line of Python under the name of
what it counts, and where a later step takes up a result, its name stands for it. The equations must hold and the last
one must give the answer; the snippet is then run like any other. After Program of Thoughts (arXiv 2211.12588), whose
programs a model wrote.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import operator
import re
from collections.abc import Sequence

from retool_jax.core.records import Problem
from retool_jax.tasks.arithmetic import Trace
from retool_jax.text.template import wrap_answer

KINDS = ('mental', 'code')  # of arithmetic.TRACE_KINDS those that can be made of a worked solution
_LONGEST = 12  # numbers, operators and brackets on the left side of an equation
_WORDS = 4  # that may stand between two of them: "116 pages x 1/4"
_TOKEN = re.compile(r'(?P<number>\d[\d,]*\.?\d*|\.\d+)|(?P<sign>[-+*/×÷()])|(?P<times>\bx\b)|(?P<percent>%)'
                    r'|(?P<word>[^\W\d]+)|(?P<money>[$€£¥])|(?P<end>\S)')  # fmt: skip
_RESULT = re.compile(r'\s*(?:[$€£¥]\s*)?(-?\d[\d,]*\.?\d*|-?\.\d+)')
_ARITHMETIC = re.compile(r'[-+*/().\d\s]*\d[-+*/().\d\s]*')
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_COUNTS_NOTHING = re.compile(
    r'an?|and|are|as|at|because|but|by|each|from|has|have|her?|his|in|is|it|more|less|of|on|or|per|she|so|than|that|the|'
    r'their|then|there|they|this|to|was|were|will|with|total'
)
_OWN = frozenset(('print', 'round', 'sum', 'min', 'max', 'int', 'float', 'abs', 'result'))


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation of a worked solution."""

    expression: tuple[str, ...]  # numbers, operators and brackets of Python
    value: float
    counts: str  # what the result counts, a word in small letters; '' where none is said


def trace(problem: Problem, worked: str, kind: str) -> Trace | None:
    """The trace of one kind; None where the solution's equations do not lead to the answer.

    'mental' are the words as they stand, 'code' a snippet in their place.
    """
    if kind == 'mental':
        lines = ''.join(f'{line}\n' for line in _lines(worked))
        return Trace('mental', (('text', lines), ('text', wrap_answer(problem.answer))))
    code = snippet(problem, worked)
    if code is None:
        return None
    return Trace('code', (('code', code[0]), ('text', wrap_answer(code[1]))))


def snippet(problem: Problem, worked: str) -> tuple[str, str] | None:
    """Python that computes the answer, and what it prints; None where there is none."""
    asked = expression(problem)
    if asked is not None:
        return f'print({asked})', repr(_value(asked))
    found = steps(worked)
    gold = _number(problem.answer)
    last = next((i for i in reversed(range(len(found))) if gold is not None and _close(found[i].value, gold)), None)
    if last is None:
        return None
    given, known, lines = set(map(_number, re.findall(r'\d[\d,]*\.?\d*', problem.question))), {}, []
    for step in found[: last + 1]:
        terms = [known.get(_number(t), t) if _number(t) not in (None, *given) else t for t in step.expression]
        name = _name(step.counts, known.values())
        lines.append(f'{name} = {" ".join(terms).replace("( ", "(").replace(" )", ")")}')
        known[step.value] = name
    code = '\n'.join([*lines, f'print({name})'])
    names: dict[str, float] = {}
    for line in lines:
        name, _, right = line.partition(' = ')
        names[name] = _value(right, names)
    return (code, repr(names[name])) if _close(names[name], gold) else None


def in_words(problem: Problem) -> str | None:
    """A worked solution of a problem that is nothing but an expression: its operations, one a line."""
    asked = expression(problem)
    if asked is None:
        return None
    lines: list[str] = []

    def work(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            left, right = work(node.left), work(node.right)
            value = _OPERATORS[type(node.op)](left, right)
            sign = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/'}[type(node.op)]
            shown = f'({_shown(right)})' if right < 0 else _shown(right)
            lines.append(f'{_shown(left)} {sign} {shown} = {_shown(value)}')
            return value
        return _value(ast.unparse(node))

    work(ast.parse(asked, mode='eval').body)
    return '\n'.join(lines)


def expression(problem: Problem) -> str | None:
    """The arithmetic expression that a question asks for, where it holds just one and its value is the answer."""
    found = [text.strip(' .\n') for text in _ARITHMETIC.findall(problem.question)]
    found = [text for text in found if re.search(r'\d\s*[-+*/]', text)]
    gold = _number(problem.answer)
    if len(found) != 1 or gold is None:
        return None
    value = _value(found[0])
    return found[0] if value is not None and _close(value, gold) else None


def steps(worked: str) -> list[Step]:
    """The equations of a worked solution that hold, in their order."""
    return [step for line in _lines(worked) for step in _steps_of(line)]


def _lines(worked: str) -> list[str]:
    return [line.strip() for line in worked.splitlines() if line.strip() and not line.startswith('####')]


def _steps_of(line: str) -> list[Step]:
    made = []
    for equals in re.finditer('=', line):
        right = _RESULT.match(line, equals.end())
        left = _left(line[: equals.start()])
        if not right or not left:
            continue
        value = _number(right[1])
        if line.startswith('%', right.end()):  # "124 / 248 * 100% = 50%": the share is counted in hundredths already
            left = ' '.join(left).replace('* 100 / 100', '* 100').split()
        for start in range(len(left)):  # the longest side that holds; what stands before it is of the sentence
            side = left[start:]
            found = _value(' '.join(side))
            if found is not None and len(side) > 1 and _close(found, value):
                made.append(Step(tuple(side), value, _counts(line, right)))
                break
    return made


def _left(text: str) -> list[str]:
    """Numbers and operators at the end of a text, as Python writes them; words of units between them are left out."""
    found: list[str] = []
    words = 0
    for token in reversed(list(_TOKEN.finditer(text))):
        kind, said = token.lastgroup, token[0]
        if kind == 'end' or len(found) >= _LONGEST:
            break
        if kind == 'word':
            words += 1
            if words > _WORDS:
                break
            continue
        if kind == 'money':
            continue
        if kind == 'number':
            if found and (found[0][0].isdigit() or found[0] == '('):  # two numbers side by side: another clause
                break
            said = said.replace(',', '').rstrip('.')
            if said.lstrip('0') != said and '.' not in said:
                said = said.lstrip('0') or '0'
        words = 0
        if kind == 'percent':
            found[:0] = ['/', '100']
        else:
            found.insert(0, {'×': '*', '÷': '/', 'x': '*'}.get(said, said))
    # A rate ("40 meters/minute") leaves an operator without its right side.
    kept = [t for i, t in enumerate(found) if not (t in '*/' and (i + 1 == len(found) or found[i + 1] in '*/+)'))]
    return kept


def _counts(line: str, result: re.Match[str]) -> str:
    """What the result of an equation counts: the word behind it, or behind the same number before the equation."""
    place = result.end()
    for start in (place, *(m.end() for m in re.finditer(rf'(?<![\d.]){re.escape(result[1])}(?![\d.])', line[:place]))):
        word = re.match(r'\s*(?:more |fewer |total |first |extra )?([A-Za-z]+)', line[start:])
        if word and not _COUNTS_NOTHING.fullmatch(word[1].lower()) and len(word[1]) > 1:
            return word[1].lower()
    return 'money' if re.search(r'[$€£¥]', line) else ''


def _name(counts: str, taken: Sequence[str]) -> str:
    """A name that no other result has: goblins, goblins2, goblins3."""
    name = counts if counts.isidentifier() and not keyword.iskeyword(counts) and counts not in _OWN else 'total'
    name, number, base = name, 1, name
    while name in taken:
        number += 1
        name = f'{base}{number}'
    return name


def _value(text: str, names: dict[str, float] | None = None) -> float | None:
    """The value of an expression of numbers, + - * / and brackets, computed as Python would; None for anything else."""
    try:
        return _walk(ast.parse(text, mode='eval').body, names or {})
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, KeyError):
        return None


def _walk(node: ast.expr, names: dict[str, float]) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_walk(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_walk(node.left, names), _walk(node.right, names))
    raise ValueError(ast.dump(node))


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(',', ''))
    except ValueError:
        return None
    return int(value) if value.is_integer() else value


def _shown(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(round(value, 6))


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))
