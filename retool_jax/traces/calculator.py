"""The rewriter that needs no model: arithmetic that stands in the words becomes a snippet over named results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from retool_jax.tasks import solutions
from retool_jax.traces import drafts
from retool_jax.traces.drafts import Draft
from retool_jax.traces.intake import Pair, refuse
from retool_jax.traces.verification import Judged

NAME = 'calculator'


def rewrite(pairs: Sequence[Pair]) -> list[Draft | Judged]:
    """A draft of each worked solution whose steps lead to its answer; the others are dropped, with the reason.

    Sentences that say what is to be computed stay in front of the snippet; those that compute are what it replaces.
    """
    found: list[Draft | Judged] = []
    for problem, words in pairs:
        trace = solutions.trace(problem, words, 'code', lead=True)
        if trace is None:
            found.append(refuse(problem, words, 'rewriter', solutions.tell(problem, words).reason, NAME))
        else:
            found.append(dataclasses.replace(drafts.of_parts(problem, trace.parts), rewriter=NAME))
    return found
