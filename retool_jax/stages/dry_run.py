"""A dry run: everything is built and compiled and one step is taken on fake tools; nothing is kept."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from retool_jax.core import console, processes
from retool_jax.core.records import ExecResult, Verdict
from retool_jax.model import decoder
from retool_jax.rollout.sampler import Sampler
from retool_jax.stages import folder
from retool_jax.stages.config import Reinforcement, require_path
from retool_jax.stages.intake import Intake, tell_overlong
from retool_jax.stages.parts import Parts, build, open_grader
from retool_jax.stages.ppo import open_datasets, open_stream, open_validation
from retool_jax.train import ppo

GIB = 2.0**30


class FakeTools:
    """Answers every snippet at once, with what a short snippet would print."""

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]:
        future: concurrent.futures.Future[ExecResult] = concurrent.futures.Future()
        future.set_result(ExecResult(Verdict.OK, '42\n', ''))
        return future

    def __str__(self) -> str:
        return 'fake: every snippet prints 42'


def run(stage: Reinforcement) -> dict[str, float]:
    """Takes one step as `stages.ppo.run` would, without a sandbox, and prints the step and its memory in GiB.

    Raises: those of the configuration, as in a real run; out of memory as the device reports it.
    """
    require_path(stage.model)
    processes.join()
    with open_grader(stage.reward) as grader, tempfile.TemporaryDirectory() as place, folder.stoppable():
        intake = Intake(stage.reward.unreadable, grader.parses)
        datasets, held_out = open_datasets(stage, intake), open_validation(stage.validation, intake)
        parts = build(stage, Path(place))
        problems = open_stream(stage, datasets, intake, parts.model)
        tell_overlong(held_out, parts.model, stage.turns.max_tokens)
        console.banner(model=parts.model, mesh=dict(parts.mesh.shape), sandbox=FakeTools(), run='none: a dry run')
        sampler = parts.sampler()
        table = memory(parts, sampler)
        source = parts.source(sampler, FakeTools() if stage.model.tools else None, problems, grader)
        results, began = [], time.perf_counter()
        # A step in which the policy is held compiles less than the run needs.
        once = dataclasses.replace(stage.ppo, steps=1, critic_warmup_steps=0)
        ppo.train(
            parts.learner,
            parts.progress,
            once,
            sync=parts.sync(sampler),
            collect=source,
            seed=stage.run.seed,
            residency=parts.residency,
            report=results.append,
        )
        seconds = time.perf_counter() - began
    device, host = processes.peaks()
    table |= ({} if device is None else {'peak of the fullest device': device}) | {'peak of the host process': host}
    metrics = results[0].metrics
    if not processes.leads():
        return table
    console.table('memory', ('buffer', 'GiB'), [(name, f'{size / GIB:.3f}') for name, size in table.items()])
    console.table(
        'one step',
        ('', ''),
        [
            ('seconds, compilation included', f'{seconds:.1f}'),
            ('episodes', len(results[0].episodes)),
            *(
                (name, f'{metrics[name]:.4g}')
                for name in (
                    'time/rollout_s',
                    'time/update_s',
                    'response_length/mean',
                    'mismatch/logprob_abs_max',
                    'actor/grad_norm',
                )
            ),
        ],
    )
    return table


def memory(parts: Parts, sampler: Sampler) -> dict[str, float]:
    """Bytes of the large buffers, over all devices; which of them are there at once: train/residency.py."""
    params, learner = parts.progress.state.params, parts.learner
    form = dict(dtype=jnp.dtype(sampler.settings.dtype), weights=sampler.settings.weights)
    to_sampling = functools.partial(decoder.to_sampling, parts.model.config, **form)
    sizes = {
        'frozen weights': size(learner.frozen),
        'policy, f32': size(params['policy']),
        'critic': size(params.get('critic')),
        'optimizer state': size(parts.progress.state.opt_state),
        'reference policy': size(parts.residency.reference),
        'sampling weights': size(jax.eval_shape(to_sampling, learner.whole(params['policy']))),
        'KV cache': size(jax.eval_shape(sampler.empty).cache),
    }
    return {name: found for name, found in sizes.items() if found}


def size(tree) -> int:
    """Bytes of the arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
