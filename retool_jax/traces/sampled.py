"""The rewriter that is the student itself: its own engine samples traces, hints make it think of the interpreter.

Recipes: START (arXiv 2503.04625) puts a hint where a model doubts ("Wait") or is about to close, and keeps what is
right with the tool where it fails without; CoRT (2506.09820) puts one at the beginning of the thoughts;
OpenMathReasoning (2504.16891) trains on what was kept and samples again.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Request
from retool_jax.tasks import answers
from retool_jax.text.template import Template, prompt_ids
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.traces import repair
from retool_jax.traces.drafts import Draft
from retool_jax.traces.intake import refuse
from retool_jax.traces.verification import Equal, Judged

NAME = 'self'
PLACES = ('think', 'wait', 'answer')
_WAIT = re.compile(r'\bwait\b[,.]?', re.IGNORECASE)
_CLOSING = re.compile(r'<answer>|\\boxed\s*\{')
AGAIN = 1  # step of the second sampling: another stream of randomness than the first


@dataclasses.dataclass(frozen=True)
class Voice:
    """A model that samples: with the interpreter, or without."""

    engine: Engine
    params: Params  # in the sampling layout
    template: Template
    tokenizer: Tokenizer

    def sample(
        self, asked: Sequence[tuple[Problem, int, str]], step: int, finished: Callable[[Episode], None]
    ) -> list[Episode]:
        """An episode for each (problem, sample, beginning of its answer), which counts as the model's own words."""
        requests = []
        for problem, sample, begun in asked:
            ids = tuple(prompt_ids(self.template, self.tokenizer, problem.question))
            episode = Episode(problem, sample, step, prompt_length=len(ids))
            episode.append(ids, acted=False)
            said = self.tokenizer.encode(begun)
            episode.append(said, acted=True, logprobs=[0.0] * len(said), version=0)
            requests.append(Request.resume(episode) if begun else Request(problem, sample, ids))
        return self.engine.run(self.params, 0, requests, step, finished=finished)

    def written(self, episode: Episode) -> str:
        """The whole answer of an episode, its given beginning included and the token that ends it left out."""
        ids = episode.tokens[len(prompt_ids(self.template, self.tokenizer, episode.problem.question)) :]
        return self.tokenizer.decode([i for i in ids if i not in self.tokenizer.eos_ids])


@dataclasses.dataclass(frozen=True)
class Written:
    """A sampled answer, as it is kept on disk."""

    id: str  # the problem's
    sample: int
    text: str  # whole, with what the interpreter gave back
    calls: int

    @staticmethod
    def of(episode: Episode, text: str) -> Written:
        return Written(episode.problem.id, episode.sample, text, len(episode.calls))


def write(
    voice: Voice,
    problems: Sequence[Problem],
    candidates: int,
    hint: str = '',
    places: Sequence[str] = (),
    finished: Callable[[Episode], None] = lambda episode: None,
) -> list[Written]:
    """`candidates` answers to each problem, side by side.

    Hints stand in `places` in turn: 'think' at the beginning of the answer; 'wait' behind the first such word, 'answer'
    before the answer, of one that was sampled without a hint and called nothing. One that calls by itself is taken as
    it is, and so is one that has no place for its hint.
    """
    asked = [(p, n, hint if _place(places, n) == 'think' else '') for p in problems for n in range(candidates)]
    first = voice.sample(asked, 0, finished)
    made = [Written.of(episode, voice.written(episode)) for episode in first]
    again = {
        i: cut
        for i, one in enumerate(made)
        if not one.calls and (cut := _hinted(one.text, hint, _place(places, one.sample)))
    }
    second = voice.sample([(asked[i][0], asked[i][1], cut) for i, cut in again.items()], AGAIN, finished)
    for i, episode in zip(again, second):
        made[i] = Written.of(episode, voice.written(episode))
    return made


def read(written: Written, problem: Problem) -> Draft | Judged:
    """A sampled answer as a draft, where code was run and no answer stands before it."""
    text, sample = written.text, written.sample
    if not written.calls:
        return refuse(problem, text, 'rewriter', 'no code was run', NAME, sample)
    before = text[: text.find('<code>')]
    if answers.last_box(before) is not None or '<answer>' in before:
        return refuse(problem, text, 'rewriter', 'an answer stands before the first call', NAME, sample)
    return dataclasses.replace(repair.read(problem, text), rewriter=NAME, candidate=sample)


def mattered(found: Sequence[Judged], without: Sequence[Written], equal: Equal) -> list[Judged]:
    """The same traces, those dropped whose problem is no harder without the interpreter.

    without: answers to the same problems by the model without it. The tool mattered where a larger share of a problem's
    candidates was kept than of these is right.
    """
    right, total, kept, tried = (collections.Counter() for _ in range(4))
    golds = {judged.draft.problem.id: judged.draft.problem.answer for judged in found}
    for one in without:
        box = answers.last_box(one.text)
        total[one.id] += 1
        right[one.id] += bool(box is not None and equal(box, golds[one.id]))
    for judged in found:
        tried[judged.draft.problem.id] += 1
        kept[judged.draft.problem.id] += judged.reason == 'kept'
    made = []
    for judged in found:
        name = judged.draft.problem.id
        share, bare = kept[name] / tried[name], right[name] / max(total[name], 1)
        if judged.reason == 'kept' and share <= bare:
            said = f'{bare:.2f} are right without the interpreter, {share:.2f} are kept with it'
            judged = dataclasses.replace(judged, reason='filter', detail=said, episode=None)
        made.append(judged)
    return made


def _place(places: Sequence[str], sample: int) -> str:
    return places[sample % len(places)] if places else ''


def _hinted(text: str, hint: str, place: str) -> str:
    """A finished answer up to where the hint goes, and the hint; '' where it has no such place."""
    spot = None
    if place == 'wait' and (found := _WAIT.search(text)):
        spot = found.end()
    elif place in ('wait', 'answer') and (found := _CLOSING.search(text)):
        spot = text.rfind('\n', 0, found.start()) + 1 if found[0] != '<answer>' else found.start()
    if spot is None:
        return ''
    head = text[:spot]
    return f'{head}{"" if not head or head[-1].isspace() else " "}{hint}'
