"""Episodes of a model that a server holds: the turn rules and the sandbox are ours, tokens come over the wire.

The server continues a prompt of token ids up to a stop string. Ids and not text, because a text is tokenised by the
server's own rules: a Llama's gets a second beginning-of-text token, and `<|im_end|>` in a question becomes the end of a
turn. vLLM, SGLang and llama.cpp take ids.

What comes back is text, and its ids here are those of the text encoded again: now and then others than the server
sampled, of the same bytes. Nothing is trained on these episodes, and scores are read from text; lengths are counted in
these ids.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retool_jax.core import answers, signals
from retool_jax.core.answers import Answer, Failure
from retool_jax.core.endpoint import Endpoint
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, ExecResult, Stop
from retool_jax.rollout import turns
from retool_jax.rollout.journal import Journal, call_key
from retool_jax.rollout.requests import Executor, Request
from retool_jax.rollout.sampler import STOP_EOS, STOP_LENGTH
from retool_jax.rollout.settings import SamplingSettings

TICK_S = 0.5  # between two looks whether the run is to stop
OPEN_PER_SLOT = 2  # episodes for each request that may be on its way: while a tool of one runs another one writes


class Served:
    """`Engine.stream` over a server."""

    link = None  # no other process has a part in its episodes

    def __init__(
        self,
        endpoint: Endpoint,
        rules: turns.Rules,
        sampling: SamplingSettings,
        executor: Executor | None,
        stops: Mapping[str, int],
        turn_end: int,
    ):
        """stops: stop string → STOP_*, those of the rules' table. turn_end: the id that ends the model's answer.

        Raises:
          ValueError: tools without an executor.
        """
        if rules.settings.tools and executor is None:
            raise ValueError('an engine with tools needs an executor')
        self.endpoint, self.rules, self.executor = endpoint, rules, executor
        self.stops, self.turn_end = dict(stops), turn_end
        self.rows = OPEN_PER_SLOT * endpoint.settings.concurrency
        self.parameters = parameters(sampling) | ({'stop': list(self.stops)} if self.stops else {})

    def stream(
        self,
        params: Params | None,
        version: int,
        requests: Sequence[Request],
        step: int,
        *,
        journal: Journal | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """Yields (index of the request, episode) as they finish, until all have or the run is told to stop; `params`
        are the server's own, and not looked at.

        Raises:
          UserError: behind the last episode, if some could not be finished: the budget was used up, or the server
            refused or failed a request; at once, if it takes none.
        """
        run = _Run(self, version, step, journal)
        waiting = collections.deque(enumerate(requests))
        while (waiting or run.open) and not signals.told():
            while waiting and len(run.open) < self.rows and not run.spent:
                run.begin(*waiting.popleft())
            yield from run.ended()
            if run.open:
                run.take()
            elif run.spent:
                break
            yield from run.ended()
        if (unfinished := len(run.lost) + len(waiting)) and not signals.told():
            raise UserError(
                f'{unfinished} of {len(requests)} episodes are not finished: {run.lost[-1]}; the others are kept, and '
                'the same command goes on with these'
            )


class _Run:
    """The open episodes of one stream, each waiting for the server or for a tool."""

    def __init__(self, served: Served, version: int, step: int, journal: Journal | None):
        self.served, self.version, self.step, self.journal = served, version, step, journal
        self.open: dict[int, Episode] = {}  # by the index of its request
        self.code: dict[int, str] = {}  # that the tool of an episode runs
        self.lost: list[str] = []  # why episodes could not be finished
        self.spent = False  # the budget is used up
        self._done: collections.deque[tuple[int, Episode]] = collections.deque()
        self._events: queue.SimpleQueue[tuple[int, concurrent.futures.Future]] = queue.SimpleQueue()

    def begin(self, index: int, request: Request) -> None:
        prompt = request.prompt
        episode = Episode(problem=request.problem, sample=request.sample, step=self.step, prompt_length=len(prompt))
        episode.append(prompt, acted=False)
        self.open[index] = episode
        allowance = self.served.rules.allowance(episode)
        if allowance <= 0:  # the prompt fills the budget
            episode.void = True
        self._follow(index, turns.Sample(allowance) if allowance > 0 else turns.End(Stop.LENGTH))

    def take(self) -> None:
        """Waits a moment for an answer or a tool, and does what the rules say of it."""
        try:
            index, future = self._events.get(timeout=TICK_S)
        except queue.Empty:
            return
        found, rules = future.result(), self.served.rules
        if isinstance(found, ExecResult):
            episode, code = self.open[index], self.code.pop(index)
            if self.journal is not None:
                self.journal.put(call_key(episode, code), found)
            self._follow(index, rules.resume(episode, code, found))
        elif isinstance(found, Failure):
            self.lost.append(found.reason)
            self.spent |= not found.asked
            del self.open[index]
        else:
            ids, stop = read(found, self.served.stops, rules, self.served.turn_end)
            # Not asked for: servers differ in what they report, and the ids may be others.
            unknown = [math.nan] * len(ids)
            self._follow(index, rules.advance(self.open[index], ids, unknown, stop, self.version))

    def ended(self) -> Iterator[tuple[int, Episode]]:
        """Hands out what is finished."""
        while self._done:
            yield self._done.popleft()

    def _follow(self, index: int, following: turns.Next) -> None:
        episode = self.open[index]
        if isinstance(following, turns.End):
            episode.stop = following.stop
            self._done.append((index, self.open.pop(index)))
        elif isinstance(following, turns.Run):
            known = self.journal.get(call_key(episode, following.code)) if self.journal is not None else None
            if known is not None:
                self._follow(index, self.served.rules.resume(episode, following.code, known))
                return
            self.code[index] = following.code
            self._wait(index, self.served.executor.submit(following.code))
        else:
            asked = answers.Request(
                prompt=list(episode.tokens),
                parameters=self.served.parameters | {'max_tokens': following.allowance},
                candidate=episode.sample,
            )
            self._wait(index, self.served.endpoint.submit(asked))

    def _wait(self, index: int, future: concurrent.futures.Future) -> None:
        future.add_done_callback(lambda done: self._events.put((index, done)))


def parameters(sampling: SamplingSettings) -> dict[str, Any]:
    """How the server draws tokens. All is said, and off where it is off: vLLM takes what is not said from the model's
    generation_config.json (Qwen2.5: top-k 20, a penalty on repetition), llama.cpp cuts at min-p 0.05."""
    said = dataclasses.asdict(sampling)
    return said | {'top_k': sampling.top_k or -1, 'repetition_penalty': 1.0}


def read(answer: Answer, stops: Mapping[str, int], rules: turns.Rules, turn_end: int) -> tuple[list[int], int]:
    """The ids of a turn and what ended it (STOP_*).

    Servers leave the stop string out, so it is put back; one that does not (the text holds it) is cut behind it. Which
    one it was say vLLM and SGLang. Of others the text must tell: an element that was left open was being closed, and
    without one the model ended its answer. An end of text inside an open `<code>` is taken for a call there.
    """
    text, stop = answer.text, STOP_LENGTH if answer.finish == 'length' else STOP_EOS
    held = [(at, tag) for tag in stops if (at := text.find(tag)) >= 0]
    if held:
        at, tag = min(held)
        text, stop = text[: at + len(tag)], stops[tag]
    elif stop == STOP_EOS:
        tag = answer.stopped_by if answer.stopped_by is not None else _left_open(text, stops)
        if tag in stops:
            text, stop = text + tag, stops[tag]
    ids = rules.tokenizer.encode(text)
    if stop == STOP_EOS and answer.finish != answers.FILTERED:
        # The model wrote it, and servers do not show it.
        ids.append(answer.stopped_by if answer.stopped_by in rules.tokenizer.eos_ids else turn_end)
    return ids, stop


def _left_open(text: str, stops: Mapping[str, int]) -> str:
    """The closing tag of the element that was opened last, '' where none is open."""
    begun = {tag: text.rfind(tag.replace('/', '', 1)) for tag in stops}
    tag = max(begun, key=begun.get, default='')
    return tag if tag and begun[tag] >= 0 else ''
