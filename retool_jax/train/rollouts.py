"""The episodes of one RL step: rollout, grading, shaping, and dynamic sampling over whole groups."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from retool_jax.algo.groups import overlong_penalty, unequal_groups
from retool_jax.core import episodes as episode_files
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem, Stop, Verdict
from retool_jax.rollout.engine import Engine, Request
from retool_jax.rollout.journal import Journal
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.train import evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Which episodes a step is made of."""

    problems_per_step: int
    samples: int  # episodes per problem: a group
    dynamic_rounds: int  # 0: every group is taken; else groups of equal rewards are replaced, in at most so many rounds
    overlong_buffer: int  # tokens before the budget in which the reward falls by up to 1; 0 is off

    def __post_init__(self):
        if self.dynamic_rounds and self.samples < 2:
            raise ValueError(f'dynamic_rounds={self.dynamic_rounds} compares the samples of a problem, of which there '
                             f'is samples={self.samples}; raise it, or set dynamic_rounds=0')


@dataclasses.dataclass(frozen=True)
class Collected:
    """A step's graded episodes, group by group, and where the stream of problems stands after them."""

    episodes: list[Episode]
    cursor: int
    metrics: dict[str, float]


class Source(Protocol):
    """Where a step's episodes come from; `params` are in the training layout."""

    def __call__(self, params: Params, step: int, cursor: int) -> Collected: ...


class Problems(Protocol):
    """A stream with random access: an endless grain dataset, or a list that is long enough."""

    def __getitem__(self, index: int) -> Problem: ...


def sampled(engine: Engine, settings: RolloutSettings, stream: Problems, template: Template, tokenizer: Tokenizer,
            grader: Grader, journal: Journal | None = None,
            finished: Callable[[Episode], None] = lambda episode: None) -> Source:
    """The source that rolls out: current weights in the sampling layout, every token stamped with its step.

    With `dynamic_rounds` it asks for `problems_per_step` further problems of the stream until that many groups
    have unequal rewards, and takes them in the stream's order, so what is accepted depends on no latency. The
    cursor then stands behind the last one taken; what was sampled beyond it is sampled anew next time.
    """
    def collect(params: Params, step: int, cursor: int) -> Collected:
        weights, tally = engine.sampler.sync(params), collections.Counter()
        taken: list[list[Episode]] = []
        first: list[list[Episode]] = []
        seen: collections.Counter = collections.Counter()
        for _ in range(max(settings.dynamic_rounds, 1)):
            asked = [stream[i] for i in range(cursor, cursor + settings.problems_per_step)]
            requests = number(evaluate.make_requests(asked, settings.samples, template, tokenizer), seen)
            made = engine.run(weights, step, requests, step, journal=journal, finished=finished)
            evaluate.grade(made, grader, tokenizer)
            tally.update(stats(engine) | {'made': len(made), 'correct': sum(e.reward.correct for e in made)})
            groups = [made[i:i + settings.samples] for i in range(0, len(made), settings.samples)]
            first = first or groups
            found = groups if not settings.dynamic_rounds else [g for g in groups if differs(g)]
            missing = settings.problems_per_step - len(taken)
            taken += found[:missing]
            if len(found) >= missing:
                cursor += next(i for i, g in enumerate(groups) if g is found[missing - 1]) + 1
                break
            cursor += settings.problems_per_step
        episodes = [e for group in taken or first for e in group]
        rounds = tally.pop('rounds')
        metrics = {name: float(value) for name, value in tally.items()}
        if settings.dynamic_rounds:
            metrics |= {'rollout/rounds': float(rounds), 'rollout/groups_taken': float(len(taken))}
        shape_overlong(episodes, settings.overlong_buffer, engine.rules.settings.max_tokens)
        return Collected(episodes, cursor, rates(metrics))
    return collect


def number(requests: Sequence[Request], seen: collections.Counter) -> list[Request]:
    """Numbers the samples of a problem through where a step holds it more than once, or its copies would be
    equal and share their journal. `seen` counts the requests of earlier rounds and is added to."""
    found = []
    for request in requests:
        found.append(dataclasses.replace(request, sample=seen[request.problem.id]))
        seen[request.problem.id] += 1
    return found


def differs(group: Sequence[Episode]) -> bool:
    """Whether a group's graded rewards say anything: those of sandbox faults do not."""
    return bool(unequal_groups(np.array([e.reward.value for e in group]), np.zeros(len(group), int),
                               np.array([e.stop != Stop.FAULT for e in group]), 1)[0])


def shape_overlong(episodes: Sequence[Episode], buffer: int, budget: int) -> None:
    """Adds DAPO's overlong penalty to the graded rewards (algo.groups.overlong_penalty)."""
    if buffer == 0:
        return
    for episode in episodes:
        room = max(budget - episode.prompt_length, 0)  # a long prompt may leave less than the buffer
        over = overlong_penalty(np.array(episode.acted_count), room, min(buffer, room))
        episode.reward = dataclasses.replace(episode.reward, value=episode.reward.value + float(over))


def describe(episodes: Sequence[Episode]) -> dict[str, float]:
    """What the episodes of a step say of themselves."""
    mean = lambda pick: float(np.mean([float(pick(e)) for e in episodes]))
    calls = [call for e in episodes for call in e.calls]
    share = lambda *verdicts: float(np.mean([c.verdict in verdicts for c in calls])) if calls else 0.0
    waits = [c.wall_s for c in calls] or [0.0]
    return {
        'rewards/mean': mean(lambda e: e.reward.value), 'rewards/correct': mean(lambda e: e.reward.correct),
        'response_length/mean': mean(lambda e: e.acted_count),
        'response_length/clip_ratio': mean(lambda e: e.stop == Stop.LENGTH),
        'num_turns/mean': mean(lambda e: e.turns), 'void_turn_ratio': mean(lambda e: e.void),
        'tools/calls': len(calls) / len(episodes),
        'tools/code_ratio': mean(lambda e: any(c.code for c in e.calls)),
        'tools/failure_frequency': 1.0 - share(Verdict.OK) if calls else 0.0,
        'tools/timeout_frequency': share(Verdict.TIMEOUT),
        'tools/fault_frequency': share(Verdict.SANDBOX_ERROR),
        'tools/seconds_p50': float(np.quantile(waits, 0.5)), 'tools/seconds_p99': float(np.quantile(waits, 0.99)),
    }


def stats(engine: Engine) -> dict[str, float]:
    """Sums of the engine's last run, which those of several runs add up to."""
    s = engine.stats
    return {'rounds': 1, 'time/rollout_s': s.total_s, 'time/tools_blocked_s': s.tools_blocked_s,
            'time/decode_s': s.decode_s, 'time/extend_s': s.extend_s, 'tokens': s.sampled_tokens,
            'live': s.live_steps, 'slots': s.slot_steps}


def rates(sums: dict[str, float]) -> dict[str, float]:
    """How the rollout's time went and how good it was before any group was replaced, from sums over its rounds."""
    took = lambda name: sums.pop(name, 0.0)
    tokens, live, slots, made, correct = map(took, ('tokens', 'live', 'slots', 'made', 'correct'))
    return sums | {'rollout/tokens_per_s': tokens / max(sums['time/rollout_s'], 1e-9),
                   'rollout/slot_occupancy': live / max(slots, 1),
                   'rollout/correct': correct / max(made, 1)}


def part_names(directory: str) -> list[str]:
    """The parts of an episodes/ folder that hold training rollouts; ValueError where there are none."""
    names = [name for name in episode_files.names(directory) if not name.startswith('val_')]
    if not names:
        raise ValueError(f'halves.episodes={directory!r} holds no training episodes; give the episodes/ of a run')
    return names


def dumped(directory: str, vocab_size: int) -> Source:
    """The source that reads: step i takes part i of an episodes/ folder, beginning again behind the last.

    Rewards are those of the run that wrote them, its shaping included. Errors: ValueError for episodes that are not
    graded, or of another tokenizer.
    """
    names = part_names(directory)

    def collect(params: Params, step: int, cursor: int) -> Collected:
        name = names[step % len(names)]
        episodes = episode_files.read(directory, name)
        if any(e.reward is None for e in episodes):
            raise ValueError(f'{directory}/{name}.jsonl holds episodes without a reward: they were never graded')
        if max(max(e.tokens) for e in episodes) >= vocab_size:
            raise ValueError(f'{directory}/{name}.jsonl holds ids beyond the model: it was written for another one')
        return Collected(episodes, cursor, {'time/rollout_s': 0.0, 'time/tools_blocked_s': 0.0})
    return collect
