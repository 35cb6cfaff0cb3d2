"""The keys with which an RL step takes least: every candidate by shapes, then in full those that promise most.

With one mesh.tensor and ppo.offload=True the seconds and the memory of rollout do not depend on how training is
computed, nor those of training on the sampler's rows: the best of each together are the best. What is changed is how a
step is computed, not what is learned (sums round otherwise): dtypes, optimizer and algorithm stay as they are given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence

from retool_jax.core import console
from retool_jax.core.errors import UserError
from retool_jax.plan.chips import Slice
from retool_jax.plan.memory import LIMIT
from retool_jax.plan.plans import Keys, Plans, changed
from retool_jax.plan.programs import Run
from retool_jax.rollout.scheduler import QUANTUM_S
from retool_jax.stages.config import Reinforcement

MADE = 6  # plans in full, that of the configuration as given among them; of 32B one is up to 2.5 minutes on two cores
TENSOR = 16  # chips of an engine at most; of GPUs those of a host
TIMES = (1, 2, 4, 8)  # rows of a micro-batch for each device of data × fsdp
FEEDS = (1, 2, 4, 8)  # sampler.feed_rows
QUOTAS = (16, 32)  # sampler.quota where engines of several processes always decode so many steps at a time
# 'offload' moves results over the link to the host, of which the plan knows no price.
REMATS = ('full', 'attention', 'dots_but_mlp', 'dots', 'none')
SAMPLING, TRAINING = ('sync', 'rollout'), ('score', 'update')  # phases of a step


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration as shapes say it."""

    keys: Keys  # those that differ from the configuration as given
    tensor: int
    seconds: dict[str, float]  # of a step, by phase
    shares: dict[str, float]  # of a chip's memory that is filled, by phase
    call_s: float  # of decoding

    @functools.cached_property
    def name(self) -> str:
        return ' '.join(f'{key}={value}' for key, value in self.keys.items()) or 'as given'

    @property
    def fits(self) -> bool:
        return max(self.shares.values()) <= LIMIT


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found."""

    keys: Keys  # none: the configuration as given is the best
    plan: dict  # in full, with them
    made: dict[str, dict]  # name of a candidate → its plan in full
    candidates: list[Candidate]  # the configuration as given first
    seconds: float  # that the search took


def search(plans: Plans, stage: Reinforcement) -> Found:
    """The least RL step among those that fit; where none does, the configuration as given.

    The same arguments find the same keys: how many plans are made is bounded by their number, not by the clock.
    Raises: UserError for a configuration that has no plan.
    """
    began = time.perf_counter()
    given = _candidate({}, plans.guess(stage))
    candidates = [given]
    sizes = tensors(plans.slice, given.tensor)
    with console.progress(f'{plans.slice.name}: searching', len(sizes)) as advance:
        for tensor in sizes:
            with contextlib.suppress(UserError):  # the model does not divide by it
                candidates += [c for c in _of_tensor(plans, stage, given.tensor, tensor) if c.keys]
            advance(f'mesh.tensor={tensor}')
    made = settle(plans, stage, candidates)
    fitting = {name: plan for name, plan in made.items() if plan['fits']} or {given.name: made[given.name]}
    best = min(
        (c for c in candidates if c.name in fitting), key=lambda c: _order(c, fitting[c.name]['step']['seconds'])
    )
    keys, plan = best.keys, fitting[best.name]
    if plan['fits']:
        keys, plan = _finish(plans, stage, keys, plan)
    return Found(keys, plan, made, candidates, time.perf_counter() - began)


def _finish(plans: Plans, stage: Reinforcement, keys: Keys, plan: dict) -> tuple[Keys, dict]:
    """With as many rows as the memory holds, which `numbers` may miss, and without ppo.offload where all fits."""
    now = changed(stage, keys)
    rows = min(plan['kv_rows_that_fit'], -(-now.ppo.problems_per_step // plan['engines']) * now.ppo.samples)
    if rows > now.sampler.rows:
        fuller = _differing(stage, {**keys, 'sampler.rows': rows})
        trial = plans.make(changed(stage, fuller))
        if trial['fits'] and trial['step']['seconds'] < plan['step']['seconds']:
            keys, plan = fuller, trial
    if now.ppo.offload:
        # No step is longer by the plan for what waits on the host, but its way there and back takes time.
        without = _differing(stage, {**keys, 'ppo.offload': False})
        trial = plans.make(changed(stage, without))
        keys, plan = (without, trial) if trial['fits'] else (keys, plan)
    return keys, plan


def settle(plans: Plans, stage: Reinforcement, candidates: Sequence[Candidate]) -> dict[str, dict]:
    """Plans in full, by the names of their candidates: first the configuration as given, the first of `candidates`,
    then always that which promises least seconds, until that is one of those made, or `MADE` are.

    What a plan in full says of a phase corrects what shapes say of it in all candidates with the same mesh.tensor; one
    that needs at least as much memory as one that did not fit is left out.
    """
    made: dict[str, dict] = {}
    ratio: dict[tuple[int, str], float] = {}
    too_much: dict[tuple[int, str], float] = {}

    def promised(c: Candidate) -> float:
        if c.name in made:
            return made[c.name]['step']['seconds'] if made[c.name]['fits'] else math.inf
        if any(share >= too_much.get((c.tensor, phase), math.inf) for phase, share in c.shares.items()):
            return math.inf
        return sum(seconds * ratio.get((c.tensor, phase), 1.0) for phase, seconds in c.seconds.items())

    best = candidates[0]
    left = [c for c in candidates if c.fits or c is best]
    while best.name not in made and len(made) < MADE and (not made or promised(best) < math.inf):
        made[best.name] = plan = plans.make(changed(stage, best.keys))
        for phase in plan['phases']:
            at = (best.tensor, phase['name'])
            ratio[at] = phase['seconds'] / best.seconds[phase['name']]
            if not phase['fits']:
                too_much[at] = min(too_much.get(at, math.inf), best.shares[phase['name']])
        best = min(left, key=lambda c: _order(c, promised(c)))
    return made


def tensors(slice: Slice, given: int) -> list[int]:
    """Values of mesh.tensor that divide the slice."""
    most = slice.chip.host if slice.chip.platform == 'gpu' else TENSOR
    return sorted({given, *(n for n in range(1, most + 1) if slice.count % n == 0)})


def numbers(most: int) -> Iterator[int]:
    """Whole numbers from 1 as far as `most`, at first all, then four an octave."""
    step, n = 1, 1
    while n == 1 or n <= most:
        yield n
        n += step
        if n == 8 * step:
            step *= 2


def _of_tensor(plans: Plans, stage: Reinforcement, given: int, tensor: int) -> list[Candidate]:
    """All of one mesh.tensor: each rollout with each training.

    Raises: UserError where the model or the mesh does not divide by it.
    """
    base: Keys = {} if tensor == given else {'mesh.tensor': tensor}
    if base and -1 not in (stage.mesh.data, stage.mesh.fsdp):
        base |= {'mesh.fsdp': -1}
    rest = plans.slice.count // tensor  # divides by whatever rows and micro-batches are split over
    base |= {'sampler.rows': rest, 'sampler.decode_rows': 0, 'forward.micro_rows': 0, 'ppo.offload': True}
    run = Run(changed(stage, base), plans.model, plans.slice, plans.process_chips)
    rollouts = _rollouts(plans, stage, base, run)
    fits = min(c.shares['rollout'] for c in rollouts) <= LIMIT
    trainings = _trainings(plans, stage, rollouts[0].keys, rest) if fits else rollouts[:1]
    joined = lambda a, b: {phase: a[phase] for phase in SAMPLING} | {phase: b[phase] for phase in TRAINING}
    return [
        Candidate(
            _differing(stage, base | _of(a.keys, 'sampler') | _of(b.keys, 'forward')),
            tensor,
            joined(a.seconds, b.seconds),
            joined(a.shares, b.shares),
            a.call_s,
        )
        for a, b in itertools.product(rollouts, trainings)
    ]


def _rollouts(plans: Plans, stage: Reinforcement, base: Keys, run: Run) -> list[Candidate]:
    """By sampler.rows and sampler.decode_rows, with sampler.feed_rows and sampler.quota as given and with those that
    the best of these gains most by; the fewest rows first. A call that were over sooner than `QUANTUM_S` is not tried:
    the host's own work between calls has no price."""
    episodes = math.ceil(stage.ppo.problems_per_step / run.engines) * stage.ppo.samples
    given, found = {'feed_rows': stage.sampler.feed_rows, 'quota': stage.sampler.quota}, []

    def guess(ends: tuple[int, int] | None = None, **sampler: int) -> Candidate:
        keys = base | {f'sampler.{name}': value for name, value in sampler.items()}
        return _candidate(keys, plans.guess(changed(stage, keys), ends))

    def over(rows: Sequence[int], **same: int) -> list[Candidate]:
        few, *more = rows
        made = [guess(rows=few, **same)]
        # More rows need more memory: where these have none, no others have.
        if made[0].shares['rollout'] > LIMIT or not more:
            return made
        made.append(guess(rows=more[-1], **same))
        for n in more[:-1]:
            made.append(guess((few, more[-1]), rows=n, **same))
            if made[-1].shares['rollout'] > LIMIT:
                break
        return made

    for decode_rows in sorted({0, stage.sampler.decode_rows}):
        rows = sorted(n for n in {*numbers(episodes), stage.sampler.rows} if n > decode_rows)
        if not rows:
            continue
        found += (made := over(rows, decode_rows=decode_rows, **given))
        fitting = [c for c in made if c.shares['rollout'] <= LIMIT]
        if fitting:
            best = min(fitting, key=lambda c: c.seconds['rollout'])
            same = {'rows': best.keys['sampler.rows'], 'decode_rows': decode_rows}
            tried = [guess(**same, **given | {'feed_rows': n}) for n in sorted({given['feed_rows'], *FEEDS})]
            fed = {'feed_rows': min(tried, key=lambda c: c.seconds['rollout']).keys['sampler.feed_rows']}
            quotas = QUOTAS if run.lockstep and not stage.ppo.quanta else ()  # ppo.quanta counts calls of so many steps
            tried = [guess(**same, **given | fed | {'quota': n}) for n in quotas if n < given['quota']]
            tried = [c for c in tried if c.call_s >= QUANTUM_S and c.seconds['rollout'] < best.seconds['rollout']]
            quota = min(tried, key=lambda c: c.seconds['rollout']).keys['sampler.quota'] if tried else given['quota']
            if (least := fed | {'quota': quota}) != given:
                found += over(rows, decode_rows=decode_rows, **least)
    return found


def _trainings(plans: Plans, stage: Reinforcement, base: Keys, rest: int) -> list[Candidate]:
    """By forward.remat and forward.micro_rows."""
    given = stage.forward.micro_rows
    rows = {n * rest: n * rest if n > 1 else 0 for n in TIMES}
    if given and given % rest == 0:
        rows[given] = given
    found = []
    for remat in dict.fromkeys((stage.forward.remat, *REMATS)):
        for _, value in sorted(rows.items()):
            keys = {**base, 'forward.remat': remat, 'forward.micro_rows': value}
            found.append(_candidate(keys, plans.guess(changed(stage, keys))))
            if max(found[-1].shares[phase] for phase in TRAINING) > LIMIT:  # larger ones need more
                break
    return found


def _candidate(keys: Keys, plan: dict) -> Candidate:
    return Candidate(
        keys,
        plan['mesh']['tensor'],
        {phase['name']: phase['seconds'] for phase in plan['phases']},
        {phase['name']: phase['share'] for phase in plan['phases']},
        plan['rollout']['decode']['total'] / plan['rollout']['decode']['runs'],
    )


def _order(c: Candidate, seconds: float) -> tuple:
    """Of equal steps the one with the fewest changes."""
    return seconds, len(c.keys), c.name


def _of(keys: Keys, block: str) -> Keys:
    return {key: value for key, value in keys.items() if key.startswith(f'{block}.')}


def _differing(stage: Reinforcement, keys: Keys) -> Keys:
    """Those that have another value in the stage."""
    value = lambda key: functools.reduce(getattr, key.split('.'), stage)
    return {key: new for key, new in keys.items() if value(key) != new}
