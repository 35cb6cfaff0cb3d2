"""Our side of bench/accelerator.py, a process for a group of cases: `python -m retool_jax.bench.accelerator_jax CASES`.

CASES is a JSON list of {'case': name, 'kind': a function below, …its arguments}. A line of JSON answers each: its
figures, or under 'error' the first line of what went wrong; the next case goes on. Weights and KV are random numbers
made on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.bench import update as updates
from retool_jax.bench.accelerator import spread
from retool_jax.core.pytrees import Batch, Int8KV, Params, SampleState
from retool_jax.core.records import Episode, Problem, Reward
from retool_jax.model import attention, decoder
from retool_jax.model.config import ModelConfig
from retool_jax.plan import models
from retool_jax.rollout.sampler import Chunks, Sampler, SamplerSettings
from retool_jax.train.pack import first_fit, pack
from retool_jax.train.settings import ForwardSettings


def main(cases: str) -> None:
    for case in json.loads(cases):
        began = time.perf_counter()
        try:
            known = {key: value for key, value in case.items() if key not in ('case', 'kind', 'limit')}
            found = KINDS[case['kind']](**known)
        except Exception as error:  # of any kind: the other cases go on
            print(f'{case["case"]}: {error}', file=sys.stderr, flush=True)
            # The traceback holds the case's arrays.
            found = {'error': f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0][:300]}'}
            error.__traceback__ = None
        gc.collect()
        took = {'took_s': round(time.perf_counter() - began, 2)}
        print(json.dumps({'case': case['case']} | found | took), flush=True)


def device(bytes: int, repeats: int) -> dict:
    """What the chip does at best: bytes/s of a copy (read and written) and of a sum (read), bf16 matmul FLOP/s."""
    chip = jax.devices()[0]
    x = jax.random.normal(jax.random.key(0), (bytes // 4,), jnp.float32)
    copy, total = jax.jit(lambda x: x + 1), jax.jit(jnp.sum)
    rates = {
        'copy': 2 * bytes / updates.best(lambda: copy(x), repeats),
        'read': bytes / updates.best(lambda: total(x), repeats),
    }
    stats = chip.memory_stats() or {}
    return {
        'device': chip.device_kind,
        'platform': chip.platform,
        'jax': jax.__version__,
        'memory': stats.get('bytes_limit'),
        'copy_bytes_per_s': rates['copy'],
        'read_bytes_per_s': rates['read'],
        'matmul_flops': updates.matmul_rate('bfloat16', repeats),
    }


def decode(
    model: str,
    rows: int,
    slots: int,
    low: int,
    high: int,
    quota: int,
    calls: int,
    dtype: str,
    cache_dtype: str,
    fused: bool = True,
) -> dict:
    """Decode calls of `rows` rows whose contexts are spread evenly over low … high; none ends.

    fused: by a kernel of model/decoding.py, where the device and the cache have one.

    Raises:
      ValueError: the longest, with what the calls add, does not fit the slots.
    """
    config = models.sizes(None, model)
    weights = random_weights(config, dtype)
    sampler = make_sampler(config, rows, slots, quota, min(256, slots), min(8, rows), dtype, cache_dtype)
    sampler.fused &= fused
    length_B = spread(rows, low, high)
    state = fill(sampler, length_B)
    if length_B.max() + (1 + calls) * quota > slots:
        raise ValueError(f'{length_B.max()} tokens and {1 + calls} calls of {quota} do not fit {slots} slots')
    row_R, taken = sampler.choose(list(range(rows))), []
    for i in range(1 + calls):
        began = time.perf_counter()
        state, out = sampler.decode(weights, state, row_R, int(length_B.max()) + i * quota, False)
        jax.block_until_ready((state, out))
        taken.append(time.perf_counter() - began)
        if int(out.count_B.sum()) != rows * quota:
            raise RuntimeError(f'{int(out.count_B.sum())} tokens were drawn, not {rows * quota}')
    live = length_B.sum() + rows * (quota + calls * quota / 2)  # mean over the measured steps
    return {
        'compile_s': taken[0],
        'step_s': float(np.median(taken[1:])) / quota,
        'tokens_per_s': rows * quota / float(np.median(taken[1:])),
        'live_tokens': float(live),
        'weight_bytes': weight_bytes(weights),
        'kv_bytes': float(live) * kv_bytes(config, cache_dtype),
        **peak(),
    }


def extend(
    model: str, rows: int, slots: int, start: int, chunk: int, feed_rows: int, calls: int, dtype: str, cache_dtype: str
) -> dict:
    """Chunks of `chunk` tokens for `feed_rows` rows that hold `start` tokens: a prompt (0) or a tool's output.

    Raises:
      ValueError: what a row holds in the end does not fit the slots.
    """
    config = models.sizes(None, model)
    weights = random_weights(config, dtype)
    sampler = make_sampler(config, rows, slots, 64, chunk, feed_rows, dtype, cache_dtype)
    state, taken = fill(sampler, np.full(rows, start)), []
    longest = start + chunk * (1 + calls)  # at last: every call is one program
    if longest > slots:
        raise ValueError(f'{longest} tokens do not fit {slots} slots')
    some = lambda value, dtype=np.int32: np.full(feed_rows, value, dtype)
    rng = np.random.default_rng(0)
    for _ in range(1 + calls):
        chunks = Chunks(
            row_R=np.arange(feed_rows, dtype=np.int32),
            count_R=some(chunk),
            live_R=some(True, bool),
            tokens_RC=rng.integers(0, config.vocab_size, (feed_rows, chunk)).astype(np.int32),
            allowance_R=some(1),
            tag_R=some(0),
        )
        began = time.perf_counter()
        state, fed = sampler.extend(weights, state, chunks, longest)
        jax.block_until_ready((state, fed))
        taken.append(time.perf_counter() - began)
    seconds, tokens = float(np.median(taken[1:])), feed_rows * chunk
    body = updates.flops_per_token(config, 0) // 3 - 2 * config.hidden_size * config.vocab_size
    before = start + chunk * (1 + (1 + calls) / 2)  # mean over the measured calls, the last token's
    mixed = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (before - chunk / 2)
    return {
        'compile_s': taken[0],
        'call_s': seconds,
        'tokens_per_s': tokens / seconds,
        'flops': (body + mixed) * tokens / seconds,
        **peak(),
    }


def update(
    model: str,
    width: int,
    rows: int,
    micro_rows: int,
    attend: str,
    remat: str,
    logprob_chunk: int,
    vocab_chunk: int,
    repeats: int,
    dtype: str,
) -> dict:
    """GRPO steps over full packed rows; FLOPs as the model needs them, causal and within episodes."""
    config = models.sizes(None, model)
    forward = ForwardSettings(
        dtype=dtype,
        gradient_dtype='float32',
        attention=attend,
        remat=remat,
        unroll=1,
        logprob_chunk=logprob_chunk,
        vocab_chunk=vocab_chunk,
        micro_rows=micro_rows,
        row_width=width,
        row_segments=16,
    )
    lengths = draw_lengths(width, rows)
    seconds = float(
        np.median(updates.update_seconds(config, forward, packed(config, lengths, width, micro_rows), repeats))
    )
    tokens, heads = sum(lengths), config.num_attention_heads * config.head_dim
    flops = updates.flops_per_token(config, 0) * tokens + 6 * config.num_hidden_layers * heads * sum(
        n * n for n in lengths
    )
    return {
        'step_s': seconds,
        'tokens': tokens,
        'episodes': len(lengths),
        'tokens_per_s': tokens / seconds,
        'flops': flops / seconds,
        **peak(),
    }


def attend(model: str, width: int, attend: str, repeats: int, dtype: str) -> dict:
    """Attention of one layer alone over one packed row, forwards and backwards; beside it how far it is from blocked
    attention in f32, relative to its norm, for the output and the gradients."""
    config = models.sizes(None, model)
    rng, lengths = np.random.default_rng(0), draw_lengths(width, 1)
    segments = packed(config, lengths, width, 1).segment_ids_BT
    make = lambda heads, scale: jnp.asarray(scale * rng.normal(size=(1, width, heads, config.head_dim)), dtype)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = make(heads, config.head_dim**-0.5), make(kv_heads, 1), make(kv_heads, 1)
    weight = make(heads, 1) * jnp.asarray(segments > 0, dtype)[:, :, None, None]

    def work(form):
        def loss(q, k, v):
            out = form(q, k, v, segments)
            return (out * weight).astype(jnp.float32).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)), jax.jit(lambda *x: form(*x, segments))

    backward, forward = work(attention.choose(attend, width, 16))
    exact, _ = work(attention.blocked)
    found = [*backward(q, k, v)[0], forward(q, k, v)]
    with jax.default_matmul_precision('highest'):
        grads, out = exact(*(x.astype(jnp.float32) for x in (q, k, v)))
    real = lambda x: jnp.where(segments[:, :, None, None] > 0, x.astype(jnp.float32), 0)
    error = [float(jnp.linalg.norm(real(a) - real(b)) / jnp.linalg.norm(real(b))) for a, b in zip(found, [*grads, out])]
    both, one = updates.best(lambda: backward(q, k, v), repeats), updates.best(lambda: forward(q, k, v), repeats)
    pairs = 2 * heads * config.head_dim * sum(n * n for n in lengths)  # of the forward pass, causal
    return {
        'forward_s': one,
        'both_s': both,
        'flops': 3.5 * pairs / both,
        'errors': dict(zip(('dq', 'dk', 'dv', 'out'), error)),
    }


KINDS = {'device': device, 'decode': decode, 'extend': extend, 'update': update, 'attend': attend}


def random_weights(config: ModelConfig, dtype: str) -> Params:
    """The sampling layout in `dtype`, never anywhere in f32: 7B would take 30 GB."""
    shapes = jax.eval_shape(
        lambda: decoder.to_sampling(config, decoder.init(config, jax.random.key(0)), jnp.dtype(dtype))
    )
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [_normal(jax.random.key(i), x.shape, x.dtype, 0.02) for i, x in enumerate(leaves)])


@functools.partial(jax.jit, static_argnums=1)
def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random int8; as bits, since drawing from −127 … 127 takes several numbers of 32 bits each."""
    return jax.random.bits(key, shape, jnp.uint8).astype(jnp.int8)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype, scale: float) -> jax.Array:
    return _draw(key, shape, jnp.dtype(dtype).name) * jnp.asarray(scale, dtype)


_draw = jax.jit(lambda key, shape, dtype: jax.random.normal(key, shape, dtype), static_argnums=(1, 2))


def weight_bytes(weights: Params) -> int:
    """What a step reads of the weights: all but the embeddings, of which it looks up a few rows."""
    return sum(x.nbytes for x in jax.tree.leaves(weights | {'embed_tokens': {}}))


def kv_bytes(config: ModelConfig, cache_dtype: str) -> int:
    """Bytes of a cached token."""
    number = jnp.dtype(cache_dtype).itemsize * config.head_dim + (4 if cache_dtype == 'int8' else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * number


def make_sampler(
    config: ModelConfig, rows: int, slots: int, quota: int, chunk: int, feed_rows: int, dtype: str, cache_dtype: str
) -> Sampler:
    """A sampler whose rows end at their allowance alone."""
    sizes = SamplerSettings(
        rows=rows,
        slots=slots,
        chunk=chunk,
        feed_rows=feed_rows,
        quota=quota,
        decode_rows=0,
        min_bound=chunk,
        dtype=dtype,
        weights='float',
        cache_dtype=cache_dtype,
    )
    return Sampler(config, sizes, np.zeros((1, config.vocab_size), np.int32), np.zeros(1, np.int8), ())


def fill(sampler: Sampler, length_B: np.ndarray) -> SampleState:
    """Live rows of random KV that hold so many tokens."""
    state = sampler.empty()

    def one(i, kv):
        key = jax.random.key(i)
        if not isinstance(kv, Int8KV):
            return _normal(key, kv.shape, kv.dtype, 1)
        return Int8KV(values=_bits(key, kv.values.shape), scale=jnp.full_like(kv.scale, 1 / 64))

    keys, values = ([], [])
    for i in range(len(state.cache.k)):  # one array at a time beside the cache
        for made, held in ((keys, state.cache.k), (values, state.cache.v)):
            made.append(one(2 * i + len(made), held[i]))
            held[i] = None
    cache = dataclasses.replace(state.cache, k=keys, v=values, length_B=jnp.asarray(length_B, jnp.int32))
    return dataclasses.replace(
        state, cache=cache, live_B=jnp.ones_like(state.live_B), allowance_B=jnp.full_like(state.allowance_B, 1 << 20)
    )


def draw_lengths(width: int, rows: int) -> list[int]:
    """Episodes of an eighth to a half of a row, as many as fill so many rows."""
    rng, lengths = np.random.default_rng(0), []
    while True:
        more = [*lengths, int(rng.integers(width // 8, width // 2 + 1))]
        if len(first_fit(more, width)) > rows:
            return lengths
        lengths = more


def packed(config: ModelConfig, lengths: list[int], width: int, micro_rows: int) -> Batch:
    """Random episodes of these lengths, four of a problem, an eighth of each the prompt, half of them right."""
    rng, episodes = np.random.default_rng(1), []
    for i, n in enumerate(lengths):
        acted = [j >= n // 8 for j in range(n)]
        episodes.append(
            Episode(
                Problem(str(i), '', '', '', ''),
                0,
                0,
                tokens=rng.integers(0, config.vocab_size, n).tolist(),
                acted=acted,
                logprobs=[-np.log(config.vocab_size) * a for a in acted],
                versions=[0] * n,
                prompt_length=n // 8,
                reward=Reward(float(i % 2), i % 2 == 1, False, False, ''),
            )
        )
    return pack(episodes, width=width, rows=micro_rows, segments=16, groups=[i // 4 for i in range(len(lengths))])


def peak() -> dict:
    """The most memory that this process has held on the device, where the platform counts it."""
    stats = jax.devices()[0].memory_stats() or {}
    return {'peak_bytes': stats['peak_bytes_in_use']} if 'peak_bytes_in_use' in stats else {}


if __name__ == '__main__':
    main(sys.argv[1])
