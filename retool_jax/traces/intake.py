"""Text traces on their way to a rewriter, and the first verification: that a trace says the gold answer itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from retool_jax.core.records import Problem
from retool_jax.tasks import answers
from retool_jax.traces.drafts import Draft
from retool_jax.traces.verification import Equal, Judged

type Pair = tuple[Problem, str]

_MARKED = re.compile(r'^[ \t]*####[ \t]*(\S[^\n]*)', re.MULTILINE)
_SAID = re.compile(r'\banswer\s*(?:is|:|=)\s*(?:\*\*|\$|:|\s)*([^\n]*?[^\s.*$])[\s.*$]*(?:\n|\Z)', re.IGNORECASE)


def stated(words: str) -> str | None:
    """The answer that a text trace says: its last box, what stands behind ####, or behind 'the answer is' in one of the
    last lines; None where it says none."""
    box = answers.last_box(words)
    if box is not None:
        return box
    if marked := _MARKED.findall(words):
        return marked[-1].strip()
    said = _SAID.findall('\n'.join(words.strip().splitlines()[-3:]))
    return said[-1].strip() if said else None


def verify(pairs: Sequence[Pair], equal: Equal) -> tuple[list[Pair], list[Judged]]:
    """The traces whose own answer is the gold answer, or that say none; and those dropped."""
    kept, dropped = [], []
    for problem, words in pairs:
        said = stated(words)
        if said is None or equal(said, problem.answer):
            kept.append((problem, words))
        else:
            dropped.append(
                refuse(problem, words, 'trace', f'it says {said[:80]!r}, the gold answer is {problem.answer!r}')
            )
    return kept, dropped


def refuse(problem: Problem, words: str, reason: str, detail: str, rewriter: str = '', candidate: int = 0) -> Judged:
    """A text trace that goes no further."""
    return Judged(Draft(problem, (words,), (), rewriter=rewriter, candidate=candidate), reason, detail)
