"""Log-probabilities of given tokens without a [B, T, V] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from retool_jax.core.pytrees import Params
from retool_jax.model.qwen import head_weight


def token_logprobs(params: Params, hidden_BTD: jax.Array, tokens_BT: jax.Array, *, temperature: float = 1.0,
                   chunk: int = 256) -> tuple[jax.Array, jax.Array]:
    """log p(token t | tokens before t) and the entropy of that distribution, both f32 [B, T].

    Aligned to the token: entry t comes from hidden state t − 1, entry 0 is 0. The vocabulary is
    projected for `chunk` positions of a row at a time and recomputed in the backward pass, so
    the largest array is B · chunk · V in f32.
    """
    b, t, _ = hidden_BTD.shape
    chunk = min(chunk, t)
    if t % chunk:
        raise ValueError(f'sequence length {t} is not a multiple of the logprob chunk {chunk}')
    w_DV = head_weight(params)
    target_BT = jnp.roll(tokens_BT, -1, axis=1)  # hidden t predicts token t + 1; the last entry is unused

    @jax.checkpoint
    def one(x_BCD, target_BC):
        logits = jnp.matmul(x_BCD, w_DV.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
        return score(logits if temperature == 1.0 else logits / temperature, target_BC)

    split = lambda x: jnp.moveaxis(x.reshape(b, t // chunk, chunk, *x.shape[2:]), 1, 0)
    _, (logprob, entropy) = jax.lax.scan(lambda carry, xs: (carry, one(*xs)), None,
                                         (split(hidden_BTD), split(target_BT)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t)
    shift = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return shift(join(logprob)), shift(join(entropy))


def score(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log softmax(z)[target] and the entropy logsumexp(z) − Σ softmax(z)·z over the last axis."""
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    z = logits - peak
    e = jnp.exp(z)
    total = e.sum(axis=-1)
    log_total = jnp.log(total)
    # A one-hot product, not a gather: under a sharded vocabulary it stays a local reduction.
    hit = target[..., None] == jnp.arange(logits.shape[-1])
    return jnp.where(hit, z, 0.0).sum(axis=-1) - log_total, log_total - (e * z).sum(axis=-1) / total
