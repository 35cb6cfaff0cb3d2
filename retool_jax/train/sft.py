"""Supervised fine-tuning on episodes: packed rows, loss on acted tokens, epochs from one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from retool_jax.core.pytrees import Batch, TrainState
from retool_jax.core.records import Episode
from retool_jax.rollout.pack import pack
from retool_jax.train.update import ForwardSettings, Learner, mean_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """Length of a supervised run."""

    steps: int  # optimizer steps
    batch_tokens: int  # tokens per step, padding not counted


def batches(episodes: Sequence[Episode], settings: SFTSettings, forward: ForwardSettings, seed: int,
            start: int = 0) -> Iterator[Batch]:
    """Step `start`, `start + 1`, …: epochs of shuffled episodes cut at `batch_tokens`, packed into rows.

    A step depends on the seed and its number alone, so a resumed run sees what the whole one would.
    """
    order: list[int] = []
    epoch = 0
    for step in range(settings.steps):
        chosen, tokens = [], 0
        while True:
            if not order:
                order = list(np.random.default_rng((seed, epoch)).permutation(len(episodes)))
                epoch += 1
            length = len(episodes[order[-1]].tokens)
            if chosen and tokens + length > settings.batch_tokens:
                break
            chosen.append(episodes[order.pop()])
            tokens += length
        if step >= start:
            yield pack(chosen, width=forward.row_width, rows=forward.micro_rows, segments=forward.row_segments)


def train(learner: Learner, state: TrainState, episodes: Sequence[Episode], settings: SFTSettings, seed: int,
          log: Callable[[int, dict[str, float]], None],
          save: Callable[[int, TrainState], None] | None = None, save_every: int = 1) -> TrainState:
    """Runs the remaining steps of `state`.

    `log(step, metrics)` is called one step late, so that the host never waits for the step in flight;
    `save(steps done, state)` after every `save_every` steps and the last, when all of them are logged.
    """
    start, late = int(state.step), None
    for step, batch in enumerate(batches(episodes, settings, learner.forward, seed, start), start=start):
        state, metrics = learner.sft_step(state, batch)
        if late is not None:
            log(step - 1, mean_metrics(step - 1, [late]))
        late = metrics
        if step + 1 == settings.steps or (save is not None and (step + 1) % save_every == 0):
            log(step, mean_metrics(step, [late]))
            late = None
            if save is not None:
                save(step + 1, state)
    return state
