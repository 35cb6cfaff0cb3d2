"""Rollout with slow tools: rows that go on while others wait, against instant tools and against a barrier per turn."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import threading
import time
from collections.abc import Callable

import numpy as np

from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, ExecResult, Problem, Stop, ToolCall, Verdict
from retool_jax.model.config import ModelConfig
from retool_jax.rollout import turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import STOP_CODE, STOP_NONE, Sampler
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.text import tags

FED = 32  # tokens of a tool's output
ROUNDS = 12, 6  # episodes per row: with few rows; with many, or behind a barrier
DECODING = 5 / 8  # share of the rows with slow tools that decode: about half of them wait
CALL, LAST = 'call', 'last'  # what a turn ends with
NOISY = 3  # times as many rounds with few rows, whose rates differ by a fifth from one round to the next
ANSWERED = ExecResult(Verdict.OK, '', '')


class Script:
    """Turn rules for a random model, with those parts of turns.Rules that an engine uses: a turn that the table
    ends is a call or, once in `calls` + 1 times, the episode's last (its problem decides); outputs are the same ids.

    barrier: an episode's last turn is announced to the executor too, and keeps its row until that answers.
    """

    def __init__(self, turn_tokens: int, max_tokens: int, calls: int, barrier: bool = False):
        self.settings = turns.TurnSettings(
            tools=calls > 0,
            max_tokens=max_tokens,
            max_turn_tokens=turn_tokens,
            max_turns=max_tokens,
            max_calls=max_tokens,
            on_cap='end',
            on_answer='end',
        )
        self.table = tags.TagTable(*(np.zeros((1, 1), np.int32) for _ in range(5)))
        self.calls, self.barrier = calls, barrier

    def turn_ids(self, episode: Episode) -> list[int]:
        return []  # nothing is taken up again

    def allowance(self, episode: Episode, written: int = 0) -> int:
        return min(self.settings.max_turn_tokens - written, self.settings.max_tokens - len(episode.tokens))

    def advance(self, episode: Episode, tokens, logprobs, stop: int, version: int) -> turns.Next:
        episode.append(tokens, acted=True, logprobs=logprobs, version=version)
        assert stop != STOP_NONE
        episode.turns += 1
        chance = random.Random(f'{episode.problem.id} {episode.turns}').random()
        if stop == STOP_CODE and chance * (self.calls + 1) < self.calls:
            return turns.Run(CALL)
        return turns.Run(LAST) if self.barrier else turns.End(Stop.EOS)

    def resume(self, episode: Episode, code: str, result: ExecResult) -> turns.Next:
        if code == LAST:
            return turns.End(Stop.EOS)
        episode.calls.append(ToolCall(episode.turns - 1, code, result.verdict, '', '', '', len(episode.tokens), 0.0))
        fed = list(range(FED))
        episode.append(fed, acted=False)
        allowance = self.allowance(episode)
        return turns.Feed(fed, allowance) if allowance > 0 else turns.End(Stop.LENGTH)


class Tool:
    """Answers every call after `seconds`, all at once and none before the other."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]:
        future: concurrent.futures.Future[ExecResult] = concurrent.futures.Future()
        if self.seconds > 0:
            timer = threading.Timer(self.seconds, future.set_result, (ANSWERED,))
            timer.daemon = True
            timer.start()
        else:
            future.set_result(ANSWERED)
        return future

    def finished(self, episode: Episode) -> None:
        pass


class Barrier:
    """A turn of all rows, then all their tools at once, then the next: what a loop of batched generation and
    batched tools does. No episode goes on, and no row is given to another, before the longest turn has ended."""

    def __init__(self, seconds: float, rows: int, episodes: int):
        self.seconds, self.rows, self.left = seconds, rows, episodes
        self.waiting: list[tuple[str, concurrent.futures.Future[ExecResult]]] = []

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]:
        future: concurrent.futures.Future[ExecResult] = concurrent.futures.Future()
        self.waiting.append((code, future))
        self._release()
        return future

    def finished(self, episode: Episode) -> None:
        self.left -= 1
        self._release()

    def _release(self) -> None:
        if not self.waiting or len(self.waiting) < min(self.rows, self.left):
            return
        waiting, self.waiting = self.waiting, []
        seconds = self.seconds if any(code == CALL for code, _ in waiting) else 0.0
        timer = threading.Timer(seconds, lambda: [future.set_result(ANSWERED) for _, future in waiting])
        timer.daemon = True
        timer.start()


class Case:
    """An engine of so many rows whose turns end at random after `mean` tokens on average."""

    def __init__(self, config: ModelConfig, shape, rows: int, decode_rows: int, mean: float):
        self.shape, self.rows, self.decode_rows = shape, rows, decode_rows
        # Two states: a random share of the vocabulary ends the turn. A random model then ends one at a fixed rate.
        ends = max(round(shape.vocab / mean), 1)
        table = np.zeros((2, shape.vocab), np.int32)
        table[:, np.random.default_rng(0).choice(shape.vocab, ends, replace=False)] = 1
        # Chunks as long as what tools answer, one or two at a time; a short quota, so that no tool waits for long.
        sizes = SamplerSettings(
            rows=rows,
            slots=shape.slots,
            chunk=FED,
            feed_rows=2,
            quota=16,
            decode_rows=decode_rows,
            min_bound=2 * FED,
            dtype=shape.dtype,
            weights='float',
            cache_dtype=shape.dtype,
        )
        self.sampler = Sampler(config, sizes, table, np.array([0, tags.CODE], np.int8), ())
        self.engine: Engine | None = None

    def run(self, weights: Params, tool, count: int, step: int = 0) -> float:
        """tokens/s of `count` episodes, from the `rows`-th that ended until the queue is empty."""
        rules = Script(self.shape.slots, self.shape.slots - FED, self.shape.calls, isinstance(tool, Barrier))
        plain = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
        self.engine = Engine(self.sampler, rules, plain, tool, seed=0, purpose=0)
        rng = np.random.default_rng(step)
        prompt = lambda: tuple(rng.integers(0, self.shape.vocab, self.shape.prompt).tolist())
        requests = [Request(Problem(f'{step}/{i}', '', '', '', ''), 0, prompt()) for i in range(count)]
        ended, marks = itertools.count(1), []

        def finished(episode: Episode) -> None:
            tool.finished(episode)
            if next(ended) in (self.rows, count - self.rows):
                stats = self.engine.stats
                marks.append(np.array([time.perf_counter(), stats.sampled_tokens, len(stats.tool_wait_s)]))

        self.engine.run(weights, 0, requests, step, finished=finished)
        self.seconds, tokens, self.answers = marks[-1] - marks[0]
        return tokens / self.seconds


def measure(config: ModelConfig, weights: Params, shape, repeats: int, say: Callable[[str], None]) -> dict:
    """tokens/s with tools that take half of an episode's time, and their ratios."""
    say('pace of a row')
    first, last = shape.tool_rows[0], shape.tool_rows[-1]
    few = first // 2
    # Tools take as long as the rest of an episode takes with few rows and instant tools.
    mean, held = shape.new / (shape.calls + 1), []
    probe = Case(config, shape, few, few, mean)
    for step in range(4):
        probe.run(weights, Tool(0.0), ROUNDS[0] * few, step)
        held.append(few * probe.seconds / max(probe.answers, 1))  # seconds of a row for every call
    mean = max(mean * shape.tool_s / float(np.median(held[1:])), 4.0)  # the first compiles
    instant = Case(config, shape, few, few, mean)
    slow = {rows: Case(config, shape, rows, round(rows * DECODING), mean) for rows in shape.tool_rows}
    count = lambda case: case.rows * ROUNDS[case.rows > first]
    shares = []  # of the time that rows are held, how much tools take

    def tools(case: Case, step: int) -> float:
        rate = case.run(weights, Tool(shape.tool_s), count(case), step)
        if case.rows == first:
            shares.append(shape.tool_s * case.answers / case.rows / case.seconds)
        return rate

    def barrier(case: Case, step: int) -> float:
        episodes = case.rows * ROUNDS[1]
        return case.run(weights, Barrier(shape.tool_s, case.rows, episodes), episodes, step)

    def rounds(sides: dict[str, Callable[[int], float]], repeats: int) -> dict[str, np.ndarray]:
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(repeats + 1):
            for name, work in sides.items():
                say(f'{name}, round {i}')
                speeds[name].append(work(i))
                say(f'{speeds[name][-1]:.0f} tokens/s')
        return {name: np.array(rates[1:]) for name, rates in speeds.items()}  # the first round compiles

    speeds = rounds(
        {
            f'instant_{few}': lambda i: instant.run(weights, Tool(0.0), count(instant), i),
            f'tools_{first}': lambda i: tools(slow[first], i),
            f'barrier_{first}': lambda i: barrier(slow[first], i),
        },
        NOISY * repeats,
    )
    shares = shares[1:]
    if last > first:
        speeds |= rounds(
            {f'tools_{rows}': lambda i, c=slow[rows]: tools(c, i) for rows in shape.tool_rows[1:]}
            | {f'barrier_{last}': lambda i: barrier(slow[last], i)},
            repeats,
        )
    figures = {f'{name}_tokens_per_s': float(np.median(rates)) for name, rates in speeds.items()}
    figures |= {'turn_tokens': mean, 'tools_share': float(np.median(shares))}
    pairs = {'tools_over_instant': (f'tools_{first}', f'instant_{few}')} | {
        f'tools_over_barrier_{rows}': (f'tools_{rows}', f'barrier_{rows}') for rows in (first, last)
    }
    for ratio, (name, other) in pairs.items():
        # A machine's speed changes within minutes: sides are compared within rounds, and by medians of all beside it.
        figures[ratio] = float(np.median(speeds[name] / speeds[other]))
        figures[f'{ratio}_of_medians'] = float(np.median(speeds[name]) / np.median(speeds[other]))
        figures[f'{ratio}_rounds'] = [round(float(r), 2) for r in speeds[name] / speeds[other]]
    return figures
