"""An evaluation run: the score of a problem file, kept as it grows and gone on with where it stopped."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from retool_jax.core import console, episode_files, mirror, processes, signals
from retool_jax.core.errors import UserError
from retool_jax.core.metrics import Metrics
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem, Stop
from retool_jax.core.signals import uninterrupted
from retool_jax.rollout import hosts
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.library import Model
from retool_jax.rollout.served import Served
from retool_jax.stages import folder, parts, served
from retool_jax.stages.config import ENGINE, Evaluation
from retool_jax.stages.intake import Intake, tell_overlong
from retool_jax.tasks import stream, summary
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import Template
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.train import grading

LISTED = 50  # problems; longer lists stand in summary.json and the report alone
UNFINISHED = 'unfinished'  # below episodes/: parts of an evaluation that is not through
KEEP_S = 60.0  # finished episodes wait no longer than this before they are on disk


def run(stage: Evaluation) -> dict:
    """Scores the model on `stage.problems`; returns what summary.json holds."""
    if stage.backend != ENGINE:
        stage.endpoint.require()
    processes.join()
    name = stream.title(stage.problems)
    with contextlib.ExitStack() as stack:
        grader = stack.enter_context(parts.open_grader(stage.reward))
        intake = Intake(stage.reward.unreadable, grader.parses)
        problems = intake.read(stage.problems, stage.limit)
        mesh = parts.make_mesh(stage.mesh) if stage.backend == ENGINE else None
        directory = stack.enter_context(folder.claimed(stage, free=served.FREE if mesh is None else ('endpoint',)))
        stack.enter_context(folder.stoppable())
        opened = served.opened(stage, directory) if mesh is None else _opened(stage, directory, mesh)
        speaker, make = stack.enter_context(opened)
        tell_overlong(problems, speaker, stage.turns.max_tokens)
        intake.write(directory)
        with contextlib.ExitStack() as work:
            pool = work.enter_context(parts.open_guarded(stage.sandbox, stage.model.tools))
            engine, params = make(pool)
            journal = work.enter_context(contextlib.closing(folder.open_journal(directory)))
            console.banner(
                model=speaker,
                **({} if mesh is None else {'mesh': dict(mesh.shape)}),
                sandbox=pool or 'none',
                problems=f'{len(problems)} of {name} × {stage.samples} samples',
                run=mirror.place(directory),
            )
            advance = work.enter_context(console.progress(f'evaluate {name}', len(problems) * stage.samples))
            episodes = run_kept(
                engine,
                params,
                problems,
                stage.samples,
                directory / 'episodes',
                f'val_{name}',
                speaker.template,
                speaker.tokenizer,
                grader,
                journal,
                advance,
            )
        found = {name: summary.summarise(episodes, grader.equal)}
        if processes.leads():
            folder.write(directory / 'summary.json', found)
            with Metrics(directory) as writer:
                writer.rewind(None)
                writer.write(0, {'phase': 'val'} | summary.as_metrics(name, found[name]) | times(episodes))
    if faults := found[name]['stops'].get(Stop.FAULT, 0):
        console.say(
            f'warning: the sandbox itself failed in {faults} episodes, which count as wrong; '
            'see python -m retool_jax.sandbox.doctor'
        )
    return found


@contextlib.contextmanager
def _opened(stage: Evaluation, directory: Path, mesh: jax.sharding.Mesh) -> Iterator[tuple[Model, served.Make]]:
    """The model at model.path, and what makes its engine from a sandbox."""
    model = parts.open_model(stage.model, directory)
    parts.check_context(model, stage.turns.max_tokens, 'turns.max_tokens')
    sampler = parts.make_sampler(model, stage.sampler, stage.turns, mesh)
    params = parts.load_policy(stage.model, model, stage.run.seed, mesh)
    make = lambda pool: parts.make_engine(
        model, sampler, stage.turns, stage.feedback, stage.sampling, pool, stage.run.seed, parts.EVALUATION
    )
    yield model, lambda pool: (make(pool), sampler.sync(params))


def run_kept(
    engine: Engine | Served,
    params: Params | None,
    problems: Sequence[Problem],
    samples: int,
    directory: Path,
    name: str,
    template: Template,
    tokenizer: Tokenizer,
    grader: Grader,
    journal: Journal,
    advance: Callable[..., None],
) -> list[Episode]:
    """`evaluate.run` whose finished episodes are kept below `directory`; those that are there are not made again.

    While it runs they are parts of `directory`/unfinished, in the end the one part `name`. What an episode holds
    does not depend on what else is made with it, and tool results of unfinished episodes are in the journal, so
    a killed evaluation ends as it would have. `advance(n=…)` counts episodes. Of several processes each keeps what
    its engines make (of a team one), and one puts it together.

    Raises: UserError for kept episodes of other problems or samples.
    """
    requests = grading.make_requests(problems, samples, template, tokenizer)
    order = [(r.problem.id, r.sample) for r in requests]
    asked = dict(zip(order, requests))
    unfinished = directory / UNFINISHED
    folder_of = directory if name in episode_files.names(directory) else unfinished
    names = [name] if folder_of == directory else episode_files.names(unfinished)
    found = {(e.problem.id, e.sample): e for part in names for e in episode_files.read(folder_of, part)}
    if any(key not in asked or asked[key].problem != e.problem for key, e in found.items()):
        raise UserError(
            f'{folder_of} holds other problems than those asked for: the problem file has changed; '
            'choose another run.dir'
        )
    advance(n=len(found))
    missing = [request for key, request in asked.items() if key not in found]
    processes.wait()  # until all have read what is there
    process, mine = jax.process_index(), hosts.share(engine, missing)
    waiting: list[Episode] = []
    count = len(episode_files.names(unfinished))

    def keep() -> None:
        nonlocal count
        if hosts.leads(engine):  # the others of its team make the same
            grading.grade(waiting, grader, tokenizer)
            episode_files.write(unfinished, f'part_{process:03d}_{count:05d}', waiting, tokenizer.decode)
            mirror.publish(directory)
        count += 1
        waiting.clear()

    kept = time.monotonic()
    with uninterrupted():
        try:
            for _, episode in engine.stream(params, 0, mine, 0, journal=journal) if mine else ():
                waiting.append(episode)
                advance()
                if len(waiting) >= engine.rows or time.monotonic() - kept > KEEP_S:
                    keep()
                    kept = time.monotonic()
        finally:  # of a stop too: what is finished stays
            if waiting:
                keep()
        processes.agree(processes.gather(signals.told()))
    if folder_of == unfinished and processes.leads():
        mirror.refresh(directory)
        found = {(e.problem.id, e.sample): e for e in episode_files.read(unfinished)}
        with uninterrupted():
            episode_files.write(directory, name, [found[key] for key in order], tokenizer.decode)
            shutil.rmtree(unfinished, ignore_errors=True)
            mirror.publish(directory)
    processes.wait()
    mirror.refresh(directory)
    journal.forget(1)  # of step 0, and nothing is unfinished any more
    return episode_files.read(directory, name)


def times(episodes: Sequence[Episode]) -> dict[str, float]:
    """Seconds that calls took; they stand in metrics.jsonl, not in summary.json, which has no clock."""
    waits = sorted(call.wall_s for e in episodes for call in e.calls)
    return {f'tools/seconds_p{p}': waits[(len(waits) - 1) * p // 100] for p in (50, 99)} if waits else {}


def show(name: str, scores: dict) -> None:
    """Prints scores with intervals, what else is known of the episodes and calls, and each problem."""
    percent, k = lambda x: f'{100 * x:.1f} %', scores['k']
    rows = [
        (title, percent(scores[key]), ' – '.join(percent(x) for x in scores[ci]))
        for title, key, ci in (
            (f'avg@{k}', 'avg', 'ci'),
            (f'pass@{k}', 'pass', 'pass_ci'),
            (f'maj@{k}', 'maj', 'maj_ci'),
            (f'avg@{k}, exact string', 'exact', 'exact_ci'),
            (f'avg@{k}, lenient rule', 'lenient', 'lenient_ci'),
        )
    ]
    rows += [(f'pass@{j}', percent(value), '') for j, value in scores['pass_at'].items() if int(j) != k]
    console.table(f'{name}: {scores["problems"]} problems × {k} samples', ('score', 'value', '95 % interval'), rows)
    episodes = scores['problems'] * k
    of_all = lambda counts: ', '.join(f'{n} {word}' for word, n in counts.items()) or '–'
    console.table(
        '',
        (f'{episodes} episodes', ''),
        [
            ('answered in form', percent(scores['format'])),
            ('cut off at the budget (LENGTH)', percent(scores['truncated'])),
            ('void', percent(scores['void'])),
            ('ended by', of_all(scores['stops'])),
            ('tokens written', f'{scores["length"]:.0f}'),
            ('turns', f'{scores["turns"]:.2f}'),
            ('ran code', percent(scores['code_ratio'])),
            ('calls', f'{scores["calls"]:.2f}'),
            ('calls that failed', percent(scores['call_failures'])),
            ('verdicts of calls', of_all(scores['verdicts'])),
        ],
    )
    if len(scores['families']) > 1:
        console.table('', ('family', f'avg@{k}'), [(f, percent(x)) for f, x in scores['families'].items()])
    if len(scores['by_problem']) > LISTED:
        print(f'The {len(scores["by_problem"])} problems stand in summary.json and in the report.')
        return
    shares = ('avg', 'maj', 'exact', 'lenient', 'code', 'truncated')
    columns = ('problem, %', f'avg@{k}', 'maj', 'exact', 'lenient', 'code', 'LENGTH', 'tokens', 'gold', 'answer')
    console.table(
        '',
        columns,
        [
            (
                problem,
                *(f'{100 * r[key]:.0f}' for key in shares),
                f'{r["length"]:.0f}',
                _brief(r['gold']),
                _brief(r['answer']) or '–',
            )
            for problem, r in scores['by_problem'].items()
        ],
    )


def _brief(text: str) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= 24 else text[:23] + '…'
