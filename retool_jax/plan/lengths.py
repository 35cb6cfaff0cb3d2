"""How long a step's episodes are, and which of them an engine's rows hold when: a simulation without chance.

The same arguments give the same numbers: lengths are quantiles, in an order of a fixed seed, and the loop is that of
rollout/scheduler.py, in decode calls.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import statistics

import numpy as np

from retool_jax.core.errors import UserError

SEED = 0  # of the order in which the lengths come
HALVINGS = 60  # of the interval in which the scale of the lengths lies


def draw(episodes: int, mean: float, sigma: float, budget: int) -> np.ndarray:
    """Tokens of each episode of a step, int64 [E] in the order of the requests: log-normal and cut at the budget.

    The quantiles (i + ½) ÷ E are taken, shuffled, so that no luck is in their sum. mean: of what is left by the cut.
    sigma: standard deviation of the logarithm.

    Raises: UserError for a mean that no lengths up to the budget have.
    """
    if not 1 < mean < budget:
        raise UserError(
            f'--tokens={mean:g} must lie between 1 and turns.max_tokens={budget}, at which episodes are cut'
        )
    quantile = statistics.NormalDist(0, sigma).inv_cdf
    deviation_E = np.array([quantile((i + 0.5) / episodes) for i in range(episodes)])
    cut = lambda scale: np.clip(np.exp(scale + deviation_E), 1, budget)
    widest = float(np.abs(deviation_E).max())
    low, high = -widest, math.log(budget) + widest  # all 1, all at the budget
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle).mean() < mean else (low, middle)
    return np.random.default_rng(SEED).permutation(np.rint(cut(high)).astype(np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What the simulation needs to know of an engine."""

    rows: int  # that decode at a time
    call: int  # steps of a decode call: a row that stops in it stands still until its end
    stretches: int  # of equal length, in which an episode is written: after each but the last a row waits for a tool
    samples: int  # of a problem: their prompt is fed once
    chunk: int  # tokens of a prompt or of a tool's answer, the most that one call of extend takes of a row
    feed_rows: int  # that one call of extend takes


@dataclasses.dataclass(frozen=True)
class Course:
    """What an engine does in a step: pieces [P] of its decode steps, and its calls of extend in groups [F].

    A piece's rows are those at its end.
    """

    steps_P: np.ndarray  # decode steps
    busy_P: np.ndarray  # rows that hold an episode, averaged over the piece
    live_P: np.ndarray  # slots that hold their tokens, each row's rounded up to whole tiles, averaged likewise
    longest_P: np.ndarray  # slots of the longest row
    extends_F: np.ndarray  # calls
    reach_F: np.ndarray  # slots of the longest row after them

    @property
    def steps(self) -> int:
        return int(self.steps_P.sum())


def follow(tokens_E: np.ndarray, engine: Engine, piece: int, tile: int = 1) -> Course:
    """The course of an engine that makes these episodes, at least one, in their order; each takes the row that is free
    first.

    A stretch takes whole decode calls, and a tool answers within one more: what the scheduler asks for in the end of
    a call it has at the earliest when the next is under way. All tokens of an episode count as decoded.
    piece: steps of a piece, made whole calls. tile: slots that are read together.
    """
    stretch_E = -(-tokens_E // (engine.stretches * engine.call))  # calls
    calls_E = engine.stretches * stretch_E + engine.stretches - 1
    free, start_E = [0] * engine.rows, np.zeros_like(tokens_E)
    for i, calls in enumerate(calls_E.tolist()):
        start_E[i] = heapq.heappop(free)
        heapq.heappush(free, int(start_E[i]) + calls)
    end_E, total = start_E + calls_E, max(free)

    width = max(piece // engine.call, 1)
    first_E, last_E = start_E // width, (end_E - 1) // width
    count_E = last_E - first_E + 1
    episode_I = np.repeat(np.arange(len(tokens_E)), count_E)  # an entry for every episode and piece that it has part in
    piece_I = np.arange(len(episode_I)) - np.repeat(np.cumsum(count_E) - count_E, count_E) + first_E[episode_I]
    start_I, end_I = start_E[episode_I], np.minimum((piece_I + 1) * width, end_E[episode_I])
    length_I = -(-tokens_E[episode_I] * (end_I - start_I) // calls_E[episode_I])
    inside_I = end_I - np.maximum(piece_I * width, start_I)

    pieces = -(-total // width)
    calls_P = np.minimum(width, total - np.arange(pieces) * width)
    averaged = lambda value_I: np.bincount(piece_I, inside_I * value_I, pieces) / calls_P
    longest_P = np.zeros(pieces, np.int64)
    np.maximum.at(longest_P, piece_I, length_I)
    extends_F, reach_F = _feeds(tokens_E, start_E, stretch_E + 1, engine)
    return Course(
        steps_P=calls_P * engine.call,
        busy_P=averaged(np.ones_like(length_I)),
        live_P=averaged(-(-length_I // tile) * tile),
        longest_P=longest_P,
        extends_F=extends_F,
        reach_F=reach_F,
    )


def _feeds(
    tokens_E: np.ndarray, start_E: np.ndarray, between_E: np.ndarray, engine: Engine
) -> tuple[np.ndarray, np.ndarray]:
    """(calls of extend, longest row after them): the scheduler feeds what is pending before each decode call, prompts
    before tools' answers, as many rows at a time as a call takes."""
    found = []
    prompt_E = np.arange(len(tokens_E)) % engine.samples == 0
    answer_S = np.arange(1, engine.stretches)
    for at, length in (
        (start_E[prompt_E], np.zeros_like(start_E[prompt_E])),
        (
            (start_E[:, None] + answer_S * between_E[:, None]).ravel(),
            (tokens_E[:, None] * answer_S // engine.stretches).ravel(),
        ),
    ):
        pass_F, where, count_F = np.unique(at, return_inverse=True, return_counts=True)
        longest_F = np.zeros(len(pass_F), np.int64)
        np.maximum.at(longest_F, where, length + engine.chunk)
        found.append((-(-count_F // engine.feed_rows), longest_F))
    calls, longest = (np.concatenate(parts) for parts in zip(*found))
    return calls, longest
