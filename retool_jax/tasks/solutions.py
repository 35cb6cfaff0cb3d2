"""Worked solutions in words turned into traces that compute: the cold start's rewriting step, without a large model.

Each equation of a solution (`equations`) becomes one line of Python under the name of what it counts, and where a later
step takes up a result, its name stands for it. What the question says itself stays a number. Equations that do not hold
are left out, and with them whatever builds on their values; the last one must give the answer. The snippet is then run
like any other. After Program of Thoughts (arXiv 2211.12588), whose programs a model wrote.

A step that its author rounded (10 / 3 = 3.33) is not rounded in the snippet, so what follows may come to another number
than in the words; whether it is still the answer is for the value of the last line to say. That line must be the gold
answer as a number, in exact fractions and in what Python prints of it: 18.0 is 18. Where floats alone miss it (0.1 +
0.2), and where the answer is the value rounded to the decimals that it has (money), the snippet prints `round(name,
decimals)`, so that the rounding can be seen in it. `/` is written even where a division leaves no rest: `//` would be
silently wrong in the next problem.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from retool_jax.core.records import Problem
from retool_jax.tasks import equations, expressions
from retool_jax.tasks.arithmetic import Trace
from retool_jax.text.template import wrap_answer

KINDS = ('mental', 'code')  # of arithmetic.TRACE_KINDS those that can be made of a worked solution
NO_EQUATION, WRONG, ASTRAY = 'no equation', 'an equation does not hold', 'does not lead to the answer'
REASONS = (NO_EQUATION, WRONG, ASTRAY)  # why a worked solution cannot be told
_ARITHMETIC = re.compile(r'[-+*/().\d\s]*\d[-+*/().\d\s]*')
_SENTENCE = 4  # words; shorter ones are labels ("Monday:")
_OWN = frozenset(('print', 'round', 'sum', 'min', 'max', 'int', 'float', 'abs', 'result'))
_NUMERALS = {
    'one': 1, 'two': 2, 'twice': 2, 'double': 2, 'doubled': 2, 'doubles': 2, 'half': 2, 'halves': 2, 'pair': 2,
    'couple': 2, 'three': 3, 'thrice': 3, 'triple': 3, 'tripled': 3, 'third': 3, 'thirds': 3, 'four': 4, 'fourth': 4,
    'fourths': 4, 'quarter': 4, 'quarters': 4, 'quadruple': 4, 'five': 5, 'fifth': 5, 'fifths': 5, 'six': 6,
    'sixth': 6, 'seven': 7, 'week': 7, 'weeks': 7, 'weekly': 7, 'eight': 8, 'nine': 9, 'ten': 10, 'tenth': 10,
    'eleven': 11, 'twelve': 12, 'dozen': 12, 'dozens': 12, 'fifteen': 15, 'twenty': 20, 'thirty': 30, 'fifty': 50,
    'hundred': 100,
}  # fmt: skip


class Told(NamedTuple):
    """A worked solution as a snippet, or why it is none."""

    code: str
    printed: str  # what the snippet prints
    reason: str = ''  # one of REASONS where it cannot be told; code and printed are then empty


class _Line(NamedTuple):
    name: str
    right: str
    exact: Fraction
    floats: float  # what Python's own arithmetic makes of it


def trace(problem: Problem, worked: str, kind: str, lead: bool = False) -> Trace | None:
    """The trace of one kind; None where the solution's equations do not lead to the answer.

    'mental' are the words as they stand, 'code' a snippet in their place. With `lead` the snippet comes behind the
    sentences that say what is to be computed and hold no result of it ("To find the cost, first add the two:"), which
    most solutions have none of.
    """
    if kind == 'mental':
        words = ''.join(f'{line}\n' for line in equations.lines(worked))
        return Trace('mental', (('text', words), ('text', wrap_answer(problem.answer))))
    told = tell(problem, worked)
    if told.reason:
        return None
    words = plan(problem, worked) if lead else ''
    before = (('text', words),) if words else ()
    return Trace('code', (*before, ('code', told.code), ('text', wrap_answer(told.printed))))


def snippet(problem: Problem, worked: str) -> tuple[str, str] | None:
    """Python that computes the answer, and what it prints; None where there is none (`tell` says why)."""
    told = tell(problem, worked)
    return None if told.reason else (told.code, told.printed)


def tell(problem: Problem, worked: str) -> Told:
    """The snippet of a worked solution and what it prints, or the reason why there is none."""
    asked, gold = expression(problem), expressions.number(problem.answer)
    if asked is not None:
        code, printed = _said(asked, gold, expressions.value(asked, {}, float), gold)
        return Told(f'print({code})', printed)
    found = equations.read(worked)
    if not found:
        return Told('', '', NO_EQUATION)
    last = _last(found, gold)
    if last is None:
        return Told('', '', WRONG if any(step.value == gold for step in found) else ASTRAY)
    steps, wrong = _right(found[: last + 1])
    if not steps or found[last].value in wrong:
        return Told('', '', WRONG)
    given = _given(problem.question)
    lines = _written(steps, given, {})
    lines = lines and _written(steps, given, _places(steps, lines))
    if lines is None:
        return Told('', '', ASTRAY)
    # 0.6666666666666666 is what a float shows of 2 / 3: with such numbers nothing is exact.
    long = any(len(term.partition('.')[2]) > 12 for step in steps for term in step.expression)
    name, _, exact, floats = lines[-1]
    said = _said(name, exact, floats, gold, Fraction(1, 10**9) if long else Fraction(0))
    if said is None:
        return Told('', '', ASTRAY)
    return Told('\n'.join([*(f'{line.name} = {line.right}' for line in lines), f'print({said[0]})']), said[1])


def plan(problem: Problem, worked: str) -> str:
    """The sentences of a worked solution that stand before its equations and say no number but the question's, a line
    each; '' where there are none."""
    found, given = equations.read(worked), _given(problem.question)
    last = _last(found, expressions.number(problem.answer))
    kept = []
    for step in found[: 0 if last is None else last + 1]:
        sentences = re.split(r'(?<=[.:;!?])\s+', step.before)
        kept += [s for s in sentences if len(s.split()) >= _SENTENCE and _numbers(s) <= given]
    return ''.join(f'{sentence}\n' for sentence in kept)


def in_words(problem: Problem) -> str | None:
    """A worked solution of a problem that is nothing but an expression: its operations, one a line."""
    asked = expression(problem)
    if asked is None:
        return None
    lines: list[str] = []

    def work(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            left, right = work(node.left), work(node.right)
            value = expressions.value(ast.unparse(node), {})
            sign = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/'}[type(node.op)]
            shown = f'({_shown(right)})' if right < 0 else _shown(right)
            lines.append(f'{_shown(left)} {sign} {shown} = {_shown(value)}')
            return value
        return expressions.value(ast.unparse(node), {})

    work(ast.parse(asked, mode='eval').body)
    return '\n'.join(lines)


def expression(problem: Problem) -> str | None:
    """The arithmetic expression that a question asks for, where it holds just one and its value is the answer."""
    found = [text.strip(' .\n') for text in _ARITHMETIC.findall(problem.question)]
    found = [text for text in found if re.search(r'\d\s*[-+*/]', text)]
    gold = expressions.number(problem.answer)
    return found[0] if len(found) == 1 and gold is not None and expressions.value(found[0], {}) == gold else None


def _last(found: Sequence[equations.Step], gold: Fraction | None) -> int | None:
    """The last equation that holds and states the answer."""
    return next((i for i in reversed(range(len(found))) if found[i].holds and found[i].value == gold), None)


def _numbers(text: str) -> set[Fraction]:
    return {expressions.number(said) for said in re.findall(expressions.NUMBER, text)}


def _given(question: str) -> set[Fraction]:
    """The numbers that a question says, in digits or in words."""
    words = re.findall(r'[a-z]+', question.lower())
    return _numbers(question) | {Fraction(_NUMERALS[word]) for word in words if word in _NUMERALS}


def _values(step: equations.Step) -> set[Fraction]:
    return {value for term in step.expression if (value := expressions.number(term)) is not None}


def _right(found: Sequence[equations.Step]) -> tuple[list[equations.Step], set[Fraction]]:
    """The equations that hold and build on none that does not; the values of the others."""
    kept: list[equations.Step] = []
    wrong: set[Fraction] = set()
    for step in found:
        sound = {other.value for other in kept}
        if not step.holds or any(value in wrong and value not in sound for value in _values(step)):
            wrong.add(step.value)
        else:
            kept.append(step)
            wrong.discard(step.value)
    return kept, wrong


def _written(
    steps: Sequence[equations.Step], given: Collection[Fraction], places: Mapping[tuple[int, int], str]
) -> list[_Line] | None:
    """A line for each step; None where a line cannot be computed, because a rounded value is divided by and is 0.

    Args:
      places: step and place in its expression → the name to stand there, whatever the question says.
    """
    lines: list[_Line] = []
    known: dict[Fraction, str] = {}
    rounded: set[Fraction] = set()  # values of results that the snippet does not round
    exact: dict[str, Fraction] = {}
    floats: dict[str, float] = {}
    for number, step in enumerate(steps):
        own = {place: name for (at, place), name in places.items() if at == number}
        right = _linked(step.expression, known, given, rounded, own)
        name = _name(step.counts, exact)
        exact[name], floats[name] = expressions.value(right, exact), expressions.value(right, floats, float)
        if exact[name] is None or floats[name] is None:
            return None
        lines.append(_Line(name, right, exact[name], floats[name]))
        known[step.value] = name
        (rounded.add if exact[name] != step.value else rounded.discard)(step.value)
    return lines


def _places(steps: Sequence[equations.Step], lines: Sequence[_Line]) -> dict[tuple[int, int], str]:
    """Where the results belong that no line takes up, because the question says the same number or another result is
    the same.

    Each goes to one place where its value stands: the first one that is a term of a sum, else the first. Behind
    another result of that value it may only stand beside it.
    """
    used = set(re.findall(r'[^\W\d]\w*', ' '.join(line.right for line in lines)))
    places: dict[tuple[int, int], str] = {}
    for i, (step, line) in enumerate(zip(steps, lines[:-1])):
        if line.name in used:
            continue
        found, again = [], False
        for j in range(i + 1, len(steps)):
            here = [k for k, term in enumerate(steps[j].expression) if expressions.number(term) == step.value]
            here = [k for k in here if (j, k) not in places and not _of_percentage(steps[j].expression, k)]
            found += [(j, k) for k in here if not again or len(here) > 1]
            again = again or steps[j].value == step.value
        sums = [(j, k) for j, k in found if _is_summand(steps[j].expression, k)]
        for place in (sums or found)[:1]:
            places[place] = line.name
    return places


def _is_summand(expression: Sequence[str], place: int) -> bool:
    beside = [*expression[max(place - 1, 0) : place], *expression[place + 1 : place + 2]]
    return '+' in beside or '-' in beside if not {'*', '/', '**'} & set(beside) else False


def _of_percentage(expression: Sequence[str], place: int) -> bool:
    """Whether a number stays one though a result has its value: the 100 of a percentage, its other number where that
    stands in the expression twice, and the 1 of a fraction."""
    term, before, behind = expression[place], expression[:place], expression[place + 1 : place + 3]
    if term == '100' and (before[-1:] == ('/',) or (before[-1:] == ('*',) and '/' in before)):
        return True
    return (behind == ('/', '100') and expression.count(term) > 1) or (term == '1' and behind[:1] == ('/',))


def _linked(
    expression: Sequence[str],
    known: Mapping[Fraction, str],
    given: Collection[Fraction],
    rounded: Collection[Fraction],
    own: Mapping[int, str],
) -> str:
    """An expression in which the names of earlier results stand for their values, and those of `own` at their places.

    What is `given` stays a number. But a rounded value is never written as if it were exact: there the name stands in
    any case, and the answer shows whether rightly.
    """
    terms = []
    for i, term in enumerate(expression):
        value = expressions.number(term)
        linked = value in known and value not in given and not _of_percentage(expression, i)
        terms.append(known[value] if value in rounded or linked else term)
        terms[-1] = own.get(i, terms[-1])
    text = ' '.join(terms).replace('( ', '(').replace(' )', ')')
    text = re.sub(r'(^|\(|[*/+-] )- (?=[\w(])', r'\1-', text)
    return re.sub(r'\(([\w.]+)\)', r'\1', text)  # "2(4)"


def _said(
    name: str, exact: Fraction, found: float, gold: Fraction, slack: Fraction = Fraction(0)
) -> tuple[str, str] | None:
    """What to print of the last result so that it is the gold answer, and what that prints; None where it is not.

    Args:
      slack: how far the exact value may be from the answer.
    """
    right = abs(exact - gold) <= slack
    if right and 'e' not in repr(found) and Fraction(repr(found)) == gold:
        return name, repr(found)
    decimals = next((n for n in range(10) if (gold * 10**n).denominator == 1), None)
    if decimals is None or not (right or (decimals and abs(exact - gold) <= Fraction(1, 2 * 10**decimals))):
        return None
    printed = repr(round(found, decimals) if decimals else round(found))
    if Fraction(printed) != gold:
        return None
    return (f'round({name}, {decimals})' if decimals else f'round({name})'), printed


def _name(counts: str, taken: Collection[str]) -> str:
    """A name that no other result has: goblins, goblins2, goblins3."""
    name = counts if counts.isidentifier() and not keyword.iskeyword(counts) and counts not in _OWN else 'total'
    name, number, base = name, 1, name
    while name in taken:
        number += 1
        name = f'{base}{number}'
    return name


def _shown(value: Fraction) -> str:
    return str(int(value)) if value.denominator == 1 else repr(round(float(value), 6))
