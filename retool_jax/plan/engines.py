"""What an RL step's rollout takes: the slowest engines' course, priced by what their calls read."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from retool_jax.plan import lengths, roofline
from retool_jax.plan.facts import Facts
from retool_jax.plan.programs import Run
from retool_jax.plan.roofline import Assumptions
from retool_jax.rollout.scheduler import QUANTUM_S

USUAL = 6144  # tokens of an episode where nobody says: the paper's are 10,400 falling to 2,400
SHARE = 3 / 8  # of the budget, where that is less


@dataclasses.dataclass(frozen=True)
class Part:
    """All runs of one program in a step, seconds."""

    runs: float
    compute: float
    memory: float
    links: float
    waits: float  # of collectives
    total: float

    def one(self) -> dict:
        """The mean run, as JSON types; `bound` names its slowest resource."""
        mean = {name: getattr(self, name) / self.runs for name in ('compute', 'memory', 'links', 'waits', 'total')}
        return mean | {'bound': max(roofline.RESOURCES, key=mean.get)}


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A step's rollout on those engines, side by side in one program, that take longest."""

    engines: int
    abreast: int  # engines of a program
    episodes: int  # that these work on
    rows: int  # of theirs that decode at a time
    mean: float  # tokens of an episode of the step
    longest: int  # of them
    budget: int  # at which they are cut
    calls: int  # of tools, by an episode
    quanta: int  # decode calls that an episode gets in the step; 0: all that it takes
    ended: float  # episodes of all engines that end in the step, and are trained on
    steps: int  # of decoding
    busy: float  # share of its row-steps in which a row writes
    live: float  # slots of a row that hold tokens at a step, averaged over rows with and without an episode
    read: float  # slots of a row that a step reads
    decode: Part
    extend: Part

    @property
    def seconds(self) -> float:
        return self.decode.total + self.extend.total


def assume(run: Run, tokens: int | None) -> Assumptions:
    """The assumptions of a plan with episodes of so many tokens in the mean, None: `USUAL`, or `SHARE` of a smaller
    budget.

    Raises: UserError for a mean that the budget does not allow.
    """
    a = Assumptions(tokens=min(USUAL, int(SHARE * run.turns.max_tokens)) if tokens is None else tokens)
    _draw(run, a)
    return a


def _draw(run: Run, a: Assumptions) -> np.ndarray:
    return lengths.draw(run.sizes.problems_per_step * run.sizes.samples, a.tokens, a.sigma, run.turns.max_tokens)


def simulate(run: Run, facts: Sequence[Facts], a: Assumptions) -> Rollout:
    """The rollout of a step.

    Requests are dealt in runs of whole problems, as by rollout/hosts.part, to the engines of a program. These fill
    their rows from one queue, and a call reads as far as the longest row of all of them wants it.
    """
    s, sampler, sizes = run.sampler.settings, run.sampler, run.sizes
    prices = Prices(run, facts, a)
    usual = sampler.bound(a.tokens + s.quota)
    stretches = min(a.feeds, run.turns.max_calls + 1, run.turns.max_turns) if run.tools else 1
    engine = lengths.Engine(
        rows=sampler.decode_rows * run.abreast,
        call=prices.steps(usual, usual),
        stretches=stretches,
        samples=sizes.samples,
        chunk=s.chunk,
        feed_rows=s.feed_rows * run.abreast,
        quanta=sizes.quanta,
    )
    tokens_E, programs = _draw(run, a), -(-run.engines // run.abreast)
    flight = lengths.in_flight(tokens_E, engine)
    ends = [sizes.problems_per_step * p // programs for p in range(programs + 1)]
    found = []
    for first, last in itertools.pairwise(ends):
        if first == last:  # more programs than problems
            continue
        own = flight.part(first, last)
        course = lengths.follow(own, engine, s.quota, prices.decode.tile or 1)
        decode, read = prices.decoding(course, engine.call)
        row_steps = course.steps * engine.rows
        found.append(
            Rollout(
                engines=run.engines,
                abreast=run.abreast,
                episodes=len(own.tokens_E),
                rows=engine.rows,
                mean=float(tokens_E.mean()),
                longest=int(tokens_E.max()),
                budget=run.turns.max_tokens,
                calls=stretches - 1,
                quanta=sizes.quanta,
                ended=flight.ended * sizes.samples,
                steps=course.steps,
                busy=course.tokens / row_steps,
                live=float((course.live_P * course.steps_P).sum() / row_steps),
                read=read,
                decode=decode,
                extend=prices.extending(course),
            )
        )
    return max(found, key=lambda rollout: rollout.seconds)


class Prices:
    """Seconds of the calls of engines side by side, by the slots of a row that they read."""

    def __init__(self, run: Run, facts: Sequence[Facts], a: Assumptions):
        self.run = run
        self.decode, self.extend = (next(f for f in facts if f.name == name) for name in ('decode', 'extend'))
        # How long a call may be while tools are waited for (rollout/scheduler.py: `_steps`).
        self.short = run.tools and not run.sizes.quanta and not run.lockstep
        bandwidth, copied = run.slice.chip.hbm_bandwidth * a.memory, not run.sampler.chooses
        # A copy is read and written. Where a call takes some rows only, the program's own facts hold it.
        self.copy = functools.cache(lambda bound: 2 * run.copied(bound) / bandwidth if copied else 0.0)
        self.of_decode = functools.cache(lambda read: roofline.seconds(self.decode.at(read), run.slice.chip, a))
        self.of_extend = functools.cache(lambda bound: roofline.seconds(self.extend.at(bound), run.slice.chip, a))

    def steps(self, read: int, bound: int) -> int:
        """Steps of a decode call."""
        quota = self.run.sampler.settings.quota
        if not self.short:
            return quota
        step_s = self.of_decode(read).total / quota
        return max(1, min(quota, int((QUANTUM_S - self.copy(bound)) / step_s)))

    def decoding(self, course: lengths.Course, call: int) -> tuple[Part, float]:
        """All decode calls of a course, and how many slots of a row a step reads in the mean."""
        sampler, quota = self.run.sampler, self.run.sampler.settings.quota
        rows = sampler.decode_rows * self.run.abreast
        pieces: collections.Counter[tuple[int, int]] = collections.Counter()
        for steps, busy, live, longest in zip(course.steps_P, course.busy_P, course.live_P, course.longest_P):
            bound = sampler.bound(int(longest) - call + quota)
            read = bound
            if self.decode.tile:  # a row that does not decode reads one
                idle = max(rows - busy, 0) * self.decode.tile
                read = -(-int(live + idle) // rows)
            pieces[read, bound] += int(steps)
        runs, times = 0.0, collections.Counter()
        for (read, bound), steps in pieces.items():
            one, calls = self.of_decode(read), steps / self.steps(read, bound)
            runs += calls
            for name in (*roofline.RESOURCES, 'waits', 'total'):
                times[name] += getattr(one, name) * steps / quota
            for name in ('memory', 'total'):
                times[name] += self.copy(bound) * calls
        read = sum(read * steps for (read, _), steps in pieces.items()) / course.steps
        return Part(runs=runs, **times), read

    def extending(self, course: lengths.Course) -> Part:
        """All calls of extend."""
        times = collections.Counter()
        for calls, reach in zip(course.extends_F, course.reach_F):
            one = self.of_extend(self.run.sampler.bound(int(reach)))
            for name in (*roofline.RESOURCES, 'waits', 'total'):
                times[name] += getattr(one, name) * int(calls)
        return Part(runs=float(course.extends_F.sum()), **times)
