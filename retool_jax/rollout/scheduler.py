"""One run of an engine: the loop over its slots.

Every pass collects what tools answered, gives free rows to queued episodes, feeds what is pending (prompts and
tool outputs, by the same call) and sends one quantum of decoding to the device. While the device decodes, the
host does what the next pass does not need: it appends what rows wrote that go on, and hands finished episodes
out. It waits for a tool only when no row can decode.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from retool_jax.core.pytrees import Params, SampleState
from retool_jax.core.records import Episode, ExecResult, Stop
from retool_jax.rollout import turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal, call_key
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import STOP_NONE, Decoded, Feed, Placement
from retool_jax.rollout.stats import RolloutStats

DEVICE = -1  # lane of the timeline
TICK_S = 0.05  # linked engines: how long a process waits for its own tools before it asks the others


@dataclasses.dataclass(slots=True)
class Slot:
    """An episode in flight: what its row waits for."""

    index: int  # of its request
    request: Request
    episode: Episode
    pending: list[int]  # ids to be fed; the cache holds all tokens before them
    length: int  # tokens of the row, `unread` among them
    quanta: int  # decode calls that it may still take part in; negative: any number
    allowance: int = 0  # once nothing is pending
    tag: int = 0  # state of the tag automaton once nothing is pending
    live: bool = False  # the row may decode
    since: int = -1  # which decode call the row was live for first; -1: none yet
    unread: tuple[np.ndarray, np.ndarray] | None = None  # tokens and logprobs that the episode does not have yet
    code: str = ''  # waits for the executor
    asked_s: float = 0.0  # when
    future: concurrent.futures.Future[ExecResult] | None = None  # of a call of this process


class Flight:
    """One `run`: the slots and the queue."""

    def __init__(self, engine: Engine, params: Params, version: int, requests: Sequence[Request], step: int,
                 journal: Journal | None, quanta: int | None):
        self.engine, self.sampler, self.rules = engine, engine.sampler, engine.rules
        self.params, self.version, self.step, self.journal = params, version, step, journal
        self.quanta = -1 if quanta is None else quanta
        self.queue = collections.deque(enumerate(requests))
        # Equal ids share a prefill, whatever their problems are called; a number stands for them, made once.
        number: dict[tuple[int, ...], int] = {}
        self.prompts = [number.setdefault(request.prompt, len(number)) for request in requests]
        self.slots: list[Slot | None] = [None] * self.sampler.settings.rows
        self.state: SampleState = engine.kept or self.sampler.empty()
        engine.kept = None  # given to the device's calls from now on
        self.prefilled: dict[int, tuple[int, jax.Array]] = {}  # prompt → row that holds it, logits behind it
        self.ended: collections.deque[tuple[int, Episode]] = collections.deque()  # not handed out yet
        self.fed: tuple[float, jax.Array, list[int]] | None = None  # since when, ready when done, rows
        self.stats = engine.stats = RolloutStats()
        self.quantum = 0  # decode calls so far

    def run(self) -> Iterator[tuple[int, Episode]]:
        began = time.perf_counter()
        while self.queue or any(self.slots):
            self._collect()
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
        if self.engine.keeps_cache:
            self.engine.kept = self.state
        yield from self.ended

    def _leave(self, row: int, stop: Stop | None) -> None:
        """Frees a row; `stop` None carries its episode over to a later run."""
        slot, self.slots[row] = self.slots[row], None
        slot.episode.stop = stop
        for prompt, (source, _) in list(self.prefilled.items()):
            if source == row:  # its KV is about to be overwritten
                heir = next((r for r, s in enumerate(self.slots) if s and self.prompts[s.index] == prompt), None)
                logits = self.prefilled.pop(prompt)[1]
                if heir is not None:
                    self.prefilled[prompt] = (heir, logits)
        self.stats.episodes += stop is not None
        self.ended.append((slot.index, slot.episode))

    def _admit(self) -> None:
        """Gives free rows to queued episodes; those of one prompt copy its KV."""
        placed = []
        for row, slot in enumerate(self.slots):
            while self.slots[row] is None and self.queue:
                slot = self._open(*self.queue.popleft())
                self.slots[row] = slot
                if slot.allowance <= 0:  # what there is fills the budget
                    slot.episode.void |= slot.request.begun is None
                    self._leave(row, Stop.LENGTH)
                    continue
                placed.append(row)
        if placed:
            for part in self._groups(placed):
                self._place(part)
            self._fork(placed)

    def _open(self, index: int, request: Request) -> Slot:
        episode, begun = request.begun, request.begun is not None
        if not begun:
            episode = Episode(problem=request.problem, sample=request.sample, step=self.step,
                              prompt_length=len(request.prompt))
            episode.append(request.prompt, acted=False)
        turn = self.rules.turn_ids(episode)  # a turn that was cut goes on where it stood
        return Slot(index, request, episode, pending=list(episode.tokens), length=len(episode.tokens),
                    quanta=self.quanta, allowance=self.rules.allowance(episode, len(turn)),
                    tag=self.rules.table.walk(turn))

    def _groups(self, rows: list[int]) -> list[list[int]]:
        size = self.sampler.settings.group
        return [rows[i:i + size] for i in range(0, len(rows), size)]

    def _row_array(self, rows: list[int]) -> np.ndarray:
        """Row numbers padded with one out of range."""
        s = self.sampler.settings
        return np.array(rows + [s.rows] * (s.group - len(rows)), np.int32)

    def _place(self, rows: list[int]) -> None:
        pad = [0] * (self.sampler.settings.group - len(rows))
        slots = [self.slots[row] for row in rows]
        column = lambda pick, dtype: np.array([pick(s) for s in slots] + pad, dtype)
        same = lambda value, dtype: np.full(len(rows) + len(pad), value, dtype)
        sampling = self.engine.sampling
        self.state = self.sampler.place(self.state, self.engine.key_data, Placement(
            row_R=self._row_array(rows), step_R=column(lambda s: s.episode.step, np.uint32),
            problem_R=column(lambda s: zlib.crc32(s.request.problem.id.encode()), np.uint32),
            sample_R=column(lambda s: s.request.sample, np.int32),
            temperature_R=same(sampling.temperature, np.float32), top_p_R=same(sampling.top_p, np.float32),
            top_k_R=same(sampling.top_k, np.int32), min_p_R=same(sampling.min_p, np.float32)))

    def _fork(self, placed: list[int]) -> None:
        """Prompts that are new are fed once; then every other sample copies the row."""
        leaders: dict[int, int] = {}
        followers = collections.defaultdict(list)
        for row in placed:
            slot = self.slots[row]
            if slot.request.begun is not None:
                continue  # fed whole, with what it wrote
            prompt = self.prompts[slot.index]
            if prompt in self.prefilled or prompt in leaders:
                followers[prompt].append(row)
            else:
                leaders[prompt] = row
        wanted = {self.prompts[index] for index, request in self.queue if request.begun is None} | set(followers)
        self._feed(only=list(leaders.values()))
        for prompt, row in leaders.items():
            if prompt in wanted:
                self.prefilled[prompt] = (row, self.sampler.logits_of(self.state, row))
        for prompt in [p for p in self.prefilled if p not in wanted]:
            del self.prefilled[prompt]
        for prompt, rows in followers.items():
            for part in self._groups(rows):
                self._copy(prompt, part)

    def _copy(self, prompt: int, rows: list[int]) -> None:
        source, logits_V = self.prefilled[prompt]
        target_R = self._row_array(rows)
        allowance_R = np.array([self.slots[r].allowance for r in rows] + [0] * (len(target_R) - len(rows)), np.int32)
        length = len(self.slots[rows[0]].pending)
        self.state = self.sampler.fork(self.state, np.full_like(target_R, source), target_R, length,
                                       logits_V, allowance_R)
        self.stats.shared_tokens += length * len(rows)
        for row in rows:
            self.slots[row].pending, self.slots[row].live = [], True

    def _collect(self) -> None:
        """Hands finished tool calls to the turn rules."""
        waiting = [row for row, slot in enumerate(self.slots) if slot and slot.asked_s]
        if not waiting:
            return
        answers = {row: self.slots[row].future.result() for row in waiting
                   if self.slots[row].future and self.slots[row].future.done()}
        if self.journal is not None:
            for row, result in answers.items():
                self.journal.put(call_key(self.slots[row].episode, self.slots[row].code), result)
        if self.engine.link is not None:
            answers = self.engine.link.share(answers)
        now = time.perf_counter()
        for row in sorted(answers):
            slot = self.slots[row]
            self.stats.tool_wait_s.append(now - slot.asked_s)
            if self.engine.timeline is not None:
                self.engine.timeline.span(row, 'tool', slot.asked_s, now, verdict=answers[row].verdict.value)
            slot.future, slot.asked_s = None, 0.0
            self._resume(row, answers[row])

    def _resume(self, row: int, result: ExecResult) -> None:
        slot = self.slots[row]
        self.stats.tool_wall_s.append(result.wall_s)
        self._follow(row, self.rules.resume(slot.episode, slot.code, result))

    def _follow(self, row: int, following: turns.Next) -> None:
        """Does what the turn rules say."""
        slot = self.slots[row]
        slot.live, slot.since = False, -1
        if isinstance(following, turns.Run):
            self._ask(row, following.code)
        elif isinstance(following, turns.Feed):
            slot.pending, slot.allowance, slot.tag = list(following.ids), following.allowance, 0
            slot.length = len(slot.episode.tokens)
            if slot.quanta == 0:
                self._leave(row, None)
        elif isinstance(following, turns.End):
            self._leave(row, following.stop)

    def _ask(self, row: int, code: str) -> None:
        """Submits a snippet, unless the journal knows its result or another process runs this row's tools."""
        slot, link = self.slots[row], self.engine.link
        slot.code = code
        if link is not None and not link.owns(row):
            slot.asked_s = time.perf_counter()
            return
        known = self.journal.get(call_key(slot.episode, code)) if self.journal is not None else None
        if known is not None and link is None:
            self._resume(row, known)
            return
        slot.asked_s = time.perf_counter()
        if known is not None:
            slot.future = concurrent.futures.Future()
            slot.future.set_result(known)
        else:
            slot.future = self.engine.executor.submit(code)

    def _feed(self, only: list[int] | None = None) -> None:
        """Runs pending ids through the cache, a chunk at a time, until none is left."""
        settings = self.sampler.settings
        rows = range(settings.rows) if only is None else only
        while waiting := [r for r in rows if self.slots[r] and self.slots[r].pending]:
            began = time.perf_counter()
            for part in self._groups(waiting):
                feed = Feed(row_R=self._row_array(part), tokens_RC=np.zeros((settings.group, settings.chunk), np.int32),
                            count_R=np.zeros(settings.group, np.int32), live_R=np.zeros(settings.group, bool),
                            allowance_R=np.zeros(settings.group, np.int32), tag_R=np.zeros(settings.group, np.int32))
                longest = 1
                for i, row in enumerate(part):
                    slot = self.slots[row]
                    piece, slot.pending = slot.pending[:settings.chunk], slot.pending[settings.chunk:]
                    feed.tokens_RC[i, :len(piece)] = piece
                    feed.count_R[i], feed.allowance_R[i], feed.tag_R[i] = len(piece), slot.allowance, slot.tag
                    slot.live = feed.live_R[i] = not slot.pending
                    longest = max(longest, slot.length - len(slot.pending))
                    self.stats.fed_tokens += len(piece)
                self.state, mark = self.sampler.extend(self.params, self.state, feed, longest)
                since, _, known = self.fed or (began, mark, [])
                self.fed = (since, mark, known + part)

    def _decode(self) -> tuple[float, Decoded, np.ndarray] | None:
        """Sends a quantum to the device, without waiting for it; rows that became live first go first."""
        live = [row for row, slot in enumerate(self.slots) if slot and slot.live]
        if not live:
            return None
        for row in live:
            if self.slots[row].since < 0:
                self.slots[row].since = self.quantum
        self.quantum += 1
        row_R = self.sampler.choose(sorted(live, key=lambda row: self.slots[row].since))
        longest = max(self.slots[row].length for row in row_R if row < len(self.slots))
        began = time.perf_counter()
        self.state, out = self.sampler.decode(self.params, self.state, row_R, longest, self.engine.sampling.truncates)
        return began, out, row_R

    def _append(self) -> None:
        """Gives episodes what their rows wrote in the quantum before."""
        for slot in self.slots:
            if slot and slot.unread:
                (tokens, logprobs), slot.unread = slot.unread, None
                slot.episode.append(tokens.tolist(), acted=True, logprobs=logprobs.tolist(), version=self.version)

    def _read(self, began: float, out: Decoded, row_R: np.ndarray) -> None:
        """Waits for the quantum and applies the turn rules to the rows that stopped in it."""
        began = self._settle(began)
        tokens_BQ, logprob_BQ, count_B, stop_B = jax.device_get(
            (out.tokens_BQ, out.logprob_BQ, out.count_B, out.stop_B))
        now = time.perf_counter()
        self.stats.decode_s += now - began
        places = {int(row): place for place, row in enumerate(row_R) if row < len(self.slots)}
        self.stats.slot_steps += len(row_R)
        self.stats.live_steps += len(places)
        self.stats.sampled_tokens += (sampled := int(count_B[list(places.values())].sum()))
        if (timeline := self.engine.timeline) is not None:
            timeline.span(DEVICE, 'decode', began, now, rows=len(places), tokens=sampled)
            timeline.count('rows', now, live=len(places), tools=sum(bool(s and s.asked_s) for s in self.slots))
            for row, place in places.items():
                timeline.span(row, 'decode', began, now, tokens=int(count_B[place]))
        carried = []
        for row, place in places.items():
            slot, n, stop = self.slots[row], int(count_B[place]), int(stop_B[place])
            slot.length += n
            slot.quanta -= 1
            if stop == STOP_NONE:
                slot.unread = (tokens_BQ[place, :n], logprob_BQ[place, :n])
                carried += [row] if slot.quanta == 0 else []
                continue
            self._follow(row, self.rules.advance(slot.episode, tokens_BQ[place, :n].tolist(),
                                                 logprob_BQ[place, :n].tolist(), stop, self.version))
        if carried:
            self._append()
            for part in self._groups(carried):
                self._place(part)  # or the device would go on with them
            for row in carried:
                self._leave(row, None)

    def _settle(self, began: float) -> float:
        """When the device was done with what it was fed before the quantum sent at `began`."""
        if self.fed is None:
            return began
        since, mark, rows = self.fed
        mark.block_until_ready()
        now, self.fed = time.perf_counter(), None
        self.stats.extend_s += now - since
        if self.engine.timeline is not None:
            for lane in [DEVICE, *sorted(set(rows))]:
                self.engine.timeline.span(lane, 'extend', since, now, rows=len(rows))
        return max(began, now)

    def _wait(self) -> None:
        """No row can decode: until a tool answers."""
        futures = [slot.future for slot in self.slots if slot and slot.future]
        if not futures and self.engine.link is None:
            return
        began = time.perf_counter()
        if self.engine.link is not None:
            concurrent.futures.wait(futures, TICK_S, concurrent.futures.FIRST_COMPLETED)
        else:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
        self.stats.tools_blocked_s += time.perf_counter() - began
