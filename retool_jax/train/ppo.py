"""PPO over multi-turn episodes: rollout, grading, scoring, update. Read `train` from top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from retool_jax.algo.advantages import explained_variance
from retool_jax.algo.groups import episode_masks, overlong_penalty
from retool_jax.algo.segments import in_update
from retool_jax.core.pytrees import Batch, Params, TrainState
from retool_jax.core.records import Episode, Problem, Stop, Verdict
from retool_jax.rollout.engine import Engine, RolloutStats
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.pack import join, pack
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.train import evaluate
from retool_jax.train.update import ForwardSettings, Learner, Scores, mean_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Sizes of an RL step and which episodes are trained on."""

    steps: int
    problems_per_step: int
    samples: int  # episodes per problem
    minibatches: int  # optimizer steps per pass over the step's episodes
    epochs: int  # passes
    critic: str  # 'none', 'head' on the policy's trunk, or its own 'backbone'
    critic_warmup_steps: int  # RL steps in which only the critic learns
    drop_void: bool  # episodes with a void turn leave the update and the baseline
    mask_truncated: bool  # episodes that ran out of budget leave the update
    overlong_buffer: int  # tokens before the budget in which the reward falls by up to 1; 0 is off


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one RL step hands to its log."""

    step: int
    metrics: dict[str, float]
    episodes: list[Episode]


def train(engine: Engine, learner: Learner, state: TrainState, settings: PPOSettings, *,
          problems: Callable[[int], Sequence[Problem]], template: Template, tokenizer: Tokenizer, grader: Grader,
          seed: int, start: int = 0, reference: Params | None = None, journal: Journal | None = None,
          report: Callable[[StepResult, TrainState], None] = lambda result, state: None,
          finished: Callable[[Episode], None] = lambda episode: None) -> TrainState:
    """Steps `start` … settings.steps − 1.

    problems(step) gives the step's problems; report(result, state) is called after every step with the
    new state; finished(episode) as each episode ends. `reference` is in the training layout.
    """
    budget = engine.rules.settings.max_tokens
    for step in range(start, settings.steps):
        began = time.perf_counter()

        # Rollout: current weights in the sampling layout, every token stamped with their version.
        weights = engine.sampler.sync(state.params['policy'])
        requests = evaluate.make_requests(problems(step), settings.samples, template, tokenizer)
        episodes = engine.run(weights, step, requests, step, journal=journal, finished=finished)
        del weights
        rollout_s = time.perf_counter() - began

        # Reward: outcome alone, judged on the model's own last words.
        evaluate.grade(episodes, grader, tokenizer)
        shape_overlong(episodes, settings, budget)

        # Scoring: old logprobs, values, advantages of the whole global batch.
        batch, minibatches = make_batch(episodes, settings, learner.forward, seed, step)
        batch = learner.put(batch)
        scores = learner.score(state.params, batch, minibatches[-1][1], reference,
                               num_groups=settings.problems_per_step)

        # Update.
        update_began = time.perf_counter()
        found = []
        for _ in range(settings.epochs):
            for rows in minibatches:
                state, metrics = learner.ppo_step(state, batch, scores, rows)
                found.append(metrics)
        metrics = mean_metrics(step, found)  # waits for the device
        metrics |= episode_metrics(episodes) | rollout_metrics(engine.stats, rollout_s)
        if settings.critic != 'none':
            metrics['critic/explained_var'] = float(_explained(batch, scores))
        metrics['time/update_s'] = time.perf_counter() - update_began
        metrics['time/step_s'] = time.perf_counter() - began
        report(StepResult(step, metrics, episodes), state)
        if journal is not None:
            journal.clear()
    return state


def shape_overlong(episodes: Sequence[Episode], settings: PPOSettings, budget: int) -> None:
    """Adds DAPO's overlong penalty to the graded rewards (algo.groups.overlong_penalty)."""
    if settings.overlong_buffer == 0:
        return
    for episode in episodes:
        room = max(budget - episode.prompt_length, 0)  # a long prompt may leave less than the buffer
        over = overlong_penalty(np.array(episode.acted_count), room, min(settings.overlong_buffer, room))
        episode.reward = dataclasses.replace(episode.reward, value=episode.reward.value + float(over))


def make_batch(episodes: Sequence[Episode], settings: PPOSettings, forward: ForwardSettings, seed: int,
               step: int) -> tuple[Batch, list[tuple[int, int]]]:
    """The global batch and the rows of each mini-batch: episodes are dealt at random, then packed.

    Every process makes the same one from the same episodes.
    """
    groups, number = [], {}
    for episode in episodes:
        groups.append(number.setdefault(episode.problem.id, len(number)))
    fault = np.array([e.stop == Stop.FAULT for e in episodes])
    baseline, update = episode_masks(np.array([e.void for e in episodes]),
                                     np.array([e.stop == Stop.LENGTH for e in episodes]), ~fault,
                                     drop_void=settings.drop_void, mask_truncated=settings.mask_truncated)
    order = np.random.default_rng((seed, step)).permutation(len(episodes))
    parts = []
    for chosen in np.array_split(order, settings.minibatches):
        pick = lambda values: [values[i] for i in chosen]  # noqa: B023
        parts.append(pack(pick(episodes), width=forward.row_width, rows=forward.micro_rows,
                          segments=forward.row_segments, groups=pick(groups), baseline=pick(baseline),
                          update=pick(update)))
    return join(parts)


@jax.jit
def _explained(batch: Batch, scores: Scores) -> jax.Array:
    mask_BT = in_update(batch.acted_BT, batch.update_BN, batch.segment_ids_BT)
    return explained_variance(scores.value_BT, scores.return_BT, mask_BT)


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
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


def rollout_metrics(stats: RolloutStats, rollout_s: float) -> dict[str, float]:
    """How the rollout's time went."""
    return {
        'time/rollout_s': rollout_s, 'time/tools_blocked_s': stats.tools_blocked_s,
        'time/decode_s': stats.decode_s, 'time/extend_s': stats.extend_s,
        'rollout/tokens_per_s': stats.sampled_tokens / max(rollout_s, 1e-9),
        'rollout/slot_occupancy': stats.live_steps / max(stats.slot_steps, 1),
    }
