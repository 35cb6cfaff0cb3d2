"""Importance weights between the sampler, which wrote the tokens, and the trainer, which scores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from retool_jax.algo import segments
from retool_jax.algo.settings import LOG_RATIO_LIMIT, LossSettings
from retool_jax.algo.tallies import Tallies, max_over, mean_over

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Bool, Float, Int


def correction(
    settings: LossSettings,
    old_logprob_BT: Float[Array, 'B T'],
    sampler_logprob_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    num_segments: int,
) -> tuple[Float[Array, 'B T'], Tallies]:
    """Weights tokens for having been sampled by a policy that is not quite the trainer's.

      none      w = 1
      token     w = min(exp(clamp(ℓₒ − ℓₛ, ±20)), C)
      sequence  w = min(g, C) with g = exp(mean(ℓₒ − ℓₛ)) of the episode; 0 where g is outside [lo, hi]
    The policy loss becomes w·L, and denominators keep counting rejected tokens, so a rejection shrinks the
    step and never enlarges what is left; in verl they leave the mask, and with it the denominators. Entropy and
    KL terms are not weighted.

    In verl the geometric mean only rejects and never weights; its bounds hold for exp(mean(ℓₛ − ℓₒ)), so that its
    [a, b] is [1/b, 1/a] here; its sequence weight is the product of the ratios. TRL's default is a mask of
    sequences: weighted by the product of their ratios, and 0 where that exceeds the cap; its token_truncate is the
    token form.

    GSPO takes `sequence`: weights of single tokens take the one ratio of a sequence apart again, and were seen to
    turn its gradient by 4 to 34 % of its length.

    See https://fengyao.notion.site/off-policy-rl (truncated importance sampling).

    Args:
      settings: correction, correction_cap, correction_low, correction_high are read.
      old_logprob_BT, sampler_logprob_BT: ℓₒ, ℓₛ at the same temperature.
      mask_BT, segment_ids_BT, num_segments: as in `policy_loss`.

    Returns:
      weight_BT without gradient (0 outside the mask), and tallies: mismatch/logprob_abs_max (of a token),
      mismatch/episode_max (the largest mean of |ℓₒ − ℓₛ| over an episode's tokens), mismatch/kl
      (k1, ℓₛ − ℓₒ, over sampled tokens), mismatch/weight, mismatch/truncated, mismatch/rejected.
    """
    gap_BT = old_logprob_BT.astype(jnp.float32) - sampler_logprob_BT.astype(jnp.float32)
    gap_BT = jax.lax.stop_gradient(jnp.where(mask_BT, gap_BT, 0.0))
    kept_BT, log_weight_BT = mask_BT, gap_BT
    if settings.correction == 'none':
        log_weight_BT = jnp.zeros_like(gap_BT)
    elif settings.correction == 'sequence':
        log_weight_BT = segments.sequence_mean(gap_BT, mask_BT, segment_ids_BT, num_segments)
    raw_BT = jnp.exp(jnp.clip(log_weight_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    if settings.correction == 'sequence':
        kept_BT = mask_BT & (raw_BT >= settings.correction_low) & (raw_BT <= settings.correction_high)
    weight_BT = jnp.where(kept_BT, jnp.minimum(raw_BT, settings.correction_cap), 0.0)
    return weight_BT, {
        'mismatch/logprob_abs_max': max_over(jnp.abs(gap_BT), mask_BT),
        'mismatch/episode_max': max_over(
            segments.sequence_mean(jnp.abs(gap_BT), mask_BT, segment_ids_BT, num_segments), mask_BT
        ),
        'mismatch/kl': mean_over(-gap_BT, mask_BT),
        'mismatch/weight': mean_over(weight_BT, mask_BT),
        'mismatch/truncated': mean_over(kept_BT & (raw_BT > settings.correction_cap), mask_BT),
        'mismatch/rejected': mean_over(~kept_BT, mask_BT),
    }
