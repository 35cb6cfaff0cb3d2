"""An evaluation's model behind a server (backend=endpoint), in the place of the engine and its weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from retool_jax.core import console, endpoint_settings, storage
from retool_jax.core.endpoint import Endpoint
from retool_jax.core.pytrees import Params
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.library import Spoken, load_spoken
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import STOP_ANSWER, STOP_CODE
from retool_jax.rollout.served import Served
from retool_jax.rollout.turns import Rules, TurnSettings
from retool_jax.sandbox.feedback import render
from retool_jax.stages import parts
from retool_jax.stages.config import Evaluation
from retool_jax.text import tags
from retool_jax.text.template import end_ids

ANSWERS = 'answers'  # below the run's folder
FREE = (*endpoint_settings.FREE, 'mesh', 'sampler')  # keys of a run that may be others when it goes on
# What makes an engine and its weights in the sampling layout, from a sandbox.
type Make = Callable[[Executor | None], tuple[Engine | Served, Params | None]]


@dataclasses.dataclass(frozen=True)
class Speaker(Spoken):
    """A served model and how it is spoken to."""

    endpoint: Endpoint = dataclasses.field(compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.endpoint)


@contextlib.contextmanager
def opened(stage: Evaluation, directory: Path) -> Iterator[tuple[Speaker, Make]]:
    """The model at endpoint.url with the tokenizer at model.path, and what makes its engine; answers are kept below
    `directory`. Behind the block is said what became of the requests."""
    spoken = load_spoken(
        storage.model_files('model.path', stage.model.path),
        stage.model.template,
        stage.model.tools,
        stage.model.instruction,
    )
    with Endpoint(stage.endpoint, directory / ANSWERS) as endpoint:
        try:
            yield (
                Speaker(spoken.tokenizer, spoken.template, endpoint),
                lambda pool: (make_engine(stage, spoken, endpoint, pool), None),
            )
        finally:
            console.say(f'endpoint: {endpoint.report()}')


def make_engine(stage: Evaluation, spoken: Spoken, endpoint: Endpoint, executor: Executor | None) -> Served:
    """The engine of an evaluation through a server."""
    budgets = TurnSettings(tools=stage.model.tools, **dataclasses.asdict(stage.turns))
    width = spoken.tokenizer.size
    table = parts.table_of(spoken.tokenizer, width, stage.model.tools, stage.turns.on_answer == 'end')
    stop_of = {tags.CODE: STOP_CODE, tags.ANSWER: STOP_ANSWER}
    looked_for = set(table.stops.tolist())
    stops = {tag: stop_of[number] for tag, number in tags.TAGS.items() if number in looked_for}
    rules = Rules(budgets, spoken.tokenizer, table, lambda result: render(result, stage.feedback))
    (turn_end,) = end_ids(spoken.template, spoken.tokenizer)
    return Served(endpoint, rules, stage.sampling, executor, stops, turn_end)
