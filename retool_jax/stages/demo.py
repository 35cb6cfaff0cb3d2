"""The demo's whole story on the embedded task, from nothing to a model that knows when to run Python.

Two models of the same size learn the same problems with the same number of steps and episodes: one
may call the interpreter, one may not. Each goes through the stages of a run of one's own – cold start, fine-tuning,
PPO – in folders below the demo's, tool/ and text/, in one process that shares sandbox, grader and compiled samplers.
Every stage goes on where it was stopped, and so does the demo. `run` reads from top to bottom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retool_jax.core import console, episode_files, metrics
from retool_jax.core.metrics import Metrics
from retool_jax.core.records import Episode, Problem
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import Sampler
from retool_jax.stages import cold_start, evaluate, folder, parts, ppo, sft
from retool_jax.stages.alarms import ALARMS, WatchSettings
from retool_jax.stages.config import (
    CheckpointSettings,
    ColdStart,
    DataSettings,
    Demo,
    FineTuning,
    HalvesSettings,
    Mix,
    Reinforcement,
    Rollouts,
    RunSettings,
    ValidationSettings,
)
from retool_jax.tasks import arithmetic
from retool_jax.tasks.grader import Grader
from retool_jax.tasks.summary import summarise
from retool_jax.train.sft import SFTSettings

HELD_OUT = 'new_operands'  # the headline set; the others are scored apart
APART = ('new_wording', 'larger_range')
TEXT_ONLY = Mix(easy={'mental': 1.0}, needy={'mental': 1.0})
PLACES = ('traces', 'model.path')  # of stages: below the demo's folder, which may be moved
SFT_SAVES, PPO_SAVES = CheckpointSettings(every=100, keep_last=1), CheckpointSettings(every=4, keep_last=2)
# Nobody is there to be warned, and 20 steps of this size are over before anything could be done.
UNWATCHED = WatchSettings(
    entropy_below=0.0, equal_steps=1, mismatch_above=0.0, episode_mismatch_above=0.0, failures_above=0.0,
    faults_above=0.0, timeouts_above=0.0, **dict.fromkeys(ALARMS, 'ignore'))  # fmt: skip


class Story:
    """One run of the demo: what both models share, and their stages."""

    def __init__(self, stage: Demo, directory: Path, executor: Executor, grader: Grader, writer: Metrics):
        self.stage, self.recipe, self.seed = stage, stage.recipe, stage.run.seed
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
            problems=self.recipe.problems_seen,
            mix=stage.mix if tools else TEXT_ONLY,
            max_tokens=min(stage.turns.max_tokens, stage.forward.row_width),
            sandbox=stage.sandbox,
            feedback=stage.feedback,
            reward=stage.reward,
        )
        with folder.claimed(stage, free=PLACES) as directory:
            if not (directory / 'summary.json').exists():
                wording = cold_start.Wording(model.template, model.tokenizer, stage.feedback, stage.max_tokens)
                executor = self.executor if tools else None
                made, counts = cold_start.build(self.problems(tools), stage.mix, executor, wording, self.seed)
                cold_start.keep(directory, model, made, counts)
            counts = json.loads((directory / 'summary.json').read_text())['counts']
        console.say(f'cold start ({_kind(tools)}): ' + ', '.join(f'{n} {reason}' for reason, n in counts.items()))
        return directory / 'episodes'

    def problems(self, tools: bool) -> list[Problem]:
        """What the cold start of a line is made from."""
        if tools:
            return arithmetic.problems('train', self.recipe.problems_seen, self.seed)
        rng = random.Random(f'text-only/{self.seed}')
        return [
            problem
            for problem in arithmetic.problems('train', 2 * self.recipe.problems_seen, self.seed)
            if arithmetic.BY_NAME[problem.family].mental or rng.random() < self.recipe.text_needy
        ]

    def fine_tune(self, tools: bool, traces: Path) -> Path:
        """Supervised fine-tuning of the random model; the folder of the one that it becomes."""
        stage, recipe = self.stage, self.recipe
        stage = FineTuning(
            **self.common(tools, 'sft'),
            traces=str(traces),
            unreadable='refuse',
            mesh=stage.mesh,
            forward=stage.forward,
            optimizer=stage.sft_optimizer,
            checkpoints=SFT_SAVES,
            sft=SFTSettings(
                steps=recipe.sft_steps, epochs=0, batch_tokens=recipe.sft_batch_tokens, evaluation_share=0.0
            ),
        )
        with folder.claimed(stage, free=PLACES) as directory:
            if not (directory / sft.FINAL).exists():
                made = episode_files.read(traces)
                # Digits of long mental arithmetic look random to such a model and drown what it can learn, to
                # copy operands: it starts with traces that need nothing else.
                easiest = [trace for trace in made if trace.calls or _mental(trace)]
                sft.go_on(
                    stage,
                    directory,
                    parts.open_model(stage.model, directory),
                    made,
                    lead=easiest,
                    lead_steps=recipe.lead_steps,
                )
        self.log(f'sft_{_kind(tools)}', metrics.read(directory))
        return directory / sft.FINAL

    def reinforce(self, tools: bool, start: Path) -> Path:
        """PPO from the model in a folder; the folder of the one that it becomes."""
        blocks = {field.name: getattr(self.stage, field.name) for field in dataclasses.fields(Rollouts)}
        stage = Reinforcement(
            **blocks | self.common(tools, 'ppo', start),
            data=DataSettings(sources=(), weights=()),
            halves=HalvesSettings(episodes=None, train=True),
            watch=UNWATCHED,
            checkpoints=PPO_SAVES,
            validation=ValidationSettings(problems=None, limit=None, every=1, samples=1),
        )
        with folder.claimed(stage, free=PLACES) as directory:
            if not (directory / 'summary.json').exists():
                asked = stage.ppo.problems_per_step * max(stage.ppo.dynamic_rounds, 1)
                stream = arithmetic.problems('train', asked * stage.ppo.steps, seed=self.seed + 1_000_003)
                ppo.go_on(
                    stage,
                    directory,
                    parts.build(stage, directory),
                    self.samplers[tools],
                    self.executor if tools else None,
                    self.grader,
                    stream,
                )
        self.log(f'ppo_{_kind(tools)}', metrics.read(directory))
        for step in range(stage.ppo.steps):
            for suffix in ('npz', 'jsonl'):  # the text last: it is what says that a part is there
                _copy(
                    directory / 'episodes' / f'train_{step:05d}.{suffix}',
                    self.directory / 'episodes' / f'{_kind(tools)}_{step:05d}.{suffix}',
                )
        return directory / ppo.FINAL

    def score(self, name: str, tools: bool, path: Path | None = None, apart: bool = True) -> dict:
        """avg@k on the held-out sets of the model in a folder, or of the random one; the episodes are kept."""
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
        sets = {HELD_OUT: self.recipe.problems} | ({s: self.recipe.apart_problems for s in APART} if apart else {})
        scores = {}
        with (
            console.progress(f'evaluate {name}', sum(sets.values()) * self.recipe.samples) as advance,
            contextlib.closing(folder.open_journal(self.directory)) as journal,
        ):
            for split, count in sets.items():
                made = evaluate.run_kept(
                    engine,
                    weights,
                    arithmetic.problems(split, count, seed=self.seed + 7),
                    self.recipe.samples,
                    self.directory / 'episodes',
                    f'val_{name}_{split}',
                    model.template,
                    model.tokenizer,
                    self.grader,
                    journal,
                    advance,
                )
                scores[split] = summarise(made, self.grader.equal)
                scores[split]['code_ratio_needy'] = needy_code_ratio(made)
        self.log(
            f'val_{name}',
            [{'step': 0} | {f'val/{split}/avg@{self.recipe.samples}': s['avg'] for split, s in scores.items()}],
        )
        return scores[HELD_OUT] | {'apart': {split: scores[split] for split in scores if split != HELD_OUT}}

    def log(self, name: str, lines: Sequence[dict]) -> None:
        """Writes what a stage measured to the demo's own metrics."""
        for line in lines:
            own = {key: value for key, value in line.items() if key not in ('step', 'time', 'phase')}
            self.writer.write(self.clock, {'phase': name, 'phase_step': line['step']} | own)
            self.clock += 1


def needy_code_ratio(episodes: Sequence[Episode]) -> float:
    """Share of episodes that ran code, among the families that need it."""
    asked = [any(call.code for call in e.calls) for e in episodes if not _mental(e)]
    return float(np.mean(asked)) if asked else 0.0


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
        story = Story(stage, directory, executor, grader, writer)
        console.banner(model=story.models[True], mesh=dict(story.mesh.shape), sandbox=executor, run=directory)
        yield story


def run(stage: Demo) -> dict:
    """The whole story, or the rest of it; returns what summary.json holds."""
    began = time.perf_counter()
    with opened(stage) as story:
        # One random model; two cold starts from it.
        scores = {'base': story.score('base', True, apart=False)}
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
            'steps': stage.ppo.steps,
            'seconds': seconds,
            'seed': story.seed,
        }
        folder.write(target, summary)
    return summary


def show(summary: dict) -> None:
    """The last lines of the terminal: scores on held-out problems, per family, and when code was run."""
    names = [name for name in ('base', 'sft', 'tool_rl', 'text_sft', 'text_rl') if name in summary]
    percent = lambda x: f'{100 * x:.1f}'
    k, problems = summary['sft']['k'], summary['sft']['problems']
    rows = [
        [f'avg@{k}', *(percent(summary[n]['avg']) for n in names)],
        ['95 % interval', *('–'.join(percent(x) for x in summary[n]['ci']) for n in names)],
    ]
    for split in APART:
        rows.append(
            [
                split,
                *(percent(summary[n]['apart'][split]['avg']) if split in summary[n]['apart'] else '' for n in names),
            ]
        )
    rows.append(['answers in the right form', *(percent(summary[n]['format']) for n in names)])
    rows.append(['code run where it is needed', *(percent(summary[n]['code_ratio_needy']) for n in names)])
    rows += [
        [f'  {family}', *(percent(summary[n]['families'][family]) for n in names)]
        for family in summary['sft']['families']
    ]
    print()
    console.table(f'{problems} held-out problems × {k} samples, %', ['', *names], rows)
    print(f'{summary["steps"]} RL steps, {summary["seconds"]:.0f} s, seed {summary["seed"]}')


def _mental(episode: Episode) -> bool:
    return arithmetic.BY_NAME[episode.problem.family].mental


def _copy(source: Path, target: Path) -> None:
    """Copies a file or a folder that is not there yet; it appears under its name when it is whole."""
    if target.exists():
        return
    new = target.with_name(f'{target.name}.new')
    if source.is_dir():
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new)
    else:
        new.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, new)
    new.replace(target)


def _kind(tools: bool) -> str:
    return 'tool' if tools else 'text'
