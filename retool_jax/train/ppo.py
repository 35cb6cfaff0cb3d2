"""RL over multi-turn episodes: rollout, scoring, update. Read `train` from top to bottom.

The algorithm is chosen by value: `advantage.kind`, `loss.kind`, `loss.aggregation`, `ppo.critic`, …
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from retool_jax.algo.advantages import explained_variance
from retool_jax.algo.groups import episode_masks, unequal_groups
from retool_jax.algo.segments import in_update
from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core import checks, processes, signals
from retool_jax.core.checks import MANY, one_of, within
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Batch, Params, Scores, TrainState
from retool_jax.core.records import Episode, Stop
from retool_jax.core.signals import uninterrupted
from retool_jax.rollout.settings import SamplingSettings
from retool_jax.train import sources
from retool_jax.train.learner import Learner, mean_metrics
from retool_jax.train.pack import join, pack
from retool_jax.train.residency import Residency
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.sources import RolloutSettings, Source
from retool_jax.train.state import CRITICS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings(RolloutSettings):
    """Sizes of an RL step and which episodes are trained on."""

    steps: int  # RL steps. P 400
    minibatches: int  # optimizer steps per pass over a step's episodes. P 2, of 512 of R's 1,024; R 4
    epochs: int  # passes over a step's episodes. R 1
    critic: str  # 'none', a 'head' on the policy's trunk, or a 'backbone' of its own. P does not say; R backbone
    # old logprobs come from the trainer's own forward pass, for a step's first mini-batch the one that is
    # differentiated; False: the sampler's serve, where a step is one update. R True
    rescore: bool
    critic_warmup_steps: int  # first RL steps, in which the critic alone learns and the policy stands still. R 20
    mask_truncated: bool  # episodes that ran out of budget leave the update. R False
    offload: bool  # buffers that a phase does not need wait in the host's memory (train/residency.py). H True

    def __post_init__(self):
        super().__post_init__()
        checks.check(
            self,
            steps=within(1, MANY),
            minibatches=within(1, 2**20),
            epochs=within(1, 10**6),
            critic=one_of(CRITICS),
            critic_warmup_steps=within(0, MANY),
        )
        if self.critic_warmup_steps and self.critic == 'none':
            raise UserError(
                f'critic_warmup_steps={self.critic_warmup_steps} holds the policy while a critic '
                "learns, and ppo.critic='none' has none: set ppo.critic_warmup_steps=0"
            )


def check(
    sizes: PPOSettings,
    advantage: AdvantageSettings,
    loss: LossSettings,
    sampling: SamplingSettings,
    weights: str = 'float',
) -> None:
    """Refuses blocks of an update that contradict each other: the one check of everything that trains by RL.

    weights: of the sampler (model.config.WEIGHTS).

    Raises: UserError naming the keys and the remedy.
    """
    if advantage.needs_values == (sizes.critic == 'none'):
        remedy = 'head or backbone' if advantage.needs_values else 'none'
        raise UserError(
            f'ppo.critic={sizes.critic!r} contradicts advantage.kind={advantage.kind!r}, which '
            f'{"needs" if advantage.needs_values else "reads no"} values; set ppo.critic={remedy}'
        )
    if advantage.needs_groups and sizes.samples < 2:
        raise UserError(
            f'advantage.kind={advantage.kind!r} compares the samples of a problem, of which there is '
            f'ppo.samples={sizes.samples}: its advantage would be the bare reward; set ppo.samples=2 or '
            'more, or advantage.kind=gae or reinforce_pp'
        )
    if not sizes.rescore:
        for key, value, wanted, why in (
            ('ppo.minibatches', sizes.minibatches, 1, 'the weights move between mini-batches'),
            ('ppo.epochs', sizes.epochs, 1, 'the weights move between passes'),
            ('ppo.quanta', sizes.quanta, 0, 'carried tokens are of older weights'),
            ('loss.kl_coef', loss.kl_coef, 0, 'the reference has to be scored'),
            ('loss.correction', loss.correction, 'none', 'the ratio itself is between sampler and trainer'),
            ('ppo.critic', sizes.critic, 'none', 'values have to be scored'),
        ):
            if value != wanted:
                raise UserError(
                    f'ppo.rescore=False takes the old logprobs from the sampler, and {why}: set {key}={wanted}, or '
                    'ppo.rescore=True'
                )
    if sizes.quanta and loss.correction == 'none':
        raise UserError(
            f'ppo.quanta={sizes.quanta} trains on tokens of older weights, which loss.correction=none '
            'takes for those of the current ones; set loss.correction=token or sequence'
        )
    if weights == 'int8' and sizes.rescore and loss.correction == 'none':
        raise UserError(
            "sampler.weights='int8' samples from another distribution than the trainer's, which loss.correction=none "
            'takes for the same; set loss.correction=token or sequence'
        )
    if sampling.temperature == 0:
        raise UserError('train_sampling.temperature=0.0 draws one answer only; choose one above 0')
    if sampling.truncates:  # ratios are between whole distributions
        raise UserError(
            f'train_sampling.top_p={sampling.top_p}, train_sampling.top_k={sampling.top_k}, '
            f'train_sampling.min_p={sampling.min_p}: the update knows no truncation; set top_p=1, top_k=0, '
            'min_p=0'
        )


def unscored(sizes: PPOSettings, loss: LossSettings, step: int) -> bool:
    """Whether the first mini-batch of a step goes without the policy's old logprobs: it is the policy's first change,
    so the pass that differentiates computes them. Not where they are read before or after that pass."""
    before = sizes.critic == 'head' or (loss.needs_reference and loss.kl_in == 'reward')
    return sizes.epochs == 1 and step >= sizes.critic_warmup_steps and not before


@dataclasses.dataclass
class Progress:
    """Where a run stands, as a checkpoint holds it. Between two steps it is whole."""

    state: TrainState
    done: int = 0  # RL steps
    cursor: int = 0  # problems taken from the stream
    carried: tuple[Episode, ...] = ()  # groups that the next step takes up (ppo.quanta)

    @property
    def oldest(self) -> int:
        """The oldest step whose tool results a resume from here may still read; the journal may drop what is older."""
        return min([self.done, *(e.step for e in self.carried)])


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one RL step hands to its log."""

    step: int
    metrics: dict[str, float]
    episodes: list[Episode]
    stopping: bool = False  # the run has been told to end: no time for more than to write this down
    timed: bool = False  # a checkpoint is due by the clock
    hosts: Sequence[dict] = ()  # a line for each process (Collected.hosts)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the device."""

    step: int
    episodes: list[Episode]
    found: list[dict[str, jax.Array]]  # one per optimizer step
    explained: jax.Array | None
    metrics: dict[str, float]
    clock: _Clock
    hosts: Sequence[dict] = ()

    def fetch(self, stopping: bool, timed: bool) -> StepResult:
        metrics = mean_metrics(self.step, self.found) | self.metrics | sources.describe(self.episodes)
        if self.explained is not None:
            metrics['critic/explained_var'] = float(self.explained)
        metrics['time/update_s'] = self.clock.seconds()
        return StepResult(self.step, metrics, self.episodes, stopping, timed, self.hosts)


class _Clock(threading.Thread):
    """A thread that measures the seconds from `began` until an array is ready, so that the host does not wait."""

    def __init__(self, began: float, awaited):
        super().__init__(daemon=True)
        self._began, self._awaited, self._ended = began, awaited, began
        self.start()

    def run(self) -> None:
        jax.block_until_ready(self._awaited)
        self._ended = time.perf_counter()

    def seconds(self) -> float:
        self.join()
        return self._ended - self._began


def train(
    learner: Learner,
    progress: Progress,
    settings: PPOSettings,
    *,
    sync: Callable[[Params], Params],
    collect: Source,
    seed: int,
    residency: Residency | None = None,
    report: Callable[[StepResult], None] = lambda result: None,
    due: Callable[[int], bool] = lambda done: False,
    spoiled: Callable[[int, Sequence[Episode]], None] = lambda step, episodes: None,
    save_every_s: float = 0.0,
) -> TrainState:
    """Steps progress.done … settings.steps − 1; `progress` is moved on after each.

    `sync(policy)` makes the weights that `collect` samples with. They live as long as a rollout.

    `report(result)` is called one step late, so that the host waits for the device only where it needs tokens. It is
    called at once for a step after which `due(steps done)` holds or `save_every_s` seconds (0: any number) have passed
    since the last such one, for the last step, and where the run is told to stop, which all processes do after the same
    step: `progress` is then what the reported step left behind. `spoiled(step, episodes)` is called before a loss that
    is not finite ends the run.
    """
    residency = residency or Residency(settings.offload)
    late: _Pending | None = None
    saved_s = time.monotonic()

    def flush(stopping: bool = False, timed: bool = False) -> None:
        nonlocal late
        pending, late = late, None
        if pending is None:
            return
        try:
            result = pending.fetch(stopping, timed)
        except UserError:
            spoiled(pending.step, pending.episodes)
            raise
        report(result)

    # The update gives the state's buffers to the device: there is no whole state until it returns.
    with uninterrupted():
        try:
            for step in range(progress.done, settings.steps):
                began = time.perf_counter()
                weights = sampling_weights(progress, residency, sync)
                collected = collect(weights, step, progress.cursor, progress.carried)
                del weights  # they have no place beside the update's buffers
                flush()
                late = update(learner, progress, settings, collected.episodes, seed, step, residency)
                late = dataclasses.replace(late, hosts=collected.hosts)
                progress.done, progress.cursor, progress.carried = step + 1, collected.cursor, collected.carried
                late.metrics.update(
                    collected.metrics
                    | {'data/cursor': float(collected.cursor), 'time/step_s': time.perf_counter() - began}
                )
                timed = bool(save_every_s) and time.monotonic() - saved_s >= save_every_s
                told, timed = processes.word((signals.told(), timed))
                if told:
                    raise signals.stop(told)
                if timed or due(step + 1):
                    flush(timed=timed)
                    saved_s = time.monotonic()
        except KeyboardInterrupt:
            flush(stopping=True)
            raise
    flush()
    progress.state = residency.whole(progress.state)
    return progress.state


def sampling_weights(progress: Progress, residency: Residency, sync: Callable[[Params], Params]) -> Params:
    """The policy's weights in the sampling layout; what is trained waits then as the residency of a rollout says."""
    progress.state = residency.enter('sync', progress.state)
    weights = sync(progress.state.params['policy'])
    progress.state = residency.enter('rollout', progress.state)
    return weights


def update(
    learner: Learner,
    progress: Progress,
    settings: PPOSettings,
    episodes: Sequence[Episode],
    seed: int,
    step: int,
    residency: Residency,
) -> _Pending:
    """Scores the episodes and takes every optimizer step over them; nothing waits for the device.

    Raises:
      UserError: the episodes are of more groups than the settings allow.
    """
    began = time.perf_counter()
    progress.state = residency.enter('score', progress.state)
    leaves_out = learner.quiet_groups and settings.critic == 'none'  # a critic learns from every group
    batch, minibatches, quiet = make_batch(episodes, settings, learner.forward, seed, step, leaves_out)
    if (groups := 1 + int(batch.group_BN.max())) > settings.problems_per_step:  # of a run with other sizes
        raise UserError(
            f'step {step} holds {groups} groups of ppo.samples={settings.samples}, more than '
            f'ppo.problems_per_step={settings.problems_per_step}; set both as the episodes were made'
        )
    batch = learner.put(batch)
    held, fresh = step < settings.critic_warmup_steps, settings.rescore and unscored(settings, learner.loss, step)
    if settings.rescore:
        scores = learner.score(
            progress.state.params,
            batch,
            minibatches[-1][1],
            residency.reference,
            num_groups=settings.problems_per_step,
            fresh=minibatches[0][1] if fresh else 0,
        )
    else:
        scores = learner.trust(batch, num_groups=settings.problems_per_step)
    progress.state, found = residency.enter('update', progress.state), []
    for _ in range(settings.epochs):
        for rows, counted in zip(minibatches, quiet):
            progress.state, metrics = learner.ppo_step(
                progress.state, batch, scores, rows, held=held, counted=counted, fresh=fresh and rows == minibatches[0]
            )
            found.append(metrics)
    explained = _explained(batch, scores) if settings.critic != 'none' else None
    left_out = sum(int((batch.group_BN[slice(*rows)] >= 0).sum()) for rows in quiet if rows)
    metrics = {'actor/left_out': left_out / len(episodes)} if leaves_out else {}
    return _Pending(step, list(episodes), found, explained, metrics, _Clock(began, found[-1]))


def make_batch(
    episodes: Sequence[Episode],
    settings: PPOSettings,
    forward: ForwardSettings,
    seed: int,
    step: int,
    quiet_groups: bool = False,
) -> tuple[Batch, list[tuple[int, int]], list[tuple[int, int] | None]]:
    """The global batch, the rows of each mini-batch, and rows that are only counted with it: episodes are dealt at
    random, then packed.

    Every process makes the same batch from the same episodes. A group is `samples` samples of a problem that were
    asked for together; a problem that the step holds twice has two groups. quiet_groups: groups of equal rewards have
    no part in a gradient (`Learner.quiet_groups`); their rows lie behind all others.
    """
    groups, number = [], {}
    for episode in episodes:
        key = (episode.problem.id, episode.step, episode.sample // settings.samples)
        groups.append(number.setdefault(key, len(number)))
    fault = np.array([e.stop == Stop.FAULT for e in episodes])
    baseline, update = episode_masks(
        np.array([e.void for e in episodes]),
        np.array([e.stop == Stop.LENGTH for e in episodes]),
        ~fault,
        drop_void=settings.drop_void,
        mask_truncated=settings.mask_truncated,
    )
    speaks = np.ones(len(episodes), bool)
    if quiet_groups:
        rewards, count = [e.reward.value for e in episodes], len(number)
        alone = np.bincount(np.array(groups)[baseline], minlength=count) == 1  # its advantage is the bare reward
        speaks = (unequal_groups(rewards, groups, baseline, count) | alone)[groups]
    order = np.random.default_rng((seed, step)).permutation(len(episodes))
    dealt = np.array_split(order, min(settings.minibatches, len(order)))

    def packed(chosen: np.ndarray) -> Batch:
        pick = lambda values: [values[i] for i in chosen]
        return pack(
            pick(episodes),
            width=forward.row_width,
            rows=forward.micro_rows,
            segments=forward.row_segments,
            groups=pick(groups),
            baseline=pick(baseline),
            update=pick(update),
            share=forward.shares,
        )

    silent = [chosen[~speaks[chosen]] for chosen in dealt]
    parts = [packed(chosen[speaks[chosen]]) for chosen in dealt] + [packed(chosen) for chosen in silent if len(chosen)]
    batch, rows = join(parts, forward.micro_rows)
    behind = iter(rows[len(dealt) :])
    return batch, rows[: len(dealt)], [next(behind) if len(chosen) else None for chosen in silent]


@jax.jit
def _explained(batch: Batch, scores: Scores) -> jax.Array:
    mask_BT = in_update(batch.acted_BT, batch.update_BN, batch.segment_ids_BT)
    return explained_variance(scores.value_BT, scores.return_BT, mask_BT)
