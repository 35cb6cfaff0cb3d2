"""What the demo's models learn and are scored on: the embedded task, or problems that others wrote.

A task says which drafts a cold start is made from, which problems RL asks and which sets are held out. `open_task`
chooses by `data.sources`.
"""

from __future__ import annotations

import dataclasses
import random
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Problem
from retool_jax.stages import cold_start
from retool_jax.stages.demo_config import Demo
from retool_jax.stages.intake import Intake
from retool_jax.tasks import answers, arithmetic, gym, stream
from retool_jax.tasks.grader import Grader
from retool_jax.traces.drafts import Draft
from retool_jax.train.sources import Problems

HEADLINE = 'new_numbers'  # of templates that are trained on
RL_SEED = 1_000_003  # added to run.seed: RL asks other embedded problems than the cold start


class Task(Protocol):
    """What a story is about."""

    bases: Mapping[str, bool]  # how the model is scored before it has learnt anything: name → with the interpreter
    everywhere: bool  # every model is scored on every set; else some on the headline set alone
    worked: tuple[str, ...]  # generators that the cold start is made from
    held_out: dict[str, list[Problem]]  # set → its problems, the headline set first

    def drafts(self, tools: bool) -> list[Draft]:
        """Traces before their snippets are run, of the model with or without the interpreter."""
        ...

    def equal(self, answer: str, gold: str) -> bool | None:
        """Judges the answers of traces."""
        ...

    def lead(self, traces: Sequence[Episode], decode: Callable[[Sequence[int]], str]) -> list[Episode]:
        """The easiest traces, which fine-tuning may begin with."""
        ...

    def asked(self, count: int) -> Problems:
        """Problems of RL, at least `count` of them."""
        ...

    def needs_tool(self, problem: Problem) -> bool:
        """Whether a problem is beyond mental arithmetic."""
        ...

    def facts(self) -> dict[str, int]:
        """What summary.json says of the data."""
        ...


class Embedded:
    """The embedded task with its own tiny model."""

    bases: Mapping[str, bool] = types.MappingProxyType({'base': True})
    everywhere = False
    worked = ()
    equal = staticmethod(answers.equal_at_sight)

    def __init__(self, stage: Demo):
        self.recipe, self.mix, self.text, self.seed = stage.recipe, stage.mix, stage.text, stage.run.seed
        sizes = {'new_operands': self.recipe.problems} | dict.fromkeys(
            ('new_wording', 'larger_range'), self.recipe.apart_problems
        )
        self.held_out = {split: arithmetic.problems(split, count, seed=self.seed + 7) for split, count in sizes.items()}

    def drafts(self, tools: bool) -> list[Draft]:
        if tools:
            return cold_start.draw(
                arithmetic.problems('train', self.recipe.problems_seen, self.seed), self.mix, self.seed
            )
        rng = random.Random(f'text-only/{self.seed}')
        asked = [
            problem
            for problem in arithmetic.problems('train', 4 * self.recipe.problems_seen, self.seed)
            if not self.needs_tool(problem) or rng.random() < self.text.needy
        ]
        return cold_start.draw(asked, self.text.mix, self.seed)

    def lead(self, traces: Sequence[Episode], decode: Callable[[Sequence[int]], str]) -> list[Episode]:
        # Digits of long mental arithmetic, and those of answers said at once, look random to such a model and drown
        # what it can learn, to copy operands: it starts with traces that need nothing else.
        worked = lambda trace: arithmetic.shows_work(trace.problem, decode(trace.tokens[trace.prompt_length :]))
        return [trace for trace in traces if trace.calls or (not self.needs_tool(trace.problem) and worked(trace))]

    def asked(self, count: int) -> Problems:
        return arithmetic.problems('train', count, seed=self.seed + RL_SEED)

    def needs_tool(self, problem: Problem) -> bool:
        return not arithmetic.BY_NAME[problem.family].mental

    def facts(self) -> dict[str, int]:
        return {}


@dataclasses.dataclass(frozen=True)
class Behind:
    """A stream of problems without its first ones."""

    problems: Problems
    first: int

    def __getitem__(self, index: int) -> Problem:
        return self.problems[self.first + index]


class Generated:
    """Problems of generators, and files beside them in evaluation, with a model that others trained.

    run.seed orders the training problems. The first `recipe.problems_seen` of the order with a worked solution make the
    cold start, and RL asks those behind them.
    """

    bases: Mapping[str, bool] = types.MappingProxyType({'base': False, 'base_tool': True})
    everywhere = True

    def __init__(self, stage: Demo, grader: Grader):
        """Makes all problems, those of the held-out sets too.

        Raises:
          UserError: a held-out question is trained on, or what a source refuses.
        """
        self.recipe, self.mix, self.text, self.seed = stage.recipe, stage.mix, stage.text, stage.run.seed
        self.equal: Callable[[str, str], bool | None] = grader.equal
        intake, told = Intake(stage.reward.unreadable, grader.parses), {}
        sets = {HEADLINE: stage.held_out.headline} | dict(stage.held_out.apart)
        limits = dict.fromkeys(sets, self.recipe.apart_problems) | {HEADLINE: self.recipe.problems}
        with gym.maker() as child:  # its library takes seconds to load
            datasets = intake.open(stage.data.sources, child)
            for source in stage.data.sources:
                told |= {problem.question: words for problem, words in gym.worked(source, child=child)}
            self.held_out = {name: intake.read(source, limits[name], child) for name, source in sets.items() if source}
        order = stream.stream(datasets, list(stage.data.weights) or None, self.seed)
        self.pairs: list[tuple[Problem, str]] = []
        drawn = 0
        while len(self.pairs) < self.recipe.problems_seen and drawn < sum(map(len, datasets)):
            problem = order[drawn]
            drawn += 1
            if problem.question in told:
                self.pairs.append((problem, told[problem.question]))
        self.order, self.worked = Behind(order, drawn), stage.data.sources
        training = {problem.question for dataset in datasets for problem in stream.once(dataset)}
        shared = [p for problems in self.held_out.values() for p in problems if p.question in training]
        if shared:
            raise UserError(
                f'held_out: {len(shared)} questions are trained on too, the first {shared[0].id!r}: give '
                'data.sources and held_out the same parameters'
            )
        self.counts = {
            'training_questions': len(training),
            'held_out_questions': sum(map(len, self.held_out.values())),
            'held_out_in_training': len(shared),
        }

    def drafts(self, tools: bool) -> list[Draft]:
        return cold_start.retell(self.pairs, self.mix if tools else self.text.mix, self.seed)

    def lead(self, traces: Sequence[Episode], decode: Callable[[Sequence[int]], str]) -> list[Episode]:
        return list(traces)

    def asked(self, count: int) -> Problems:
        return self.order

    def needs_tool(self, problem: Problem) -> bool:
        return True

    def facts(self) -> dict[str, int]:
        return self.counts


def open_task(stage: Demo, grader: Grader) -> Task:
    """The task of a demo's configuration, its problems made."""
    return Generated(stage, grader) if stage.data.sources else Embedded(stage)
