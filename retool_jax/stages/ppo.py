"""A reinforcement-learning run on problem files, with checkpoints, validation, alarms and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import grain
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from retool_jax.core import console, episode_files, metrics, processes, settings
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Problem
from retool_jax.core.signals import uninterrupted
from retool_jax.model import hf
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.library import Model
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import Sampler
from retool_jax.sandbox.guard import Guard
from retool_jax.stages import folder
from retool_jax.stages import parts as parts_stage
from retool_jax.stages.alarms import Watch
from retool_jax.stages.config import CheckpointSettings, HalvesSettings, Reinforcement, require_path
from retool_jax.stages.intake import Intake, tell_overlong
from retool_jax.tasks import arithmetic, summary
from retool_jax.tasks import stream as tasks_stream
from retool_jax.tasks.grader import Grader
from retool_jax.train import grading, ppo
from retool_jax.train import sources as train_sources
from retool_jax.train.learner import Learner
from retool_jax.train.ppo import PPOSettings, Progress, StepResult
from retool_jax.train.residency import Residency
from retool_jax.train.state import add_critic, init_state, make_optimizer

EMBEDDED = 100_000  # problems of the embedded task that are drawn from
CARRIED = 'carried'  # folder of the unfinished episodes of each checkpoint
FREE = ('ppo.steps', 'checkpoints', 'validation', 'watch', 'sandbox')  # may change between two starts of a run
STALL_S = 60.0  # beyond all retries of a call, after which a silent sandbox is given up
REMOTE_S = 900.0  # beyond sandbox.remote's own patience with servers that are gone


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of before anything runs."""

    config: ConfigDict
    sizes: PPOSettings
    halves: HalvesSettings
    model: Model
    mesh: jax.sharding.Mesh
    learner: Learner
    progress: Progress
    residency: Residency

    def sampler(self) -> Sampler:
        return parts_stage.make_sampler(self.model, self.config, self.config.model.tools, self.mesh)

    def engine(self, sampler: Sampler, executor: Executor | None, block: str, purpose: int) -> Engine:
        return parts_stage.make_engine(self.model, sampler, self.config, self.config[block], self.config.model.tools,
                                    executor, self.config.run.seed, purpose)

    def source(self, sampler: Sampler, executor: Executor | None, stream: train_sources.Problems, grader: Grader,
               journal: Journal | None = None) -> train_sources.Source:
        """Rollouts with the current weights."""
        engine = self.engine(sampler, executor, 'train_sampling', parts_stage.TRAINING)
        return train_sources.sampled(engine, self.sizes, stream, self.model.template, self.model.tokenizer,
                                     grader, journal)


def read(config: ConfigDict) -> Reinforcement:
    """The stage that a configuration describes, with the model that a run of it needs."""
    stage = settings.build(Reinforcement, config)
    require_path(stage.model)
    return stage


def build(config: ConfigDict, directory: pathlib.Path) -> Parts:
    """Model, learner and first state; the embedded model's files are written below `directory`."""
    stage = read(config)
    sizes, loss = stage.ppo, stage.loss
    mesh = parts_stage.make_mesh(config.mesh)
    model = parts_stage.open_model(config.model, directory)
    parts_stage.check_context(model, stage.turns.max_tokens, 'turns.max_tokens')
    policy = parts_stage.load_policy(config.model, model, config.run.seed, mesh)
    tree = add_critic(model.config, policy, sizes.critic)
    updates = sizes.minibatches * sizes.epochs
    optimizer = make_optimizer(stage.optimizer, sizes.steps * updates,
                               stage.critic_optimizer if 'critic' in tree else None,
                               sizes.critic_warmup_steps * updates)
    reference = jax.tree.map(jnp.copy, policy) if loss.needs_reference else None
    learner = Learner(model.config, stage.forward, optimizer, mesh, loss=loss,
                      advantage=stage.advantage, temperature=stage.train_sampling.temperature)
    return Parts(config, sizes, stage.halves, model, mesh, learner,
                 Progress(init_state(tree, optimizer)), Residency(sizes.offload, reference))


def run(config: ConfigDict) -> None:
    """Trains to the last step, or goes on where the folder's last checkpoint stands."""
    stage = read(config)
    processes.join()
    if config.halves.episodes:
        train_sources.part_names(config.halves.episodes)
    with parts_stage.open_grader(config.reward) as grader:
        intake = Intake(config.reward.unreadable, grader.parses)
        sources, held_out = open_sources(config, intake), open_validation(config.validation, intake)
        with folder.claimed(config, free=FREE) as directory, folder.stoppable():
            go_on(config, directory, stage.checkpoints, Watch(stage.watch), grader, intake, sources, held_out)


def go_on(config: ConfigDict, directory: pathlib.Path, saving: CheckpointSettings, watch: Watch, grader: Grader,
          intake: Intake, sources: list[grain.MapDataset], held_out: list[Problem]) -> None:
    """`run` in a folder that is its own."""
    parts = build(config, directory)
    sizes, halves, progress, model = parts.sizes, parts.halves, parts.progress, parts.model
    rolls = halves.episodes is None
    stream = open_stream(config, sources, intake, model)
    tell_overlong(held_out, model, config.turns.max_tokens)
    if config.data.sources and rolls:
        folder.bind(directory, fingerprints(config, sources))
    intake.write(directory)

    with contextlib.ExitStack() as stack:
        tools = config.model.tools and (rolls or bool(held_out))
        executor = stack.enter_context(open_guarded(config.sandbox, tools))
        checkpoints = stack.enter_context(Checkpoints(directory / 'checkpoints', saving.keep_last, 'score'))
        writer = stack.enter_context(metrics.Metrics(directory, processes.leads()))
        journal = stack.enter_context(contextlib.closing(open_journal(directory)))
        console.banner(model=model, mesh=dict(parts.mesh.shape), sandbox=executor or 'none', run=directory)
        restore(progress, checkpoints, directory, halves, config.run.seed)
        folder.rewind(directory, progress.done, writer)
        sampler = parts.sampler() if rolls or held_out else None
        source = (parts.source(sampler, executor, stream, grader, journal) if rolls else
                  train_sources.dumped(halves.episodes, model.config.vocab_size, config.forward.row_width))
        advance = stack.enter_context(console.progress('RL', sizes.steps - progress.done))
        validates = lambda done: bool(held_out) and (done == sizes.steps or done % config.validation.every == 0)
        saves = lambda done: done == sizes.steps or done % saving.every == 0
        saved, score = [progress.oldest], {}

        def keep(folder_name: str, name: str, episodes: Sequence[Episode], step: int | None = None) -> None:
            if processes.leads():
                episode_files.write(directory / folder_name, name, episodes, model.tokenizer.decode, step)

        def validate(step: int) -> dict[str, float]:
            engine = parts.engine(sampler, executor, 'evaluate_sampling', parts_stage.EVALUATION)
            made = grading.run(engine, sampler.sync(progress.state.params['policy']), step, held_out,
                                config.validation.samples, model.template, model.tokenizer, grader, step=step)
            keep('episodes', f'val_{step:05d}', made)
            found = summary.summarise(made, grader.equal)
            score.update({'score': found['avg']})
            return summary.as_metrics(pathlib.Path(config.validation.problems).stem, found)

        def save(wait: bool = False) -> None:
            there = checkpoints.steps()
            if progress.done in there:  # its part of `carried/` must not be touched again
                return
            if processes.leads():
                episode_files.remove(directory / CARRIED, {carried_part(step) for step in there})
            if progress.carried:
                keep(CARRIED, carried_part(progress.done), progress.carried, progress.done)
            meta = {'step': progress.done, 'cursor': progress.cursor, 'seed': config.run.seed,
                    'carried': len(progress.carried)} | score
            checkpoints.save(progress.done, parts.residency.whole(progress.state), meta, wait=wait)
            journal.forget(progress.oldest if wait else saved[-1])  # the save before this one is complete
            saved.append(progress.oldest)

        def report(result: StepResult) -> None:
            step, line = result.step, result.metrics
            score.clear()
            if validates(step + 1):
                if result.stopping:
                    return  # the step is made again, and then measured
                line = line | validate(step)
            with uninterrupted():
                keep('episodes', f'train_{step:05d}', result.episodes, step)
                writer.write(step, {'phase': 'ppo' if halves.train else 'rollout'} | line)
                if halves.train and saves(step + 1) and progress.done == step + 1:
                    save()
            advance(f'correct {line["rewards/correct"]:.2f} code {line["tools/code_ratio"]:.2f}')
            ring(watch, result, keep)

        try:
            if halves.train:
                ppo.train(parts.learner, progress, sizes, collect=source, seed=config.run.seed,
                          residency=parts.residency, report=report, due=lambda done: saves(done) or validates(done),
                          spoiled=lambda step, episodes: keep('alarms', f'not_finite_{step:05d}', episodes))
            else:
                roll_out(source, progress, sizes.steps, report, journal)
        except KeyboardInterrupt:
            # Of several processes each hears of it at another point: the last checkpoint has to do.
            if jax.process_count() == 1 and halves.train and progress.done and writer.last == progress.done - 1:
                save(wait=True)
            raise
    if halves.train:
        export(parts, directory)
    if processes.leads():
        (directory / 'summary.json').write_text(json.dumps(summarise(config, directory), indent=2))


def restore(progress: Progress, checkpoints: Checkpoints, directory: pathlib.Path, halves: HalvesSettings,
            seed: int) -> None:
    """Sets `progress` to the last checkpoint; rollouts alone go on behind the last line of metrics."""
    if not halves.train:
        lines = metrics.read(directory)
        if lines:
            progress.done, progress.cursor = lines[-1]['step'] + 1, int(lines[-1]['data/cursor'])
        return
    step = checkpoints.latest()
    if step is None:
        return
    progress.state, meta = checkpoints.restore(step, progress.state)
    if meta['seed'] != seed:
        raise UserError(f'{directory}: the checkpoint of step {step} was made with run.seed={meta["seed"]}, not {seed}')
    progress.done, progress.cursor = step, meta['cursor']
    if meta['carried']:
        progress.carried = tuple(episode_files.read(directory / CARRIED, carried_part(step)))
    console.say(f'goes on at step {step}')


def open_journal(directory: pathlib.Path) -> Journal:
    """The tool results of a run: each process writes its own file, and reads those of all."""
    name = 'journal.jsonl' if processes.leads() else f'journal_{jax.process_index()}.jsonl'
    return Journal(directory / name, others=sorted(directory.glob('journal*.jsonl')))


def carried_part(step: int) -> str:
    """Names the episodes that are unfinished when so many steps are done."""
    return f'after_{step:05d}'


def roll_out(source: train_sources.Source, progress: Progress, steps: int, report: Callable[[StepResult], None],
             journal: Journal) -> None:
    """Rollouts without training: the episodes and what they say of themselves."""
    for step in range(progress.done, steps):
        made = source(progress.state.params['policy'], step, progress.cursor)
        progress.done, progress.cursor = step + 1, made.cursor
        line = made.metrics | train_sources.describe(made.episodes) | {'data/cursor': float(made.cursor)}
        report(StepResult(step, line, made.episodes))
        journal.forget(step + 1)


def ring(watch: Watch, result: StepResult, keep: Callable[[str, str, Sequence[Episode]], None]) -> None:
    """Says each alarm with the step's episodes kept beside the run; raises UserError where it stops the run."""
    for alarm in watch.look(result.metrics, result.episodes):
        name = f'{alarm.name}_{result.step:05d}'
        keep('alarms', name, result.episodes)
        text = f'step {result.step}: {alarm.name}: {alarm.text} (episodes: alarms/{name}.jsonl)'
        if alarm.stop:
            raise UserError(f'{text}; the last checkpoint is intact, and watch.{alarm.name}=warn goes on from it')
        console.say(f'warning: {text}')


def export(parts: Parts, directory: pathlib.Path) -> None:
    """Writes the policy as a Hugging Face directory, `final/`."""
    target = directory / 'final'
    if not target.exists():
        hf.save(target, parts.model.config, parts.progress.state.params['policy'],
                jnp.dtype(parts.config.forward.dtype), parts.config.model.path or directory / 'model')
    console.say(f'model: {target} (a Hugging Face directory)')


def summarise(config: ConfigDict, directory: pathlib.Path) -> dict:
    """What summary.json holds: the last validation's scores, and the run in a few numbers."""
    lines, found = metrics.read(directory), {}
    part = f'val_{config.ppo.steps - 1:05d}'
    if config.validation.problems and part in episode_files.names(directory / 'episodes'):
        name = pathlib.Path(config.validation.problems).stem
        found[name] = summary.summarise(episode_files.read(directory / 'episodes', part))
    return found | {'steps': len(lines), 'seed': config.run.seed,
                    'seconds': sum(line.get('time/step_s', line['time/rollout_s']) for line in lines),
                    'correct': {'first': lines[0]['rewards/correct'], 'last': lines[-1]['rewards/correct']}}


@contextlib.contextmanager
def open_guarded(config: ConfigDict, tools: bool):
    """A sandbox behind a guard that renews it, or None for a run without tools."""
    with parts_stage.open_executor(config, tools) as pool:
        if pool is None:
            yield None
            return
        # Servers elsewhere are waited for by their client, which knows which of them are alive.
        stall_s = (1 + config.retries) * config.wall_s + STALL_S + (REMOTE_S if config.addresses else 0.0)
        with Guard(pool, lambda: parts_stage.make_sandbox(config), stall_s=stall_s) as guard:
            yield guard


def open_sources(config: ConfigDict, intake: Intake) -> list[grain.MapDataset]:
    """The sources of block `data`; without any the embedded task."""
    if not config.data.sources:
        return tasks_stream.open_sources([arithmetic.problems('train', EMBEDDED, config.run.seed)])
    return intake.open(list(config.data.sources))


def open_stream(config: ConfigDict, sources: list[grain.MapDataset], intake: Intake,
                model: Model) -> grain.MapDataset:
    """The endless dataset of problems that leave room for an answer."""
    fitting = intake.fit(sources, model, config.turns.max_tokens)
    return tasks_stream.stream(fitting, list(config.data.weights) or None, config.run.seed)


def fingerprints(config: ConfigDict, sources: list[grain.MapDataset]) -> dict[str, dict[str, int | str]]:
    """What a run is held to of its data (`folder.bind`)."""
    return {f'data.sources={path!r}': {'count': len(dataset), 'sha256': tasks_stream.fingerprint(dataset)}
            for path, dataset in zip(config.data.sources, sources)}


def open_validation(config: ConfigDict, intake: Intake) -> list[Problem]:
    """The problems of block `validation`, none without a path."""
    return intake.read(config.problems, config.limit) if config.problems else []
