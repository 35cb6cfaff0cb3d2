"""The jitted half of rollout: extend rows by given tokens, decode rows until they stop.

A row holds one episode. `extend` feeds it a prompt or a tool's output: the same call. `decode` samples for a fixed
number of rows, all or some, and freezes each at EOS, `</code>`, `</answer>` or the end of its allowance; a frozen row
keeps its cache and logits bit for bit. What a row writes may depend on that number (sums round by it), never on who the
other rows are. Shapes follow from the settings, so nothing recompiles after warm-up; reads cover a power-of-two bound
on the lengths, or each row's own length where a kernel attends. Several engines on a mesh do all of it at once, each
with rows of its own (rollout/shards.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core.pytrees import KVCache, Params, SampleState
from retool_jax.model import decoder, decoding, kv_cache
from retool_jax.model.config import ModelConfig
from retool_jax.rollout import rows, sampling, shards
from retool_jax.rollout.settings import SamplerSettings
from retool_jax.rollout.sync import Sync

STOP_NONE, STOP_EOS, STOP_CODE, STOP_ANSWER, STOP_LENGTH = range(5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one decode call produced: the tokens of its b-th row are the first `count_B[b]` columns."""

    tokens_BQ: jax.Array  # int32
    logprob_BQ: jax.Array  # f32, at the sampling temperature
    count_B: jax.Array  # int32
    stop_B: jax.Array  # int32, STOP_NONE while the row is live


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks for `Sampler.feed_rows` rows, those of the first engine first; `row_R` out of range pads."""

    row_R: jax.Array  # int32
    tokens_RC: jax.Array  # int32
    count_R: jax.Array  # int32
    live_R: jax.Array  # bool: the row may sample after this chunk
    allowance_R: jax.Array  # int32: how many tokens
    tag_R: jax.Array  # int32, state of the tag automaton after it: 0, or that of a turn which is taken up again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """New episodes for `Sampler.feed_rows` rows, those of the first engine first; `row_R` out of range pads."""

    row_R: jax.Array  # int32
    step_R: jax.Array  # uint32, of the training step that asked for the episode
    problem_R: jax.Array  # uint32, a hash of the problem's id
    sample_R: jax.Array  # int32
    temperature_R: jax.Array
    top_p_R: jax.Array
    top_k_R: jax.Array
    min_p_R: jax.Array


class Sampler:
    """Owns the compiled programs of one model and one set of sizes; owns no weights.

    engines: how many run side by side. rows, decode_rows, feed_rows: those of all of them together, the settings'
    of each; row r is one of engine r ÷ settings.rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: SamplerSettings,
        next_state: np.ndarray,
        stops: np.ndarray,
        eos_ids: tuple[int, ...],
        mesh: jax.sharding.Mesh | None = None,
    ):
        """next_state int32 [states, V] and stops int8 [states] are the tag automaton's
        (0 none, 1 `</code>`, 2 `</answer>`). mesh: engines over data × fsdp, heads and vocabulary over tensor;
        None: one engine, where the weights are.

        Raises:
          ValueError: the tag table is not as wide as the model's logits.
          UserError: a size of the model does not divide over the mesh.
        """
        if next_state.shape[1] != config.vocab_size:
            raise ValueError(f'tag table is {next_state.shape[1]} wide, the model has {config.vocab_size} logits')
        self.config, self.settings, self.mesh = config, settings, mesh
        self.engines = engines = shards.count(mesh)
        self.chooses = 0 < settings.decode_rows < settings.rows
        self.rows, self.feed_rows = engines * settings.rows, engines * settings.feed_rows
        self.decode_rows = engines * (settings.decode_rows or settings.rows)
        self.fused = True  # rows attend by a kernel when they decode, where there is one
        state = whole = row = None
        if mesh is not None:
            state, whole = shards.shardings(config, settings.cache_dtype, mesh)
            row = state.live_B
        # On a mesh over several processes an array must say where it lies. An abstract mesh holds no arrays, nor
        # do the chips that plan/ compiles for from afar.
        real = isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == jax.default_backend()
        table, stops = np.asarray(next_state, np.int32), np.array([STOP_NONE, STOP_CODE, STOP_ANSWER], np.int32)[stops]
        lay = lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]) if real else jnp.asarray(x)
        self.table, self.stops = lay(table), lay(stops)
        self.eos_ids = np.array(sorted(eos_ids), np.int32)
        spread = lambda function, *own: shards.spread(function, mesh, ('state', *own))
        keep = dict(donate_argnames=('state',), out_shardings=state)
        self._extend = jax.jit(
            spread(self._extend_rows, 'chunks'),
            static_argnames=('bound',),
            donate_argnames=('state',),
            out_shardings=(state, row),
        )
        self._decode = jax.jit(
            spread(self._decode_rows, 'row_R'),
            static_argnames=('bound', 'truncate'),
            donate_argnames=('state',),
            out_shardings=(state, whole),
        )
        self._assign = jax.jit(spread(self._assign_rows, 'assignment'), **keep)
        self._fork = jax.jit(
            spread(self._fork_rows, 'source_R', 'target_R', 'logits_EV', 'allowance_R'),
            static_argnames=('bound',),
            **keep,
        )
        self._logits_of = jax.jit(spread(lambda state, row_E: state.logits_BV[row_E], 'row_E'))
        self.sync = Sync(config, settings.dtype, mesh, weights=settings.weights)
        self.empty = jax.jit(self._empty, out_shardings=state)  # all rows free

    def _empty(self) -> SampleState:
        s, b = self.settings, self.rows
        return SampleState(
            cache=kv_cache.empty(self.config, b, s.slots, jnp.dtype(s.cache_dtype)),
            logits_BV=jnp.zeros((b, self.config.vocab_size), jnp.float32),
            tag_B=jnp.zeros(b, jnp.int32),
            live_B=jnp.zeros(b, bool),
            stop_B=jnp.zeros(b, jnp.int32),
            allowance_B=jnp.zeros(b, jnp.int32),
            key_B=jax.random.split(jax.random.key(0), b),
            temperature_B=jnp.ones(b, jnp.float32),
            top_p_B=jnp.ones(b, jnp.float32),
            top_k_B=jnp.zeros(b, jnp.int32),
            min_p_B=jnp.zeros(b, jnp.float32),
        )

    def kernel(self, cache: KVCache) -> decoding.Kernel | None:
        """By which rows of such a cache attend when they decode; None: by XLA, which reads up to a bound."""
        return decoding.choose(cache.k[0], self.settings.dtype, self.mesh, self.settings.slots) if self.fused else None

    @functools.cached_property
    def _programs(self) -> dict[int, int]:
        """Bound → that of the program which decodes rows so long: any does where a kernel reads each by its length."""
        kernel = self.kernel(jax.eval_shape(self._empty).cache)
        any_does = lambda bound: kernel is not None and not (kernel.bounded or self.chooses) and bound > kernel.head
        return {bound: self.settings.slots if any_does(bound) else bound for bound in self.bounds()}

    def bound(self, length: int) -> int:
        """The smallest compiled bound on reads that covers `length` slots."""
        bound = self.settings.min_bound
        while bound < length:
            bound *= 2
        return min(bound, self.settings.slots)

    def bounds(self) -> list[int]:
        """Every bound that `bound` can return."""
        found = [self.bound(1)]
        while found[-1] < self.settings.slots:
            found.append(self.bound(found[-1] + 1))
        return found

    def warm_up(self, params: Params, truncate: bool) -> None:
        """Compiles all that a run may call, once per bound on reads; afterwards nothing compiles."""
        s, state = self.settings, self.empty()
        nobody, none = np.full(self.feed_rows, self.rows, np.int32), np.zeros(self.feed_rows, np.int32)
        real = np.zeros(self.feed_rows, np.float32)
        state = self.assign(
            state,
            np.zeros(2, np.uint32),
            Assignment(
                row_R=nobody,
                step_R=none.astype(np.uint32),
                problem_R=none.astype(np.uint32),
                sample_R=none,
                temperature_R=real,
                top_p_R=real,
                top_k_R=none,
                min_p_R=real,
            ),
        )
        logits_EV = self.logits_of(state, 0)
        chunks = Chunks(
            row_R=nobody,
            tokens_RC=np.zeros((self.feed_rows, s.chunk), np.int32),
            count_R=none,
            live_R=none.astype(bool),
            allowance_R=none,
            tag_R=none,
        )
        for bound in self.bounds():
            state, _ = self.extend(params, state, chunks, bound)
            state = self.fork(state, nobody, nobody, bound, logits_EV, none)
            state, _ = self.decode(params, state, self.choose([]), max(bound - s.quota, 0), truncate)
        jax.block_until_ready(state.live_B)

    def assign(self, state: SampleState, key_data: np.ndarray, assignment: Assignment) -> SampleState:
        """Clears rows and gives them to new episodes, whose randomness is folded from
        (the key of `key_data`, step, problem, sample)."""
        assignment = dataclasses.replace(assignment, row_R=self._within(assignment.row_R))
        return self._assign(state=state, key_data=key_data, assignment=assignment)

    def extend(self, params: Params, state: SampleState, chunks: Chunks, longest: int) -> tuple[SampleState, jax.Array]:
        """Feeds chunks; `longest` is the largest row length after it. Also returns how many tokens went into each
        engine, [engines]: that array is ready when the call is done, when the state itself may have been given away."""
        chunks = dataclasses.replace(chunks, row_R=self._within(chunks.row_R))
        return self._extend(params=params, state=state, chunks=chunks, bound=self.bound(longest))

    def fork(
        self,
        state: SampleState,
        source_R: np.ndarray,
        target_R: np.ndarray,
        length: int,
        logits_EV: jax.Array,
        allowance_R: np.ndarray,
    ) -> SampleState:
        """Gives rows `target` the first `length` slots of rows `source` of the same engines, with the logits that
        `logits_of` gave of these, and makes them live. [R]: `feed_rows`, those of the first engine first."""
        return self._fork(
            state=state,
            source_R=self._within(source_R),
            target_R=self._within(target_R),
            length=np.int32(length),
            logits_EV=logits_EV,
            allowance_R=allowance_R,
            bound=self.bound(length),
        )

    def logits_of(self, state: SampleState, row: int) -> jax.Array:
        """Logits of a row as `fork` takes them, f32 [engines, V]: in its engine its own, in others those of the row
        that has its place."""
        return self._logits_of(state=state, row_E=np.full(self.engines, row % self.settings.rows, np.int32))

    def calls(self, given: Sequence[int]) -> Iterator[np.ndarray]:
        """Row numbers as calls of `assign`, `extend` and `fork` take them, int32 [feed_rows], padded out of range."""
        return rows.calls(given, self.settings.rows, self.engines, self.settings.feed_rows)

    def choose(self, live: Sequence[int]) -> np.ndarray:
        """Rows of the next decode call, int32 [decode_rows]: the first of `live`, padded with numbers out of range."""
        return rows.choose(live, self.rows, self.decode_rows, self.engines)

    def _within(self, row_R: np.ndarray) -> np.ndarray:
        """Row numbers counted within their engines; one out of range stays out of range."""
        return np.where(row_R < self.rows, row_R % self.settings.rows, self.settings.rows).astype(np.int32)

    def decode(
        self,
        params: Params,
        state: SampleState,
        row_R: np.ndarray,
        longest: int,
        truncate: bool,
        steps: int | None = None,
    ) -> tuple[SampleState, Decoded]:
        """At most `steps` (None: `quota`, the most) steps of the rows that `choose` returned; `longest` is their
        largest length before it."""
        return self._decode(
            params=params,
            table=self.table,
            stops=self.stops,
            state=state,
            row_R=self._within(row_R) if self.chooses else None,
            bound=self._programs[self.bound(longest + self.settings.quota)],
            truncate=truncate,
            steps=np.int32(self.settings.quota if steps is None else steps),
        )

    def _assign_rows(self, state: SampleState, key_data, assignment: Assignment) -> SampleState:
        r = assignment.row_R
        keys = sampling.row_keys(
            jax.random.wrap_key_data(key_data), assignment.step_R, assignment.problem_R, assignment.sample_R
        )
        put = lambda x, value: x.at[r].set(value, mode='drop')
        return dataclasses.replace(
            state,
            cache=dataclasses.replace(state.cache, length_B=put(state.cache.length_B, 0)),
            tag_B=put(state.tag_B, 0),
            live_B=put(state.live_B, False),
            stop_B=put(state.stop_B, STOP_NONE),
            key_B=put(state.key_B, keys),
            temperature_B=put(state.temperature_B, assignment.temperature_R),
            top_p_B=put(state.top_p_B, assignment.top_p_R),
            top_k_B=put(state.top_k_B, assignment.top_k_R),
            min_p_B=put(state.min_p_B, assignment.min_p_R),
        )

    def _extend_rows(self, params, state: SampleState, chunks: Chunks, bound: int) -> tuple[SampleState, jax.Array]:
        put = lambda x, value: x.at[chunks.row_R].set(value, mode='drop')
        # Rows are written and read where they lie: taking them out and putting them back would copy `bound` slots.
        hidden_RCD, cache = decoder.extend(
            self.config, params, state.cache, chunks.tokens_RC, chunks.count_R, bound, chunks.row_R
        )
        last = jnp.maximum(chunks.count_R - 1, 0)[:, None, None]
        logits_RV = decoder.unembed(params, jnp.take_along_axis(hidden_RCD, last, axis=1)[:, 0])
        return dataclasses.replace(
            state,
            cache=cache,
            logits_BV=put(state.logits_BV, logits_RV),
            tag_B=put(state.tag_B, chunks.tag_R),
            live_B=put(state.live_B, chunks.live_R),
            stop_B=put(state.stop_B, STOP_NONE),
            allowance_B=put(state.allowance_B, chunks.allowance_R),
        ), chunks.count_R.sum(keepdims=True)

    def _fork_rows(
        self, state: SampleState, source_R, target_R, length, logits_EV, allowance_R, bound: int
    ) -> SampleState:
        put = lambda x, value: x.at[target_R].set(value, mode='drop')
        copy = lambda kv: kv_cache.copy_rows(kv, source_R, target_R, bound)
        cache = KVCache(
            k=[copy(k) for k in state.cache.k],
            v=[copy(v) for v in state.cache.v],
            length_B=put(state.cache.length_B, length),
        )
        return dataclasses.replace(
            state,
            cache=cache,
            logits_BV=put(state.logits_BV, logits_EV),
            live_B=put(state.live_B, True),
            allowance_B=put(state.allowance_B, allowance_R),
        )

    def _decode_rows(self, params, table, stops, state: SampleState, row_R, steps, bound: int, truncate: bool):
        quota, whole = self.settings.quota, state
        in_place = row_R is None and (kernel := self.kernel(whole.cache)) and bound > kernel.head
        state = rows.take(whole, row_R, self.settings.slots if in_place else bound)
        kernel = self.kernel(state.cache)
        b, start_B = len(state.live_B), state.cache.length_B
        out = Decoded(
            tokens_BQ=jnp.zeros((b, quota), jnp.int32),
            logprob_BQ=jnp.zeros((b, quota), jnp.float32),
            count_B=jnp.zeros(b, jnp.int32),
            stop_B=state.stop_B,
        )

        # Uniforms of all `quota` steps are drawn here: the generator is many small operations, too dear once per step.
        u_BQ = sampling.uniforms(state.key_B, start_B[:, None] + jnp.arange(quota))

        def unfinished(carry):
            i, state, _ = carry
            return (i < quota) & (i < steps) & shards.any_engine(state.live_B.any(), self.mesh)

        def step(carry):
            i, s, out = carry
            token_B, logprob_B = sampling.draw(
                s.logits_BV, u_BQ[:, i], s.temperature_B, s.top_p_B, s.top_k_B, s.min_p_B, truncate=truncate
            )
            live = s.live_B
            hidden_BCD, cache = decoder.extend(
                self.config,
                params,
                s.cache,
                token_B[:, None],
                live.astype(jnp.int32),
                bound,
                attend_one=kernel and kernel.attend,
            )
            logits_BV = decoder.unembed(params, hidden_BCD[:, 0])
            tag_B = table[s.tag_B, token_B]
            allowance_B = s.allowance_B - 1
            stop_B = jnp.where(allowance_B <= 0, STOP_LENGTH, STOP_NONE)
            stop_B = jnp.where(stops[tag_B] != STOP_NONE, stops[tag_B], stop_B)
            stop_B = jnp.where((token_B[:, None] == self.eos_ids).any(axis=1), STOP_EOS, stop_B)
            keep = lambda new, old: jnp.where(live if new.ndim == 1 else live[:, None], new, old)
            stop_B = keep(stop_B, s.stop_B)
            out = Decoded(
                tokens_BQ=out.tokens_BQ.at[:, i].set(jnp.where(live, token_B, 0)),
                logprob_BQ=out.logprob_BQ.at[:, i].set(jnp.where(live, logprob_B, 0.0)),
                count_B=out.count_B + live,
                stop_B=stop_B,
            )
            s = dataclasses.replace(
                s,
                cache=cache,
                logits_BV=keep(logits_BV, s.logits_BV),
                stop_B=stop_B,
                tag_B=keep(tag_B, s.tag_B),
                allowance_B=keep(allowance_B, s.allowance_B),
                live_B=live & (stop_B == STOP_NONE),
            )
            return i + 1, s, out

        _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
        return rows.put(whole, state, row_R, start_B, quota), out
