"""Evaluation: k samples of every problem, graded, with intervals over problems."""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from retool_jax.core import episodes as episode_files
from retool_jax.core import metrics as console
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem, Stop, Verdict
from retool_jax.rollout.engine import Engine, Request
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template, final_text, prompt_ids
from retool_jax.text.tokenizer import Tokenizer

RESAMPLES = 2000  # of the bootstrap
PART_ROWS = 8  # episodes per part and slot: the slots that idle at a part's end cost a few percent


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


def run_in_parts(engine: Engine, params: Params, problems: Sequence[Problem], samples: int, directory: pathlib.Path,
                 name: str, template: Template, tokenizer: Tokenizer, grader: Grader,
                 advance: Callable[..., None]) -> list[Episode]:
    """`run` a few problems at a time, each part kept below `directory`; parts that are there are read, not
    made again. `advance(n=…)` counts episodes. Errors: ValueError for a part of other problems."""
    count = max(1, PART_ROWS * engine.sampler.settings.rows // samples)
    there, episodes = set(episode_files.names(directory)), []
    for start in range(0, len(problems), count):
        part, asked = f'val_{name}_{start:05d}', problems[start:start + count]
        if part in there:
            made = episode_files.read(directory, part)
            if [(e.problem, e.sample) for e in made] != [(p, sample) for p in asked for sample in range(samples)]:
                raise ValueError(f'{directory / part}.jsonl holds other problems than those asked for; '
                                 'choose another run.dir')
            advance(n=len(made))
        else:
            made = run(engine, params, 0, asked, samples, template, tokenizer, grader,
                       finished=lambda episode: advance())
            episode_files.write(directory, part, made, tokenizer.decode)
        episodes += made
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

    Returns {avg, ci, k, problems, pass, maj, exact, lenient, code_ratio, families, by_problem, …}: `avg` is
    avg@k, `pass` pass@k, `maj` maj@k, all in [0, 1], `pass_ci` and `maj_ci` their intervals; `families` maps
    each family to its avg, `by_problem` each problem's id to its own.
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
    passed = [pass_at(k, sum(e.reward.correct for e in group), k) for group in by_problem.values()]
    won = [majority(group) for group in by_problem.values()]
    return {
        'avg': float(np.mean(list(averages.values()))), 'ci': interval(list(averages.values())), 'k': k,
        'problems': len(by_problem), 'pass': float(np.mean(passed)), 'pass_ci': interval(passed),
        'maj': float(np.mean(won)), 'maj_ci': interval(won),
        'exact': mean(lambda e: e.reward.exact), 'lenient': mean(lambda e: e.reward.lenient),
        'code_ratio': mean(lambda e: any(c.code for c in e.calls)),
        'format': mean(lambda e: bool(e.reward.answer) and e.stop in (Stop.ANSWER, Stop.EOS)),
        'length': mean(lambda e: e.acted_count), 'turns': mean(lambda e: e.turns),
        'truncated': mean(lambda e: e.stop == Stop.LENGTH), 'void': mean(lambda e: e.void),
        'calls': len(calls) / max(len(episodes), 1),
        'call_failures': float(np.mean([c.verdict != Verdict.OK for c in calls])) if calls else 0.0,
        'families': {name: float(np.mean(x)) for name, x in sorted(families.items())},
        'by_problem': averages,
    }


def as_metrics(name: str, found: dict) -> dict[str, float]:
    """The scores of `summarise` under their names in metrics.jsonl."""
    k = found['k']
    return {f'val/{name}/{kind}@{k}': found[kind] for kind in ('avg', 'pass', 'maj')}


def show(name: str, found: dict) -> None:
    """Prints scores with intervals and what else is known of the episodes."""
    percent = lambda x: f'{100 * x:.1f} %'
    rows = [(f'{kind}@{found["k"]}', percent(found[kind]), ' – '.join(percent(x) for x in found[ci]))
            for kind, ci in (('avg', 'ci'), ('pass', 'pass_ci'), ('maj', 'maj_ci'))]
    console.table(f'{name}: {found["problems"]} problems × {found["k"]} samples',
                  ('score', 'value', '95 % interval'), rows)
    console.table('', ('episodes', ''), [
        ('answered', percent(found['format'])), ('cut off at the budget (LENGTH)', percent(found['truncated'])),
        ('void', percent(found['void'])), ('ran code', percent(found['code_ratio'])),
        ('calls per episode', f'{found["calls"]:.2f}'), ('calls that failed', percent(found['call_failures'])),
        ('tokens written', f'{found["length"]:.0f}'), ('exact string', percent(found['exact'])),
        ('lenient rule', percent(found['lenient']))])
    if len(found['by_problem']) <= 50:
        console.table('', ('problem', f'avg@{found["k"]}'),
                      [(name, percent(x)) for name, x in sorted(found['by_problem'].items())])
