"""The demo's whole story on the embedded task, from nothing to a model that knows when to run Python.

Two models of the same size learn the same problems with the same number of steps and episodes: one
may call the interpreter, one may not. `run` reads from top to bottom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core import console, episode_files
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.metrics import Metrics
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode
from retool_jax.model import hf
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import Sampler
from retool_jax.stages import cold_start, folder, parts
from retool_jax.stages.config import Demo, Mix
from retool_jax.tasks import arithmetic
from retool_jax.tasks.grader import Grader
from retool_jax.tasks.summary import summarise
from retool_jax.train import grading, ppo, sft, sources
from retool_jax.train.sft import SFTSettings
from retool_jax.train.state import init_state

HELD_OUT = 'new_operands'  # the headline set; the others are scored apart
APART = ('new_wording', 'larger_range')
TEXT_ONLY = Mix(easy={'mental': 1.0}, needy={'mental': 1.0})


class Story:
    """One run of the recipe: what both models share."""

    def __init__(self, stage: Demo, directory: pathlib.Path, executor: Executor, grader: Grader, writer: Metrics):
        self.stage, self.executor, self.grader, self.writer = stage, executor, grader, writer
        self.recipe, self.ppo, self.forward, self.feedback = stage.recipe, stage.ppo, stage.forward, stage.feedback
        self.directory = directory
        self.seed = stage.run.seed
        self.mesh = parts.make_mesh(stage.mesh)
        self.models = {tools: parts.open_model(dataclasses.replace(stage.model, tools=tools), directory)
                       for tools in (True, False)}
        self.model = self.models[True]  # of tokens and templates, which are the same
        self.clock = 0  # metrics lines written

    def engine(self, tools: bool, training: bool) -> Engine:
        sampling = self.stage.train_sampling if training else self.stage.evaluate_sampling
        return parts.make_engine(self.models[tools], self.samplers[tools], self.stage.turns, self.feedback, sampling,
                                 self.executor if tools else None, self.seed,
                                 parts.TRAINING if training else parts.EVALUATION)

    @functools.cached_property
    def samplers(self) -> dict[bool, Sampler]:
        """One compiled sampler per kind of model."""
        return {tools: parts.make_sampler(model, self.stage.sampler, self.stage.turns)
                for tools, model in self.models.items()}

    def random_model(self) -> Params:
        """What everything starts from."""
        return parts.load_policy(self.stage.model, self.model, self.seed, self.mesh)

    def log(self, name: str, step: int, metrics: dict[str, float]) -> None:
        self.writer.write(self.clock, {'phase': name, 'phase_step': step} | metrics)
        self.clock += 1

    def traces(self, tools: bool) -> list[Episode]:
        """The cold start of one model; what verification dropped is printed."""
        if tools:
            mix = self.stage.mix
            problems = arithmetic.problems('train', self.recipe.problems_seen, self.seed)
        else:
            mix, rng = TEXT_ONLY, random.Random(f'text-only/{self.seed}')
            problems = [p for p in arithmetic.problems('train', 2 * self.recipe.problems_seen, self.seed)
                        if arithmetic.BY_NAME[p.family].mental or rng.random() < self.recipe.text_needy]
        made, counts = cold_start.build(
            problems, mix, self.executor if tools else None, self.feedback, self.model.template,
            self.model.tokenizer, self.seed, max_tokens=min(self.stage.turns.max_tokens, self.forward.row_width))
        console.say(f'cold start ({_kind(tools)}): ' + ', '.join(f'{n} {reason}' for reason, n in counts.items()))
        return made

    def sft(self, tools: bool, traces: Sequence[Episode], params: Params) -> Params:
        """Supervised fine-tuning from `params`."""
        learner = parts.make_tuner(self.forward, self.stage.sft_optimizer, self.recipe.sft_steps, self.model.config,
                                   self.mesh)
        sizes = SFTSettings(steps=self.recipe.sft_steps, epochs=0, batch_tokens=self.recipe.sft_batch_tokens,
                            evaluation_share=0.0)
        with console.progress(f'SFT ({_kind(tools)})', sizes.steps) as advance:
            def log(step, metrics):
                self.log(f'sft_{_kind(tools)}', step, metrics)
                advance(f'loss {metrics["sft/loss"]:.3f}')
            # Both models start from `params`, and a step gives its state's memory to the next.
            state = init_state({'policy': jax.tree.map(jnp.copy, params)}, learner.optimizer)
            # Digits of long mental arithmetic look random to such a model and drown what it can learn, to
            # copy operands: it starts with traces that need nothing else.
            easiest = [trace for trace in traces if trace.calls or _mental(trace)]
            lead = dataclasses.replace(sizes, steps=self.recipe.lead_steps)
            state = sft.train(learner, state, easiest, lead, self.seed, log)
            state = sft.train(learner, state, traces, sizes, self.seed, log)
        return state.params['policy']

    def reinforce(self, tools: bool, params: Params) -> Params:
        """PPO from `params`."""
        learner = parts.make_learner(self.stage, self.model.config, self.mesh)
        asked = self.ppo.problems_per_step * max(self.ppo.dynamic_rounds, 1)
        stream = arithmetic.problems('train', asked * self.ppo.steps, seed=self.seed + 1_000_003)
        with console.progress(f'PPO ({_kind(tools)})', self.ppo.steps) as advance:
            def report(result: ppo.StepResult):
                m = result.metrics
                self.log(f'ppo_{_kind(tools)}', result.step, m)
                episode_files.write(self.directory / 'episodes', f'{_kind(tools)}_{result.step:05d}', result.episodes,
                                    self.model.tokenizer.decode)
                advance(f'correct {m["rewards/correct"]:.2f} code {m["tools/code_ratio"]:.2f}')
            collect = sources.sampled(self.engine(tools, training=True), self.ppo, stream, self.model.template,
                                       self.model.tokenizer, self.grader)
            state = ppo.train(learner, parts.begin(learner, self.ppo.critic, params), self.ppo, collect=collect,
                              seed=self.seed, report=report)
        return state.params['policy']

    def score(self, name: str, tools: bool, params: Params, apart: bool = True) -> dict:
        """avg@k on the held-out sets; the episodes are kept."""
        engine, weights = self.engine(tools, training=False), self.samplers[tools].sync(params)
        sets = {HELD_OUT: self.recipe.problems} | ({s: self.recipe.apart_problems for s in APART} if apart else {})
        found = {}
        with console.progress(f'evaluate {name}', sum(sets.values()) * self.recipe.samples) as advance:
            for split, count in sets.items():
                made = grading.run(engine, weights, 0, arithmetic.problems(split, count, seed=self.seed + 7),
                                    self.recipe.samples, self.model.template, self.model.tokenizer, self.grader,
                                    finished=lambda episode: advance())
                found[split] = summarise(made, self.grader.equal)
                found[split]['code_ratio_needy'] = needy_code_ratio(made)
                episode_files.write(self.directory / 'episodes', f'val_{name}_{split}', made,
                                    self.model.tokenizer.decode)
        self.log(f'val_{name}', 0, {f'val/{split}/avg@{self.recipe.samples}': s['avg'] for split, s in found.items()})
        return found[HELD_OUT] | {'apart': {split: found[split] for split in found if split != HELD_OUT}}


def needy_code_ratio(episodes: Sequence[Episode]) -> float:
    """Share of episodes that ran code, among the families that need it."""
    asked = [any(call.code for call in e.calls) for e in episodes if not _mental(e)]
    return float(np.mean(asked)) if asked else 0.0


@contextlib.contextmanager
def opened(stage: Demo) -> Iterator[Story]:
    """The story of a run's folder, with sandbox, grader and log; what an earlier telling left there is deleted."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(folder.claimed(stage))
        for old in ('model', 'tool_rl', 'checkpoints', 'episodes'):
            shutil.rmtree(directory / old, ignore_errors=True)
        pool = stack.enter_context(parts.open_sandbox(stage.sandbox))
        grader = stack.enter_context(parts.open_grader(stage.reward))
        writer = stack.enter_context(Metrics(directory))
        writer.rewind(None)
        story = Story(stage, directory, pool, grader, writer)
        console.banner(model=story.model, mesh=dict(story.mesh.shape), sandbox=pool, run=directory)
        yield story


def run(stage: Demo) -> dict:
    """The whole story; returns what summary.json holds."""
    began = time.perf_counter()
    with opened(stage) as story:
        # One random model; two cold starts from it.
        base = story.random_model()
        scores = {'base': story.score('base', True, base, apart=False)}
        tool = story.sft(True, story.traces(True), base)
        scores['sft'] = story.score('sft', True, tool)
        tool = story.reinforce(True, tool)
        scores['tool_rl'] = story.score('tool_rl', True, tool)
        text = story.sft(False, story.traces(False), base)
        scores['text_sft'] = story.score('text_sft', False, text, apart=False)
        text = story.reinforce(False, text)
        scores['text_rl'] = story.score('text_rl', False, text)

        checkpoints = Checkpoints(story.directory / 'checkpoints', keep_last=1)
        checkpoints.save(story.ppo.steps, {'tool': tool, 'text': text}, {'steps': story.ppo.steps}, wait=True)
        checkpoints.close()
        hf.save(story.directory / 'tool_rl', story.model.config, tool, jnp.float32, story.directory / 'model')
    summary = scores | {
        'code_ratio': {'before': scores['sft']['code_ratio_needy'], 'after': scores['tool_rl']['code_ratio_needy']},
        'steps': story.ppo.steps, 'seconds': time.perf_counter() - began, 'seed': story.seed}
    (story.directory / 'summary.json').write_text(json.dumps(summary, indent=2))
    return summary


def show(summary: dict) -> None:
    """The last lines of the terminal: scores on held-out problems, per family, and when code was run."""
    names = [name for name in ('base', 'sft', 'tool_rl', 'text_sft', 'text_rl') if name in summary]
    percent = lambda x: f'{100 * x:.1f}'
    k, problems = summary['sft']['k'], summary['sft']['problems']
    rows = [[f'avg@{k}', *(percent(summary[n]['avg']) for n in names)],
            ['95 % interval', *('–'.join(percent(x) for x in summary[n]['ci']) for n in names)]]
    for split in APART:
        rows.append([split, *(percent(summary[n]['apart'][split]['avg']) if split in summary[n]['apart'] else ''
                              for n in names)])
    rows.append(['answers in the right form', *(percent(summary[n]['format']) for n in names)])
    rows.append(['code run where it is needed', *(percent(summary[n]['code_ratio_needy']) for n in names)])
    rows += [[f'  {family}', *(percent(summary[n]['families'][family]) for n in names)]
             for family in summary['sft']['families']]
    print()
    console.table(f'{problems} held-out problems × {k} samples, %', ['', *names], rows)
    print(f'{summary["steps"]} RL steps, {summary["seconds"]:.0f} s, seed {summary["seed"]}')


def _mental(episode: Episode) -> bool:
    return arithmetic.BY_NAME[episode.problem.family].mental


def _kind(tools: bool) -> str:
    return 'tool' if tools else 'text'
