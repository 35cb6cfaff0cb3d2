"""Evaluation: k samples of every problem, graded, with intervals over problems."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np

from retool_jax.core.records import Episode, Problem, Stop, Verdict
from retool_jax.core.pytrees import Params
from retool_jax.rollout.engine import Engine, Request
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template, final_text, prompt_ids
from retool_jax.text.tokenizer import Tokenizer

RESAMPLES = 2000  # of the bootstrap


def make_requests(problems: Sequence[Problem], samples: int, template: Template, tokenizer: Tokenizer) -> list[Request]:
    """`samples` requests per problem, those of one problem side by side."""
    requests = []
    for problem in problems:
        prompt = tuple(prompt_ids(template, tokenizer, problem.question))
        requests += [Request(problem, sample, prompt) for sample in range(samples)]
    return requests


def grade(episodes: Sequence[Episode], grader: Grader, tokenizer: Tokenizer) -> None:
    """Sets every episode's reward from the model's own text after the last interpreter block."""
    rewards = grader.grade_many([final_text(e, tokenizer) for e in episodes], [e.problem.answer for e in episodes],
                                [len(e.calls) for e in episodes])
    for episode, reward in zip(episodes, rewards):
        episode.reward = reward


def run(engine: Engine, params: Params, version: int, problems: Sequence[Problem], samples: int, template: Template,
        tokenizer: Tokenizer, grader: Grader, step: int = 0,
        finished: Callable[[Episode], None] = lambda episode: None) -> list[Episode]:
    """Graded episodes, problem by problem; params are in the sampling layout."""
    episodes = engine.run(params, version, make_requests(problems, samples, template, tokenizer), step,
                          finished=finished)
    grade(episodes, grader, tokenizer)
    return episodes


def pass_at(k: int, correct: int, samples: int) -> float:
    """Unbiased chance that one of k samples is right, 1 − C(n−c, k)/C(n, k) (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(episodes: Sequence[Episode]) -> float:
    """Whether the most frequent answer of one problem is right; ties share."""
    votes = collections.Counter(e.reward.answer for e in episodes if e.reward.answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    right = {e.reward.answer for e in episodes if e.reward.correct}
    return sum(answer in right for answer in winners) / len(winners)


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean, resampling problems."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return [float(values.mean())] * 2 if len(values) else [0.0, 0.0]
    means = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def summarise(episodes: Sequence[Episode]) -> dict:
    """Scores and statistics of graded episodes; every problem must have the same number of samples.

    Returns {avg, ci, k, problems, pass, maj, exact, lenient, code_ratio, families, …}: `avg` is avg@k,
    `pass` pass@k, both in [0, 1]; `families` maps each family to its avg.
    """
    by_problem: dict[str, list[Episode]] = collections.defaultdict(list)
    for episode in episodes:
        by_problem[episode.problem.id].append(episode)
    samples = {len(group) for group in by_problem.values()}
    if len(samples) != 1:
        raise ValueError(f'evaluation: problems have {sorted(samples)} samples; all must have the same number')
    k = samples.pop()
    mean = lambda pick: float(np.mean([float(pick(e)) for e in episodes]))
    averages = {p: float(np.mean([e.reward.correct for e in group])) for p, group in by_problem.items()}
    families: dict[str, list[float]] = collections.defaultdict(list)
    for problem_id, group in by_problem.items():
        families[group[0].problem.family].append(averages[problem_id])
    calls = [call for e in episodes for call in e.calls]
    return {
        'avg': float(np.mean(list(averages.values()))), 'ci': interval(list(averages.values())), 'k': k,
        'problems': len(by_problem),
        'pass': float(np.mean([pass_at(k, sum(e.reward.correct for e in g), k) for g in by_problem.values()])),
        'maj': float(np.mean([majority(g) for g in by_problem.values()])),
        'exact': mean(lambda e: e.reward.exact), 'lenient': mean(lambda e: e.reward.lenient),
        'code_ratio': mean(lambda e: any(c.code for c in e.calls)),
        'format': mean(lambda e: bool(e.reward.answer) and e.stop in (Stop.ANSWER, Stop.EOS)),
        'length': mean(lambda e: e.acted_count), 'turns': mean(lambda e: e.turns),
        'truncated': mean(lambda e: e.stop == Stop.LENGTH), 'void': mean(lambda e: e.void),
        'calls': len(calls) / max(len(episodes), 1),
        'call_failures': float(np.mean([c.verdict != Verdict.OK for c in calls])) if calls else 0.0,
        'families': {name: float(np.mean(x)) for name, x in sorted(families.items())},
    }
