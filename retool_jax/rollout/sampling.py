"""Drawing one token per row: temperature, top-p, top-k, min-p, and the uniform that decides.

Nothing sorts the vocabulary: thresholds are found by bisection on the probability, the draw
inverts the distribution function in two levels. One uniform per row, not one Gumbel per entry.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

BISECTIONS = 40  # halvings of log-probability range [-60, 0]: the kept set is exact to f32


def row_keys(base: jax.Array, step_R: jax.Array, problem_R: jax.Array, sample_R: jax.Array) -> jax.Array:
    """PRNG keys [R] that depend on (purpose and seed in `base`, step, problem, sample) alone."""

    def one(step, problem, sample):
        key = jax.random.fold_in(jax.random.fold_in(base, step), problem)
        return jax.random.fold_in(key, sample)

    return jax.vmap(one)(step_R, problem_R, sample_R)


def uniforms(key_B: jax.Array, position_BQ: jax.Array) -> jax.Array:
    """The numbers in [0, 1) that decide the tokens at these positions of each row, f32 [B, Q]."""
    one = lambda key, position: jax.random.uniform(jax.random.fold_in(key, position))
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(key_B, position_BQ)


def draw(
    logits_BV: jax.Array,
    u_B: jax.Array,
    temperature_B: jax.Array,
    top_p_B: jax.Array,
    top_k_B: jax.Array,
    min_p_B: jax.Array,
    *,
    truncate: bool,
) -> tuple[jax.Array, jax.Array]:
    """One token per row, decided by `u_B` in [0, 1), and its log-probability at the sampling temperature.

    The log-probability is that of the distribution *before* truncation (training compares it with
    the full softmax); a temperature of 0 takes the largest logit and reports temperature 1.
    `truncate` is static: False skips top-p, top-k and min-p, and draws the same tokens as
    top_p = 1, top_k = 0, min_p = 0. Returns token_B int32, logprob_B f32.
    """
    greedy_B = temperature_B == 0
    z = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    z = z - z.max(axis=-1, keepdims=True)
    p = jnp.exp(z)
    log_total = jnp.log(p.sum(axis=-1))
    weight = jnp.where(z >= threshold(z, p, top_p_B, top_k_B, min_p_B)[:, None], p, 0.0) if truncate else p
    token = jnp.where(greedy_B, jnp.argmax(z, axis=-1), invert(weight, u_B)).astype(jnp.int32)
    return token, jnp.take_along_axis(z, token[:, None], axis=1)[:, 0] - log_total


def threshold(
    z_BV: jax.Array, p_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """The smallest z that is kept, per row, given z = log p − max and p = exp z (unnormalised).

    top-p keeps the smallest set of most probable tokens whose mass reaches top_p (ties included);
    top-k at least k tokens; min-p those with p ≥ min_p · max p. The strictest wins; the most
    probable token always stays.
    """
    v = z_BV.shape[-1]
    mass = top_p_B * p_BV.sum(axis=-1)
    count = jnp.where(top_k_B > 0, top_k_B, v)
    top_p_off, top_k_off = top_p_B >= 1, top_k_B <= 0

    def halve(_, bounds):
        low_p, high_p, low_k, high_k = bounds  # keeping z ≥ low satisfies the demand, z ≥ high does not
        mid_p, mid_k = (low_p + high_p) / 2, (low_k + high_k) / 2
        enough_p = jnp.where(z_BV >= mid_p[:, None], p_BV, 0.0).sum(axis=-1) >= mass
        enough_k = (z_BV >= mid_k[:, None]).sum(axis=-1) >= count
        return (
            jnp.where(enough_p, mid_p, low_p),
            jnp.where(enough_p, high_p, mid_p),
            jnp.where(enough_k, mid_k, low_k),
            jnp.where(enough_k, high_k, mid_k),
        )

    low, high = jnp.full_like(top_p_B, -60.0), jnp.full_like(top_p_B, 1e-6)
    low_p, _, low_k, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high, low, high))
    off = jnp.full_like(low, -jnp.inf)
    kept = jnp.maximum(jnp.where(top_p_off, off, low_p), jnp.where(top_k_off, off, low_k))
    return jnp.minimum(jnp.maximum(kept, jnp.log(min_p_B)), 0.0)


def invert(weight_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The index at which the running sum of `weight` first exceeds u · total, u in [0, 1).

    Two levels (blocks, then one block) keep the scans short; never an entry of weight 0.
    """
    b, v = weight_BV.shape
    width = max(1, 2 ** round(math.log2(v) / 2))
    blocks = -(-v // width)
    w = jnp.pad(weight_BV, ((0, 0), (0, blocks * width - v))).reshape(b, blocks, width)
    block_mass = w.sum(axis=-1)
    block_cdf = jnp.cumsum(block_mass, axis=-1)
    goal = u_B * block_cdf[:, -1]
    # A block is passed when its whole mass lies at or below the goal; rounding may not pass the last.
    last_block = blocks - 1 - jnp.argmax(block_mass[:, ::-1] > 0, axis=-1)
    block = jnp.minimum((block_cdf <= goal[:, None]).sum(axis=-1), last_block)
    before = jnp.take_along_axis(block_cdf - block_mass, block[:, None], axis=1)[:, 0]
    row = jnp.take_along_axis(w, block[:, None, None], axis=1)[:, 0]
    last = width - 1 - jnp.argmax(row[:, ::-1] > 0, axis=-1)
    inside = (jnp.cumsum(row, axis=-1) <= (goal - before)[:, None]).sum(axis=-1)
    # Rounding can also land on a leading zero of the block: step to the next positive entry.
    inside = jnp.minimum(inside, last)
    ahead = (jnp.arange(width) >= inside[:, None]) & (row > 0)
    return block * width + jnp.argmax(ahead, axis=-1)
