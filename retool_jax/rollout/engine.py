"""The host half of rollout: slots that take episodes, tools that answer while other rows decode.

Every pass of the loop admits episodes to free slots, feeds what is pending (prompts and tool
outputs, by the same call), decodes one quantum for all live rows and applies the turn rules. It
waits for a tool only when no row can decode. What an episode samples depends on its problem,
sample index and step alone, never on its slot, its neighbours or a tool's latency.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import numpy as np

from retool_jax.core.pytrees import Params, SampleState
from retool_jax.core.records import Episode, ExecResult, Problem
from retool_jax.rollout import turns
from retool_jax.rollout.journal import Journal, call_key
from retool_jax.rollout.sampler import Feed, Placement, Sampler


class Executor(Protocol):
    """What the engine needs of a sandbox: sandbox.pool.Pool, or a remote client."""

    def submit(self, code: str) -> concurrent.futures.Future[ExecResult]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn."""

    temperature: float  # 0 is greedy
    top_p: float  # 1 keeps everything
    top_k: int  # 0 keeps everything
    min_p: float  # 0 keeps everything

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One episode to be made."""

    problem: Problem
    sample: int
    prompt: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class Slot:
    """An episode in flight: what its row waits for."""

    request: Request
    episode: Episode
    pending: list[int]  # ids to be fed; the cache holds all tokens before them
    allowance: int = 0  # once nothing is pending
    live: bool = False  # the row may decode
    code: str = ''
    future: concurrent.futures.Future[ExecResult] | None = None


@dataclasses.dataclass
class RolloutStats:
    """What one `run` did; seconds are wall clock of the host."""

    episodes: int = 0
    sampled_tokens: int = 0
    fed_tokens: int = 0
    decode_s: float = 0.0
    extend_s: float = 0.0
    tools_blocked_s: float = 0.0
    total_s: float = 0.0
    slot_steps: int = 0  # rows × quanta, and of these the live ones
    live_steps: int = 0
    tool_wall_s: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Runs episodes through a Sampler's slots; takes the weights with each call."""

    def __init__(self, sampler: Sampler, rules: turns.Rules, sampling: SamplingSettings,
                 executor: Executor | None, seed: int, purpose: int):
        """`purpose` separates the randomness of training, evaluation, … under one seed."""
        if rules.settings.tools and executor is None:
            raise ValueError('rollout.tools is true but no executor was given')
        if rules.settings.max_tokens > sampler.settings.slots:
            raise ValueError(f'rollout.max_tokens {rules.settings.max_tokens} exceeds the {sampler.settings.slots} '
                             'KV slots of a row; raise sampler.slots')
        self.sampler, self.rules, self.sampling, self.executor = sampler, rules, sampling, executor
        self.key = jax.random.fold_in(jax.random.key(seed), purpose)
        self.stats = RolloutStats()

    def run(self, params: Params, version: int, requests: Sequence[Request], step: int, *,
            journal: Journal | None = None,
            finished: Callable[[Episode], None] = lambda episode: None) -> list[Episode]:
        """Makes all requested episodes with `params` (sampling layout), in the order of the requests."""
        done: dict[int, Episode] = {}
        for index, episode in self.stream(params, version, requests, step, journal=journal):
            done[index] = episode
            finished(episode)
        return [done[i] for i in range(len(requests))]

    def stream(self, params: Params, version: int, requests: Sequence[Request], step: int, *,
               journal: Journal | None = None) -> Iterator[tuple[int, Episode]]:
        """Yields (index of the request, episode) as they finish."""
        return _Flight(self, params, version, requests, step, journal).run()


class _Flight:
    """One `run`: the slots and the queue."""

    def __init__(self, engine: Engine, params: Params, version: int, requests: Sequence[Request], step: int,
                 journal: Journal | None):
        self.engine, self.sampler, self.rules = engine, engine.sampler, engine.rules
        self.params, self.version, self.step, self.journal = params, version, step, journal
        self.queue = collections.deque(enumerate(requests))
        self.index: dict[int, int] = {}  # row → index of its request
        self.slots: list[Slot | None] = [None] * self.sampler.settings.rows
        self.state: SampleState = self.sampler.empty()
        self.prefilled: dict[str, tuple[int, jax.Array]] = {}  # problem → row that holds its prompt, logits
        self.stats = engine.stats = RolloutStats()

    def run(self) -> Iterator[tuple[int, Episode]]:
        began = time.perf_counter()
        while self.queue or any(self.slots):
            ended = self._admit()
            ended += self._collect()
            self._feed()
            if any(slot and slot.live for slot in self.slots):
                ended += self._decode()
            elif not ended:
                self._wait()
            for row, stop in ended:
                yield self._finish(row, stop)
            self.stats.total_s = time.perf_counter() - began

    def _finish(self, row: int, stop) -> tuple[int, Episode]:
        slot, self.slots[row] = self.slots[row], None
        slot.episode.stop = stop
        for problem_id, (source, _) in list(self.prefilled.items()):
            if source == row:  # its KV is about to be overwritten
                heir = next((r for r, s in enumerate(self.slots) if s and s.request.problem.id == problem_id), None)
                logits = self.prefilled.pop(problem_id)[1]
                if heir is not None:
                    self.prefilled[problem_id] = (heir, logits)
        self.stats.episodes += 1
        return self.index.pop(row), slot.episode

    def _admit(self) -> list[tuple[int, turns.Stop]]:
        """Gives free rows to queued episodes; samples of one problem copy the prompt's KV."""
        ended, placed = [], []
        for row, slot in enumerate(self.slots):
            if slot is not None or not self.queue:
                continue
            index, request = self.queue.popleft()
            episode = Episode(problem=request.problem, sample=request.sample, step=self.step,
                              prompt_length=len(request.prompt))
            episode.append(request.prompt, acted=False)
            self.slots[row] = Slot(request, episode, pending=list(request.prompt))
            self.index[row] = index
            allowance = self.rules.allowance(episode)
            if allowance <= 0:  # the prompt alone fills the budget
                episode.void = True
                self.slots[row].pending = []
                ended.append((row, turns.Stop.LENGTH))
                continue
            self.slots[row].allowance = allowance
            placed.append(row)
        for part in self._groups(placed):
            self._place(part)
        self._fork(placed)
        return ended

    def _groups(self, rows: list[int]) -> list[list[int]]:
        size = self.sampler.settings.group
        return [rows[i:i + size] for i in range(0, len(rows), size)]

    def _row_array(self, rows: list[int]) -> np.ndarray:
        """Row numbers padded with one out of range."""
        s = self.sampler.settings
        return np.array(rows + [s.rows] * (s.group - len(rows)), np.int32)

    def _place(self, rows: list[int]) -> None:
        pad = self.sampler.settings.group - len(rows)
        requests = [self.slots[row].request for row in rows]
        constant = lambda value, dtype: np.full(len(rows) + pad, value, dtype)
        sampling = self.engine.sampling
        self.state = self.sampler.place(self.state, self.engine.key, self.step, Placement(
            row_R=self._row_array(rows),
            problem_R=np.array([zlib.crc32(r.problem.id.encode()) for r in requests] + [0] * pad, np.uint32),
            sample_R=np.array([r.sample for r in requests] + [0] * pad, np.int32),
            temperature_R=constant(sampling.temperature, np.float32), top_p_R=constant(sampling.top_p, np.float32),
            top_k_R=constant(sampling.top_k, np.int32), min_p_R=constant(sampling.min_p, np.float32)))

    def _fork(self, placed: list[int]) -> None:
        """Prompts that are new are fed once; then every other sample copies the row."""
        leaders: dict[str, int] = {}
        followers: list[int] = []
        for row in placed:
            problem_id = self.slots[row].request.problem.id
            if problem_id in self.prefilled or problem_id in leaders:
                followers.append(row)
            else:
                leaders[problem_id] = row
        wanted = {self.slots[row].request.problem.id for row in followers}
        wanted |= {request.problem.id for _, request in self.queue}
        self._feed(only=list(leaders.values()))
        for problem_id, row in leaders.items():
            if problem_id in wanted:
                self.prefilled[problem_id] = (row, self.state.logits_BV[row])
        for problem_id in [p for p in self.prefilled if p not in wanted]:
            del self.prefilled[problem_id]
        by_problem = collections.defaultdict(list)
        for row in followers:
            by_problem[self.slots[row].request.problem.id].append(row)
        for problem_id, rows in by_problem.items():
            for part in self._groups(rows):
                self._copy(problem_id, part)

    def _copy(self, problem_id: str, rows: list[int]) -> None:
        source, logits_V = self.prefilled[problem_id]
        target_R = self._row_array(rows)
        allowance_R = np.array([self.slots[r].allowance for r in rows] + [0] * (len(target_R) - len(rows)), np.int32)
        length = len(self.slots[rows[0]].pending)
        self.state = self.sampler.fork(self.state, np.full_like(target_R, source), target_R, length,
                                       logits_V, allowance_R)
        for row in rows:
            self.slots[row].pending, self.slots[row].live = [], True

    def _collect(self) -> list[tuple[int, turns.Stop]]:
        """Hands finished tool calls to the turn rules."""
        ended = []
        for row, slot in enumerate(self.slots):
            if slot and slot.future and slot.future.done():
                result, slot.future = slot.future.result(), None
                if self.journal is not None:
                    self.journal.put(call_key(slot.episode, slot.code), result)
                ended += self._follow(row, self._resume(slot, result))
        return ended

    def _resume(self, slot: Slot, result: ExecResult) -> turns.Next:
        self.stats.tool_wall_s.append(result.wall_s)
        return self.rules.resume(slot.episode, slot.code, result)

    def _follow(self, row: int, following: turns.Next) -> list[tuple[int, turns.Stop]]:
        """Does what the turn rules say."""
        slot = self.slots[row]
        if isinstance(following, turns.Run):
            slot.code, slot.live = following.code, False
            known = self.journal.get(call_key(slot.episode, slot.code)) if self.journal is not None else None
            if known is not None:
                return self._follow(row, self._resume(slot, known))
            slot.future = self.engine.executor.submit(following.code)
        elif isinstance(following, turns.Feed):
            slot.pending, slot.allowance, slot.live = list(following.ids), following.allowance, False
        elif isinstance(following, turns.End):
            slot.live = False
            return [(row, following.stop)]
        return []

    def _feed(self, only: list[int] | None = None) -> None:
        """Runs pending ids through the cache, a chunk at a time, until none is left."""
        began = time.perf_counter()
        settings = self.sampler.settings
        rows = range(settings.rows) if only is None else only
        while waiting := [r for r in rows if self.slots[r] and self.slots[r].pending]:
            for part in self._groups(waiting):
                feed = Feed(row_R=self._row_array(part), tokens_RC=np.zeros((settings.group, settings.chunk), np.int32),
                            count_R=np.zeros(settings.group, np.int32), live_R=np.zeros(settings.group, bool),
                            allowance_R=np.zeros(settings.group, np.int32))
                longest = 1
                for i, row in enumerate(part):
                    slot = self.slots[row]
                    piece, slot.pending = slot.pending[:settings.chunk], slot.pending[settings.chunk:]
                    feed.tokens_RC[i, :len(piece)] = piece
                    feed.count_R[i], feed.allowance_R[i] = len(piece), slot.allowance
                    slot.live = feed.live_R[i] = not slot.pending
                    longest = max(longest, len(slot.episode.tokens) - len(slot.pending))
                    self.stats.fed_tokens += len(piece)
                self.state = self.sampler.extend(self.params, self.state, feed, longest)
        self.stats.extend_s += time.perf_counter() - began

    def _decode(self) -> list[tuple[int, turns.Stop]]:
        began = time.perf_counter()
        longest = max(len(s.episode.tokens) for s in self.slots if s and s.live)
        self.state, out = self.sampler.decode(self.params, self.state, longest, self.engine.sampling.truncates)
        tokens_BQ, logprob_BQ, count_B, stop_B = jax.device_get(
            (out.tokens_BQ, out.logprob_BQ, out.count_B, out.stop_B))
        self.stats.decode_s += time.perf_counter() - began
        self.stats.sampled_tokens += int(count_B.sum())
        self.stats.slot_steps += len(self.slots)
        ended = []
        for row, slot in enumerate(self.slots):
            if slot and slot.live:
                self.stats.live_steps += 1
                n = int(count_B[row])
                following = self.rules.advance(slot.episode, tokens_BQ[row, :n].tolist(), logprob_BQ[row, :n].tolist(),
                                               int(stop_B[row]), self.version)
                ended += self._follow(row, following)
        return ended

    def _wait(self) -> None:
        futures = [slot.future for slot in self.slots if slot and slot.future]
        if futures:
            began = time.perf_counter()
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
            self.stats.tools_blocked_s += time.perf_counter() - began
