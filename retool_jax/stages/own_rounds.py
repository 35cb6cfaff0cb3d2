"""Rounds of a model that makes its own cold start: sample with the interpreter, keep what holds, fine-tune, again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from retool_jax.core import console
from retool_jax.core.records import Problem
from retool_jax.stages import parts, sft
from retool_jax.stages.config import CheckpointSettings, FineTuning, ModelSettings, RunSettings
from retool_jax.stages.rewrite_config import Rewrite
from retool_jax.traces import outcome, sampled, verification
from retool_jax.traces.sampled import Voice, Written
from retool_jax.traces.verification import Equal, Judged, Wording

SAMPLES = 'samples.jsonl'  # of a round: all that was sampled, with the interpreter and without
SAVES = 5  # checkpoints of a fine-tuning


def make(
    stage: Rewrite,
    directory: Path,
    problems: Sequence[Problem],
    pool: parts.Sandbox,
    wording: Wording,
    equal: Equal,
) -> list[Judged]:
    """What became of the traces of all rounds; each asks its own share of the problems.

    Round n + 1 samples with the first model fine-tuned on all that was kept in rounds 1 to n. What a round sampled and
    what was tuned is in its folder and not made again. After the last round nothing is tuned: launch/sft.py does that
    with the episodes/ of all.
    """
    rounds, found, model = stage.rewriter.rounds, [], stage.model
    for number in range(1, rounds + 1):
        place = directory / f'round_{number}'
        part = problems[number - 1 :: rounds]
        with_tool, without = _samples(stage, place, model, part, pool)
        made = _judged(with_tool, part, pool, wording, equal)
        if stage.rewriter.mattered:
            made = sampled.mattered(made, without, equal)
        outcome.keep(place, made, wording.tokenizer)
        counts = ', '.join(f'{n} {reason}' for reason, n in verification.tally(made).items() if n)
        console.say(f'round {number} of {rounds}: {counts}')
        found += made
        if number < rounds:
            model = _tuned(stage, directory, place, number, found)
    return found


def _samples(
    stage: Rewrite, place: Path, model: ModelSettings, problems: Sequence[Problem], pool: parts.Sandbox
) -> tuple[list[Written], list[Written]]:
    """The round's answers with the interpreter, and without it where asked for; from disk where they are there."""
    file = place / SAMPLES
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        settings, made = stage.rewriter, {}
        for tools in (True, False) if settings.mattered else (True,):
            hints = (settings.hint, settings.places) if tools else ()
            total = len(problems) * settings.candidates
            with console.progress(f'{place.name}, {"with" if tools else "without"} the tool', total) as advance:
                voice = _voice(stage, place, dataclasses.replace(model, tools=tools), pool)
                made[tools] = sampled.write(voice, problems, settings.candidates, *hints, finished=lambda _: advance())
            del voice
        rows = [dataclasses.asdict(one) | {'tools': tools} for tools, ones in made.items() for one in ones]
        new = file.with_name(f'{SAMPLES}.new')
        new.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        new.replace(file)
    both: dict[bool, list[Written]] = {True: [], False: []}
    for row in map(json.loads, file.read_text().splitlines()):
        both[row.pop('tools')].append(Written(**row))
    return both[True], both[False]


def _voice(stage: Rewrite, place: Path, settings: ModelSettings, pool: parts.Sandbox) -> Voice:
    """A model with its weights, ready to be sampled from."""
    mesh = parts.make_mesh(stage.mesh)
    model = parts.open_model(settings, place)
    parts.check_context(model, stage.turns.max_tokens, 'turns.max_tokens')
    sampler = parts.make_sampler(model, stage.sampler, stage.turns, mesh)
    params = sampler.sync(parts.load_policy(settings, model, stage.run.seed, mesh))
    executor = pool if settings.tools else None
    engine = parts.make_engine(
        model, sampler, stage.turns, stage.feedback, stage.sampling, executor, stage.run.seed, parts.TRAINING
    )
    return Voice(engine, params, model.template, model.tokenizer)


def _judged(
    written: Sequence[Written], problems: Sequence[Problem], pool: parts.Sandbox, wording: Wording, equal: Equal
) -> list[Judged]:
    by_id = {problem.id: problem for problem in problems}
    return verification.settle([sampled.read(one, by_id[one.id]) for one in written], pool, wording, equal)


def _tuned(stage: Rewrite, directory: Path, place: Path, number: int, found: Sequence[Judged]) -> ModelSettings:
    """The first model, fine-tuned on all that was kept so far."""
    traces = place / 'so_far'
    outcome.keep(traces, found, parts.open_model(stage.model, directory).tokenizer)
    steps = CheckpointSettings(every=max(stage.sft.steps // SAVES, 1), every_s=0.0, keep_last=1)
    tuning = FineTuning(
        run=RunSettings(dir=str(place / 'sft'), seed=stage.run.seed),
        traces=str(traces / 'episodes'),
        unreadable=stage.reward.unreadable,
        model=stage.model,
        lora=stage.lora,
        mesh=stage.mesh,
        forward=stage.forward,
        optimizer=stage.optimizer,
        sft=stage.sft,
        checkpoints=steps,
    )
    if not (place / 'sft' / sft.FINAL).exists():
        sft.run(tuning)
    return dataclasses.replace(stage.model, path=str(place / 'sft' / sft.FINAL))
