"""Evaluation: k samples of every problem, graded, with intervals over problems."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from retool_jax.core import console, processes
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem, Stop, Verdict
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Request
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template, final_text, prompt_ids
from retool_jax.text.tokenizer import Tokenizer

type Equal = Callable[[str, str], bool]

RESAMPLES = 2000  # of the bootstrap
LONGEST_ANSWER = 200  # characters kept in summary.json
LISTED = 50  # problems; longer lists stand in summary.json and the report alone


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
    rewards = grader.grade_many([final_text(e, tokenizer) for e in episodes], [e.problem.answer for e in episodes],
                                [len(e.calls) for e in episodes],
                                [tokenizer.decode(e.tokens[e.prompt_length:]) for e in episodes])
    for episode, reward in zip(episodes, rewards):
        episode.reward = reward


def grade_shared(episodes: Sequence[Episode], grader: Grader, tokenizer: Tokenizer) -> None:
    """`grade` where every process of a run holds all episodes: each judges a share, and all see the same verdicts."""
    count = jax.process_count()
    mine = episodes[jax.process_index()::count]
    grade(mine, grader, tokenizer)
    for first, rewards in enumerate(processes.gather([e.reward for e in mine])):
        for episode, reward in zip(episodes[first::count], rewards):
            episode.reward = reward


def run(engine: Engine, params: Params, version: int, problems: Sequence[Problem], samples: int, template: Template,
        tokenizer: Tokenizer, grader: Grader, step: int = 0,
        finished: Callable[[Episode], None] = lambda episode: None) -> list[Episode]:
    """Graded episodes, problem by problem; params are in the sampling layout."""
    episodes = engine.run(params, version, make_requests(problems, samples, template, tokenizer), step,
                          finished=finished)
    grade_shared(episodes, grader, tokenizer)
    return episodes


def pass_at(k: int, correct: int, samples: int) -> float:
    """Unbiased chance that one of k samples is right, 1 − C(n−c, k)/C(n, k) (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def count_votes(episodes: Sequence[Episode], equal: Equal) -> list[list[Episode]]:
    """The samples of one problem that answered, those of equal answers together, the first written first.

    Right ones are equal to the gold answer and so to each other; a wrong one joins the first wrong one that it equals.
    """
    answers: list[list[Episode]] = []
    for episode in episodes:
        reward = episode.reward
        if not reward.answer:
            continue
        joined = next((given for given in answers if given[0].reward.correct == reward.correct and (
            reward.correct or equal(reward.answer, given[0].reward.answer))), None)
        if joined is None:
            answers.append(joined := [])
        joined.append(episode)
    return answers


def winners(episodes: Sequence[Episode], equal: Equal) -> list[Episode]:
    """The first of each of the most frequent answers of one problem; none where nobody answered."""
    votes = count_votes(episodes, equal)
    most = max(map(len, votes), default=0)
    return [given[0] for given in votes if len(given) == most]


def majority(episodes: Sequence[Episode], equal: Equal | None = None) -> float:
    """Whether the most frequent answer of one problem is right; ties share. `equal` as in `summarise`."""
    with _judging(equal) as equal:
        found = winners(episodes, equal)
    return sum(e.reward.correct for e in found) / max(len(found), 1)


@contextlib.contextmanager
def _judging(equal: Equal | None) -> Iterator[Equal]:
    if equal is not None:
        yield equal
        return
    with Grader() as grader:
        yield grader.equal


def interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean, resampling problems."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return [float(values.mean())] * 2 if len(values) else [0.0, 0.0]
    means = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def summarise(episodes: Sequence[Episode], equal: Equal | None = None) -> dict:
    """Scores and statistics of graded episodes; every problem must have the same number of samples.

    Returns {k, problems, avg, pass, maj, exact, lenient, …}, shares in [0, 1]: `avg` is avg@k by equivalence,
    `exact` and `lenient` the same by equal strings and by the authors' rule, `pass_at` pass@j for j up to k;
    `ci` is the interval of avg, `NAME_ci` that of another; `families` maps each family to its avg, `verdicts`
    and `stops` count calls and episodes, `by_problem` has a record for each problem. No clock enters: the
    same episodes give the same summary. `equal(answer, other)` says which answers are one vote (`Grader.equal`);
    None: a grader of its own. Errors: ValueError for unequal numbers of samples.
    """
    by_problem: dict[str, list[Episode]] = collections.defaultdict(list)
    for episode in episodes:
        by_problem[episode.problem.id].append(episode)
    samples = {len(group) for group in by_problem.values()}
    if len(samples) != 1:
        raise ValueError(f'evaluation: problems have {sorted(samples)} samples; all must have the same number')
    k = samples.pop()
    with _judging(equal) as equal:
        records = {name: _record(group, equal) for name, group in by_problem.items()}
    column = lambda name: [record[name] for record in records.values()]
    mean = lambda pick: float(np.mean([float(pick(e)) for e in episodes]))
    families: dict[str, list[float]] = collections.defaultdict(list)
    for name, group in by_problem.items():
        families[group[0].problem.family].append(records[name]['avg'])
    calls = [call for e in episodes for call in e.calls]
    right = [sum(e.reward.correct for e in group) for group in by_problem.values()]
    passed = [pass_at(k, c, k) for c in right]
    scores = {'avg': column('avg'), 'pass': passed, 'maj': column('maj'), 'exact': column('exact'),
              'lenient': column('lenient')}
    intervals = {'ci' if name == 'avg' else f'{name}_ci': interval(values) for name, values in scores.items()}
    return {
        'k': k, 'problems': len(by_problem), **{name: float(np.mean(values)) for name, values in scores.items()},
        **intervals,
        'pass_at': {str(j): float(np.mean([pass_at(j, c, k) for c in right])) for j in _counts(k)},
        'code_ratio': mean(lambda e: any(c.code for c in e.calls)),
        'format': mean(lambda e: bool(e.reward.answer) and e.stop in (Stop.ANSWER, Stop.EOS)),
        'length': mean(lambda e: e.acted_count), 'turns': mean(lambda e: e.turns),
        'truncated': mean(lambda e: e.stop == Stop.LENGTH), 'void': mean(lambda e: e.void),
        'calls': len(calls) / max(len(episodes), 1),
        'call_failures': float(np.mean([c.verdict != Verdict.OK for c in calls])) if calls else 0.0,
        'verdicts': _tally(c.verdict for c in calls), 'stops': _tally(e.stop for e in episodes),
        'families': {name: float(np.mean(x)) for name, x in sorted(families.items())},
        'by_problem': records,
    }


def _record(group: Sequence[Episode], equal: Equal) -> dict:
    """What is known of one problem: shares of its samples, the gold answer and the most frequent one."""
    share = lambda pick: float(np.mean([float(pick(e)) for e in group]))
    found = winners(group, equal)
    return {
        'avg': share(lambda e: e.reward.correct), 'maj': sum(e.reward.correct for e in found) / max(len(found), 1),
        'exact': share(lambda e: e.reward.exact),
        'lenient': share(lambda e: e.reward.lenient), 'gold': group[0].problem.answer,
        'answer': found[0].reward.answer[:LONGEST_ANSWER] if found else '', 'family': group[0].problem.family,
        'code': share(lambda e: any(c.code for c in e.calls)), 'calls': share(lambda e: len(e.calls)),
        'length': share(lambda e: e.acted_count), 'truncated': share(lambda e: e.stop == Stop.LENGTH),
    }


def _counts(k: int) -> list[int]:
    """1, 2, 4, … and k."""
    return sorted({*(2 ** i for i in range(k.bit_length())), k})


def _tally(values: Iterable) -> dict[str, int]:
    return {str(value): count for value, count in sorted(collections.Counter(values).items())}


def as_metrics(name: str, found: dict) -> dict[str, float]:
    """The scores of `summarise` under their names in metrics.jsonl."""
    k = found['k']
    return {f'val/{name}/{kind}@{k}': found[kind] for kind in ('avg', 'pass', 'maj')}


def show(name: str, found: dict) -> None:
    """Prints scores with intervals, what else is known of the episodes and calls, and each problem."""
    percent, k = lambda x: f'{100 * x:.1f} %', found['k']
    rows = [(title, percent(found[key]), ' – '.join(percent(x) for x in found[ci])) for title, key, ci in (
        (f'avg@{k}', 'avg', 'ci'), (f'pass@{k}', 'pass', 'pass_ci'), (f'maj@{k}', 'maj', 'maj_ci'),
        (f'avg@{k}, exact string', 'exact', 'exact_ci'), (f'avg@{k}, lenient rule', 'lenient', 'lenient_ci'))]
    rows += [(f'pass@{j}', percent(value), '') for j, value in found['pass_at'].items() if int(j) != k]
    console.table(f'{name}: {found["problems"]} problems × {k} samples', ('score', 'value', '95 % interval'), rows)
    episodes = found['problems'] * k
    of_all = lambda counts: ', '.join(f'{n} {word}' for word, n in counts.items()) or '–'
    console.table('', (f'{episodes} episodes', ''), [
        ('answered in form', percent(found['format'])), ('cut off at the budget (LENGTH)', percent(found['truncated'])),
        ('void', percent(found['void'])), ('ended by', of_all(found['stops'])),
        ('tokens written', f'{found["length"]:.0f}'), ('turns', f'{found["turns"]:.2f}'),
        ('ran code', percent(found['code_ratio'])), ('calls', f'{found["calls"]:.2f}'),
        ('calls that failed', percent(found['call_failures'])), ('verdicts of calls', of_all(found['verdicts']))])
    if len(found['families']) > 1:
        console.table('', ('family', f'avg@{k}'), [(f, percent(x)) for f, x in found['families'].items()])
    if len(found['by_problem']) > LISTED:
        print(f'The {len(found["by_problem"])} problems stand in summary.json and in the report.')
        return
    shares = ('avg', 'maj', 'exact', 'lenient', 'code', 'truncated')
    columns = ('problem, %', f'avg@{k}', 'maj', 'exact', 'lenient', 'code', 'LENGTH', 'tokens', 'gold', 'answer')
    console.table('', columns, [
        (problem, *(f'{100 * r[key]:.0f}' for key in shares), f'{r["length"]:.0f}', _brief(r['gold']),
         _brief(r['answer']) or '–') for problem, r in found['by_problem'].items()])


def _brief(text: str) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= 24 else text[:23] + '…'
