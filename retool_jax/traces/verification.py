"""Verification: every snippet is run, what it really printed becomes the interpreter element, and what holds is kept.

The paper verifies in form and in answer (ReTool §2.2); here each snippet is executed besides. Episodes are made by the
very turn rules of a rollout, so that their segments, masks and feedback ids are those that a rollout would produce.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from retool_jax.core.records import Episode, ExecResult, Reward, Stop, Verdict
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import STOP_CODE, STOP_EOS
from retool_jax.rollout.turns import Feed, Rules, Run, TurnSettings
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.tasks import answers
from retool_jax.text import tags
from retool_jax.text.template import Template, end_ids, prompt_ids
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.traces import claims, drafts, snippets
from retool_jax.traces.drafts import Draft
from retool_jax.traces.reasons import REASONS

IN_FLIGHT = 256  # snippets handed to the pool at once: enough to keep it busy, far from its queue's end
_LAST_WORDS = 16  # of an output, among which the answer is looked for
MENDINGS = 4  # runs of a trace's snippets with something mended in one of them, after the first

type Equal = Callable[[str, str], bool | None]


@dataclasses.dataclass(frozen=True)
class Wording:
    """How traces are put: as the model that learns from them reads and writes."""

    template: Template
    tokenizer: Tokenizer
    feedback: FeedbackSettings  # what it is shown of a result
    max_tokens: int | None = None  # a longer trace, prompt included, is dropped as 'length'; None: none is too long


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of a draft."""

    draft: Draft  # as it was judged: mended where that helped
    reason: str  # one of REASONS or MORE_REASONS
    detail: str = ''  # in a line what is wrong with it; '' where it was kept
    claimed: str | None = None  # what the trace says that a snippet printed, where that is the reason
    printed: str | None = None  # and what it printed
    cut: str | None = None  # its text up to and with the first output that is not as claimed, the real one put in
    text: str = ''  # the whole answer with what its snippets really printed, where it was kept
    episode: Episode | None = None  # the same as a rollout would have made it


def verify(
    items: Sequence[Draft], executor: Executor | None, wording: Wording, equal: Equal, progress: bool = True
) -> list[Judged]:
    """Runs the snippets of drafts, mends what their runs show, and judges each; in the order given.

    `executor` may be None where there is nothing to run. `equal(answer, gold)` judges the last box (`Grader.equal`).

    Raises:
      ValueError: there are snippets to run, and no executor.
    """
    judge = _Judge(wording, equal)
    flaws = [drafts.flaw(item) for item in items]
    results = execute((code for item, bad in zip(items, flaws) if not bad for code in item.codes), executor, progress)
    found = [Judged(item, 'format', bad) if bad else judge(item, results) for item, bad in zip(items, flaws)]
    tried = list(items)
    for _ in range(MENDINGS):
        again = {}
        for i, judged in enumerate(found):
            if judged.reason != 'format' and (changed := _mended(tried[i], results, wording.feedback)):
                again[i] = tried[i] = changed
        if not again:
            break
        results |= execute((code for item in again.values() for code in item.codes), executor, progress, known=results)
        for i, item in again.items():
            if (judged := judge(item, results)).reason in ('kept', 'length'):
                found[i] = judged
    return judge.assembled(found, results)


def settle(items: Sequence[Draft | Judged], executor: Executor | None, wording: Wording, equal: Equal) -> list[Judged]:
    """What a rewriter made, its drafts verified, in the order given; what it dropped itself stays as it is.

    Raises:
      ValueError: as `verify`.
    """
    verified = iter(verify([item for item in items if isinstance(item, Draft)], executor, wording, equal))
    return [next(verified) if isinstance(item, Draft) else item for item in items]


def tally(found: Iterable[Judged]) -> dict[str, int]:
    """How many traces were kept and dropped, by reason."""
    return dict.fromkeys(REASONS, 0) | collections.Counter(judged.reason for judged in found)


def episodes(found: Iterable[Judged]) -> list[Episode]:
    """The traces that were kept."""
    return [judged.episode for judged in found if judged.episode is not None]


def execute(
    codes: Iterable[str],
    executor: Executor | None,
    progress: bool = True,
    known: Mapping[str, ExecResult] | None = None,
) -> dict[str, ExecResult]:
    """Runs every different snippet that is not known once, many at a time, under a progress bar.

    Raises:
      ValueError: there are snippets, and no executor.
    """
    unique = [code for code in dict.fromkeys(codes) if code not in (known or ())]
    if unique and executor is None:
        raise ValueError('the mix has snippets to run: give a sandbox pool, or a mix of mental traces only')
    from rich.progress import track

    results: dict[str, ExecResult] = {}
    waiting: collections.deque = collections.deque()
    for code in track(unique, 'running snippets', disable=not progress or not unique):
        if len(waiting) == IN_FLIGHT:
            done, future = waiting.popleft()
            results[done] = future.result()
        waiting.append((code, executor.submit(code)))
    results.update((code, future.result()) for code, future in waiting)
    return results


def _mended(draft: Draft, results: Mapping[str, ExecResult], feedback: FeedbackSettings) -> Draft | None:
    """A draft with the first call mended that its run shows to need it; None where none does."""
    codes = draft.codes
    for call, (code, claim) in enumerate(zip(codes, draft.printed)):
        result = results[code]
        if result.verdict == Verdict.SANDBOX_ERROR:
            return None
        if claim is not None and (
            claims.bears_out(result, claim, feedback) or claims.same_numbers(result, claim, feedback)
        ):
            continue
        if changed := snippets.mended(codes, call, result):
            rule, script = changed
            return draft.with_code(call, script, rule)
    return None


class _Judge:
    """Judges drafts by the results of their snippets, and makes episodes of those that hold."""

    def __init__(self, wording: Wording, equal: Equal):
        self.wording, self.equal = wording, equal
        limit = wording.max_tokens or 2**30
        # Nothing but the length may stop a trace: the rules are used for what they append.
        budget = TurnSettings(
            tools=True, max_tokens=limit, max_turn_tokens=limit, max_turns=2**30, max_calls=2**30, on_cap='end',
            on_answer='eos',
        )  # fmt: skip
        table = tags.build_table(wording.tokenizer.token_bytes, wording.tokenizer.size)
        self.rules = Rules(budget, wording.tokenizer, table, lambda result: render(result, wording.feedback))
        self.end, self.limit = end_ids(wording.template, wording.tokenizer), limit

    def __call__(self, draft: Draft, results: Mapping[str, ExecResult]) -> Judged:
        """The judgement of a well-formed draft, but for its length.

        Snippets may fail on the way, as a correction needs; the last one must run. Where the trace does not say what
        its snippets print, its answer must be among what the last one printed last.
        """
        ran = [results[code] for code in draft.codes]
        for call, (result, claim) in enumerate(zip(ran, draft.printed)):
            if result.verdict == Verdict.SANDBOX_ERROR:
                return Judged(draft, 'execution', f'call {call + 1}: the sandbox itself failed')
            if claim is None or claims.bears_out(result, claim, self.wording.feedback):
                continue
            if claims.same_numbers(result, claim, self.wording.feedback):
                if 'number_form' not in draft.repairs:
                    draft = dataclasses.replace(draft, repairs=(*draft.repairs, 'number_form'))
                continue
            shown = [render(result, self.wording.feedback) for result in ran[: call + 1]]
            cut = drafts.prefix(draft, shown)
            return Judged(
                draft, 'execution', f'call {call + 1} prints something else than is claimed', claim, shown[-1], cut
            )
        if ran and ran[-1].verdict != Verdict.OK:
            said = render(ran[-1], self.wording.feedback)
            return Judged(draft, 'execution', f'the last call ends with {ran[-1].verdict}', draft.printed[-1], said)
        box, gold = answers.last_box(draft.turns[-1]), draft.problem.answer
        if box is None or not self.equal(box, gold):
            return Judged(draft, 'answer', f'the answer {box!r} is not {gold!r}')
        told = not ran or draft.printed[-1] is not None  # the words that follow are of that output
        if told or any(self.equal(word, gold) for word in _last_words(ran[-1].stdout)):
            return Judged(draft, 'kept')
        said = f'the last call does not print the answer {gold!r}'
        return Judged(draft, 'answer', said, None, render(ran[-1], self.wording.feedback))

    def assembled(self, found: Sequence[Judged], results: Mapping[str, ExecResult]) -> list[Judged]:
        """The same with the episodes of what was kept; too long ones are dropped."""
        samples: collections.Counter[str] = collections.Counter()
        made = []
        for judged in found:
            if judged.reason == 'kept':
                problem = judged.draft.problem
                prompt = prompt_ids(self.wording.template, self.wording.tokenizer, problem.question)
                episode = assemble(judged.draft, results, self.rules, prompt, self.end, samples[problem.id])
                if episode is None or len(episode.tokens) > self.limit:
                    judged = dataclasses.replace(judged, reason='length', detail=f'more than {self.limit} tokens')
                else:
                    samples[problem.id] += 1
                    shown = [call.feedback for call in episode.calls]
                    text = drafts.prefix(judged.draft, shown) + judged.draft.turns[-1]
                    box = answers.last_box(judged.draft.turns[-1])
                    episode.reward = Reward(1.0, correct=True, exact=box == problem.answer, lenient=True, answer=box)
                    judged = dataclasses.replace(judged, text=text, episode=episode)
            made.append(judged)
        return made


def assemble(
    draft: Draft,
    results: Mapping[str, ExecResult],
    rules: Rules,
    prompt: Sequence[int],
    end: Sequence[int],
    sample: int = 0,
) -> Episode | None:
    """The episode that a policy writing these turns would have had; None where the budget stops it."""
    episode = Episode(draft.problem, sample, step=0)
    episode.append(prompt, acted=False)
    episode.prompt_length = len(prompt)
    codes = draft.codes
    for i, turn in enumerate(draft.turns):
        last = i == len(draft.turns) - 1
        ids = rules.tokenizer.encode(turn) + (list(end) if last else [])
        step = rules.advance(episode, ids, [0.0] * len(ids), STOP_EOS if last else STOP_CODE, version=0)
        if isinstance(step, Run):
            # Without its time, which no trace needs: the same traces are the same files.
            step = rules.resume(episode, step.code, dataclasses.replace(results[codes[i]], wall_s=0.0))
        if not last and not isinstance(step, Feed):
            return None
    episode.stop = Stop.EOS
    return episode


def _last_words(stdout: str) -> list[str]:
    """What stands in the last line of an output: the line, and its words and numbers from the last to the first."""
    lines = stdout.strip().splitlines()
    return [lines[-1].strip(), *reversed(re.split(r'[\s,;=()\[\]{}]+', lines[-1])[-_LAST_WORDS:])] if lines else []
