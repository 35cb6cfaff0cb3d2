"""The jitted half of rollout: extend rows by given tokens, decode rows until they stop.

A row holds one episode. `extend` feeds it a prompt or a tool's output: the same call.
`decode` samples for a fixed number of rows, all or some, and freezes each at EOS, `</code>`,
`</answer>` or the end of its allowance; a frozen row keeps its cache and logits bit for bit. What
a row writes may depend on that number (sums round by it), never on who the other rows are. Shapes
follow from the settings, so nothing recompiles after warm-up; reads cover a power-of-two bound on
the lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core import sharding
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Int8KV, KVCache, Params, SampleState
from retool_jax.model import decoder, kv_cache
from retool_jax.model.config import ModelConfig
from retool_jax.rollout import rows, sampling
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
    """Chunks for `feed_rows` rows; `row_R` out of range pads."""

    row_R: jax.Array  # int32
    tokens_RC: jax.Array  # int32
    count_R: jax.Array  # int32
    live_R: jax.Array  # bool: the row may sample after this chunk
    allowance_R: jax.Array  # int32: how many tokens
    tag_R: jax.Array  # int32, state of the tag automaton after it: 0, or that of a turn which is taken up again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """New episodes for `feed_rows` rows; `row_R` out of range pads."""

    row_R: jax.Array  # int32
    step_R: jax.Array  # uint32, of the training step that asked for the episode
    problem_R: jax.Array  # uint32, a hash of the problem's id
    sample_R: jax.Array  # int32
    temperature_R: jax.Array
    top_p_R: jax.Array
    top_k_R: jax.Array
    min_p_R: jax.Array


class Sampler:
    """Owns the compiled programs of one model and one set of sizes; owns no weights."""

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
        (0 none, 1 `</code>`, 2 `</answer>`). mesh: rows over data × fsdp, heads and vocabulary over tensor;
        None leaves everything where the weights are.

        Raises:
          ValueError: the tag table is not as wide as the model's logits.
        """
        if next_state.shape[1] != config.vocab_size:
            raise ValueError(f'tag table is {next_state.shape[1]} wide, the model has {config.vocab_size} logits')
        self.config, self.settings = config, settings
        self.decode_rows = settings.decode_rows or settings.rows
        self.chooses = self.decode_rows < settings.rows
        self.ways = mesh.shape['data'] * mesh.shape['fsdp'] if mesh is not None else 1
        self.fused = mesh is None or mesh.size == 1  # kernels that the partitioner cannot look into
        state, whole = self.shardings(mesh) if mesh is not None else (None, None)
        # On a mesh over several processes an array must say where it lies. An abstract mesh holds no arrays, nor
        # do the chips that plan/ compiles for from afar.
        real = isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == jax.default_backend()
        hold = lambda x: jax.device_put(np.asarray(x, np.int32), whole if real else None)
        self.table = hold(next_state)
        self.stops = hold(np.array([STOP_NONE, STOP_CODE, STOP_ANSWER])[np.asarray(stops)])
        self.eos_ids = np.array(sorted(eos_ids), np.int32)
        keep = dict(donate_argnames=('state',), out_shardings=state)
        self._extend = jax.jit(
            self._extend_rows, static_argnames=('bound',), donate_argnames=('state',), out_shardings=(state, whole)
        )
        self._decode = jax.jit(
            self._decode_rows,
            static_argnames=('bound', 'truncate'),
            donate_argnames=('state',),
            out_shardings=(state, whole),
        )
        self._assign = jax.jit(self._assign_rows, **keep)
        self._fork = jax.jit(self._fork_rows, static_argnames=('bound',), **keep)
        self.sync = Sync(config, settings.dtype, mesh, weights=settings.weights)
        self.empty = jax.jit(self._empty, out_shardings=state)  # all rows free
        self.logits_of = jax.jit(lambda state, row: state.logits_BV[row])  # [V]

    def shardings(self, mesh: jax.sharding.Mesh):
        """Shardings of the state and of what every device holds whole.

        Raises: UserError where a size of the model or `rows` does not divide over the mesh.
        """
        rules = decoder.fit_rules(self.config, mesh, sharding.SAMPLE_RULES)
        for name, size in (('rows', self.settings.rows), ('decode_rows', self.decode_rows)):
            if size % self.ways:
                raise UserError(
                    f'sampler.{name}={size} does not divide over data={mesh.shape["data"]} × '
                    f'fsdp={mesh.shape["fsdp"]}; choose a multiple'
                )
        lies = lambda *words: jax.NamedSharding(mesh, sharding.spec(words, rules))
        one = lies('batch', 'kv_heads', None, 'head_dim')
        if self.settings.cache_dtype == 'int8':
            one = Int8KV(values=one, scale=lies('batch', 'kv_heads', None))
        kv = [one] * self.config.num_hidden_layers
        row = lies('batch')
        state = SampleState(
            cache=KVCache(k=kv, v=kv, length_B=row),
            logits_BV=lies('batch', 'vocab'),
            tag_B=row,
            live_B=row,
            stop_B=row,
            allowance_B=row,
            key_B=row,
            temperature_B=row,
            top_p_B=row,
            top_k_B=row,
            min_p_B=row,
        )
        return state, lies()

    def _empty(self) -> SampleState:
        s, b = self.settings, self.settings.rows
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
        nobody, none = np.full(s.feed_rows, s.rows, np.int32), np.zeros(s.feed_rows, np.int32)
        real = np.zeros(s.feed_rows, np.float32)
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
        logits_V = self.logits_of(state, 0)
        chunks = Chunks(
            row_R=nobody,
            tokens_RC=np.zeros((s.feed_rows, s.chunk), np.int32),
            count_R=none,
            live_R=none.astype(bool),
            allowance_R=none,
            tag_R=none,
        )
        for bound in self.bounds():
            state, _ = self.extend(params, state, chunks, bound)
            state = self.fork(state, nobody, nobody, bound, logits_V, none)
            state, _ = self.decode(params, state, self.choose([]), max(bound - s.quota, 0), truncate)
        jax.block_until_ready(state.live_B)

    def assign(self, state: SampleState, key_data: np.ndarray, assignment: Assignment) -> SampleState:
        """Clears rows and gives them to new episodes, whose randomness is folded from
        (the key of `key_data`, step, problem, sample)."""
        return self._assign(state=state, key_data=key_data, assignment=assignment)

    def extend(self, params: Params, state: SampleState, chunks: Chunks, longest: int) -> tuple[SampleState, jax.Array]:
        """Feeds chunks; `longest` is the largest row length after it. Also returns how many tokens went in: that array
        is ready when the call is done, when the state itself may have been given away."""
        return self._extend(params=params, state=state, chunks=chunks, bound=self.bound(longest))

    def fork(
        self,
        state: SampleState,
        source_R: np.ndarray,
        target_R: np.ndarray,
        length: int,
        logits_RV: jax.Array,
        allowance_R: np.ndarray,
    ) -> SampleState:
        """Gives rows `target` the first `length` slots of rows `source` and makes them live."""
        return self._fork(
            state=state,
            source_R=source_R,
            target_R=target_R,
            length=np.int32(length),
            logits_RV=logits_RV,
            allowance_R=allowance_R,
            bound=self.bound(length),
        )

    def choose(self, live: Sequence[int]) -> np.ndarray:
        """Rows of the next decode call, int32 [decode_rows]: the first of `live`, padded with numbers out of range."""
        return rows.choose(live, self.settings.rows, self.decode_rows, self.ways)

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
            row_R=row_R if self.chooses else None,
            bound=self.bound(longest + self.settings.quota),
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
        ), chunks.count_R.sum()

    def _fork_rows(
        self, state: SampleState, source_R, target_R, length, logits_RV, allowance_R, bound: int
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
            logits_BV=put(state.logits_BV, logits_RV),
            live_B=put(state.live_B, True),
            allowance_B=put(state.allowance_B, allowance_R),
        )

    def _decode_rows(self, params, table, stops, state: SampleState, row_R, steps, bound: int, truncate: bool):
        quota, whole = self.settings.quota, state
        state = rows.take(whole, row_R, bound, self.ways)
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
            return (i < quota) & (i < steps) & state.live_B.any()

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
                fused=self.fused,
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
        return rows.put(whole, state, row_R, start_B, quota, self.ways), out
