"""What goes into an engine: what is asked, how tokens are drawn, who runs snippets, and the other processes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from typing import Protocol

from retool_jax.core.checks import MANY, above, check, within
from retool_jax.core.records import Episode, ExecResult, Problem


class Executor(Protocol):
    """What the engine needs of a sandbox: sandbox.pool.Pool, or a remote client."""

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]: ...


class Link(Protocol):
    """What an engine on a mesh over several processes needs of the others: hosts.Lockstep."""

    def owns(self, row: int) -> bool:
        """Whether this process runs the tools of a row."""

    def share(self, answers: dict[int, ExecResult]) -> dict[int, ExecResult]:
        """The answers of all processes, the same in each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn."""

    temperature: float  # what logits are divided by; 0 takes the largest. P 1 in evaluation; R 1 in training
    # The most probable tokens whose probability adds up to this are kept, in (0, 1]; 1: all. P 0.7 in evaluation
    # (R 0.6); R 1 in training, where truncation would renormalise the sampler's distribution and not the trainer's
    top_p: float
    top_k: int  # so many most probable tokens are kept; 0: all. H 0
    min_p: float  # tokens below this share of the largest probability are dropped, in [0, 1]; 0: none. H 0

    def __post_init__(self):
        check(self, temperature=within(0, 1e6), top_p=above(0, 1), top_k=within(0, MANY), min_p=within(0, 1))

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One episode to be made, or to be taken up where an earlier `run` left it."""

    problem: Problem
    sample: int
    prompt: tuple[int, ...]
    begun: Episode | None = None  # unfinished (its stop is None); it goes on as it is, without a copy

    @staticmethod
    def resume(episode: Episode) -> Request:
        """Takes an unfinished episode up again."""
        return Request(episode.problem, episode.sample, tuple(episode.tokens[:episode.prompt_length]), episode)
