"""What goes into an engine: what is asked, who runs snippets, and the other processes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from typing import Protocol

from retool_jax.core.records import Episode, ExecResult, Problem


class Executor(Protocol):
    """What the engine needs of a sandbox: sandbox.pool.Pool, or a remote client."""

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]: ...


class Link(Protocol):
    """What an engine on a mesh over several processes needs of the others: hosts.Lockstep."""

    waited_s: float  # in `share`, since somebody set it to 0

    def owns(self, row: int) -> bool:
        """Whether this process runs the tools of a row."""

    def share(self, answers: dict[int, ExecResult], told: int) -> tuple[dict[int, ExecResult], int]:
        """The answers of all processes and the signal that any was told to stop by, the same in each."""


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
