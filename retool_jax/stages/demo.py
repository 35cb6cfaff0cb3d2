"""The demo's whole story, from a cold start to a model that knows when to run Python.

The task is the embedded one with a tiny model from nothing, or problems of generators with a model that others trained
(`demo_task`). Two models of the same size learn the same problems with the same number of steps and episodes: one
may call the interpreter, one may not. Each goes through the stages of a run of one's own – cold start, fine-tuning,
PPO – in folders below the demo's, tool/ and text/, in one process that shares sandbox, grader and compiled samplers.
Every stage goes on where it was stopped, and so does the demo. `run` reads from top to bottom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retool_jax.core import console, episode_files, metrics, processes
from retool_jax.core.metrics import Metrics
from retool_jax.core.records import Episode
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import Sampler
from retool_jax.stages import evaluate, folder, parts, ppo, pretrained, sft
from retool_jax.stages.alarms import ALARMS, WatchSettings
from retool_jax.stages.config import (
    CheckpointSettings,
    ColdStart,
    EpisodeSettings,
    FineTuning,
    HalvesSettings,
    ProfileSettings,
    Reinforcement,
    Rollouts,
    RunSettings,
    ValidationSettings,
)
from retool_jax.stages.demo_config import Demo
from retool_jax.stages.demo_task import Task, open_task
from retool_jax.tasks import summary as scoring
from retool_jax.tasks.grader import Grader
from retool_jax.traces import outcome, verification
from retool_jax.traces.verification import Wording
from retool_jax.train import sft as train_sft
from retool_jax.train.sft import SFTSettings

PLACES = ('traces', 'model.path')  # of stages: below the demo's folder, or in a cache, both of which may be moved
FIXED = ('watch', 'episodes', 'profile')  # blocks of RL that no flag of the demo reaches; versions add keys to them
SFT_SAVES = 5  # checkpoints of a fine-tuning, at each of which the held-out loss is measured
MODELS = ('base', 'base_tool', 'sft', 'tool_rl', 'text_sft', 'text_rl')  # as they are scored, in the story's order
# What RL gained, and what the tool adds: pairs of models that are compared problem by problem.
GAINS = (('tool_rl', 'sft'), ('tool_rl', 'text_rl'), ('text_rl', 'text_sft'))
# Nobody is there to be warned, and 20 steps of this size are over before anything could be done.
UNWATCHED = WatchSettings(
    entropy_below=0.0, equal_steps=1, mismatch_above=0.0, episode_mismatch_above=0.0, failures_above=0.0,
    faults_above=0.0, timeouts_above=0.0, straggler_above=0.0, straggler_steps=1,
    **dict.fromkeys(ALARMS, 'ignore'))  # fmt: skip


class Story:
    """One run of the demo: what both models share, and their stages."""

    def __init__(self, stage: Demo, task: Task, directory: Path, executor: Executor, grader: Grader, writer: Metrics):
        """stage: with the path of the model that the story begins with, None for random weights of the embedded one."""
        self.stage, self.task, self.recipe, self.seed = stage, task, stage.recipe, stage.run.seed
        self.directory, self.executor, self.grader, self.writer = directory, executor, grader, writer
        self.mesh = parts.make_mesh(stage.mesh)
        self.models = {
            tools: parts.open_model(dataclasses.replace(stage.model, tools=tools), directory) for tools in (True, False)
        }  # before they have learnt anything
        self.clock = 0  # metrics lines written

    @functools.cached_property
    def samplers(self) -> dict[bool, Sampler]:
        """One compiled sampler per kind of model, for rollouts and evaluations alike."""
        return {
            tools: parts.make_sampler(model, self.stage.sampler, self.stage.turns, self.mesh)
            for tools, model in self.models.items()
        }

    def common(self, tools: bool, name: str, start: Path | None = None) -> dict:
        """The blocks that every stage of a line has: its folder, and the model that it begins with."""
        model = dataclasses.replace(self.stage.model, tools=tools, **({'path': str(start)} if start else {}))
        place = self.directory / _kind(tools) / name
        return {'run': RunSettings(dir=str(place), seed=self.seed), 'model': model}

    def cold_start(self, tools: bool) -> Path:
        """The traces of one line, as a folder of episodes; what verification dropped is printed."""
        stage, model = self.stage, self.models[tools]
        stage = ColdStart(
            **self.common(tools, 'cold_start'),
            traces=None,
            golds=None,
            worked=self.task.worked,
            problems=self.recipe.problems_seen,
            mix=stage.mix if tools else stage.text.mix,
            max_tokens=min(stage.turns.max_tokens, stage.forward.row_width),
            sandbox=stage.sandbox,
            feedback=stage.feedback,
            reward=stage.reward,
        )
        with folder.claimed(stage, free=PLACES) as directory:
            if not (directory / 'summary.json').exists():
                wording = Wording(model.template, model.tokenizer, stage.feedback, stage.max_tokens)
                executor = self.executor if tools else None
                found = verification.verify(self.task.drafts(tools), executor, wording, self.task.equal)
                folder.write(directory / 'summary.json', outcome.keep(directory, found, model.tokenizer))
            counts = json.loads((directory / 'summary.json').read_text())['counts']
        console.say(f'cold start ({_kind(tools)}): ' + ', '.join(f'{n} {reason}' for reason, n in counts.items()))
        return directory / 'episodes'

    def fine_tune(self, tools: bool, traces: Path) -> Path:
        """Supervised fine-tuning of the first model to its last step; the folder of the one that it becomes."""
        stage, recipe = self.stage, self.recipe
        saves = CheckpointSettings(every=-(-recipe.sft_steps // SFT_SAVES), every_s=0.0, keep_last=1)
        stage = FineTuning(
            **self.common(tools, 'sft'),
            traces=str(traces),
            unreadable='refuse',
            lora=stage.lora if stage.model.path else dataclasses.replace(stage.lora, rank=0),
            mesh=stage.mesh,
            forward=stage.forward,
            optimizer=stage.sft_optimizer,
            checkpoints=saves,
            sft=SFTSettings(
                steps=recipe.sft_steps,
                epochs=0,
                batch_tokens=recipe.sft_batch_tokens,
                evaluation_share=recipe.evaluation_share,
            ),
        )
        with folder.claimed(stage, free=PLACES) as directory:
            if not (directory / sft.FINAL).exists():
                made, held_out = train_sft.hold_out(episode_files.read(traces), recipe.evaluation_share)
                model = parts.open_model(stage.model, directory)
                sft.go_on(
                    stage,
                    directory,
                    model,
                    made,
                    held_out,
                    lead=self.task.lead(made, model.tokenizer.decode),
                    lead_steps=recipe.lead_steps if tools else self.stage.text.lead_steps,
                    best=False,
                )
        self.log(f'sft_{_kind(tools)}', metrics.read(directory))
        return directory / sft.FINAL

    def reinforce(self, tools: bool, start: Path) -> Path:
        """PPO from the model in a folder; the folder of the one that it becomes."""
        blocks = {field.name: getattr(self.stage, field.name) for field in dataclasses.fields(Rollouts)}
        if not tools:
            text = self.stage.text
            blocks |= {'optimizer': text.optimizer, 'advantage': text.advantage, 'ppo': self.stage.text_ppo()}
        stage = Reinforcement(
            **blocks | self.common(tools, 'ppo', start),
            data=self.stage.data,
            halves=HalvesSettings(episodes=None, train=True),
            watch=UNWATCHED,
            checkpoints=self.stage.checkpoints,
            validation=ValidationSettings(problems=None, limit=None, every=1, samples=1),
            episodes=EpisodeSettings(keep=1),
            profile=ProfileSettings(steps=()),
        )
        with folder.claimed(stage, free=(*PLACES, *FIXED)) as directory:
            if not (directory / 'summary.json').exists():
                asked = stage.ppo.problems_per_step * max(stage.ppo.dynamic_rounds, 1)
                ppo.go_on(
                    stage,
                    directory,
                    parts.build(stage, directory),
                    self.samplers[tools],
                    self.executor if tools else None,
                    self.grader,
                    self.task.asked(asked * stage.ppo.steps),
                )
        self.log(f'ppo_{_kind(tools)}', metrics.read(directory))
        there = episode_files.names(self.directory / 'episodes')
        for step in range(stage.ppo.steps):
            if (name := f'{_kind(tools)}_{step:05d}') not in there:
                episode_files.link(directory / 'episodes', f'train_{step:05d}', self.directory / 'episodes', name)
        return directory / ppo.FINAL

    def score(self, name: str, tools: bool, path: Path | None = None, apart: bool = True) -> dict:
        """avg@k on the held-out sets of the model in a folder, or of the first one; the episodes are kept.

        apart: on all sets; else, unless the task asks for all of all, on the headline set alone.
        """
        stage, model, sampler = self.stage, self.models[tools], self.samplers[tools]
        settings = dataclasses.replace(stage.model, path=str(path)) if path else stage.model
        weights = sampler.sync(parts.load_policy(settings, model, self.seed, self.mesh))
        engine = parts.make_engine(
            model,
            sampler,
            stage.turns,
            stage.feedback,
            stage.evaluate_sampling,
            self.executor if tools else None,
            self.seed,
            parts.EVALUATION,
        )
        headline, *others = self.task.held_out
        sets = [headline, *others] if apart or self.task.everywhere else [headline]
        scores, asked = {}, sum(len(self.task.held_out[split]) for split in sets)
        with (
            console.progress(f'evaluate {name}', asked * self.recipe.samples) as advance,
            contextlib.closing(folder.open_journal(self.directory)) as journal,
        ):
            for split in sets:
                made = evaluate.run_kept(
                    engine,
                    weights,
                    self.task.held_out[split],
                    self.recipe.samples,
                    self.directory / 'episodes',
                    f'val_{name}_{split}',
                    model.template,
                    model.tokenizer,
                    self.grader,
                    journal,
                    advance,
                )
                scores[split] = scoring.summarise(made, self.grader.equal)
                scores[split]['code_ratio_needy'] = self.needy_code_ratio(made)
        self.log(
            f'val_{name}',
            [{'step': 0} | {f'val/{split}/avg@{self.recipe.samples}': s['avg'] for split, s in scores.items()}],
        )
        return scores[headline] | {'apart': {split: scores[split] for split in scores if split != headline}}

    def needy_code_ratio(self, episodes: Sequence[Episode]) -> float:
        """Share of episodes that ran code, among the problems that need it."""
        asked = [any(call.code for call in e.calls) for e in episodes if self.task.needs_tool(e.problem)]
        return float(np.mean(asked)) if asked else 0.0

    def log(self, name: str, lines: Sequence[dict]) -> None:
        """Writes what a stage measured to the demo's own metrics."""
        for line in lines:
            own = {key: value for key, value in line.items() if key not in ('step', 'time', 'phase')}
            self.writer.write(self.clock, {'phase': name, 'phase_step': line['step']} | own)
            self.clock += 1


@contextlib.contextmanager
def opened(stage: Demo) -> Iterator[Story]:
    """The story of a run's folder, with sandbox, grader and log."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(folder.claimed(stage))
        stack.enter_context(folder.stoppable())
        executor = stack.enter_context(parts.open_guarded(stage.sandbox, tools=True))
        grader = stack.enter_context(parts.open_grader(stage.reward))
        writer = stack.enter_context(Metrics(directory))
        writer.rewind(None)  # every stage writes its lines anew, the finished ones at once
        task = open_task(stage, grader)
        if stage.model.path is None and stage.package.requirement:
            path = str(pretrained.fetch(stage.package))
            stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, path=path))
        story = Story(stage, task, directory, executor, grader, writer)
        console.banner(model=story.models[True], mesh=dict(story.mesh.shape), sandbox=executor, run=directory)
        yield story


def run(stage: Demo) -> dict:
    """The whole story, or the rest of it; returns what summary.json holds."""
    processes.refuse('the demo')
    began = time.perf_counter()
    with opened(stage) as story:
        # One model to begin with; two cold starts from it.
        scores = {name: story.score(name, tools, apart=False) for name, tools in story.task.bases.items()}
        tool = story.fine_tune(True, story.cold_start(True))
        scores['sft'] = story.score('sft', True, tool)
        tool = story.reinforce(True, tool)
        scores['tool_rl'] = story.score('tool_rl', True, tool)
        text = story.fine_tune(False, story.cold_start(False))
        scores['text_sft'] = story.score('text_sft', False, text, apart=False)
        text = story.reinforce(False, text)
        scores['text_rl'] = story.score('text_rl', False, text)
        _copy(tool, story.directory / 'tool_rl')
        target = story.directory / 'summary.json'
        # Whoever asks for a finished story again is told how long it took.
        seconds = json.loads(target.read_text())['seconds'] if target.exists() else time.perf_counter() - began
        summary = scores | {
            'code_ratio': {'before': scores['sft']['code_ratio_needy'], 'after': scores['tool_rl']['code_ratio_needy']},
            'gains': gains(scores),
            'data': story.task.facts(),
            'headline': next(iter(story.task.held_out)),
            'steps': stage.ppo.steps,
            'seconds': seconds,
            'seed': story.seed,
        }
        folder.write(target, summary)
    return summary


def gains(scores: dict) -> dict:
    """Differences of avg@k on the headline set between models, {'tool_rl − sft': {'points': …, 'ci': …}, …}."""
    record = lambda name: {problem: found['avg'] for problem, found in scores[name]['by_problem'].items()}
    made = {}
    for better, other in GAINS:
        points, ci = scoring.difference(record(better), record(other))
        made[f'{better} − {other}'] = {'points': points, 'ci': ci}
    return made


def show(summary: dict) -> None:
    """The last lines of the terminal: scores on held-out problems, per family, and when code was run."""
    names = [name for name in MODELS if name in summary]
    percent = lambda x: f'{100 * x:.1f}'
    k, problems = summary['sft']['k'], summary['sft']['problems']
    rows = [
        [f'avg@{k}', *(percent(summary[n]['avg']) for n in names)],
        ['95 % interval', *('–'.join(percent(x) for x in summary[n]['ci']) for n in names)],
    ]
    for split in summary['sft']['apart']:
        rows.append(
            [
                split,
                *(percent(summary[n]['apart'][split]['avg']) if split in summary[n]['apart'] else '' for n in names),
            ]
        )
    rows.append(['answers in the right form', *(percent(summary[n]['format']) for n in names)])
    rows.append(['code run where it is needed', *(percent(summary[n]['code_ratio_needy']) for n in names)])
    rows += [
        [title, *(f'{summary[n][key]:.{digits}f}' for n in names)]
        for title, key, digits in (('calls an answer', 'calls', 2), ('tokens an answer', 'length', 0))
    ]
    rows += [
        [f'  {family}', *(percent(summary[n]['families'][family]) for n in names)]
        for family in summary['sft']['families']
    ]
    print()
    console.table(f'{summary["headline"]}: {problems} held-out problems × {k} samples, %', ['', *names], rows)
    for name, gain in summary['gains'].items():
        print(f'{name}: {percent(gain["points"])} points ({"–".join(map(percent, gain["ci"]))})')
    if summary['data']:
        print(
            '{held_out_in_training} of {held_out_questions} held-out questions stand among the {training_questions} '
            'of training'.format(**summary['data'])
        )
    print(f'{summary["steps"]} RL steps, {summary["seconds"]:.0f} s, seed {summary["seed"]}')


def _copy(source: Path, target: Path) -> None:
    """Copies a folder that is not there yet; it appears under its name when it is whole."""
    if target.exists():
        return
    new = target.with_name(f'{target.name}.new')
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source, new)
    new.replace(target)


def _kind(tools: bool) -> str:
    return 'tool' if tools else 'text'
