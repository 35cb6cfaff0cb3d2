"""What goes into an engine: what is asked and in which order, who runs snippets, and the other processes."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from retool_jax.core.records import Episode, ExecResult, Problem


class Executor(Protocol):
    """What the engine needs of a sandbox: sandbox.pool.Pool, or a remote client."""

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]: ...


class Link(Protocol):
    """What engines on the devices of several processes need of the others: hosts.Lockstep."""

    members: tuple[int, ...]  # the processes, in order
    waited_s: float  # in `share`, since somebody set it to 0

    def owns(self, row: int) -> bool:
        """Whether this process runs the tools of a row."""

    def share(self, answers: dict[int, ExecResult], told: int) -> tuple[dict[int, ExecResult], int]:
        """The answers of all of them and the signal that any was told to stop by, the same in each."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One episode to be made, or to be taken up where an earlier `run` left it."""

    problem: Problem
    sample: int
    prompt: tuple[int, ...]
    begun: Episode | None = None  # unfinished (its stop is None), of lists; it goes on as it is, without a copy

    @staticmethod
    def resume(episode: Episode) -> Request:
        """Takes an unfinished episode up again."""
        return Request(episode.problem, episode.sample, tuple(episode.tokens[: episode.prompt_length]), episode)


def by_prompt(requests: Sequence[Request]) -> list[list[Request]]:
    """Runs of requests whose prompt is the same: where one engine makes them, they share its prefill."""
    return [list(run) for _, run in itertools.groupby(requests, key=lambda request: request.prompt)]


class Queue:
    """Requests that wait for a row, with their indices: dealt to engines by whole prompts, in order.

    An engine takes those of another's prompt only where none is left that no engine has begun with.
    """

    def __init__(self, requests: Sequence[Request], engines: int):
        number = itertools.count()
        self.prompts = collections.deque([(next(number), request) for request in run] for run in by_prompt(requests))
        self.own: list[collections.deque[tuple[int, Request]]] = [collections.deque() for _ in range(engines)]

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        return itertools.chain(*self.own, *self.prompts)

    def __bool__(self) -> bool:
        return bool(self.prompts) or any(self.own)

    def take(self, engine: int) -> tuple[int, Request]:
        """The next (index, request) of an engine; IndexError where none waits."""
        own = self.own[engine]
        if not own and self.prompts:
            own.extend(self.prompts.popleft())
        return own.popleft() if own else max(self.own, key=len).pop()
