"""What a long cache costs: reads bounded by length, and tool output that enters without a second prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.bench.timing import clock, in_turns
from retool_jax.core.pytrees import Params
from retool_jax.model import attention
from retool_jax.model.config import ModelConfig
from retool_jax.rollout.sampler import Assignment, Chunks, Sampler
from retool_jax.rollout.settings import SamplerSettings

ROWS = 16  # in the comparison of cache sizes
LIVE = 256


class Rows:
    """A sampler's rows, filled to a length and measured from there."""

    def __init__(self, config: ModelConfig, weights: Params, shape, rows: int, slots: int):
        self.shape, self.weights, self.count = shape, weights, rows
        self.sampler = Sampler(
            config,
            SamplerSettings(
                rows=rows,
                slots=slots,
                chunk=shape.chunk,
                feed_rows=min(8, rows),
                quota=shape.quota,
                decode_rows=0,
                min_bound=shape.chunk,
                dtype=shape.dtype,
                weights='float',
                cache_dtype=shape.dtype,
            ),
            np.zeros((1, shape.vocab), np.int32),
            np.zeros(1, np.int8),
            (),
        )
        self.state = self.sampler.empty()

    def fill(self, length: int) -> float:
        """Seconds to prefill `length` tokens in every row, from empty."""
        return clock(lambda: self._fill(length))

    def _fill(self, length: int) -> jax.Array:
        s = self.sampler.settings
        for rows in self._calls():
            same = lambda value, dtype: np.full(s.feed_rows, value, dtype)
            self.state = self.sampler.assign(
                self.state,
                np.zeros(2, np.uint32),
                Assignment(
                    row_R=rows,
                    step_R=same(0, np.uint32),
                    problem_R=rows.astype(np.uint32),
                    sample_R=same(0, np.int32),
                    temperature_R=same(1, np.float32),
                    top_p_R=same(1, np.float32),
                    top_k_R=same(0, np.int32),
                    min_p_R=same(0, np.float32),
                ),
            )
        for end in range(s.chunk, length + s.chunk, s.chunk):
            mark = self._extend(min(s.chunk, length - end + s.chunk), min(end, length))
        return mark

    def _calls(self) -> list[np.ndarray]:
        size = self.sampler.settings.feed_rows
        return [np.arange(i, i + size, dtype=np.int32) for i in range(0, self.count, size)]

    def _extend(self, count: int, end: int, own: Sequence[np.ndarray] | None = None) -> jax.Array:
        """own: row numbers of the calls; None: all rows."""
        s = self.sampler.settings
        for rows in self._calls() if own is None else own:
            chunks = Chunks(
                row_R=rows,
                tokens_RC=np.full((s.feed_rows, s.chunk), 7, np.int32),
                count_R=np.full(s.feed_rows, count, np.int32),
                live_R=np.ones(s.feed_rows, bool),
                allowance_R=np.full(s.feed_rows, s.quota, np.int32),
                tag_R=np.zeros(s.feed_rows, np.int32),
            )
            self.state, mark = self.sampler.extend(self.weights, self.state, chunks, end)
        return mark

    def extend(self, length: int) -> float:
        """Seconds of one chunk that ends at `length`."""
        self._fill(length - self.shape.chunk)
        jax.block_until_ready(self.state.logits_BV)
        return clock(lambda: self._extend(self.shape.chunk, length))

    def decode(self, length: int, first: int = 0) -> float:
        """Seconds per token of one quantum that ends at `length`, in the first row at `first` where that is more."""
        s, before = self.sampler.settings, length - self.shape.quota
        longest = max(before, first - self.shape.quota)
        self._fill(before)
        alone = np.full(s.feed_rows, self.count, np.int32)
        alone[0] = 0
        for start in range(before, longest, s.chunk):
            count = min(s.chunk, longest - start)
            self._extend(count, start + count, [alone])
        jax.block_until_ready(self.state.logits_BV)

        def work() -> jax.Array:
            rows = self.sampler.choose(range(self.count))
            self.state, out = self.sampler.decode(self.weights, self.state, rows, longest, False)
            return out.tokens_BQ

        return clock(work) / self.shape.quota


def measure(config: ModelConfig, weights: Params, shape, repeats: int, say: Callable[[str], None]) -> dict:
    """Seconds of chunks and steps at the same length in a long and a short cache, of steps where one row of `ROWS` is
    long, and of a tool's return."""
    say('long and short cache')
    caches = {
        name: Rows(config, weights, shape, ROWS, slots)
        for name, slots in (('long', shape.slots), ('short', shape.short_slots), ('bounded', shape.slots))
    }
    caches['bounded'].sampler.fused = False  # reads every row up to the bound of the longest
    seconds = in_turns(
        {
            'decode_long': lambda i: caches['long'].decode(LIVE),
            'decode_short': lambda i: caches['short'].decode(LIVE),
            'extend_long': lambda i: caches['long'].extend(LIVE),
            'extend_short': lambda i: caches['short'].extend(LIVE),
            'decode_one_long': lambda i: caches['long'].decode(LIVE, shape.slots),
            'decode_one_long_bounded': lambda i: caches['bounded'].decode(LIVE, shape.slots),
        },
        repeats,
    )
    figures = {f'{name}_s': value for name, value in seconds.items()}
    for name in ('decode', 'extend'):
        figures[f'{name}_long_over_short'] = seconds[f'{name}_long'] / seconds[f'{name}_short']
    for name in ('decode_one_long', 'decode_one_long_bounded'):
        figures[f'{name}_over_none'] = seconds[name] / seconds['decode_long']
    caches.clear()

    say('a tool returns late')
    one, end = Rows(config, weights, shape, 1, shape.slots), min(shape.long + shape.chunk, shape.slots)
    bounds = one.sampler.bound(end), one.sampler.bound(LIVE + shape.chunk)
    reads = {bound: attention_program(config, shape, bound) for bound in bounds}
    seconds = in_turns(
        {
            'resume_long': lambda i: one.extend(end),
            'resume_short': lambda i: one.extend(LIVE + shape.chunk),
            'prefill': lambda i: one.fill(end),
            'attend_long': lambda i: reads[bounds[0]](),
            'attend_short': lambda i: reads[bounds[1]](),
        },
        repeats,
    )
    extra = seconds['attend_long'] - seconds['attend_short']
    return (
        figures
        | {f'{name}_s': value for name, value in seconds.items()}
        | {
            'prefill_over_resume': seconds['prefill'] / seconds['resume_long'],
            'resume_extra_over_attention': (seconds['resume_long'] - seconds['resume_short']) / extra,
        }
    )


def attention_program(config: ModelConfig, shape, bound: int) -> Callable[[], float]:
    """Seconds of one chunk's attention to `bound` slots in every layer, and of nothing else."""
    key = jax.random.key(0)
    heads, size = config.num_key_value_heads, config.head_dim
    q = jax.random.normal(key, (1, shape.chunk, config.num_attention_heads, size), shape.dtype)
    kv = [
        jax.random.normal(jax.random.fold_in(key, i), (1, heads, bound, size), shape.dtype)
        for i in range(2 * config.num_hidden_layers)
    ]

    @jax.jit
    def run(q, kv):
        positions = jnp.arange(bound - shape.chunk, bound)[None]
        for k, v in zip(kv[::2], kv[1::2]):
            q = attention.cached(q, k, v, positions)
        return q

    jax.block_until_ready(run(q, kv))
    return lambda: clock(run, q, kv)
