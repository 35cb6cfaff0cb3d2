"""Scores of k graded samples per problem: avg@k, pass@k, maj@k, with intervals over problems."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from retool_jax.core.records import Episode, Stop, Verdict
from retool_jax.tasks.grader import Grader

type Equal = Callable[[str, str], bool]  # whether two answers are one vote

RESAMPLES = 2000  # of the bootstrap
LONGEST_ANSWER = 200  # characters kept in summary.json


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
        joined = next(
            (
                given
                for given in answers
                if given[0].reward.correct == reward.correct
                and (reward.correct or equal(reward.answer, given[0].reward.answer))
            ),
            None,
        )
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
        most_frequent = winners(episodes, equal)
    return sum(e.reward.correct for e in most_frequent) / max(len(most_frequent), 1)


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


def difference(scores: Mapping[str, float], others: Mapping[str, float], seed: int = 0) -> tuple[float, list[float]]:
    """Mean difference of two models' scores on the same problems, with its 95 % bootstrap interval over problems.

    Paired: a resampled problem counts with both scores.

    Raises:
      ValueError: the problems are not the same ones.
    """
    if scores.keys() != others.keys():
        raise ValueError(f'difference: {len(scores)} and {len(others)} problems, which are not the same ones')
    gains = [scores[problem] - others[problem] for problem in scores]
    return float(np.mean(gains)), interval(gains, seed)


def summarise(episodes: Sequence[Episode], equal: Equal | None = None) -> dict:
    """Scores and statistics of graded episodes; every problem must have the same number of samples.

    Returns {k, problems, avg, pass, maj, exact, lenient, …}, shares in [0, 1]: `avg` is avg@k by equivalence,
    `exact` and `lenient` the same by equal strings and by the authors' rule, `pass_at` pass@j for j up to k;
    `ci` is the interval of avg, `NAME_ci` that of another; `families` maps each family to its avg, `verdicts`
    and `stops` count calls and episodes, `by_problem` has a record for each problem. No clock enters: the
    same episodes give the same summary. `equal(answer, other)` says which answers are one vote (`Grader.equal`);
    None: a grader of its own. Raises: ValueError for unequal numbers of samples.
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
    scores = {
        'avg': column('avg'),
        'pass': passed,
        'maj': column('maj'),
        'exact': column('exact'),
        'lenient': column('lenient'),
    }
    intervals = {'ci' if name == 'avg' else f'{name}_ci': interval(values) for name, values in scores.items()}
    return {
        'k': k,
        'problems': len(by_problem),
        **{name: float(np.mean(values)) for name, values in scores.items()},
        **intervals,
        'pass_at': {str(j): float(np.mean([pass_at(j, c, k) for c in right])) for j in _counts(k)},
        'code_ratio': mean(lambda e: any(c.code for c in e.calls)),
        'format': mean(lambda e: bool(e.reward.answer) and e.stop in (Stop.ANSWER, Stop.EOS)),
        'length': mean(lambda e: e.acted_count),
        'turns': mean(lambda e: e.turns),
        'truncated': mean(lambda e: e.stop == Stop.LENGTH),
        'void': mean(lambda e: e.void),
        'calls': len(calls) / max(len(episodes), 1),
        'call_failures': float(np.mean([c.verdict != Verdict.OK for c in calls])) if calls else 0.0,
        'verdicts': _tally(c.verdict for c in calls),
        'stops': _tally(e.stop for e in episodes),
        'families': {name: float(np.mean(x)) for name, x in sorted(families.items())},
        'by_problem': records,
    }


def _record(group: Sequence[Episode], equal: Equal) -> dict:
    """What is known of one problem: shares of its samples, the gold answer and the most frequent one."""
    share = lambda pick: float(np.mean([float(pick(e)) for e in group]))
    most_frequent = winners(group, equal)
    return {
        'avg': share(lambda e: e.reward.correct),
        'maj': sum(e.reward.correct for e in most_frequent) / max(len(most_frequent), 1),
        'exact': share(lambda e: e.reward.exact),
        'lenient': share(lambda e: e.reward.lenient),
        'gold': group[0].problem.answer,
        'answer': most_frequent[0].reward.answer[:LONGEST_ANSWER] if most_frequent else '',
        'family': group[0].problem.family,
        'code': share(lambda e: any(c.code for c in e.calls)),
        'calls': share(lambda e: len(e.calls)),
        'length': share(lambda e: e.acted_count),
        'truncated': share(lambda e: e.stop == Stop.LENGTH),
    }


def _counts(k: int) -> list[int]:
    """1, 2, 4, … and k."""
    return sorted({*(2**i for i in range(k.bit_length())), k})


def _tally(values: Iterable) -> dict[str, int]:
    return {str(value): count for value, count in sorted(collections.Counter(values).items())}


def as_metrics(name: str, scores: dict) -> dict[str, float]:
    """The scores of `summarise` under their names in metrics.jsonl."""
    k = scores['k']
    return {f'val/{name}/{kind}@{k}': scores[kind] for kind in ('avg', 'pass', 'maj')}
