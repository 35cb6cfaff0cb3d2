"""One run of an engine: the loop over its rows.

Every pass collects what tools answered, gives free rows to queued episodes, feeds what is pending (prompts and
tool outputs, by the same call) and sends one quantum of decoding to the device. While the device decodes, the
host does what the next pass does not need: it appends what rows wrote that go on, and hands finished episodes
out. It waits for a tool only when no row can decode. Told to stop, it leaves between two passes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from retool_jax.core import signals
from retool_jax.core.pytrees import Params, SampleState
from retool_jax.core.records import Episode, ExecResult, Stop
from retool_jax.rollout import turns
from retool_jax.rollout.journal import Journal, call_key
from retool_jax.rollout.prompts import Prompts
from retool_jax.rollout.requests import Executor, Link, Queue, Request
from retool_jax.rollout.row import Row
from retool_jax.rollout.sampler import STOP_NONE, Assignment, Chunks, Decoded, Sampler
from retool_jax.rollout.settings import SamplingSettings
from retool_jax.rollout.stats import RolloutStats, Timeline

QUANTUM_S = 0.1  # of one decode call where there are tools: a call and its answer wait for the end of one each
TICK_S = 0.05  # of a wait for tools, before the others and the signals are asked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equipment:
    """What an engine lends to a run; a run changes none of it."""

    sampler: Sampler
    rules: turns.Rules
    sampling: SamplingSettings
    key_data: np.ndarray  # of the key that every episode's randomness is folded from
    executor: Executor | None  # None: text only
    link: Link | None  # None: no other process takes part
    timeline: Timeline | None  # None: nobody draws one
    common: tuple[int, ...]  # ids that all prompts begin with, fed once per run; (): each prompt is fed whole


class Scheduler:
    """Makes the episodes of one `Engine.run`.

    `stats` grow while it runs. `state`, when it is done, is the sampler's state with its KV cache, all rows free.
    """

    def __init__(
        self,
        equipment: Equipment,
        params: Params,
        version: int,
        requests: Sequence[Request],
        step: int,
        *,
        journal: Journal | None,
        quanta: int | None,
        state: SampleState,
    ):
        """state: of `equipment.sampler`, with rows of no use to anyone; it is given to the device's calls."""
        self.sampler, self.rules, self.sampling = equipment.sampler, equipment.rules, equipment.sampling
        self.key_data, self.executor = equipment.key_data, equipment.executor
        self.link, self.timeline = equipment.link, equipment.timeline
        self.settings = self.sampler.settings
        self.params, self.version, self.step, self.journal = params, version, step, journal
        self.quanta = -1 if quanta is None else quanta
        self.queue = Queue(requests, self.sampler.engines)
        self.prompts = Prompts(requests, equipment.common, self.settings.rows)
        self.rows: list[Row | None] = [None] * self.sampler.rows
        self.state, self.stats = state, RolloutStats()
        self.ended: collections.deque[tuple[int, Episode]] = collections.deque()  # not handed out yet
        self.fed: tuple[float, jax.Array, list[int]] | None = None  # since when, ready when done, rows
        self.quantum, self.step_s = 0, None  # decode calls so far; seconds of one step of the last, once there was one
        self.told = 0  # the signal that ended the run early

    def run(self) -> Iterator[tuple[int, Episode]]:
        """Yields (index of the request, episode) as they finish."""
        began = time.perf_counter()
        while (self.queue or any(self.rows)) and not self._collect():
            self._admit()
            self._feed()
            decoding = self._decode()  # from here on the device is busy
            self._append()
            moved = bool(decoding or self.ended)
            while self.ended:
                yield self.ended.popleft()
            if decoding:
                self._read(*decoding)
            elif not moved:
                self._wait()
            self.stats.total_s = time.perf_counter() - began
        yield from self.ended

    def _leave(self, r: int, stop: Stop | None) -> None:
        """Frees a row; `stop` None carries its episode over to a later run."""
        row, self.rows[r] = self.rows[r], None
        row.episode.stop = stop
        self.prompts.leave(r, {i: other.index for i, other in enumerate(self.rows) if other})
        self.stats.episodes += stop is not None
        self.ended.append((row.index, row.episode))

    def _admit(self) -> None:
        """Gives free rows to queued episodes, first of the engine that has most; those of one prompt copy its KV."""
        each, admitted = self.settings.rows, []
        blocks = (range(first, first + each) for first in range(0, len(self.rows), each))
        free = [[r for r in block if self.rows[r] is None] for block in blocks]  # of each engine
        while self.queue and any(free):
            engine = max(range(len(free)), key=lambda engine: len(free[engine]))
            r = free[engine].pop(0)
            row = self.rows[r] = self._open(*self.queue.take(engine))
            if row.allowance <= 0:  # what there is fills the budget
                row.episode.void |= row.request.begun is None
                self._leave(r, Stop.LENGTH)
                free[engine].insert(0, r)
                continue
            admitted.append(r)
        if admitted:
            self._assign(admitted)
            self._prefill(admitted)

    def _open(self, index: int, request: Request) -> Row:
        episode, begun = request.begun, request.begun is not None
        if not begun:
            episode = Episode(
                problem=request.problem, sample=request.sample, step=self.step, prompt_length=len(request.prompt)
            )
            episode.append(request.prompt, acted=False)
        turn = self.rules.turn_ids(episode)  # a turn that was cut goes on where it stood
        return Row(
            index,
            request,
            episode,
            pending=list(episode.tokens),
            length=len(episode.tokens),
            quanta=self.quanta,
            allowance=self.rules.allowance(episode, len(turn)),
            tag=self.rules.table.walk(turn),
        )

    def _column(self, row_R: np.ndarray, pick: Callable[[Row], float], dtype) -> np.ndarray:
        """Something of each row of a call, 0 where it is padded."""
        return np.array([pick(self.rows[r]) if r < len(self.rows) else 0 for r in row_R.tolist()], dtype)

    def _assign(self, rows: Sequence[int]) -> None:
        """Clears rows on the device and sets what their episodes are drawn by."""
        for row_R in self.sampler.calls(rows):
            same = lambda value, dtype: np.full(len(row_R), value, dtype)  # noqa: B023
            self.state = self.sampler.assign(
                self.state,
                self.key_data,
                Assignment(
                    row_R=row_R,
                    step_R=self._column(row_R, lambda row: row.episode.step, np.uint32),
                    problem_R=self._column(row_R, lambda row: zlib.crc32(row.request.problem.id.encode()), np.uint32),
                    sample_R=self._column(row_R, lambda row: row.request.sample, np.int32),
                    temperature_R=same(self.sampling.temperature, np.float32),
                    top_p_R=same(self.sampling.top_p, np.float32),
                    top_k_R=same(self.sampling.top_k, np.int32),
                    min_p_R=same(self.sampling.min_p, np.float32),
                ),
            )

    def _prefill(self, admitted: list[int]) -> None:
        """Feeds each new prompt once to each engine; then every other sample copies the row."""
        new = {r: self.rows[r].index for r in admitted if self.rows[r].request.begun is None}
        leaders, followers = self.prompts.deal(new)
        queued = {self.prompts.of[index] for index, request in self.queue if request.begun is None}
        fed = set(leaders.values())
        self._begin([r for r in admitted if r not in new or r in fed])
        self._feed(only=list(leaders.values()))
        logits_of = functools.partial(self.sampler.logits_of, self.state)
        self.prompts.hold(leaders, lambda key: key in followers or key[1] in queued, logits_of)
        for key, rows in followers.items():
            source, logits_EV = self.prompts.held[key]
            self._copy(source, rows, len(self.rows[rows[0]].pending), logits_EV)
            for r in rows:
                self.prompts.place(r, source in self.prompts.begun)
                self.rows[r].pending, self.rows[r].live = [], True

    def _begin(self, rows: list[int]) -> None:
        """Gives rows the beginning that all prompts have in common, which each engine is fed once; the rest stays
        pending."""
        begin = [r for r in rows if self.prompts.begins(self.rows[r].pending)]
        for r in set(rows) - set(begin):
            self.prompts.place(r, False)
        count = len(self.prompts.common)
        rest = {r: self.rows[r].pending[count:] for r in begin}
        firsts = self.prompts.first(begin)
        for r in firsts:
            self.rows[r].pending = list(self.prompts.common)
        self._feed(only=firsts)
        for r in firsts:
            self.prompts.place(r, True)
            self.stats.prefix_feeds += 1
        for source, others in self.prompts.sources(r for r in begin if r not in firsts).items():
            self._copy(source, others, count, self.sampler.logits_of(self.state, source))
            self.stats.prefix_copies += len(others)
        for r, ids in rest.items():
            self.prompts.place(r, True)
            self.rows[r].pending, self.rows[r].live = ids, False

    def _copy(self, source: int, rows: Sequence[int], length: int, logits_EV: jax.Array) -> None:
        """Gives rows the first `length` slots of another of their engine; they are live on the device."""
        for row_R in self.sampler.calls(rows):
            allowance_R = self._column(row_R, lambda row: row.allowance, np.int32)
            self.state = self.sampler.fork(
                self.state, np.full_like(row_R, source), row_R, length, logits_EV, allowance_R
            )
        self.stats.shared_tokens += length * len(rows)

    def _collect(self) -> int:
        """Hands finished tool calls to the turn rules; returns `told`."""
        self.told = signals.told()
        waiting = {r: row for r, row in enumerate(self.rows) if row and row.asked_s}
        answers = {r: row.future.result() for r, row in waiting.items() if row.future and row.future.done()}
        if self.journal is not None:
            for r, result in answers.items():
                self.journal.put(call_key(self.rows[r].episode, self.rows[r].code), result)
        if self.link is not None:
            answers, self.told = self.link.share(answers, self.told)
        now = time.perf_counter()
        for r in sorted(answers):
            row = self.rows[r]
            self.stats.tool_wait_s.append(now - row.asked_s)
            if self.timeline is not None:
                self.timeline.span(r, 'tool', row.asked_s, now, verdict=answers[r].verdict.value)
            row.future, row.asked_s = None, 0.0
            self._resume(r, answers[r])
        return self.told

    def _resume(self, r: int, result: ExecResult) -> None:
        self.stats.tool_wall_s.append(result.wall_s)
        self._follow(r, self.rules.resume(self.rows[r].episode, self.rows[r].code, result))

    def _follow(self, r: int, following: turns.Next) -> None:
        """Does what the turn rules say."""
        row = self.rows[r]
        row.live, row.since = False, -1
        if isinstance(following, turns.Run):
            self._ask(r, following.code)
        elif isinstance(following, turns.Feed):
            row.pending, row.allowance, row.tag = list(following.ids), following.allowance, 0
            row.length = len(row.episode.tokens)
            if row.quanta == 0:
                self._leave(r, None)
        elif isinstance(following, turns.End):
            self._leave(r, following.stop)

    def _ask(self, r: int, code: str) -> None:
        """Submits a snippet, unless the journal knows its result or another process runs this row's tools."""
        row = self.rows[r]
        row.code = code
        if self.link is not None and not self.link.owns(r):
            row.asked_s = time.perf_counter()
            return
        known = self.journal.get(call_key(row.episode, code)) if self.journal is not None else None
        if known is not None and self.link is None:
            self._resume(r, known)
            return
        row.asked_s = time.perf_counter()
        if known is not None:
            row.future = concurrent.futures.Future()
            row.future.set_result(known)
        else:
            row.future = self.executor.submit(code)

    def _feed(self, only: list[int] | None = None) -> None:
        """Runs pending ids through the cache, a chunk at a time, until none is left."""
        chunk = self.settings.chunk
        rows = range(len(self.rows)) if only is None else only
        while waiting := [r for r in rows if self.rows[r] and self.rows[r].pending]:
            began = time.perf_counter()
            for row_R in self.sampler.calls(waiting):
                part = [(i, r) for i, r in enumerate(row_R.tolist()) if r < len(self.rows)]
                zeros = lambda *shape, dtype=np.int32: np.zeros((len(row_R), *shape), dtype)  # noqa: B023
                chunks = Chunks(
                    row_R=row_R,
                    tokens_RC=zeros(chunk),
                    count_R=zeros(),
                    live_R=zeros(dtype=bool),
                    allowance_R=zeros(),
                    tag_R=zeros(),
                )
                longest = 1
                for i, r in part:
                    row = self.rows[r]
                    piece, row.pending = row.pending[:chunk], row.pending[chunk:]
                    chunks.tokens_RC[i, : len(piece)] = piece
                    chunks.count_R[i], chunks.allowance_R[i], chunks.tag_R[i] = len(piece), row.allowance, row.tag
                    row.live = chunks.live_R[i] = not row.pending
                    longest = max(longest, row.length - len(row.pending))
                    self.stats.fed_tokens += len(piece)
                self.state, mark = self.sampler.extend(self.params, self.state, chunks, longest)
                since, _, known = self.fed or (began, mark, [])
                self.fed = (since, mark, known + [r for _, r in part])

    def _decode(self) -> tuple[float, Decoded, np.ndarray] | None:
        """Sends a quantum to the device, without waiting for it; rows that became live first go first."""
        live = {r: row for r, row in enumerate(self.rows) if row and row.live}
        if not live:
            return None
        for row in live.values():
            if row.since < 0:
                row.since = self.quantum
        self.quantum += 1
        row_R = self.sampler.choose(sorted(live, key=lambda r: live[r].since))
        longest = max(live[r].length for r in row_R.tolist() if r in live)
        began = time.perf_counter()
        self.state, out = self.sampler.decode(
            self.params, self.state, row_R, longest, self.sampling.truncates, self._steps()
        )
        return began, out, row_R

    def _steps(self) -> int:
        """Steps of the next decode call: `quota`, or as few as keep a row that calls a tool from waiting long.

        A row that calls, or whose tool has answered, stands still until the call's end. Where calls end changes nothing
        that a row writes, but `quanta` counts them and lockstep needs the same ones in every process.
        """
        if self.executor is None or self.quanta >= 0 or self.link is not None:
            return self.settings.quota
        return 1 if self.step_s is None else max(1, min(self.settings.quota, int(QUANTUM_S / self.step_s)))

    def _append(self) -> None:
        """Gives episodes what their rows wrote in the quantum before."""
        for row in self.rows:
            if row and row.unread:
                (tokens, logprobs), row.unread = row.unread, None
                row.episode.append(tokens.tolist(), acted=True, logprobs=logprobs.tolist(), version=self.version)

    def _read(self, began: float, out: Decoded, row_R: np.ndarray) -> None:
        """Waits for the quantum and applies the turn rules to the rows that stopped in it."""
        began = self._settle(began)
        tokens_BQ, logprob_BQ, count_B, stop_B = jax.device_get(
            (out.tokens_BQ, out.logprob_BQ, out.count_B, out.stop_B)
        )
        now = time.perf_counter()
        decoded = {r: b for b, r in enumerate(row_R.tolist()) if r < len(self.rows)}  # row → its index in the call
        sampled = int(count_B[list(decoded.values())].sum())
        self.stats.decode_s += now - began
        self.step_s = (now - began) / max(int(count_B.max()), 1)
        self.stats.row_steps += len(row_R)
        self.stats.live_steps += len(decoded)
        self.stats.sampled_tokens += sampled
        if self.timeline is not None:
            tools = sum(bool(row and row.asked_s) for row in self.rows)
            self.timeline.decoded(began, now, {r: int(count_B[b]) for r, b in decoded.items()}, tools)
        carried = []
        for r, b in decoded.items():
            row, n, stop = self.rows[r], int(count_B[b]), int(stop_B[b])
            row.length += n
            row.quanta -= 1
            if stop == STOP_NONE:
                row.unread = (tokens_BQ[b, :n], logprob_BQ[b, :n])
                carried += [r] if row.quanta == 0 else []
                continue
            self._follow(
                r,
                self.rules.advance(
                    row.episode, tokens_BQ[b, :n].tolist(), logprob_BQ[b, :n].tolist(), stop, self.version
                ),
            )
        if carried:
            self._append()
            self._assign(carried)  # or the device would go on with them
            for r in carried:
                self._leave(r, None)

    def _settle(self, began: float) -> float:
        """When the device was done with what it was fed before the quantum sent at `began`."""
        if self.fed is None:
            return began
        since, mark, rows = self.fed
        mark.block_until_ready()
        now, self.fed = time.perf_counter(), None
        self.stats.extend_s += now - since
        if self.timeline is not None:
            self.timeline.fed(since, now, rows)
        return max(began, now)

    def _wait(self) -> None:
        """Waits until a tool answers, since no row can decode."""
        futures = [row.future for row in self.rows if row and row.future]
        began = time.perf_counter()
        concurrent.futures.wait(futures, TICK_S, concurrent.futures.FIRST_COMPLETED)
        self.stats.tools_blocked_s += time.perf_counter() - began
