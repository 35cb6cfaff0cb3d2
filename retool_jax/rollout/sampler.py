"""The jitted half of rollout: extend rows by given tokens, decode rows until they stop.

A row is a slot of the KV cache. `extend` feeds it a prompt or a tool's output: the same call.
`decode` samples for every live row and freezes each at EOS, `</code>`, `</answer>` or the end of
its allowance; a frozen row keeps its cache and logits bit for bit. Shapes follow from the
settings, so nothing recompiles after warm-up; reads cover a power-of-two bound on the lengths.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core.pytrees import KVCache, Params, SampleState
from retool_jax.model import cache as kv_cache
from retool_jax.model import qwen
from retool_jax.model.config import QwenConfig
from retool_jax.rollout import sampling

STOP_NONE, STOP_EOS, STOP_CODE, STOP_ANSWER, STOP_LENGTH = range(5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Sizes of the compiled programs."""

    rows: int  # slots of the engine: episodes in flight
    slots: int  # KV slots per row: prompt + everything after it
    chunk: int  # tokens per extend call; longer feeds take several
    group: int  # rows per extend call
    quota: int  # decode steps per call
    min_bound: int  # smallest bound on reads
    dtype: str  # of activations and the sampling weights
    cache_dtype: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one decode call produced; row b's tokens are the first `count_B[b]` columns."""

    tokens_BQ: jax.Array  # int32
    logprob_BQ: jax.Array  # f32, at the sampling temperature
    count_B: jax.Array  # int32
    stop_B: jax.Array  # int32, STOP_NONE while the row is live


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
    """Chunks for `group` rows; `row_R` out of range pads."""

    row_R: jax.Array  # int32
    tokens_RC: jax.Array  # int32
    count_R: jax.Array  # int32
    live_R: jax.Array  # bool: the row may sample after this chunk
    allowance_R: jax.Array  # int32: how many tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """New episodes for `group` rows; `row_R` out of range pads."""

    row_R: jax.Array  # int32
    problem_R: jax.Array  # uint32, a hash of the problem's id
    sample_R: jax.Array  # int32
    temperature_R: jax.Array
    top_p_R: jax.Array
    top_k_R: jax.Array
    min_p_R: jax.Array


class Sampler:
    """Owns the compiled programs of one model and one set of sizes; owns no weights."""

    def __init__(self, config: QwenConfig, settings: SamplerSettings, next_state: np.ndarray, stops: np.ndarray,
                 eos_ids: tuple[int, ...]):
        """next_state int32 [states, V] and stops int8 [states] are the tag automaton's
        (0 none, 1 `</code>`, 2 `</answer>`)."""
        if next_state.shape[1] != config.vocab_size:
            raise ValueError(f'tag table is {next_state.shape[1]} wide, the model has {config.vocab_size} logits')
        self.config, self.settings = config, settings
        self.table = jnp.asarray(next_state, jnp.int32)
        self.stops = jnp.asarray(np.array([STOP_NONE, STOP_CODE, STOP_ANSWER])[np.asarray(stops)], jnp.int32)
        self.eos_ids = jnp.asarray(sorted(eos_ids), jnp.int32)
        self._extend = jax.jit(self._extend_rows, static_argnames=('bound',), donate_argnames=('state',))
        self._decode = jax.jit(self._decode_rows, static_argnames=('bound', 'truncate'), donate_argnames=('state',))
        self._place = jax.jit(self._place_rows, donate_argnames=('state',))
        self._fork = jax.jit(self._fork_rows, static_argnames=('bound',), donate_argnames=('state',))
        self.sync = jax.jit(functools.partial(qwen.to_sampling, config, dtype=jnp.dtype(settings.dtype)))

    def empty(self) -> SampleState:
        """All rows free."""
        s, b = self.settings, self.settings.rows
        return SampleState(
            cache=kv_cache.empty(self.config, b, s.slots, jnp.dtype(s.cache_dtype)),
            logits_BV=jnp.zeros((b, self.config.vocab_size), jnp.float32),
            tag_B=jnp.zeros(b, jnp.int32), live_B=jnp.zeros(b, bool), stop_B=jnp.zeros(b, jnp.int32),
            allowance_B=jnp.zeros(b, jnp.int32), key_B=jax.random.split(jax.random.key(0), b),
            temperature_B=jnp.ones(b, jnp.float32), top_p_B=jnp.ones(b, jnp.float32),
            top_k_B=jnp.zeros(b, jnp.int32), min_p_B=jnp.zeros(b, jnp.float32))

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

    def place(self, state: SampleState, key: jax.Array, step: int, placement: Placement) -> SampleState:
        """Clears rows and gives them to new episodes, whose randomness is folded from
        (key, step, problem, sample)."""
        return self._place(state=state, key=key, step=jnp.uint32(step), placement=placement)

    def extend(self, params: Params, state: SampleState, feed: Feed, longest: int) -> SampleState:
        """Feeds chunks; `longest` is the largest row length after it."""
        return self._extend(params=params, state=state, feed=feed, bound=self.bound(longest))

    def fork(self, state: SampleState, source_R: np.ndarray, target_R: np.ndarray, length: int,
             logits_RV: jax.Array, allowance_R: np.ndarray) -> SampleState:
        """Gives rows `target` the first `length` slots of rows `source` and makes them live."""
        return self._fork(state=state, source_R=source_R, target_R=target_R, length=jnp.int32(length),
                          logits_RV=logits_RV, allowance_R=allowance_R, bound=self.bound(length))

    def decode(self, params: Params, state: SampleState, longest: int, truncate: bool) -> tuple[SampleState, Decoded]:
        """At most `quota` steps; `longest` is the largest live length before it."""
        return self._decode(params=params, table=self.table, stops=self.stops, state=state,
                            bound=self.bound(longest + self.settings.quota), truncate=truncate)

    def _place_rows(self, state: SampleState, key, step, placement: Placement) -> SampleState:
        r = placement.row_R
        put = lambda x, value: x.at[r].set(value, mode='drop')
        return dataclasses.replace(
            state, cache=dataclasses.replace(state.cache, length_B=put(state.cache.length_B, 0)),
            tag_B=put(state.tag_B, 0), live_B=put(state.live_B, False), stop_B=put(state.stop_B, STOP_NONE),
            key_B=put(state.key_B, sampling.row_keys(key, step, placement.problem_R, placement.sample_R)),
            temperature_B=put(state.temperature_B, placement.temperature_R),
            top_p_B=put(state.top_p_B, placement.top_p_R), top_k_B=put(state.top_k_B, placement.top_k_R),
            min_p_B=put(state.min_p_B, placement.min_p_R))

    def _extend_rows(self, params, state: SampleState, feed: Feed, bound: int) -> SampleState:
        r = feed.row_R
        take = lambda x: x.at[r].get(mode='clip')
        put = lambda x, value: x.at[r].set(value, mode='drop')
        own = KVCache(k=[take(k[:, :, :bound]) for k in state.cache.k],
                      v=[take(v[:, :, :bound]) for v in state.cache.v], length_B=take(state.cache.length_B))
        hidden_RCD, own = qwen.extend(self.config, params, own, feed.tokens_RC, feed.count_R, bound)
        last = jnp.maximum(feed.count_R - 1, 0)[:, None, None]
        logits_RV = qwen.unembed(params, jnp.take_along_axis(hidden_RCD, last, axis=1)[:, 0])
        back = lambda full, part: full.at[r, :, :bound].set(part, mode='drop')
        cache = KVCache(k=[back(k, x) for k, x in zip(state.cache.k, own.k)],
                        v=[back(v, x) for v, x in zip(state.cache.v, own.v)],
                        length_B=put(state.cache.length_B, own.length_B))
        return dataclasses.replace(
            state, cache=cache, logits_BV=put(state.logits_BV, logits_RV), tag_B=put(state.tag_B, 0),
            live_B=put(state.live_B, feed.live_R), stop_B=put(state.stop_B, STOP_NONE),
            allowance_B=put(state.allowance_B, feed.allowance_R))

    def _fork_rows(self, state: SampleState, source_R, target_R, length, logits_RV, allowance_R,
                   bound: int) -> SampleState:
        put = lambda x, value: x.at[target_R].set(value, mode='drop')
        copy = lambda kv: kv_cache.copy_rows(kv, source_R, target_R, bound)
        cache = KVCache(k=[copy(k) for k in state.cache.k], v=[copy(v) for v in state.cache.v],
                        length_B=put(state.cache.length_B, length))
        return dataclasses.replace(state, cache=cache, logits_BV=put(state.logits_BV, logits_RV),
                                   live_B=put(state.live_B, True), allowance_B=put(state.allowance_B, allowance_R))

    def _decode_rows(self, params, table, stops, state: SampleState, bound: int, truncate: bool):
        quota, rows = self.settings.quota, self.settings.rows
        whole = state.cache
        # The loop carries only the slots it may read: slicing inside would copy them every step.
        state = dataclasses.replace(state, cache=KVCache(
            k=[k[:, :, :bound] for k in whole.k], v=[v[:, :, :bound] for v in whole.v], length_B=whole.length_B))
        out = Decoded(tokens_BQ=jnp.zeros((rows, quota), jnp.int32), logprob_BQ=jnp.zeros((rows, quota), jnp.float32),
                      count_B=jnp.zeros(rows, jnp.int32), stop_B=state.stop_B)

        def unfinished(carry):
            i, state, _ = carry
            return (i < quota) & state.live_B.any()

        def step(carry):
            i, s, out = carry
            token_B, logprob_B = sampling.draw(
                s.logits_BV, s.key_B, s.cache.length_B, s.temperature_B, s.top_p_B, s.top_k_B, s.min_p_B,
                truncate=truncate)
            live = s.live_B
            hidden_BCD, cache = qwen.extend(self.config, params, s.cache, token_B[:, None],
                                            live.astype(jnp.int32), bound)
            logits_BV = qwen.unembed(params, hidden_BCD[:, 0])
            tag_B = table[s.tag_B, token_B]
            allowance_B = s.allowance_B - 1
            stop_B = jnp.where(allowance_B <= 0, STOP_LENGTH, STOP_NONE)
            stop_B = jnp.where(stops[tag_B] != STOP_NONE, stops[tag_B], stop_B)
            stop_B = jnp.where((token_B[:, None] == self.eos_ids).any(axis=1), STOP_EOS, stop_B)
            keep = lambda new, old: jnp.where(live if new.ndim == 1 else live[:, None], new, old)
            stop_B = keep(stop_B, s.stop_B)
            out = Decoded(tokens_BQ=out.tokens_BQ.at[:, i].set(jnp.where(live, token_B, 0)),
                          logprob_BQ=out.logprob_BQ.at[:, i].set(jnp.where(live, logprob_B, 0.0)),
                          count_B=out.count_B + live, stop_B=stop_B)
            s = dataclasses.replace(s, cache=cache, logits_BV=keep(logits_BV, s.logits_BV), stop_B=stop_B,
                                    tag_B=keep(tag_B, s.tag_B), allowance_B=keep(allowance_B, s.allowance_B),
                                    live_B=live & (stop_B == STOP_NONE))
            return i + 1, s, out

        _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
        back = lambda full, part: part if bound == full.shape[2] else full.at[:, :, :bound].set(part)
        cache = KVCache(k=[back(f, x) for f, x in zip(whole.k, state.cache.k)],
                        v=[back(f, x) for f, x in zip(whole.v, state.cache.v)], length_B=state.cache.length_B)
        return dataclasses.replace(state, cache=cache), out
