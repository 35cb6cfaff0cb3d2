"""What became of traces, on disk and on screen: kept.jsonl, dropped.jsonl, episodes, and how many of which kind."""

from __future__ import annotations

import collections
import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from retool_jax.core import console, episode_files
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Verdict
from retool_jax.core.signals import uninterrupted
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.traces import drafts, repair, verification
from retool_jax.traces.reasons import MORE_REASONS, REASONS
from retool_jax.traces.verification import Judged

KEPT, DROPPED = 'kept.jsonl', 'dropped.jsonl'


def keep(directory: Path, found: Sequence[Judged], tokenizer: Tokenizer, own: Collection[str] = ()) -> dict:
    """Writes what was kept (episodes/, kept.jsonl) and what was dropped and why (dropped.jsonl); returns the summary.

    own: ids of problems whose gold answer is the trace's own. kept.jsonl is a file of traces like any other:
    `rewritten` with `problem` and `answer`.

    Raises:
      UserError: no trace was kept; dropped.jsonl is written then too.
    """
    made = verification.episodes(found)
    samples: collections.Counter[str] = collections.Counter()
    for episode in made:  # anew: traces that were finished later were counted apart
        episode.sample = samples[episode.problem.id]
        samples[episode.problem.id] += 1
    directory.mkdir(parents=True, exist_ok=True)
    with uninterrupted():
        _write(directory / DROPPED, (_row(judged) for judged in found if judged.episode is None))
        if not made:
            counts = ', '.join(f'{count} {reason}' for reason, count in verification.tally(found).items() if count)
            raise UserError(f'no trace was kept ({counts}); {directory / DROPPED} says why of each')
        _write(directory / KEPT, (_row(judged) for judged in found if judged.episode is not None))
        episode_files.write(directory / 'episodes', 'cold_start', made, tokenizer.decode)
    unverified = sum(episode.problem.id in own for episode in made)
    return {
        'counts': verification.tally(found),
        'answers': {'verified': len(made) - unverified, 'own': unverified},
        'repairs': dict(collections.Counter(name for j in found if j.episode for name in j.draft.repairs)),
        'yield': yields(found),
        'statistics': statistics_of(made),
    }


def show(found: Sequence[Judged], own: Collection[str] = ()) -> None:
    """Prints what was kept and dropped, what was mended, and the yield of every source and rewriter."""
    made = verification.episodes(found)
    console.table('traces', ('', 'number', 'share'), shares(verification.tally(found)))
    mended = collections.Counter(name for j in found if j.episode for name in j.draft.repairs)
    if mended:
        rules = [(repair.RULES[name], str(count)) for name, count in mended.items()]
        console.table('mended', ('in traces that were kept', 'number'), rules)
    rows = yields(found)
    if len(rows) > 1:
        cells = [(r['source'], r['rewriter'], str(r['traces']), f'{100 * r["kept"] / r["traces"]:.1f} %') for r in rows]
        console.table('yield', ('source', 'rewriter', 'traces', 'kept'), cells)
    if unverified := sum(episode.problem.id in own for episode in made):
        console.say(
            f'answers: {len(made) - unverified} of {len(made)} traces kept were verified; {unverified} have no '
            'gold answer but their own last box, which verifies nothing: --config.golds=FILE names one'
        )


def shares(counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Rows of a table: why traces are kept or dropped, how many, and their share in %."""
    total = max(sum(counts.values()), 1)
    names = REASONS | MORE_REASONS
    return [(names[reason], str(count), f'{100 * count / total:.1f} %') for reason, count in counts.items()]


def yields(found: Iterable[Judged]) -> list[dict]:
    """How many traces of each source and rewriter were made and kept, and why the others were dropped."""
    rows: dict[tuple[str, str], collections.Counter] = {}
    for judged in found:
        key = (judged.draft.problem.source, judged.draft.rewriter)
        rows.setdefault(key, collections.Counter())[judged.reason] += 1
    return [
        {
            'source': source,
            'rewriter': rewriter,
            'traces': counts.total(),
            'kept': counts['kept'],
            'dropped': {reason: count for reason, count in counts.items() if reason != 'kept'},
        }
        for (source, rewriter), counts in sorted(rows.items())
    ]


def statistics_of(made: Sequence[Episode]) -> dict[str, float]:
    """What the paper counts of its cold-start data and answers (P §3.3): calls, failures, corrections, lengths.

    A correction is a call that runs after one that failed. Lengths are tokens of the policy; medians and means over
    traces.
    """
    calls = [call for e in made for call in e.calls]
    failed = [call for call in calls if call.verdict != Verdict.OK]
    corrected = sum(
        any(a.verdict != Verdict.OK and b.verdict == Verdict.OK for a, b in zip(e.calls, e.calls[1:])) for e in made
    )
    lengths = [e.acted_count for e in made]
    lines = [len([line for line in call.code.splitlines() if line.strip()]) for call in calls]
    mean = lambda values: statistics.fmean(values) if values else 0.0
    return {
        'traces': len(made),
        'problems': len({e.problem.id for e in made}),
        'with_code': mean([bool(e.calls) for e in made]),
        'calls': mean([len(e.calls) for e in made]),
        'failing_calls': len(failed) / max(len(calls), 1),
        'corrections': corrected / max(len(made), 1),
        'lines': mean(lines),
        'length_mean': mean(lengths),
        'length_p50': statistics.median(lengths) if lengths else 0.0,
        'length_max': max(lengths, default=0),
    }


def _row(judged: Judged) -> dict:
    """A line of kept.jsonl or dropped.jsonl."""
    draft, problem = judged.draft, judged.draft.problem
    row = {'id': problem.id, 'source': problem.source, 'problem': problem.question, 'answer': problem.answer}
    row |= {'rewriter': draft.rewriter, 'candidate': draft.candidate} if draft.rewriter else {}
    row |= {'repairs': list(draft.repairs)} if draft.repairs else {}
    if judged.episode is not None:
        return row | {'rewritten': judged.text}
    row |= {'reason': judged.reason, 'detail': judged.detail, 'claimed': judged.claimed, 'printed': judged.printed}
    return row | {'rewritten': drafts.text(draft)}


def _write(path: Path, rows: Iterable[dict]) -> None:
    """A file that appears whole or not."""
    partial = path.with_name(f'.{path.name}')
    partial.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    partial.replace(path)
