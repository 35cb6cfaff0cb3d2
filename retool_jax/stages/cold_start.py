"""Cold start: traces in which every snippet was really run, as episodes to fine-tune on.

The last two of the paper's four steps (ReTool §2.2): text traces, rewritten into code-augmented ones
(`stages/rewrite`), verified in format, verified in answer; every snippet is run besides (`traces/verification`). What a
language model spelled otherwise is mended first, by rules that are named and counted (`traces/repair`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from retool_jax.core import console, mirror, processes, storage
from retool_jax.core.records import Problem
from retool_jax.stages import folder, parts
from retool_jax.stages.config import ColdStart, Mix
from retool_jax.stages.intake import Intake
from retool_jax.tasks import arithmetic, golds, gym, problems, solutions
from retool_jax.traces import drafts, outcome, repair, verification
from retool_jax.traces.drafts import Draft
from retool_jax.traces.verification import Wording


def run(stage: ColdStart) -> None:
    """Writes the traces that hold to `episodes/`, and what was kept and dropped to summary.json."""
    processes.refuse('a cold start')
    leave_out = stage.reward.unreadable == 'leave_out'
    traces = storage.local('traces', stage.traces) if stage.traces else None
    rewritten, remarks = problems.load_traces(traces, leave_out) if traces else (None, [])
    for line in remarks:
        console.say(line)
    own = golds.own(rewritten, traces) if rewritten else set()
    if stage.golds:
        rewritten, own = golds.join(rewritten, own, problems.read(storage.local('golds', stage.golds)))
    told = read_worked(stage.worked, stage.problems, stage.run.seed) if stage.worked else None
    with parts.open_grader(stage.reward) as grader:
        if rewritten:
            rewritten = Intake(stage.reward.unreadable, grader.parses).worked(rewritten)
        with folder.claimed(stage) as directory, parts.open_sandbox(stage.sandbox) as pool:
            model = parts.open_model(stage.model, directory)
            wording = Wording(model.template, model.tokenizer, stage.feedback, stage.max_tokens)
            console.banner(model=model, sandbox=pool, run=mirror.place(directory))
            if rewritten is not None:
                items = [repair.read(problem, text) for problem, text in rewritten]
            elif told is not None:
                items = retell(told, stage.mix, stage.run.seed)
            else:
                items = draw(arithmetic.problems('train', stage.problems, stage.run.seed), stage.mix, stage.run.seed)
            found = verification.verify(items, pool, wording, grader.equal)
            folder.write(directory / 'summary.json', outcome.keep(directory, found, model.tokenizer, own))
    outcome.show(found, own)


def draw(asked: Iterable[Problem], mix: Mix, seed: int) -> list[Draft]:
    """A trace for each problem of the embedded task, of a kind drawn from `mix`."""
    rng = random.Random(f'cold start/{seed}')
    items = []
    for problem in asked:
        shares = mix.easy if arithmetic.BY_NAME[problem.family].mental else mix.needy
        kind = rng.choices(list(shares), list(shares.values()))[0]
        items.append(drafts.of_parts(problem, arithmetic.trace(problem, kind, seed).parts))
    return items


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
        drafts.of_parts(problem, solutions.trace(problem, words, rng.choices(kinds, shares)[0]).parts)
        for problem, words in worked
        if solutions.snippet(problem, words) is not None
    ]
