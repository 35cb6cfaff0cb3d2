"""Gold answers of traces: which are the trace's own last box, and those that a problem file knows better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import files, schemas


def own(rewritten: Iterable[tuple[Problem, str]], path: str | Path) -> set[str]:
    """Ids of the traces of a file whose gold answer is what the trace itself says last.

    Such a gold answer verifies nothing: the trace is right by definition. They are the rows in which no field but the
    trace holds an answer.
    """
    bare = set()
    for where, row in files.read_rows(Path(path)):
        try:
            if not schemas.has_gold(row):
                bare.add(_asked(schemas.read_problem(row, where, '', '').question))
        except UserError:  # a row that the reader has left out
            continue
    return {problem.id for problem, _ in rewritten if _asked(problem.question) in bare}


def join(
    rewritten: Sequence[tuple[Problem, str]],
    ids: set[str],
    golds: Iterable[Problem],
) -> tuple[list[tuple[Problem, str]], set[str]]:
    """Gives the traces named by `ids` the answers that `golds` has for their questions.

    Returns all traces, and those of `ids` that have no answer still. Questions that differ in spacing alone are one;
    a question with two answers in `golds` has none.
    Raises: UserError where no question of `golds` is asked by any of these traces.
    """
    known: dict[str, set[str]] = {}
    for problem in golds:
        known.setdefault(_asked(problem.question), set()).add(problem.answer)
    sure = {question: answers.pop() for question, answers in known.items() if len(answers) == 1}
    joined, left = [], set()
    for problem, text in rewritten:
        if problem.id in ids and (gold := sure.get(_asked(problem.question))) is None:
            left.add(problem.id)
        elif problem.id in ids:
            problem = Problem(problem.id, problem.question, gold, problem.source, problem.family)
        joined.append((problem, text))
    if ids and left == ids:
        raise UserError(
            'golds: no question of this file is that of a trace without a gold answer of its own; name the '
            'problem file that the traces were written for'
        )
    return joined, left


def _asked(question: str) -> str:
    return ' '.join(question.split())
