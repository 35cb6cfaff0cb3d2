"""A supervised run: fine-tuning on verified traces, with checkpoints and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from retool_jax.core import console, episode_files, mirror, processes, storage
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.errors import UserError
from retool_jax.core.metrics import Metrics
from retool_jax.core.pytrees import TrainState
from retool_jax.core.records import Episode
from retool_jax.model import lora
from retool_jax.rollout.library import Model
from retool_jax.stages import folder, parts
from retool_jax.stages.config import FineTuning
from retool_jax.stages.intake import Intake
from retool_jax.stages.parts import FINAL
from retool_jax.tasks.grader import Grader
from retool_jax.train import sft
from retool_jax.train.state import init_state


def run(stage: FineTuning) -> None:
    """Trains to the last step, or goes on where the folder's last checkpoint stands.

    `final/` is the last state; with a held-out share, the one of those saved whose loss on it was lowest.

    Raises:
      UserError: a held-out share that leaves no traces on one side, or traces that `read_traces` or `check_ids` refuse.
    """
    processes.join()
    sizes = stage.sft
    everything = read_traces(stage.traces, stage.forward.row_width)
    with Grader() as grader:
        intake = Intake(stage.unreadable, grader.parses, 'unreadable')
        everything = [trace for _, trace in intake.worked([(trace.problem, trace) for trace in everything])]
    traces, held_out = sft.hold_out(everything, sizes.evaluation_share)
    if not traces or (sizes.evaluation_share and not held_out):
        raise UserError(
            f'sft.evaluation_share={sizes.evaluation_share} holds out {len(held_out)} of '
            f'{len(everything)} traces; choose a share that leaves some on both sides, or 0'
        )
    with folder.claimed(stage, free=('checkpoints',)) as directory, folder.stoppable():
        model = parts.open_model(stage.model, directory)
        check_ids(everything, model, stage.traces)
        parts.check_context(model, max(len(trace.tokens) for trace in everything), 'the longest trace')
        folder.bind(
            directory, {f'traces={stage.traces!r}': {'count': len(everything), 'sha256': fingerprint(everything)}}
        )
        console.banner(
            model=model,
            mesh=dict(parts.make_mesh(stage.mesh).shape),
            traces=len(traces),
            held_out=len(held_out),
            run=mirror.place(directory),
        )
        go_on(stage, directory, model, traces, held_out)
        console.say(f'model: {mirror.place(directory / FINAL)} (a Hugging Face directory)')


def go_on(
    stage: FineTuning,
    directory: Path,
    model: Model,
    traces: Sequence[Episode],
    held_out: Sequence[Episode] = (),
    lead: Sequence[Episode] = (),
    lead_steps: int = 0,
    best: bool = True,
) -> None:
    """`run` in a folder that is its own; the first `lead_steps` steps see the traces of `lead`. best: `final/` is the
    checkpoint with the smallest held-out loss; else the last step."""
    sizes, saving, forward = sft.settle(stage.sft, traces, stage.run.seed), stage.checkpoints, stage.forward
    mesh = parts.make_mesh(stage.mesh)
    with contextlib.ExitStack() as stack:
        learner = parts.make_tuner(forward, stage.optimizer, sizes.steps, stage.lora, model.config, mesh)
        frozen, policy = parts.load_trained(stage, model, mesh)
        learner, state = learner.over(frozen), init_state({'policy': policy}, learner.optimizer)
        del policy  # the first step takes its memory
        checkpoints = stack.enter_context(Checkpoints(directory / 'checkpoints', saving.keep_last, 'score'))
        writer = stack.enter_context(Metrics(directory, processes.leads()))
        start = checkpoints.latest() or 0
        if start:
            state, _ = checkpoints.restore(start, state)
            console.say(f'goes on at step {start}')
        folder.rewind(directory, start, writer)
        advance = stack.enter_context(console.progress('SFT', sizes.steps - start))

        def log(step: int, metrics: dict[str, float]) -> None:
            writer.write(step, {'phase': 'sft'} | metrics)
            advance(f'loss {metrics["sft/loss"]:.3f}')

        def save(step: int, state: TrainState, metrics: dict[str, float]) -> None:
            score = {'score': -metrics[sft.HELD_OUT]} if best and sft.HELD_OUT in metrics else {}
            mirror.publish(directory)
            checkpoints.save(step, state, {'step': step} | lora.describe(stage.lora) | score)

        train = lambda state, seen, sizes: sft.train(
            learner, state, seen, sizes, stage.run.seed, log, save, saving.every, held_out, saving.every_s
        )
        if lead_steps:
            first = dataclasses.replace(sizes, steps=lead_steps)
            state = train(state, lead, first)
        state = train(state, traces, sizes)
        chosen = checkpoints.best() if best else None
        if chosen is not None:
            console.say(f'best: step {chosen}, held-out loss {-checkpoints.meta(chosen)["score"]:.4f}')
            if chosen < sizes.steps:
                like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
                del state  # or there would be two of them
                state, _ = checkpoints.restore(chosen, like)
    parts.export(stage, directory, model, learner, state.params['policy'])


def read_traces(path: str, width: int) -> list[Episode]:
    """The episodes of a cold start's folder that fit a row.

    Raises:
      UserError: the folder holds no episodes, or none that fits.
    """
    directory = storage.local('traces', path)
    if not directory.is_dir() or not episode_files.names(directory):
        raise UserError(f'config.traces={path!r} holds no episodes; give the folder that launch/cold_start.py wrote')
    traces = episode_files.read(directory)
    fitting = [trace for trace in traces if len(trace.tokens) <= width]
    if not fitting:
        raise UserError(f'config.traces={path!r}: no trace fits forward.row_width={width}; raise it')
    if len(fitting) < len(traces):
        console.say(
            f'{len(traces) - len(fitting)} of {len(traces)} traces are longer than forward.row_width={width} '
            'and left out'
        )
    return fitting


def fingerprint(traces: list[Episode]) -> str:
    """A digest of the ids of all traces and of who wrote them, in order."""
    digest = hashlib.sha256()
    for trace in traces:
        digest.update(np.asarray([len(trace.tokens), *trace.tokens, *trace.acted], np.int32).tobytes())
    return digest.hexdigest()


def check_ids(traces: list[Episode], model: Model, path: str) -> None:
    """Refuses traces that were written for another tokenizer. Raises: UserError."""
    first = traces[0]
    if max(max(trace.tokens) for trace in traces) >= model.tokenizer.size:
        raise UserError(
            f'config.traces={path!r} holds ids beyond the tokenizer of model.path: '
            'the traces were written for another model'
        )
    if first.problem.question not in model.tokenizer.decode(first.tokens[: first.prompt_length]):
        raise UserError(f'config.traces={path!r} was written with another tokenizer than that of model.path')
