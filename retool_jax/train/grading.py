"""Grading of episodes: requests of k samples per problem, and rewards from the model's own text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from retool_jax.core import processes
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Request
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template, final_text, prompt_ids
from retool_jax.text.tokenizer import Tokenizer


def make_requests(problems: Sequence[Problem], samples: int, template: Template, tokenizer: Tokenizer) -> list[Request]:
    """`samples` requests per problem, those of one problem side by side."""
    requests = []
    for problem in problems:
        prompt = tuple(prompt_ids(template, tokenizer, problem.question))
        requests += [Request(problem, sample, prompt) for sample in range(samples)]
    return requests


def grade(episodes: Sequence[Episode], grader: Grader, tokenizer: Tokenizer) -> None:
    """Sets every episode's reward from the model's own text after the last fed-back token; the authors' lenient rule
    sees everything after the prompt."""
    judges = [e.problem.judge for e in episodes]
    judged = {'judges': judges} if any(judges) else {}  # a reward of one's own need not know of them
    rewards = grader.grade_many(
        [final_text(e, tokenizer) for e in episodes],
        [e.problem.answer for e in episodes],
        [len(e.calls) for e in episodes],
        [tokenizer.decode(e.tokens[e.prompt_length :]) for e in episodes],
        **judged,
    )
    for episode, reward in zip(episodes, rewards):
        episode.reward = reward


def grade_shared(episodes: Sequence[Episode], grader: Grader, tokenizer: Tokenizer) -> None:
    """`grade` where every process of a run holds all episodes: each judges a share, and all see the same verdicts."""
    count = jax.process_count()
    mine = episodes[jax.process_index() :: count]
    grade(mine, grader, tokenizer)
    for first, rewards in enumerate(processes.gather([e.reward for e in mine])):
        for episode, reward in zip(episodes[first::count], rewards):
            episode.reward = reward


def run(
    engine: Engine,
    params: Params,
    version: int,
    problems: Sequence[Problem],
    samples: int,
    template: Template,
    tokenizer: Tokenizer,
    grader: Grader,
    step: int = 0,
    finished: Callable[[Episode], None] = lambda episode: None,
) -> list[Episode]:
    """Graded episodes, problem by problem; params are in the sampling layout."""
    episodes = engine.run(
        params, version, make_requests(problems, samples, template, tokenizer), step, finished=finished
    )
    grade_shared(episodes, grader, tokenizer)
    return episodes
