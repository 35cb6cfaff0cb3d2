"""The episodes of one RL step: rollout, grading, shaping, dynamic sampling, and what is carried into the next."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from retool_jax.algo.groups import overlong_penalty, unequal_groups
from retool_jax.core import episode_files, processes, signals
from retool_jax.core.checks import MANY, check, within
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Fault, Problem, Stop, Verdict
from retool_jax.rollout import hosts
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.requests import Request
from retool_jax.rollout.stats import RolloutStats
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.train import grading


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Which episodes a step is made of."""

    problems_per_step: int  # groups that an RL step is made of. P does not say; R 1024
    samples: int  # episodes per problem: the size of a group. R 1 for PPO, 16 for GRPO
    # Rounds of problems_per_step further problems that may replace groups of equal rewards (DAPO's dynamic sampling,
    # 2503.14476 §3.2); 0: every group is taken. H 0
    dynamic_rounds: int
    drop_void: bool  # episodes with a void turn leave update and baseline (SimpleTIR, 2509.02479). H False
    # Tokens before the budget's end in which the reward falls by up to 1 (DAPO's shaping); 0: no fall. H 0
    overlong_buffer: int
    # Partial rollouts: decode calls (of sampler.quota steps) that an episode gets in an RL step; what is unfinished
    # then goes on in the next step, under its weights. 0: every episode is waited for. H 0
    quanta: int

    def __post_init__(self):
        check(
            self,
            problems_per_step=within(1, 2**20),
            samples=within(1, 2**16),
            dynamic_rounds=within(0, 2**16),
            overlong_buffer=within(0, MANY),
            quanta=within(0, MANY),
        )
        if self.dynamic_rounds and self.samples < 2:
            raise UserError(
                f'dynamic_rounds={self.dynamic_rounds} compares the samples of a problem, of which there '
                f'is samples={self.samples}; raise it, or set dynamic_rounds=0'
            )


@dataclasses.dataclass(frozen=True)
class Collected:
    """A step's graded episodes, group by group, and where the stream of problems stands after them."""

    episodes: list[Episode]
    cursor: int
    metrics: dict[str, float]
    carried: tuple[Episode, ...] = ()  # groups with an unfinished episode (its stop is None), not graded yet
    hosts: Sequence[dict] = ()  # what each process did (hosts.describe)


class Source(Protocol):
    """Where a step's episodes come from.

    `weights` are in the sampling layout; `carried`, what the step before left unfinished, stays as it is.
    """

    def __call__(self, weights: Params, step: int, cursor: int, carried: Sequence[Episode] = ()) -> Collected: ...


class Problems(Protocol):
    """A stream with random access: an endless grain dataset, or a list that is long enough."""

    def __getitem__(self, index: int) -> Problem: ...


def sampled(
    engine: Engine,
    settings: RolloutSettings,
    stream: Problems,
    template: Template,
    tokenizer: Tokenizer,
    grader: Grader,
    journal: Journal | None = None,
    aside: Path | None = None,
) -> Source:
    """The source that rolls out; every token is stamped with its step.

    With `dynamic_rounds` it asks for `problems_per_step` further problems of the stream until that many groups
    have unequal rewards, and takes them in the stream's order, so what is accepted depends on no latency. The
    cursor then stands behind the last one taken; what was sampled beyond it is sampled anew next time.

    With `quanta` a step begins with the groups that the one before left unfinished, tops them up to
    `problems_per_step`, and takes those that are whole when every episode has had its decode calls; where none is,
    it goes around again. Tokens keep the logprobs and the version of the weights that wrote them.

    A step that is told to stop, before its update, leaves its finished episodes in the folder `aside`; those that
    are there are not made again, and the others are what they would have been.
    """
    rounds = max(settings.dynamic_rounds, 1)

    def collect(weights: Params, step: int, cursor: int, carried: Sequence[Episode] = ()) -> Collected:
        tally: collections.Counter = collections.Counter()
        spent, own = RolloutStats(), RolloutStats()
        open_groups = split([dataclasses.replace(e) for e in carried], settings.samples)  # grading writes into them
        taken: list[list[Episode]] = []
        first: list[list[Episode]] = []
        seen: collections.Counter = collections.Counter()
        ended: dict[int, list[Episode]] = {}  # by round: what this process has finished

        def make(requests: Sequence[Request], turn: int) -> list[Episode]:
            """The episodes of a round, less those that a stopped one has left."""
            known, ended[turn] = left_aside(aside, step, turn), []
            missing = [r for r in requests if _key_of(r, step) not in known]
            try:
                quanta, note = settings.quanta or None, ended[turn].append
                made = engine.run(weights, step, missing, step, journal=journal, quanta=quanta, finished=note)
                processes.agree([processes.word(signals.told())])
            except KeyboardInterrupt:
                if aside is not None and hosts.leads(engine):
                    leave_aside(aside, step, ended, tokenizer)
                raise
            new = iter(made)
            return [known[key] if (key := _key_of(r, step)) in known else next(new) for r in requests]

        while len(taken) < settings.problems_per_step and (tally['rounds'] < rounds or not (taken or first)):
            missing = settings.problems_per_step - len(taken)
            room = missing - len(open_groups) if settings.quanta else settings.problems_per_step
            asked = [stream[i] for i in range(cursor, cursor + room)]
            requests = [Request.resume(copied(e)) for group in open_groups for e in group if e.stop is None]
            requests += number(grading.make_requests(asked, settings.samples, template, tokenizer), seen)
            made = iter(make(requests, tally['rounds']))
            groups = [[next(made) if e.stop is None else e for e in group] for group in open_groups]
            groups += split(list(made), settings.samples)
            whole = [group for group in groups if all(e.stop is not None for e in group)]
            open_groups = [group for group in groups if any(e.stop is None for e in group)]
            graded = [e for group in whole for e in group]
            grading.grade_shared(graded, grader, tokenizer)
            spent, own = spent + engine.stats, own + engine.own
            tally.update(rounds=1, made=len(graded), correct=sum(e.reward.correct for e in graded))
            first = first or whole
            found = whole if not settings.dynamic_rounds else [g for g in whole if differs(g, settings.drop_void)]
            taken += found[:missing]
            cursor += room
            if not settings.quanta and len(found) >= missing:
                cursor -= len(whole) - 1 - next(i for i, group in enumerate(whole) if group is found[missing - 1])
        episodes = [e for group in taken or first for e in group]
        metrics = spent.summary() | {
            'time/rollout_s': spent.total_s,
            'time/tools_blocked_s': spent.tools_blocked_s,
            'time/decode_s': spent.decode_s,
            'time/extend_s': spent.extend_s,
            'rollout/correct': tally['correct'] / max(tally['made'], 1),
        }  # before any group was replaced
        if settings.dynamic_rounds or settings.quanta:
            metrics |= {'rollout/rounds': float(tally['rounds']), 'rollout/groups_taken': float(len(taken))}
        carried = tuple(e for group in open_groups for e in group)
        if settings.quanta:
            metrics |= describe_carried(episodes, carried, step)
        shape_overlong(episodes, settings.overlong_buffer, engine.rules.settings.max_tokens)
        return Collected(episodes, cursor, metrics, carried, hosts.describe(own, engine.link))

    return collect


def leave_aside(directory: Path, step: int, ended: Mapping[int, Sequence[Episode]], tokenizer: Tokenizer) -> None:
    """Writes the finished episodes of each round of a step for the run that goes on; each process its own."""
    count = len(episode_files.names(directory))
    for turn, episodes in ended.items():
        if episodes:
            name = f'{step:05d}_{turn:03d}_{jax.process_index():03d}_{count:05d}'
            episode_files.write(directory, name, episodes, tokenizer.decode, step)


def left_aside(directory: Path | None, step: int, turn: int) -> dict[tuple[int, str, int], Episode]:
    """What `leave_aside` has written of round `turn` of a step, by (step of its beginning, problem, sample)."""
    names = [] if directory is None else episode_files.names(directory)
    ours = [name for name in names if name.startswith(f'{step:05d}_{turn:03d}_')]
    return {(e.step, e.problem.id, e.sample): e for name in ours for e in episode_files.read(directory, name)}


def forget_aside(directory: Path, step: int) -> None:
    """Removes what was left of the steps before `step`."""
    episode_files.remove(directory, [name for name in episode_files.names(directory) if int(name[:5]) >= step])


def _key_of(request: Request, step: int) -> tuple[int, str, int]:
    return (request.begun.step if request.begun else step), request.problem.id, request.sample


def split(episodes: Sequence[Episode], samples: int) -> list[list[Episode]]:
    """Groups of so many samples each, in order."""
    return [list(episodes[i : i + samples]) for i in range(0, len(episodes), samples)]


def copied(episode: Episode) -> Episode:
    """An episode that may go on while the original stays as a checkpoint has it."""
    return dataclasses.replace(
        episode, **{name: list(getattr(episode, name)) for name in ('tokens', 'acted', 'logprobs', 'versions', 'calls')}
    )


def number(requests: Sequence[Request], seen: collections.Counter) -> list[Request]:
    """Numbers the samples of each problem on, over all copies of it in a step: copies with equal numbers would be
    sampled alike and share their journal's entries. seen: requests of earlier rounds per problem, added to here."""
    found = []
    for request in requests:
        found.append(dataclasses.replace(request, sample=seen[request.problem.id]))
        seen[request.problem.id] += 1
    return found


def differs(group: Sequence[Episode], drop_void: bool) -> bool:
    """True if a group holds right and wrong answers, not counting episodes outside the baseline (faults; with
    `drop_void` void ones).

    Correctness is compared, not the reward: reward.style=verl lifts a wrong answer by its calls, and groups that are
    wrong throughout would pass for groups that say something.
    """
    counts = np.array([e.stop != Stop.FAULT and not (drop_void and e.void) for e in group])
    return bool(
        unequal_groups(np.array([e.reward.correct for e in group], float), np.zeros(len(group), int), counts, 1)[0]
    )


def shape_overlong(episodes: Sequence[Episode], buffer: int, budget: int) -> None:
    """Adds DAPO's overlong penalty to the graded rewards (algo.groups.overlong_penalty).

    What the policy may write is `budget` less everything it did not write, the prompt and what tools printed. An
    episode that was cut always gets −1: a turn's own budget or a tool's output that no longer fitted may have
    ended it before `budget` was full.
    """
    if buffer == 0:
        return
    for episode in episodes:
        room = max(budget - (len(episode.tokens) - episode.acted_count), 0)  # may be less than the buffer
        over = overlong_penalty(np.array(episode.acted_count), room, min(buffer, room))
        penalty = -1.0 if episode.stop == Stop.LENGTH else float(over)
        episode.reward = dataclasses.replace(episode.reward, value=episode.reward.value + penalty)


def describe(episodes: Sequence[Episode]) -> dict[str, float]:
    """Metrics of a step's episodes, by name."""
    mean = lambda pick: float(np.mean([float(pick(e)) for e in episodes]))
    calls = [call for e in episodes for call in e.calls]
    share = lambda *verdicts: float(np.mean([c.verdict in verdicts for c in calls])) if calls else 0.0
    waits = [c.wall_s for c in calls if c.verdict not in (Verdict.FORMAT, Verdict.CAP)] or [0.0]  # those that ran
    return {
        'rewards/mean': mean(lambda e: e.reward.value),
        'rewards/correct': mean(lambda e: e.reward.correct),
        'grader/timeout_frequency': mean(lambda e: e.reward.late),
        'response_length/mean': mean(lambda e: e.acted_count),
        'response_length/clip_ratio': mean(lambda e: e.stop == Stop.LENGTH),
        'num_turns/mean': mean(lambda e: e.turns),
        'void_turn_ratio': mean(lambda e: e.void),
        'tools/calls': len(calls) / len(episodes),
        'tools/code_ratio': mean(lambda e: any(c.code for c in e.calls)),
        'tools/failure_frequency': 1.0 - share(Verdict.OK) if calls else 0.0,
        'tools/timeout_frequency': share(Verdict.TIMEOUT),
        'tools/fault_frequency': share(Verdict.SANDBOX_ERROR),
        **{
            f'tools/fault_{fault}': float(np.mean([c.fault == fault for c in calls]))  # the kinds that there were
            for fault in Fault
            if any(c.fault == fault for c in calls)
        },
        'tools/seconds_p50': float(np.quantile(waits, 0.5)),
        'tools/seconds_p99': float(np.quantile(waits, 0.99)),
    }


def describe_carried(episodes: Sequence[Episode], carried: Sequence[Episode], step: int) -> dict[str, float]:
    """How much a step leaves unfinished, and how old what it trains on is, in steps."""
    ages = [step - e.step for e in episodes]
    versions = np.concatenate([np.asarray(e.versions, np.int32)[np.asarray(e.acted, bool)] for e in episodes])
    return {
        'partial/carried': float(sum(e.stop is None for e in carried)),
        'partial/age_mean': float(np.mean(ages)),
        'partial/age_max': float(max(ages)),
        'partial/stale_tokens': float(np.mean(versions < step)) if len(versions) else 0.0,
    }


def part_names(directory: str) -> list[str]:
    """The parts of an episodes/ folder that hold training rollouts; UserError where there are none."""
    names = [name for name in episode_files.names(directory) if not name.startswith('val_')]
    if not names:
        raise UserError(f'halves.episodes={directory!r} holds no training episodes; give the episodes/ of a run')
    return names


def dumped(directory: str, vocab_size: int, width: int | None = None) -> Source:
    """The source that reads: step i takes part i of an episodes/ folder, beginning again behind the last.

    Rewards are those of the run that wrote them, its shaping included. Raises: UserError for episodes that are not
    graded, of another tokenizer, or longer than `width`, the tokens of a row.
    """
    names = part_names(directory)

    def collect(weights: Params, step: int, cursor: int, carried: Sequence[Episode] = ()) -> Collected:
        name = names[step % len(names)]
        episodes, path = episode_files.read(directory, name), episode_files.text_file(directory, name)
        if any(e.reward is None for e in episodes):
            raise UserError(f'{path} holds episodes without a reward: they were never graded')
        if max(max(e.tokens) for e in episodes) >= vocab_size:
            raise UserError(f'{path} holds ids beyond the model: it was written for another one')
        longest = max(episodes, key=lambda e: len(e.tokens))
        if width is not None and len(longest.tokens) > width:
            raise UserError(
                f'{path}: an episode of problem {longest.problem.id!r} has '
                f'{len(longest.tokens)} tokens, more than forward.row_width={width}; raise it'
            )
        return Collected(episodes, cursor, {'time/rollout_s': 0.0, 'time/tools_blocked_s': 0.0})

    return collect
