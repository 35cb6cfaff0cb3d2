"""What recipes leave out of verified traces; nothing, unless asked."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from retool_jax.core.checks import MANY, check, within
from retool_jax.core.errors import UserError
from retool_jax.traces.verification import Judged


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """What is left out of the traces that hold."""

    per_problem: int | None  # traces of one problem, the first ones; at least 1; None: all. H
    # share of a problem's candidates that must hold, in [0, 1]: what hardly ever does may be luck; None: no bound.
    # Difficulty by pass rate is OpenMathReasoning's (arXiv 2504.16891), the bounds are yours
    pass_rate_low: float | None
    pass_rate_high: float | None  # share that may hold: what always does teaches little; in [0, 1]; None: no bound
    # lines of code up to which a snippet is short, at least 1. OpenMathReasoning has a model judge whether code is
    # significant; its length stands in for that. H
    short_lines: int
    short_share: float | None  # share of traces with short snippets alone among those with code, [0, 1); None: any. H
    min_tokens: int | None  # written by the model in a trace, at least 1; None: any. The longest: max_tokens. H

    def __post_init__(self):
        check(
            self,
            per_problem=within(1, MANY),
            pass_rate_low=within(0, 1),
            pass_rate_high=within(0, 1),
            short_lines=within(1, MANY),
            short_share=within(0, 0.999),
            min_tokens=within(1, MANY),
        )
        low, high = self.pass_rate_low, self.pass_rate_high
        if low is not None and high is not None and low > high:
            raise UserError(f'pass_rate_low={low} exceeds pass_rate_high={high}; no problem lies between')


def apply(found: Sequence[Judged], settings: FilterSettings) -> list[Judged]:
    """The same traces, those dropped that a filter leaves out, in the order of the settings but for `per_problem`,
    which counts what the others leave."""
    found = list(found)
    rates = _rates(found)

    def sift(fault) -> None:
        for i, judged in enumerate(found):
            if judged.reason == 'kept' and (said := fault(judged)):
                found[i] = dataclasses.replace(judged, reason='filter', detail=said, episode=None)

    low, high = settings.pass_rate_low, settings.pass_rate_high
    sift(lambda j: _outside(rates[j.draft.problem.id], low, high))
    if settings.min_tokens is not None:
        sift(lambda j: _below(j.episode.acted_count, settings.min_tokens))
    if settings.short_share is not None:
        coded = [j for j in found if j.reason == 'kept' and j.episode.calls]
        short = [j for j in coded if _is_short(j, settings.short_lines)]
        room = int(settings.short_share * (len(coded) - len(short)) / (1 - settings.short_share))
        beyond = {id(j) for j in short[room:]}
        sift(lambda j: f'short snippets alone, of which there are {room} already' if id(j) in beyond else '')
    if settings.per_problem is not None:
        counts: collections.Counter[str] = collections.Counter()

        def one_more(judged: Judged) -> str:
            counts[judged.draft.problem.id] += 1
            full = counts[judged.draft.problem.id] > settings.per_problem
            return f'more than {settings.per_problem} traces of its problem' if full else ''

        sift(one_more)
    return found


def _rates(found: Sequence[Judged]) -> dict[str, float]:
    """Share of the candidates that hold, by problem."""
    total = collections.Counter(judged.draft.problem.id for judged in found)
    kept = collections.Counter(judged.draft.problem.id for judged in found if judged.reason == 'kept')
    return {name: kept[name] / count for name, count in total.items()}


def _outside(rate: float, low: float | None, high: float | None) -> str:
    if low is not None and rate < low:
        return f'{rate:.2f} of the candidates of its problem hold, below {low:g}'
    if high is not None and rate > high:
        return f'{rate:.2f} of the candidates of its problem hold, above {high:g}'
    return ''


def _below(tokens: int, least: int) -> str:
    return f'{tokens} tokens, fewer than {least}' if tokens < least else ''


def _is_short(judged: Judged, lines: int) -> bool:
    return all(sum(bool(line.strip()) for line in call.code.splitlines()) <= lines for call in judged.episode.calls)
