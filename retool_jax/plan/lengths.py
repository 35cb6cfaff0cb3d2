"""How long a step's episodes are, and which of them an engine's rows hold when: a simulation without chance.

The same arguments give the same numbers: lengths are quantiles, in an order of a fixed seed, and the loop is that of
rollout/scheduler.py, in decode calls. With partial rollouts a step is one of many alike.
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
    quanta: int = 0  # decode calls that an episode gets in a step; 0: all that it takes

    def stretch(self, tokens_E: np.ndarray) -> np.ndarray:
        """Decode calls [E] of each stretch of an episode."""
        return -(-tokens_E // (self.stretches * self.call))


@dataclasses.dataclass(frozen=True)
class Flight:
    """The episodes [E] that a step works on, in the order of the requests."""

    tokens_E: np.ndarray  # that each has in its end
    begun_E: np.ndarray  # decode calls that the steps before have given it
    group_E: np.ndarray  # which of the step's groups it belongs to, ascending
    ended: float  # groups that a step ends, and is trained on

    def part(self, first: int, last: int) -> Flight:
        """Those of some groups."""
        own = (self.group_E >= first) & (self.group_E < last)
        return dataclasses.replace(
            self, tokens_E=self.tokens_E[own], begun_E=self.begun_E[own], group_E=self.group_E[own]
        )


@dataclasses.dataclass(frozen=True)
class Course:
    """What an engine does in a step: pieces [P] of its decode steps, and its calls of extend in groups [F].

    A piece's rows are those at its end.
    """

    steps_P: np.ndarray  # decode steps
    busy_P: np.ndarray  # rows that hold an episode, averaged over the piece
    live_P: np.ndarray  # slots that hold their tokens, each row's rounded up to whole tiles, averaged likewise
    longest_P: np.ndarray  # slots of the longest row
    tokens: int  # that are written
    extends_F: np.ndarray  # calls
    reach_F: np.ndarray  # slots of the longest row after them

    @property
    def steps(self) -> int:
        return int(self.steps_P.sum())


def in_flight(tokens_E: np.ndarray, engine: Engine) -> Flight:
    """What a step works on where so long episodes are asked for, whole groups of `engine.samples` of them.

    With `engine.quanta` a step begins with the groups that the one before left unfinished, and new ones in the place of
    those that ended. Where that has gone on for long, a group is as often in each step of its life as in any other: of
    all steps of all groups' lives as many are taken as a step has groups, evenly by what is written in them and what
    before, and shuffled. Of a group those episodes are left that have not ended.
    """
    groups = len(tokens_E) // engine.samples
    if not engine.quanta:
        return Flight(tokens_E, np.zeros_like(tokens_E), np.arange(len(tokens_E)) // engine.samples, groups)
    calls_GS = (engine.stretches * engine.stretch(tokens_E)).reshape(groups, engine.samples)
    life_G = -(-calls_GS.max(axis=1) // engine.quanta)  # steps
    group_L = np.repeat(np.arange(groups), life_G)  # an entry for every step of every life
    begun_L = engine.quanta * (np.arange(len(group_L)) - np.repeat(np.cumsum(life_G) - life_G, life_G))
    made_LS = np.clip(calls_GS[group_L] - begun_L[:, None], 0, engine.quanta)
    order_L = np.lexsort((begun_L, made_LS.sum(axis=1)))
    taken_G = order_L[(2 * np.arange(groups) + 1) * len(order_L) // (2 * groups)]
    taken_G = np.random.default_rng(SEED).permutation(taken_G)
    left = (made_LS[taken_G] > 0).ravel()
    return Flight(
        tokens_E.reshape(calls_GS.shape)[group_L[taken_G]].ravel()[left],
        np.repeat(begun_L[taken_G], engine.samples)[left],
        np.repeat(np.arange(groups), engine.samples)[left],
        groups * groups / len(order_L),
    )


def follow(flight: Flight, engine: Engine, piece: int, tile: int = 1) -> Course:
    """The course of an engine that works on these episodes, at least one, in their order; each takes the row that is
    free first.

    A stretch takes whole decode calls, and a tool answers within one more: what the scheduler asks for in the end of
    a call it has at the earliest when the next is under way. All tokens of an episode count as decoded.
    piece: steps of a piece, made whole calls. tile: slots that are read together.
    """
    tokens_E, begun_E = flight.tokens_E, flight.begun_E
    stretch_E = engine.stretch(tokens_E)  # calls
    whole_E = engine.stretches * stretch_E
    made_E = np.minimum(whole_E - begun_E, engine.quanta or whole_E)
    answers_E = (begun_E + made_E - 1) // stretch_E - begun_E // stretch_E  # between its stretches of this step
    calls_E = made_E + answers_E
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
    parts_I = (begun_E * calls_E)[episode_I] + made_E[episode_I] * (end_I - start_I)  # of whole_E × calls_E
    length_I = -(-tokens_E[episode_I] * parts_I // (whole_E * calls_E)[episode_I])
    inside_I = end_I - np.maximum(piece_I * width, start_I)

    pieces = -(-total // width)
    calls_P = np.minimum(width, total - np.arange(pieces) * width)
    averaged = lambda value_I: np.bincount(piece_I, inside_I * value_I, pieces) / calls_P
    longest_P = np.zeros(pieces, np.int64)
    np.maximum.at(longest_P, piece_I, length_I)
    extends_F, reach_F = _feeds(flight, start_E, stretch_E, answers_E, engine)
    return Course(
        steps_P=calls_P * engine.call,
        busy_P=averaged(np.ones_like(length_I)),
        live_P=averaged(-(-length_I // tile) * tile),
        longest_P=longest_P,
        tokens=int((tokens_E * made_E // whole_E).sum()),
        extends_F=extends_F,
        reach_F=reach_F,
    )


def _feeds(
    flight: Flight, start_E: np.ndarray, stretch_E: np.ndarray, answers_E: np.ndarray, engine: Engine
) -> tuple[np.ndarray, np.ndarray]:
    """(calls of extend, longest row after them): the scheduler feeds what is pending before each decode call, prompts
    and what earlier steps wrote before tools' answers, as many rows at a time as a call takes."""
    tokens_E, begun_E = flight.tokens_E, flight.begun_E
    new = np.flatnonzero(begun_E == 0)[:: engine.samples]  # groups that begin are whole, and their prompt is fed once
    old = np.flatnonzero(begun_E)
    written = tokens_E[old] * begun_E[old] // (engine.stretches * stretch_E[old])
    episode_A = np.repeat(np.arange(len(tokens_E)), answers_E)
    number_A = np.arange(len(episode_A)) - np.repeat(np.cumsum(answers_E) - answers_E, answers_E) + 1
    stretch_A = begun_E[episode_A] // stretch_E[episode_A] + number_A  # that the answer follows
    found = []
    for at, length, chunks in (
        (
            start_E[np.concatenate([new, old])],
            np.concatenate([np.full(len(new), engine.chunk), written]),
            np.concatenate([np.ones(len(new), np.int64), -(-written // engine.chunk)]),
        ),
        (
            start_E[episode_A] + stretch_A * stretch_E[episode_A] - begun_E[episode_A] + number_A,
            tokens_E[episode_A] * stretch_A // engine.stretches + engine.chunk,
            np.ones(len(episode_A), np.int64),
        ),
    ):
        pass_F, where = np.unique(at, return_inverse=True)
        chunks_F, most_F, longest_F = np.zeros((3, len(pass_F)), np.int64)
        np.add.at(chunks_F, where, chunks)
        np.maximum.at(most_F, where, chunks)  # one after another, of a row
        np.maximum.at(longest_F, where, length)
        found.append((np.maximum(-(-chunks_F // engine.feed_rows), most_F), longest_F))
    calls, longest = (np.concatenate(parts) for parts in zip(*found))
    return calls, longest
