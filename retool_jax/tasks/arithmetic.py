"""The embedded task: computation problems in plain words, and the traces a cold start is made of.

Everything comes from a seed. Held-out operands are a tenth of all operand tuples, chosen by a hash of
family and operands, so that no seed can train on them.
"""

from __future__ import annotations

import dataclasses
import random
import re
import zlib

from retool_jax.core.records import Problem
from retool_jax.tasks.families import FAMILIES, Family, Operands
from retool_jax.text.template import wrap_answer

SPLITS = ('train', 'new_operands', 'new_wording', 'larger_range')
TRACE_KINDS = ('mental', 'direct', 'code', 'repair')

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A worked solution; the interpreter's output belongs after every 'code' part and is not in it."""

    kind: str  # one of TRACE_KINDS
    parts: tuple[tuple[str, str], ...]  # ('text', words as the model writes them) or ('code', bare Python)


def held_out(family: Family, operands: Operands) -> bool:
    """Whether these operands are among the tenth that is never trained on; blind to swapped operands."""
    key = operands if family.ordered else tuple(sorted(operands))
    return zlib.crc32(f'{family.name}:{key}'.encode()) % 10 == 0


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` problems of a split, families in turn; a shorter list of the same seed is a prefix.

    'train' and 'new_wording' use operands of the training side, 'new_operands' those held out, and
    'larger_range' operands beyond the training range (in the training wordings).

    Raises:
      ValueError: no such split, or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}: take one of {", ".join(SPLITS)}')
    if count < 0:
        raise ValueError(f'count is {count}: take 0 or more')
    rng = random.Random(f'{split}/{seed}')
    seen: set[str] = set()
    out: list[Problem] = []
    for index in range(count):
        family = FAMILIES[index % len(FAMILIES)]
        for _ in range(20):  # repeats are avoided while the family still has fresh questions
            operands = _draw(family, split, rng)
            wording = family.held_out_wording if split == 'new_wording' else rng.choice(family.wordings)
            question = wording.format(**dict(zip('abc', operands)))
            if question not in seen:
                break
        seen.add(question)
        name = f'{index:06d}-{family.name}-' + '-'.join(map(str, operands))
        answer = str(family.solve(*operands))
        out.append(Problem(name, question, answer, f'arithmetic/{split}', family.name))
    return out


def _draw(family: Family, split: str, rng: random.Random) -> Operands:
    while True:
        operands = family.sample(rng, split == 'larger_range')
        if split == 'larger_range' or held_out(family, operands) == (split == 'new_operands'):
            return operands


def operands_of(problem: Problem) -> Operands:
    """The integers of a problem of this task, read from its id. Raises: ValueError for another task's."""
    match = re.fullmatch(rf'\d+-{problem.family}-(\d+(?:-\d+)*)', problem.id)
    if problem.family not in BY_NAME or match is None:
        raise ValueError(f'problem {problem.id!r} is not of the arithmetic task: traces exist for those only')
    return tuple(map(int, match[1].split('-')))


def trace(problem: Problem, kind: str, seed: int) -> Trace:
    """A right solution of one kind: worked in the head, said at once, by a snippet, or by a failing one put right.

    Raises:
      ValueError: no such kind, or a problem of another task.
    """
    family, operands = BY_NAME.get(problem.family), operands_of(problem)
    work = Trace(
        'mental',
        (
            ('text', family.lead + '\n'),
            ('text', family.worked(*operands) + '\n'),
            ('text', wrap_answer(problem.answer)),
        ),
    )
    if kind == 'mental':
        return work
    if kind == 'direct':
        lead, _calculation, conclusion = work.parts
        return Trace('direct', (lead, conclusion))
    if kind == 'code':
        return rewrite(work, problem)
    if kind == 'repair':
        right = rewrite(work, problem)
        lead, code, conclusion = right.parts
        slip = random.Random(f'{problem.id}/{seed}').choice(family.slips)
        failing = slip.spoil(operands, code[1])
        return Trace('repair', (lead, ('code', failing), ('text', slip.remark + '\n'), code, conclusion))
    raise ValueError(f'trace kind is {kind!r}: take one of {", ".join(TRACE_KINDS)}')


def shows_work(problem: Problem, answer: str) -> bool:
    """Whether an answer to a problem of this task says anything between its lead and its conclusion."""
    return answer.partition('<answer>')[0].strip() != BY_NAME[problem.family].lead


def rewrite(text_trace: Trace, problem: Problem) -> Trace:
    """The cold start's rewriting step: the manual calculation gives way to a snippet, all else stays."""
    (lead, _manual, conclusion), family = text_trace.parts, BY_NAME[problem.family]
    return Trace('code', (lead, ('code', family.code(*operands_of(problem))), conclusion))
