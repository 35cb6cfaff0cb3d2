"""What the scheduler knows of an episode in a row of the sampler."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np

from retool_jax.core.records import Episode, ExecResult
from retool_jax.rollout.requests import Request


@dataclasses.dataclass(slots=True)
class Row:
    """The episode that a row of the sampler holds, and what it waits for."""

    index: int  # of its request
    request: Request
    episode: Episode
    pending: list[int]  # ids to be fed; the cache holds all tokens before them
    length: int  # tokens of the row, `unread` among them
    quanta: int  # decode calls that it may still take part in; negative: any number
    allowance: int = 0  # tokens that it may sample once nothing is pending
    tag: int = 0  # state of the tag automaton once nothing is pending
    live: bool = False  # the row may decode
    since: int = -1  # the quantum that the row was first live for; -1: none yet
    unread: tuple[np.ndarray, np.ndarray] | None = None  # tokens and logprobs that the episode does not have yet
    code: str = ''  # the snippet that the executor was asked to run
    asked_s: float = 0.0  # when it was asked; 0: the row waits for no tool
    future: concurrent.futures.Future[ExecResult] | None = None  # of a call of this process
