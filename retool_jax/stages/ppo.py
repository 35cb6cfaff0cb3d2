"""A reinforcement-learning run on problem files, with checkpoints, validation, alarms and resume."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import grain

from retool_jax.core import console, episode_files, metrics, mirror, processes, profile, signals, storage
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem
from retool_jax.core.signals import uninterrupted
from retool_jax.model import lora
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import Sampler
from retool_jax.stages import folder
from retool_jax.stages.alarms import Watch
from retool_jax.stages.config import HalvesSettings, Reinforcement, ValidationSettings, require_path
from retool_jax.stages.intake import Intake, tell_overlong
from retool_jax.stages.parts import EVALUATION, FINAL, Model, Parts, build, open_grader, open_guarded
from retool_jax.tasks import arithmetic, stream, summary
from retool_jax.tasks.grader import Grader
from retool_jax.train import grading, ppo, sources
from retool_jax.train.ppo import Progress, StepResult

EMBEDDED = 100_000  # problems of the embedded task that are drawn from
CARRIED = 'carried'  # folder of the unfinished episodes of each checkpoint
STOPPED = 'stopped'  # folder of the finished episodes of a step that was stopped
BRIEF = ('episodes/train_*', 'alarms/*', 'profile/*')  # files that a resume knows by name and step alone
# May change between two starts of a run.
FREE = ('ppo.steps', 'checkpoints', 'validation', 'watch', 'sandbox', 'episodes', 'profile')


def run(stage: Reinforcement) -> None:
    """Trains to the last step, or goes on where the folder's last checkpoint stands."""
    require_path(stage.model)
    processes.join()
    if stage.halves.episodes:
        sources.part_names(given_episodes(stage.halves))
    with open_grader(stage.reward) as grader:
        intake = Intake(stage.reward.unreadable, grader.parses)
        datasets, held_out = open_datasets(stage, intake), open_validation(stage.validation, intake)
        with folder.claimed(stage, FREE, BRIEF) as directory, folder.stoppable():
            parts, rolls = build(stage, directory), stage.halves.episodes is None
            problems = open_stream(stage, datasets, intake, parts.model)
            tell_overlong(held_out, parts.model, stage.turns.max_tokens)
            if stage.data.sources and rolls:
                folder.bind(directory, fingerprints(stage, datasets))
            intake.write(directory)
            sampler = parts.sampler() if rolls or held_out else None
            with open_guarded(stage.sandbox, stage.model.tools and sampler is not None) as executor:
                console.banner(
                    model=parts.model,
                    mesh=dict(parts.mesh.shape),
                    sandbox=executor or 'none',
                    run=mirror.place(directory),
                )
                go_on(stage, directory, parts, sampler, executor, grader, problems, held_out)


def go_on(
    stage: Reinforcement,
    directory: Path,
    parts: Parts,
    sampler: Sampler | None,
    executor: Executor | None,
    grader: Grader,
    problems: sources.Problems,
    held_out: Sequence[Problem] = (),
) -> None:
    """`run` in a folder that is its own, with all that it needs; sampler: None where nothing is sampled."""
    sizes, halves, saving, validation = stage.ppo, stage.halves, stage.checkpoints, stage.validation
    progress, model, watch = parts.progress, parts.model, Watch(stage.watch)
    rolls = halves.episodes is None
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(directory / 'checkpoints', saving.keep_last, 'score'))
        writer = stack.enter_context(metrics.Metrics(directory, processes.leads()))
        journal = stack.enter_context(contextlib.closing(folder.open_journal(directory)))
        restore(progress, checkpoints, directory, halves, stage.run.seed)
        folder.rewind(directory, progress.done, writer)
        source = (
            parts.source(sampler, executor, problems, grader, journal, directory / STOPPED)
            if rolls
            else sources.dumped(given_episodes(halves), model.config.vocab_size, stage.forward.row_width)
        )
        sync = parts.sync(sampler) if sampler else lambda policy: {}  # episodes that are read need no weights
        begin = stack.enter_context(profile.traced(directory / 'profile', stage.profile.steps))
        advance = stack.enter_context(console.progress('RL', sizes.steps - progress.done))
        validates = lambda done: bool(held_out) and (done == sizes.steps or done % validation.every == 0)
        saves = lambda done: done == sizes.steps or done % saving.every == 0
        saved, score, written = [progress.oldest], {}, [progress.done]

        def collect(weights: Params, step: int, *given) -> sources.Collected:
            begin(step, weights)
            return source(weights, step, *given)

        def keep(folder_name: str, name: str, episodes: Sequence[Episode], step: int | None = None) -> None:
            if processes.leads():
                episode_files.write(directory / folder_name, name, episodes, model.tokenizer.decode, step)

        def remember(name: str, step: int, episodes: Sequence[Episode]) -> None:
            """Keeps the episodes of a step for an alarm: those that are kept already under its name too."""
            if not processes.leads():
                return
            if not episode_files.link(directory / 'episodes', train_part(step), directory / 'alarms', name):
                keep('alarms', name, episodes)

        def validate(step: int) -> dict[str, float]:
            engine = parts.engine(sampler, executor, stage.evaluate_sampling, EVALUATION)
            made = grading.run(
                engine,
                ppo.sampling_weights(progress, parts.residency, sync),
                step,
                held_out,
                validation.samples,
                model.template,
                model.tokenizer,
                grader,
                step=step,
            )
            keep('episodes', f'val_{step:05d}', made)
            found = summary.summarise(made, grader.equal)
            score.update({'score': found['avg']})
            return summary.as_metrics(stream.title(validation.problems), found)

        def save(wait: bool = False) -> None:
            there = checkpoints.steps()
            if progress.done in there:  # its part of `carried/` must not be touched again
                return
            if processes.leads():
                episode_files.remove(directory / CARRIED, {carried_part(step) for step in there})
                sources.forget_aside(directory / STOPPED, max(there, default=0))
            if progress.carried:
                keep(CARRIED, carried_part(progress.done), progress.carried, progress.done)
            meta = {
                'step': progress.done,
                'cursor': progress.cursor,
                'seed': stage.run.seed,
                'carried': len(progress.carried),
            }
            meta |= lora.describe(stage.lora) | score
            mirror.publish(directory)  # what the checkpoint counts on
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
                if stage.episodes.keeps(step, sizes.steps):
                    keep('episodes', train_part(step), result.episodes, step)
                if processes.leads():
                    metrics.append(directory / metrics.HOSTS, step, result.hosts)
                writer.write(step, {'phase': 'ppo' if halves.train else 'rollout'} | line)
                mirror.publish(directory)
                written.append(step + 1)
                if halves.train and (saves(step + 1) or result.timed) and progress.done == step + 1:
                    save()
            advance(f'correct {line["rewards/correct"]:.2f} code {line["tools/code_ratio"]:.2f}')
            ring(watch, result, remember)

        try:
            if halves.train:
                ppo.train(
                    parts.learner,
                    progress,
                    sizes,
                    sync=sync,
                    collect=collect,
                    seed=stage.run.seed,
                    residency=parts.residency,
                    report=report,
                    due=lambda done: saves(done) or validates(done),
                    spoiled=lambda step, episodes: keep('alarms', f'not_finite_{step:05d}', episodes),
                    save_every_s=saving.every_s,
                )
            else:
                weights = ppo.sampling_weights(progress, parts.residency, sync)
                roll_out(collect, weights, progress, sizes.steps, report, journal)
        except KeyboardInterrupt:
            if halves.train and progress.done and written[-1] == progress.done:
                save(wait=True)
            raise
    if halves.train:
        export(parts, directory)
    if processes.leads():
        shutil.rmtree(directory / STOPPED, ignore_errors=True)
        folder.write(directory / 'summary.json', summarise(stage, directory))


def restore(progress: Progress, checkpoints: Checkpoints, directory: Path, halves: HalvesSettings, seed: int) -> None:
    """Sets `progress` to the last checkpoint; rollouts alone go on behind the last line of metrics.

    Raises:
      UserError: the checkpoint is of another seed, or not as `Checkpoints.restore` wants it.
    """
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


def train_part(step: int) -> str:
    """Names the episodes of a step."""
    return f'train_{step:05d}'


def carried_part(step: int) -> str:
    """Names the episodes that are unfinished when so many steps are done."""
    return f'after_{step:05d}'


def roll_out(
    source: sources.Source,
    weights: Params,
    progress: Progress,
    steps: int,
    report: Callable[[StepResult], None],
    journal: Journal,
) -> None:
    """Rollouts without training: the episodes and what they say of themselves."""
    for step in range(progress.done, steps):
        with uninterrupted():
            made = source(weights, step, progress.cursor)
            progress.done, progress.cursor = step + 1, made.cursor
            line = made.metrics | sources.describe(made.episodes) | {'data/cursor': float(made.cursor)}
            report(StepResult(step, line, made.episodes, hosts=made.hosts))
            journal.forget(step + 1)
            processes.agree([processes.word(signals.told())])


def ring(watch: Watch, result: StepResult, remember: Callable[[str, int, Sequence[Episode]], None]) -> None:
    """Says each alarm with the step's episodes kept beside the run; raises UserError where it stops the run."""
    for alarm in watch.look(result.metrics, result.episodes, result.hosts):
        name = f'{alarm.name}_{result.step:05d}'
        remember(name, result.step, result.episodes)
        text = f'step {result.step}: {alarm.name}: {alarm.text} (episodes: alarms/{name}.jsonl.gz)'
        if alarm.stop:
            raise UserError(f'{text}; the last checkpoint is intact, and watch.{alarm.name}=warn goes on from it')
        console.say(f'warning: {text}')


def export(parts: Parts, directory: Path) -> None:
    """Writes the policy below `directory`, and says where."""
    parts.export(directory)
    console.say(f'model: {mirror.place(directory / FINAL)} (a Hugging Face directory)')


def summarise(stage: Reinforcement, directory: Path) -> dict:
    """What summary.json holds: the last validation's scores, and the run in a few numbers."""
    lines, found = metrics.read(directory), {}
    part = f'val_{stage.ppo.steps - 1:05d}'
    if stage.validation.problems and part in episode_files.names(directory / 'episodes'):
        name = stream.title(stage.validation.problems)
        found[name] = summary.summarise(episode_files.read(directory / 'episodes', part))
    return found | {
        'steps': len(lines),
        'seed': stage.run.seed,
        'seconds': sum(line.get('time/step_s', line['time/rollout_s']) for line in lines),
        'correct': {'first': lines[0]['rewards/correct'], 'last': lines[-1]['rewards/correct']},
    }


def open_datasets(stage: Reinforcement, intake: Intake) -> list[grain.MapDataset]:
    """A dataset for each of `data.sources`; without any the embedded task."""
    if not stage.data.sources:
        return stream.open_sources([arithmetic.problems('train', EMBEDDED, stage.run.seed)])
    return intake.open(stage.data.sources)


def open_stream(
    stage: Reinforcement, datasets: list[grain.MapDataset], intake: Intake, model: Model
) -> grain.MapDataset:
    """The endless dataset of problems that leave room for an answer."""
    fitting = intake.fit(datasets, model, stage.turns.max_tokens)
    return stream.stream(fitting, list(stage.data.weights) or None, stage.run.seed)


def fingerprints(stage: Reinforcement, datasets: list[grain.MapDataset]) -> dict[str, dict[str, int | str]]:
    """What a run is held to of its data (`folder.bind`)."""
    return {
        f'data.sources={path!r}': {'count': len(dataset), 'sha256': stream.fingerprint(dataset)}
        for path, dataset in zip(stage.data.sources, datasets)
    }


def given_episodes(halves: HalvesSettings) -> str:
    """The folder of `halves.episodes`, on this machine."""
    return str(storage.local('halves.episodes', halves.episodes))


def open_validation(validation: ValidationSettings, intake: Intake) -> list[Problem]:
    """The problems that a policy is scored on while it learns, none without a file of them."""
    if not validation.problems:
        return []
    return intake.read(validation.problems, validation.limit, key='validation.problems')
