"""Supervised fine-tuning on episodes: packed rows, loss on acted tokens, epochs from one seed, held-out loss."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from retool_jax.core import processes, signals
from retool_jax.core.checks import MANY, below, check, within
from retool_jax.core.pytrees import Batch, TrainState
from retool_jax.core.records import Episode
from retool_jax.core.signals import uninterrupted
from retool_jax.train.learner import Learner, mean_metrics
from retool_jax.train.pack import pack
from retool_jax.train.settings import ForwardSettings

HELD_OUT = 'sft/held_out_loss'  # mean −log p of the acted tokens, in nats


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """Length of a supervised run, and what of its traces is kept apart."""

    steps: int  # optimizer steps, where `epochs` is 0. H 125
    epochs: int  # passes over the traces, which then decide the number of steps; 0: `steps` does. P 2; R 6
    batch_tokens: int  # tokens per optimizer step, padding not counted. R 131072, 32 traces of 4,096
    # Share of the problems whose traces are never trained on, in [0, 1): their loss is measured at every checkpoint,
    # and the best one becomes `final/`; 0 measures none. H 0.02
    evaluation_share: float

    def __post_init__(self):
        check(
            self,
            steps=within(1, MANY),
            epochs=within(0, 10**6),
            batch_tokens=within(1, MANY),
            evaluation_share=below(0, 1),
        )


def hold_out(episodes: Sequence[Episode], share: float) -> tuple[list[Episode], list[Episode]]:
    """Traces to train on, and those kept apart: about `share` of the problems, by a hash of their question.

    All traces of a question are on one side, and on the same one whatever else the folder holds.
    """
    apart = [zlib.crc32(e.problem.question.encode('utf-8', 'surrogatepass')) < share * 2**32 for e in episodes]
    return ([e for e, out in zip(episodes, apart) if not out], [e for e, out in zip(episodes, apart) if out])


def deal(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Yields (indices of its episodes, passes that are over after it) for step 0, 1, ….

    Each pass is shuffled anew; the next begins in the step in which one ends.
    """
    order: list[int] = []
    epoch = 0
    while True:
        chosen, tokens = [], 0
        while True:
            if not order:
                order = list(np.random.default_rng((seed, epoch)).permutation(len(lengths)))
                epoch += 1
            length = lengths[order[-1]]
            if chosen and tokens + length > batch_tokens:
                break
            chosen.append(int(order.pop()))
            tokens += length
        yield chosen, epoch - bool(order)


def settle(settings: SFTSettings, episodes: Sequence[Episode], seed: int) -> SFTSettings:
    """The settings with the number of steps that `epochs` passes take; the last step may begin the next pass."""
    if not settings.epochs:
        return settings
    steps = deal([len(e.tokens) for e in episodes], settings.batch_tokens, seed)
    count = next(i for i, (_, passes) in enumerate(steps, start=1) if passes >= settings.epochs)
    return dataclasses.replace(settings, steps=count)


def batches(
    episodes: Sequence[Episode], settings: SFTSettings, forward: ForwardSettings, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Step `start`, `start + 1`, …: epochs of shuffled episodes cut at `batch_tokens`, packed into rows.

    A step depends on the seed and its number alone, so a resumed run sees what the whole one would.
    """
    steps = deal([len(e.tokens) for e in episodes], settings.batch_tokens, seed)
    for step, (chosen, _) in zip(range(settings.steps), steps):
        if step >= start:
            yield packed([episodes[i] for i in chosen], forward)


def packed(episodes: Sequence[Episode], forward: ForwardSettings) -> Batch:
    """Episodes packed into rows of the learner's shape."""
    size = {'width': forward.row_width, 'rows': forward.micro_rows, 'segments': forward.row_segments}
    return pack(episodes, **size, share=forward.shares)


def train(
    learner: Learner,
    state: TrainState,
    episodes: Sequence[Episode],
    settings: SFTSettings,
    seed: int,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[int, TrainState, dict[str, float]], None] | None = None,
    save_every: int = 1,
    held_out: Sequence[Episode] = (),
    save_every_s: float = 0.0,
) -> TrainState:
    """Runs the remaining steps of `state`.

    `log(step, metrics)` is called one step late, so that the host never waits for the step in flight;
    `save(steps done, state, metrics of the last)` after every `save_every` steps and the last, when all of them are
    logged; also when `save_every_s` seconds have passed since (0: never), and where the run is told to stop, after the
    same step in all processes. Before the former the loss on `held_out` is measured and logged as sft/held_out_loss.
    """
    start, late, saved_s = int(state.step), [], time.monotonic()
    due = lambda done: done == settings.steps or (save is not None and done % save_every == 0)
    measured = packed(held_out, learner.forward) if held_out else None

    def flush(extra: dict[str, float]) -> dict[str, float]:
        step, found = late.pop(0)
        metrics = mean_metrics(step, [found]) | extra
        log(step, metrics)
        return metrics

    with uninterrupted():  # the state is given to each step and comes back changed
        for step, batch in enumerate(batches(episodes, settings, learner.forward, seed, start), start=start):
            state, found = learner.sft_step(state, batch)
            late.append((step, found))
            if len(late) > 1:
                flush({})
            timed = bool(save_every_s) and time.monotonic() - saved_s >= save_every_s
            told, timed = processes.word((signals.told(), timed))
            measures = measured is not None and due(step + 1)
            if told and measures:  # on the next start: it may take longer than there is time
                raise signals.stop(told)
            if due(step + 1) or told or timed:
                metrics = flush({HELD_OUT: learner.sft_loss(state.params, measured)} if measures else {})
                if save is not None:
                    save(step + 1, state, metrics)
                saved_s = time.monotonic()
            if told:
                raise signals.stop(told)
    return state
