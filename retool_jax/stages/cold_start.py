r"""Cold start: traces in which every snippet was really run, as episodes to fine-tune on.

The paper's four steps (ReTool §2.2): text traces, rewritten into code-augmented ones, verified in
format, verified in answer. Here every snippet is executed besides, and what it really printed becomes
the interpreter block. Episodes are made by the very turn rules of a rollout, so that their segments,
masks and feedback ids are those that rollout would produce.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from retool_jax.core import console, episode_files
from retool_jax.core.checks import MANY
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, ExecResult, Problem, Stop, Verdict
from retool_jax.rollout.library import Model
from retool_jax.rollout.sampler import STOP_CODE, STOP_EOS
from retool_jax.rollout.turns import Feed, Rules, Run, TurnSettings
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.sandbox.pool import Pool
from retool_jax.stages import folder, parts
from retool_jax.stages.config import ColdStart, Mix
from retool_jax.stages.intake import Intake
from retool_jax.tasks import answers, arithmetic, golds, gym, problems, solutions
from retool_jax.text import tags
from retool_jax.text.template import (
    Template,
    end_ids,
    extract_snippet,
    prompt_ids,
    split_trace,
    wrap_feedback,
    wrap_snippet,
)
from retool_jax.text.tokenizer import Tokenizer

REASONS = {  # why a trace is dropped
    'kept': 'kept', 'format': 'tags, their order or a fence are not those of a rollout',
    'execution': 'a snippet fails, or prints something else than the trace says',
    'answer': 'the answer is not the gold answer', 'length': 'longer than max_tokens'}  # fmt: skip
IN_FLIGHT = 256  # snippets handed to the pool at once: enough to keep it busy, far from its queue's end

# Where an output was cut: an ellipsis, and a word about it in brackets if there is one: '...', '…', '(truncated)...',
# '...(truncated)...', '… [12 characters omitted] …'.
_NOTE = r'[\[(<][^\[\]()<>\n]{0,60}?(?:truncat|omit|cut|skip|char|more|lines)[^\[\]()<>\n]{0,60}[\])>]'
_DOTS = r'(?:\.{3,}|…)'
_CUT = re.compile(rf'{_NOTE}\s*{_DOTS}|{_DOTS}(?:\s*{_NOTE}(?:\s*{_DOTS})?)?')
_TAG = re.compile(r'</?(?:code|interpreter|answer)>')
_CONCLUSION = re.compile(r'<answer>\s*\\boxed\{.*\}\s*</answer>\s*\Z', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Wording:
    """How traces are put: as the model that learns from them reads and writes."""

    template: Template
    tokenizer: Tokenizer
    feedback: FeedbackSettings  # what it is shown of a result
    max_tokens: int | None = None  # a longer trace, prompt included, is dropped as 'length'; None: none is too long


@dataclasses.dataclass(frozen=True)
class Draft:
    """A trace before its snippets are run: the policy's turns, all but the last ending in `</code>`."""

    problem: Problem
    turns: tuple[str, ...]
    printed: tuple[str | None, ...]  # what each snippet is said to have printed; None where nothing is said


def run(stage: ColdStart) -> None:
    """Writes the traces that hold to `episodes/`, and what was kept and dropped to summary.json."""
    leave_out = stage.reward.unreadable == 'leave_out'
    rewritten, remarks = problems.load_traces(stage.traces, leave_out) if stage.traces else (None, [])
    for line in remarks:
        console.say(line)
    own = golds.own(rewritten, stage.traces) if rewritten else set()
    if stage.golds:
        rewritten, own = golds.join(rewritten, own, problems.read(stage.golds))
    told = read_worked(stage.worked, stage.problems, stage.run.seed) if stage.worked else None
    with parts.open_grader(stage.reward) as grader:
        if rewritten:
            rewritten = Intake(stage.reward.unreadable, grader.parses).worked(rewritten)
        with folder.claimed(stage) as directory, parts.open_sandbox(stage.sandbox) as pool:
            model = parts.open_model(stage.model, directory)
            wording = Wording(model.template, model.tokenizer, stage.feedback, stage.max_tokens)
            console.banner(model=model, sandbox=pool, run=directory)
            if rewritten is not None:
                made, counts = verify(rewritten, pool, wording, grader.equal)
            elif told is not None:
                made, counts = make(retell(told, stage.mix, stage.run.seed), pool, wording, grader.equal)
            else:
                drawn = arithmetic.problems('train', stage.problems, stage.run.seed)
                made, counts = build(drawn, stage.mix, pool, wording, stage.run.seed)
            unverified = sum(episode.problem.id in own for episode in made)
            keep(directory, model, made, counts, unverified)
    console.table('traces', ('', 'number', 'share'), shares(counts))
    if own:
        console.say(
            f'answers: {len(made) - unverified} of {len(made)} traces kept were verified; {unverified} have no '
            'gold answer but their own last box, which verifies nothing: --config.golds=FILE names one'
        )


def keep(
    directory: Path, model: Model, made: Sequence[Episode], counts: Mapping[str, int], unverified: int = 0
) -> None:
    """Writes the traces to `episodes/` of a run's folder and last of all its summary.json.

    Raises:
      UserError: no trace was kept.
    """
    if not made:
        raise UserError(f'no trace was kept: {counts}')
    episode_files.write(directory / 'episodes', 'cold_start', made, model.tokenizer.decode)
    verified = {'verified': len(made) - unverified, 'own': unverified}
    folder.write(directory / 'summary.json', {'counts': counts, 'answers': verified})


def build(
    asked: Sequence[Problem],
    mix: Mix,
    pool: Pool | None,
    wording: Wording,
    seed: int,
    progress: bool = True,
) -> tuple[list[Episode], dict[str, int]]:
    """Episodes of the embedded task and how many traces were kept or dropped, by reason.

    Kinds are drawn per problem from `mix`. `pool` may be None where the mix is mental only.

    Raises:
      ValueError: there are snippets to run, and no pool.
    """
    return make(draw(asked, mix, seed), pool, wording, answers.equal_at_sight, progress)


def draw(asked: Iterable[Problem], mix: Mix, seed: int) -> list[Draft]:
    """A trace for each problem of the embedded task, of a kind drawn from `mix`."""
    rng = random.Random(f'cold start/{seed}')
    drafts = []
    for problem in asked:
        shares = mix.easy if arithmetic.BY_NAME[problem.family].mental else mix.needy
        kind = rng.choices(list(shares), list(shares.values()))[0]
        drafts.append(draft(problem, arithmetic.trace(problem, kind, seed)))
    return drafts


def read_worked(sources: Sequence[str], count: int, seed: int) -> list[tuple[Problem, str]]:
    """At most `count` problems of generators with their worked solutions, in an order drawn from `seed`."""
    with gym.maker() as child:
        pairs = [pair for source in sources for pair in gym.worked(source, child=child)]
    random.Random(f'worked/{seed}').shuffle(pairs)
    return pairs[:count]


def retell(worked: Iterable[tuple[Problem, str]], mix: Mix, seed: int) -> list[Draft]:
    """A trace of each worked solution whose equations lead to the answer, of a kind drawn from `mix.needy`.

    Whatever the mix, the same problems are left out, so that a text-only cold start sees those of the other one.
    """
    rng = random.Random(f'cold start/{seed}')
    kinds, shares = list(mix.needy), list(mix.needy.values())
    return [
        draft(problem, solutions.trace(problem, words, rng.choices(kinds, shares)[0]))
        for problem, words in worked
        if solutions.snippet(problem, words) is not None
    ]


def verify(
    rewritten: Iterable[tuple[Problem, str]],
    pool: Pool,
    wording: Wording,
    equal: Callable[[str, str], bool | None],
    progress: bool = True,
) -> tuple[list[Episode], dict[str, int]]:
    """The general path: whole rewritten answers with inline tags, verified by running every snippet.

    `equal(answer, gold)` judges the last box (`Grader.equal`). A trace whose interpreter blocks claim
    what its snippets do not print is dropped as 'execution', since its words follow from the claim.
    """
    drafts = [read_draft(problem, text) for problem, text in rewritten]
    return make(drafts, pool, wording, equal, progress)


def shares(counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Rows of a table: why traces are kept or dropped, how many, and their share in %."""
    total = max(sum(counts.values()), 1)
    return [(REASONS[reason], str(count), f'{100 * count / total:.1f} %') for reason, count in counts.items()]


def draft(problem: Problem, trace: arithmetic.Trace) -> Draft:
    """A trace of the embedded task as turns."""
    turns = ['']
    for kind, text in trace.parts:
        turns[-1] += wrap_snippet(text) if kind == 'code' else text
        if kind == 'code':
            turns.append('')
    return Draft(problem, tuple(turns), (None,) * (len(turns) - 1))


def read_draft(problem: Problem, text: str) -> Draft:
    """An answer with inline tags as turns; an element around the whole (the rewriter's marker) is dropped."""
    text = text.strip()
    marker = re.fullmatch(r'<([\w-]+)>\s*(.*?)\s*</\1>', text, re.DOTALL)
    if marker and marker[1] not in ('code', 'answer', 'interpreter'):
        text = marker[2]
    segments = split_trace(text)
    turns = tuple(part for acted, part in segments if acted)
    printed = tuple(part for acted, part in segments if not acted)
    return Draft(problem, turns, printed)


def misformed(draft: Draft) -> bool:
    """Whether tags, their order or a fence are not as rollout needs them to detect a call and an answer."""
    if len(draft.printed) != len(draft.turns) - 1:
        return True
    *calls, last = draft.turns
    for turn in calls:
        if _TAG.findall(turn) != ['<code>', '</code>'] or not turn.endswith('</code>'):
            return True
        if turn.count('```') != 2 or extract_snippet(turn) is None:
            return True
    return _TAG.findall(last) != ['<answer>', '</answer>'] or not _CONCLUSION.search(last)


def make(
    drafts: Sequence[Draft],
    pool: Pool | None,
    wording: Wording,
    equal: Callable[[str, str], bool | None],
    progress: bool = True,
) -> tuple[list[Episode], dict[str, int]]:
    """Verifies drafts, runs their snippets and makes episodes; counts what was kept and what was dropped."""
    counts = dict.fromkeys(REASONS, 0)
    formed = []
    for item in drafts:
        if misformed(item):
            counts['format'] += 1
        else:
            formed.append(item)
    codes = [extract_snippet(turn).code for item in formed for turn in item.turns[:-1]]
    results = execute(codes, pool, progress)

    template, tokenizer, limit = wording.template, wording.tokenizer, wording.max_tokens or 2**30
    # Nothing but the length may stop a trace: the rules are used for what they append.
    budget = TurnSettings(
        tools=True, max_tokens=limit, max_turn_tokens=limit, max_turns=2**30, max_calls=2**30, on_cap='end',
        on_answer='eos',
    )  # fmt: skip
    table = tags.build_table(tokenizer.token_bytes, tokenizer.size)
    rules = Rules(budget, tokenizer, table, lambda result: render(result, wording.feedback))
    end = end_ids(template, tokenizer)
    samples: collections.Counter[str] = collections.Counter()
    episodes = []
    for item in formed:
        reason = fault(item, results, wording.feedback, equal)
        if reason == 'kept':
            prompt = prompt_ids(template, tokenizer, item.problem.question)
            episode = assemble(item, results, rules, prompt, end, samples[item.problem.id])
            if episode is None or len(episode.tokens) > limit:
                reason = 'length'
            else:
                samples[item.problem.id] += 1
                episodes.append(episode)
        counts[reason] += 1
    return episodes, counts


def execute(codes: Iterable[str], pool: Pool | None, progress: bool = True) -> dict[str, ExecResult]:
    """Runs every different snippet once, many at a time, under a progress bar.

    Raises:
      ValueError: there are snippets, and no pool.
    """
    unique = list(dict.fromkeys(codes))
    if unique and pool is None:
        raise ValueError('the mix has snippets to run: give a sandbox pool, or a mix of mental traces only')
    from rich.progress import track

    results: dict[str, ExecResult] = {}
    waiting: collections.deque = collections.deque()
    for code in track(unique, 'running snippets', disable=not progress or not unique):
        if len(waiting) == IN_FLIGHT:
            done, future = waiting.popleft()
            results[done] = future.result()
        waiting.append((code, pool.submit(code)))
    results.update((code, future.result()) for code, future in waiting)
    return results


def fault(
    draft: Draft,
    results: Mapping[str, ExecResult],
    feedback: FeedbackSettings,
    equal: Callable[[str, str], bool | None],
) -> str:
    """Why a well-formed trace is dropped: 'execution' or 'answer', or 'kept'.

    Snippets may fail on the way, as a correction needs; the last one must run. Where the trace does
    not say what its snippets print, its answer must be what the last one printed last.
    """
    ran = [results[extract_snippet(turn).code] for turn in draft.turns[:-1]]
    if any(result.verdict == Verdict.SANDBOX_ERROR for result in ran):
        return 'execution'
    if ran and ran[-1].verdict != Verdict.OK:
        return 'execution'
    box = answers.last_box(draft.turns[-1])
    if box is None or not equal(box, draft.problem.answer):
        return 'answer'
    for result, claim in zip(ran, draft.printed):
        if claim is not None and not bears_out(result, claim, feedback):
            return 'execution'
    if ran and draft.printed[-1] is None:
        lines = ran[-1].stdout.split()
        if not lines or not equal(lines[-1], draft.problem.answer):
            return 'answer'
    return 'kept'


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
    for i, turn in enumerate(draft.turns):
        last = i == len(draft.turns) - 1
        ids = rules.tokenizer.encode(turn) + (list(end) if last else [])
        step = rules.advance(episode, ids, [0.0] * len(ids), STOP_EOS if last else STOP_CODE, version=0)
        if isinstance(step, Run):
            step = rules.resume(episode, step.code, results[step.code])
        if not last and not isinstance(step, Feed):
            return None
    episode.stop = Stop.EOS
    return episode


def bears_out(result: ExecResult, claim: str, feedback: FeedbackSettings) -> bool:
    """Whether a run says what was claimed, spacing aside; of an error only the last line, styles differ.

    The whole output is compared, whatever `feedback` would leave of it. Where the claim holds an ellipsis it was cut
    there: what stands before, between and after must follow one another in the output, beginning with its first
    character and ending with its last.
    """
    whole = dataclasses.replace(feedback, max_chars=MANY, max_frames=MANY)
    said, printed, claimed = (
        re.sub(r'</?interpreter>', '', text).strip()
        for text in (wrap_feedback(render(result, whole)), wrap_feedback(result.stdout), claim)
    )
    if result.verdict == Verdict.OK:  # what was printed, or what this project adds to it where it is nothing
        return _shows(claimed, printed) or _shows(claimed, said)
    *above, last = claimed.splitlines() or ['']
    error = (said.splitlines() or [''])[-1]
    # A cut inside the last line has left the head of another one before it.
    return _shows(last, error) or bool(above and _CUT.search(last) and _shows('…' + _CUT.split(last)[-1], error))


def _shows(claimed: str, said: str) -> bool:
    """Whether `claimed` is `said`, or what is left of it with something cut out at every ellipsis."""
    if _spaced(claimed) == (said := _spaced(said)):
        return True
    head, *others = (_spaced(part) for part in _CUT.split(claimed))
    if not others or not any((head, *others)) or not said.startswith(head):
        return False
    *between, tail = others
    place = len(head)
    for part in between:  # at least one character is missing at each cut
        place = said.find(part, place + 1)
        if place < 0:
            return False
        place += len(part)
    return said.endswith(tail) and place < len(said) - len(tail)


def _spaced(text: str) -> str:
    """Spacing counts between two words or numbers alone: there it is one blank."""
    return re.sub(r'(?<!\w)\s+|\s+(?!\w)', '', re.sub(r'\s+', ' ', text.strip()))
