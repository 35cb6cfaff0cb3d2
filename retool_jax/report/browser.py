"""The episodes that a report carries: a fair selection within a budget, and the compact form they travel in.

The page holds one small index of all of them, parsed at once, and one block per episode, parsed when it
is opened.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from retool_jax.report import labels
from retool_jax.report.runs import Arrays, Part, Run, Transcript

MOST_OUTPUT = 4_000  # characters of stdout and of stderr kept beside the feedback


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a report carries; it says how much beyond that is left out."""

    episodes: int = 2_000
    characters: int = 30_000_000  # of text, all episodes together
    tokens: int = 2_000_000  # of token views, all episodes together
    parts: int = 60  # files of training episodes that are read per kind, evenly over the run


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """An episode of the browser."""

    part: Part
    number: int  # its place in the part
    transcript: Transcript


def spread(parts: Sequence[Part], limit: int) -> list[Part]:
    """At most `limit` training parts of each kind, evenly over the run with both ends, and all others."""
    chosen: list[Part] = []
    for _, same in groupby(sorted(parts), key=lambda p: (p.kind, p.training)):
        same = list(same)
        if same[0].training and len(same) > limit:
            same = [same[round(i * (len(same) - 1) / (limit - 1))] for i in range(limit)]
        chosen += same
    return chosen


def quotas(counts: Sequence[int], limit: int) -> list[int]:
    """How many of each part's episodes to take: all where they fit into `limit`, else an even share."""
    shares, left = [0] * len(counts), limit
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    for done, i in enumerate(order):  # small parts leave room for the others
        shares[i] = min(counts[i], left // (len(order) - done))
        left -= shares[i]
    return shares


def choose(part: Part, transcripts: Sequence[Transcript], share: int) -> list[Chosen]:
    """`share` episodes of a part drawn evenly at random, always the same ones, in their order."""
    numbers = range(len(transcripts))
    if len(transcripts) > share:
        numbers = sorted(random.Random(part.name).sample(numbers, share))
    return [Chosen(part, i, transcripts[i]) for i in numbers]


def embed(run: Run, chosen: Sequence[Chosen], limits: Limits) -> tuple[dict[str, Any], list[str], int]:
    """The index, one JSON block per episode that the budget holds, and how many of them carry their tokens.

    Episodes enter in an order that is random but fixed, so that a tight budget thins all parts alike.
    """
    order = random.Random(0).sample(range(len(chosen)), len(chosen))
    kept, with_tokens, characters, tokens = set(), set(), 0, 0
    for i in order:
        transcript = chosen[i].transcript
        characters += sum(len(s.text) for s in transcript.segments)
        if characters > limits.characters and kept:
            break
        kept.add(i)
        tokens += sum(s.tokens for s in transcript.segments)
        if tokens <= limits.tokens:
            with_tokens.add(i)
    shown = [c for i, c in enumerate(chosen) if i in kept]
    arrays = _arrays(run, [c for i, c in enumerate(chosen) if i in with_tokens])
    blocks = [dump(_body(c.transcript, arrays.get((c.part, c.number)))) for c in shown]
    ids = sorted({int(t) for a in arrays.values() for t in np.unique(a.tokens)})
    return _index(run, shown, ids), blocks, len(arrays)


def dump(value: Any) -> str:
    """JSON that is safe inside a script element, whatever the text in it."""
    return (
        json.dumps(value, ensure_ascii=False, separators=(',', ':'))
        .replace('<', '\\u003c')
        .replace('\u2028', '\\u2028')
        .replace('\u2029', '\\u2029')
        .encode('utf-8', 'replace')
        .decode()
    )


def _arrays(run: Run, chosen: Sequence[Chosen]) -> dict[tuple[Part, int], Arrays]:
    arrays = {}
    for part, same in groupby(sorted(chosen, key=lambda c: (c.part, c.number)), key=lambda c: c.part):
        numbers = [c.number for c in same]
        arrays |= {(part, n): a for n, a in zip(numbers, run.arrays(part, numbers))}
    return arrays


def _index(run: Run, shown: Sequence[Chosen], ids: Sequence[int]) -> dict[str, Any]:
    """Columns are lists side by side; problems and parts are named once."""
    problems = {c.transcript.problem: 0 for c in shown}
    problems = {problem: i for i, problem in enumerate(problems)}
    parts = {part: i for i, part in enumerate(dict.fromkeys(c.part for c in shown))}
    rows = [
        [
            parts[c.part],
            t.step,
            problems[t.problem],
            t.sample,
            None if t.reward is None else t.reward.value,
            int(t.correct),
            [str(call.verdict) for call in t.calls],
            '' if t.stop is None else str(t.stop),
            t.length,
            t.turns,
            int(t.void),
        ]
        for c in shown
        for t in [c.transcript]
    ]
    return {
        'rows': rows,
        'parts': [{'name': p.name, 'kind': p.kind, 'step': p.step, 'label': labels.title(p)} for p in parts],
        'problems': [[p.id, p.question, p.answer, p.family, p.source] for p in problems],
        'vocabulary': _spellings(run, ids),
    }


def _spellings(run: Run, ids: Sequence[int]) -> dict[int, str]:
    """How the ids in use are written; bytes that are no text alone as \\xNN. Empty without a tokenizer."""
    tokenizer = run.tokenizer
    if tokenizer is None:
        return {}
    special = {i: name for name, i in tokenizer.special_ids.items()}
    return {i: special.get(i) or tokenizer.spell([i]).decode('utf-8', 'backslashreplace') for i in ids}


def _body(transcript: Transcript, arrays: Arrays | None) -> dict[str, Any]:
    """What the viewer shows: segments, calls (each with the segment it was answered by), reward, tokens."""
    segments, starts, position = [], {}, 0
    for i, segment in enumerate(transcript.segments):
        segments.append([segment.kind[0], segment.text])
        if segment.kind == 'tool':
            starts[position] = i
        position += segment.tokens
    calls = []
    for call in transcript.calls:
        hidden = [
            _clip(text) if text.strip() and text.strip() not in call.feedback else ''
            for text in (call.stdout, call.stderr)
        ]
        calls.append([starts.get(call.position, -1), str(call.verdict), round(call.wall_s, 4), *hidden])
    body: dict[str, Any] = {'s': segments, 'c': calls}
    if transcript.reward is not None:
        r = transcript.reward
        body['r'] = [r.answer, int(r.exact), int(r.lenient)]
    if arrays is not None:
        body['t'] = {
            'ids': arrays.tokens.tolist(),
            'acted': _runs(arrays.acted.astype(int)),
            'logprobs': [None if x != x else round(1000 * x) for x in arrays.logprobs[arrays.acted].tolist()],
            'versions': _runs(arrays.versions[arrays.acted]),
        }
    return body


def _runs(column: np.ndarray) -> list[int]:
    """Run lengths: [value, count, value, count, …]."""
    runs: list[int] = []
    for value, same in groupby(column.tolist()):
        runs += [value, sum(1 for _ in same)]
    return runs


def _clip(text: str) -> str:
    return text if len(text) <= MOST_OUTPUT else f'{text[:MOST_OUTPUT]}\n… [{len(text) - MOST_OUTPUT} characters more]'
