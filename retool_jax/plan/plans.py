"""Plans of one configuration with some of its keys changed; what is known of a program is found out once."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from retool_jax.core import console
from retool_jax.model.config import ModelConfig
from retool_jax.plan import dcn, engines, facts, guess, page
from retool_jax.plan.chips import Slice
from retool_jax.plan.facts import Facts
from retool_jax.plan.programs import Program, Run
from retool_jax.stages.config import Reinforcement

type Keys = dict[str, Any]  # dotted keys of the configuration → values


def changed(stage: Reinforcement, keys: Keys) -> Reinforcement:
    """The stage with such values.

    Raises: UserError for a value that its block refuses.
    """
    for key, value in keys.items():
        block, _, name = key.partition('.')
        stage = dataclasses.replace(stage, **{block: dataclasses.replace(getattr(stage, block), **{name: value})})
    return stage


def known_by(run: Run, program: Program) -> tuple:
    """What facts of a program follow from, of all that a search changes."""
    forward, sampler = run.learner.forward, run.sampler.settings
    follows = {
        'score': (forward.micro_rows,),
        'update': (forward.micro_rows, forward.remat),
        'extend': (sampler.feed_rows, sampler.rows, sampler.decode_rows),
        'decode': (sampler.quota, sampler.rows, sampler.decode_rows),
    }
    return (program.name, *run.mesh.shape.values(), *follows.get(program.name.partition(' ')[0], ()))


class Plans:
    """Of one model on one slice; stages differ in the keys of `known_by`, and in ppo.offload."""

    def __init__(self, model: ModelConfig, slice: Slice, tokens: int | None, process_chips: int = 0):
        """tokens: of an episode in the mean, as `engines.assume` takes them; process_chips: as `Run` takes them."""
        self.model, self.slice, self.tokens, self.process_chips = model, slice, tokens, process_chips
        self.found: dict[tuple, Facts] = {}
        self.guessed: dict[tuple, Facts] = {}

    def make(self, stage: Reinforcement) -> dict:
        """The plan: its programs compiled where the slice has devices, else estimated.

        Raises: UserError naming the key, or what does not divide.
        """
        run = Run(stage, self.model, self.slice, self.process_chips)
        assumptions = engines.assume(run, self.tokens)  # before minutes of compiling
        programs, began = {known_by(run, program): program for program in run.programs()}, time.perf_counter()
        todo = {key: program for key, program in programs.items() if key not in self.found}
        if self.slice.devices:
            with console.progress(f'{self.slice.name}: compiling', len(todo)) as advance:
                self.found |= zip(todo, facts.compile_all(list(todo.values()), advance))
        else:
            self.found |= {key: guess.estimate(run, program) for key, program in todo.items()}
        found = [dcn.add(run, self.found[key]) for key in programs]
        return page.make(run, found, assumptions, time.perf_counter() - began, time.process_time())

    def guess(self, stage: Reinforcement, ends: tuple[int, int] | None = None) -> dict:
        """The plan from shapes alone.

        ends: numbers of sampler.rows around this stage's, of which plans were guessed before. What extend and decode
        do, move and send grows by the row, so that it need not be traced again. Raises: as `make`.
        """
        run = Run(stage, self.model, self.slice, self.process_chips)
        found = []
        for program in run.programs():
            key = known_by(run, program)
            if key not in self.guessed:
                self.guessed[key] = (
                    self._between(key, *ends)
                    if ends and program.name in ('extend', 'decode')
                    else guess.estimate(run, program)
                )
            found.append(dcn.add(run, self.guessed[key]))
        return page.make(run, found, engines.assume(run, self.tokens))

    def _between(self, key: tuple, fewest: int, most: int) -> Facts:
        """Of extend or decode, whose key ends in rows and decode_rows."""
        *rest, rows, decode_rows = key
        few, many = (self.guessed[*rest, end, decode_rows] for end in (fewest, most))
        return between(few, many, (rows - fewest) / (most - fewest))


def between(few: Facts, many: Facts, share: float) -> Facts:
    """What lies at `share` of the way from one to the other."""
    mix = lambda a, b: a + share * (b - a)
    values = {n: mix(getattr(few, n), getattr(many, n)) for n in ('flops', 'moved', 'slot_flops', 'slot_moved')}
    values |= {n: round(mix(getattr(few, n), getattr(many, n))) for n in ('arguments', 'temporaries')}
    return dataclasses.replace(few, **values, sent={kind: mix(n, many.sent[kind]) for kind, n in few.sent.items()})
