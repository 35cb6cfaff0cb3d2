"""A reinforcement-learning run: PPO on problem files, with checkpoints, validation and resume."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core import episodes as episode_files
from retool_jax.core import metrics as console
from retool_jax.core import settings
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.pytrees import TrainState
from retool_jax.model import hf
from retool_jax.rollout.journal import Journal
from retool_jax.tasks import arithmetic
from retool_jax.tasks import problems as problem_files
from retool_jax.train import assembly, data, evaluate, folder, ppo
from retool_jax.train.ppo import PPOSettings
from retool_jax.train.state import OptimizerSettings, add_critic, init_state, make_optimizer
from retool_jax.train.update import ForwardSettings, Learner

EMBEDDED = 100_000  # problems of the embedded task that are drawn from


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When state is saved."""

    every: int  # steps
    keep_last: int


def run(config: ConfigDict) -> None:
    """Trains to the last step, or goes on where the folder's last checkpoint stands."""
    block = lambda kind, name: settings.build(kind, config[name], name)
    sizes, saving = block(PPOSettings, 'ppo'), block(CheckpointSettings, 'checkpoints')
    tools, seed = config.model.tools, config.run.seed
    stream = open_stream(config.data, seed)
    held_out = open_validation(config.validation)
    mesh = assembly.make_mesh(config.mesh)
    directory = folder.claim(config, free=('ppo.steps', 'checkpoints', 'validation'))
    language = assembly.open_language(config.model, directory)
    policy = assembly.load_policy(config.model, language, seed, mesh)
    tree = add_critic(language.config, policy, sizes.critic)
    updates = sizes.minibatches * sizes.epochs
    optimizer = make_optimizer(block(OptimizerSettings, 'optimizer'), sizes.steps * updates,
                               block(OptimizerSettings, 'critic_optimizer') if 'critic' in tree else None,
                               sizes.critic_warmup_steps * updates)
    loss = block(LossSettings, 'loss')
    reference = jax.tree.map(jnp.copy, policy) if loss.needs_reference else None
    learner = Learner(language.config, block(ForwardSettings, 'forward'), optimizer, mesh, loss=loss,
                      advantage=block(AdvantageSettings, 'advantage'), temperature=config.train_sampling.temperature)

    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.stoppable())
        pool = stack.enter_context(assembly.open_executor(config.sandbox, tools))
        grader = stack.enter_context(assembly.open_grader(config.reward))
        checkpoints = stack.enter_context(Checkpoints(directory / 'checkpoints', saving.keep_last))
        writer = stack.enter_context(console.Metrics(directory))
        journal = stack.enter_context(contextlib.closing(Journal(directory / 'journal.jsonl')))
        console.banner(model=language, mesh=dict(mesh.shape), sandbox=pool, run=directory)
        state, start = init_state(tree, optimizer), checkpoints.latest() or 0
        del tree, policy
        if start:
            state, _ = checkpoints.restore(start, state)
            console.say(f'goes on at step {start}')
        folder.rewind(directory, start, writer)

        sampler = assembly.make_sampler(language, config, tools)
        engine = lambda name, purpose: assembly.make_engine(language, sampler, config, config[name], tools, pool, seed,
                                                            purpose)
        count = sizes.problems_per_step
        advance = stack.enter_context(console.progress('PPO', sizes.steps - start))

        def validate(step: int, state: TrainState) -> dict[str, float]:
            made = evaluate.run(engine('evaluate_sampling', assembly.EVALUATION), sampler.sync(state.params['policy']),
                                step, held_out, config.validation.samples, language.template, language.tokenizer,
                                grader, step=step)
            episode_files.write(directory / 'episodes', f'val_{step:05d}', made, language.tokenizer.decode)
            return evaluate.as_metrics('held_out', evaluate.summarise(made))

        def report(result: ppo.StepResult, state: TrainState) -> None:
            step, metrics = result.step, result.metrics
            last = step + 1 == sizes.steps
            episode_files.write(directory / 'episodes', f'train_{step:05d}', result.episodes, language.tokenizer.decode)
            if held_out and (last or (step + 1) % config.validation.every == 0):
                metrics = metrics | validate(step, state)
            writer.write(step, {'phase': 'ppo'} | metrics)
            if last or (step + 1) % saving.every == 0:
                checkpoints.save(step + 1, state, {'step': step + 1})
            advance(f'correct {metrics["rewards/correct"]:.2f} code {metrics["tools/code_ratio"]:.2f}')

        state = ppo.train(engine('train_sampling', assembly.TRAINING), learner, state, sizes,
                          problems=lambda step: data.next_batch(stream, step * count, count)[0],
                          template=language.template, tokenizer=language.tokenizer, grader=grader, seed=seed,
                          start=start, reference=reference, journal=journal, report=report)
    export = directory / 'final'
    if not export.exists():
        hf.save(export, language.config, state.params['policy'], jnp.dtype(config.forward.dtype),
                config.model.path or directory / 'model')
    console.say(f'model: {export} (a Hugging Face directory)')


def open_stream(config: ConfigDict, seed: int):
    """The endless dataset of block `data`; without sources the embedded task."""
    sources = list(config.sources) or [arithmetic.problems('train', EMBEDDED, seed)]
    return data.stream(sources, list(config.weights) or None, seed)


def open_validation(config: ConfigDict) -> list:
    """The problems of block `validation`, none without a path."""
    return problem_files.read(config.problems, config.limit) if config.problems else []
