"""Rewriting: text traces to traces that compute, verified before and after – the first half of the paper's cold start.

ReTool §2.2: traces whose own answer is right are rewritten by a model into code-augmented ones; what comes back is
mended in its form, every snippet is run, and what contradicts its interpreter is finished anew or dropped. The
student's own sampler can take the model's place (`own_rounds`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path

from retool_jax.core import console, endpoint_settings, processes
from retool_jax.core.endpoint import Endpoint
from retool_jax.stages import folder, own_rounds, parts
from retool_jax.stages.intake import Intake
from retool_jax.stages.rewrite_config import Rewrite
from retool_jax.tasks import arithmetic, golds, gym, problems
from retool_jax.traces import calculator, filters, intake, outcome, sampled, verification
from retool_jax.traces.asked import Asked
from retool_jax.traces.intake import Pair
from retool_jax.traces.verification import Equal, Judged, Wording

FINISHES = 3  # times that a trace is gone on with from an output that is not as claimed


def run(stage: Rewrite) -> None:
    """Writes the traces that hold (episodes/, kept.jsonl), the others and why (dropped.jsonl), last summary.json."""
    processes.refuse('a rewriting')
    pairs, own = read(stage)
    if len(pairs) > stage.problems:
        console.say(f'the first {stage.problems} of {len(pairs)} are taken (problems={stage.problems})')
        pairs = pairs[: stage.problems]
    with contextlib.ExitStack() as stack:
        grader = stack.enter_context(parts.open_grader(stage.reward))
        pairs = Intake(stage.reward.unreadable, grader.parses).worked(pairs)
        directory = stack.enter_context(folder.claimed(stage, free=endpoint_settings.FREE))
        stack.enter_context(folder.stoppable())
        pool = stack.enter_context(parts.open_sandbox(stage.sandbox))
        model = parts.open_model(stage.model, directory)
        wording = Wording(model.template, model.tokenizer, stage.feedback, stage.max_tokens)
        if stage.rewriter.kind == sampled.NAME:
            console.banner(model=model, sandbox=pool, problems=len(pairs), run=directory)
            found = own_rounds.make(stage, directory, [p for p, _ in pairs], pool, wording, grader.equal)
            found = filters.apply(found, stage.filters)
        else:
            pairs, dropped = intake.verify(pairs, grader.equal)
            console.banner(model=model, sandbox=pool, traces=len(pairs) + len(dropped), run=directory)
            made = rewritten(stage, directory, pairs, pool, wording, grader.equal)
            found = [*dropped, *filters.apply(made, stage.filters)]
        folder.write(directory / 'summary.json', outcome.keep(directory, found, model.tokenizer, own))
    outcome.show(found, own)


def read(stage: Rewrite) -> tuple[list[Pair], set[str]]:
    """Problems with their text traces, and the ids of those whose gold answer is the trace's own."""
    kind = stage.rewriter.kind
    if stage.traces is None:
        return [(p, '') for p in arithmetic.problems('train', stage.problems, stage.run.seed)], set()
    if gym.named(stage.traces):
        with gym.maker() as child:
            if kind == sampled.NAME:
                pairs = [(p, '') for p in gym.read(stage.traces, gym.TRAINING, child=child).problems]
            else:
                pairs = gym.worked(stage.traces, child=child)
        random.Random(f'worked/{stage.run.seed}').shuffle(pairs)
        return pairs, set()
    leave_out = stage.reward.unreadable == 'leave_out'
    if kind == sampled.NAME:
        loaded = problems.load(stage.traces, leave_out)
        for line in loaded.remarks(stage.traces):
            console.say(line)
        return [(p, '') for p in loaded.problems], set()
    pairs, remarks = problems.load_traces(stage.traces, leave_out, solutions=True)
    for line in remarks:
        console.say(line)
    own = golds.own(pairs, stage.traces)
    if stage.golds:
        pairs, own = golds.join(pairs, own, problems.read(stage.golds))
    return pairs, own


def rewritten(
    stage: Rewrite, directory: Path, pairs: Sequence[Pair], pool: parts.Sandbox, wording: Wording, equal: Equal
) -> list[Judged]:
    """What becomes of traces by a calculator or a server."""
    if stage.rewriter.kind == calculator.NAME and not stage.rewriter.judge:
        return verification.settle(calculator.rewrite(pairs), pool, wording, equal)
    parameters = {'temperature': stage.rewriter.temperature, 'max_tokens': stage.rewriter.max_tokens}
    with Endpoint(stage.endpoint, directory / 'answers') as endpoint:
        server, dropped = Asked(endpoint, stage.rewriter.candidates, parameters), []
        if stage.rewriter.judge:
            pairs, dropped = server.judge(pairs)
        if stage.rewriter.kind == calculator.NAME:
            found = verification.settle(calculator.rewrite(pairs), pool, wording, equal)
        else:
            words = {problem.id: text for problem, text in pairs}
            found = verification.settle(server.rewrite(pairs), pool, wording, equal)
            for _ in range(FINISHES if stage.rewriter.finish else 0):
                found, more = finished(found, server, words, pool, wording, equal)
                if not more:
                    break
        console.say(endpoint.report())
        return [*dropped, *found]


def finished(
    found: Sequence[Judged], server: Asked, words: dict[str, str], pool: parts.Sandbox, wording: Wording, equal: Equal
) -> tuple[list[Judged], bool]:
    """The same with traces finished that contradict their interpreter; whether any was gone on with."""
    cut = [i for i, item in enumerate(found) if item.cut is not None]
    items = server.finish([(found[i], words[found[i].draft.problem.id]) for i in cut]) if cut else []
    gone_on = [(i, item) for i, item in zip(cut, items) if item is not None]
    made = list(found)
    for (i, _), item in zip(gone_on, verification.verify([item for _, item in gone_on], pool, wording, equal)):
        made[i] = item
    return made, bool(gone_on)
