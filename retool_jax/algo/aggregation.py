"""From losses of tokens to one number, the same however a batch is cut.

A denominator is computed once over the global batch; each part of the batch divides its own numerator by
it, and the parts add up to the same loss and gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from retool_jax.algo import segments

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Bool, Float, Int


def denominator(
    aggregation: str,
    mask_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    num_segments: int,
    constant: float | None = None,
) -> Float[Array, '']:
    """Counts what a mean is taken over; call it once on the global batch (or add up its parts').

      token-mean            Σ m
      seq-mean-token-mean   sequences with any m
      seq-mean-token-sum    sequences with any m, times the constant

    Padding rows and episodes outside the update therefore count nowhere: a mean over sequences is over those that
    train. TRL divides by all rows of a batch, masked ones too, and its gradient shrinks with each of them.
    A token that `correction` rejects stays in m.

    Args:
      aggregation: one of settings.LOSS_CHOICES['aggregation'].
      mask_BT: `segments.in_update`.
      segment_ids_BT, num_segments: 0 = padding, 1…N; N static.
      constant: tokens, for seq-mean-token-sum.

    Returns:
      A scalar ≥ 0; `aggregate` gives 0 where it is 0.
    """
    if aggregation == 'token-mean':
        return jnp.sum(mask_BT).astype(jnp.float32)  # summed as integers: exact beyond 2^24 tokens
    sequences = jnp.sum(segments.per_segment(mask_BT, segment_ids_BT, num_segments) > 0).astype(jnp.float32)
    return sequences * constant if aggregation == 'seq-mean-token-sum' else sequences


def numerator(
    loss_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    num_segments: int,
    aggregation: str,
) -> Float[Array, '']:
    """Sums masked losses over tokens; for seq-mean-token-mean each sequence's sum is divided by its Σ m.

    An episode must lie in one part of the batch whole, or its Σ m would be counted short.
    """
    loss_BT = jnp.where(mask_BT, loss_BT, 0.0)
    if aggregation == 'seq-mean-token-mean':
        count_BN = segments.per_segment(mask_BT, segment_ids_BT, num_segments)
        loss_BT = loss_BT / jnp.maximum(segments.per_token(count_BN, segment_ids_BT), 1)
    return jnp.sum(loss_BT)


def aggregate(
    loss_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    num_segments: int,
    aggregation: str,
    denominator: Float[Array, ''],
) -> Float[Array, '']:
    """Divides the numerator of a part of the batch by the denominator of the whole; the parts' results add.

    token-mean is DAPO's and TRL's default for GRPO today; seq-mean-token-mean the GRPO paper's;
    seq-mean-token-sum Dr. GRPO's, as in TRL (verl's seq-mean-token-sum-norm divides by the padded width, so
    its scale depends on the padding).
    """
    total = numerator(loss_BT, mask_BT, segment_ids_BT, num_segments, aggregation)
    return jnp.where(denominator > 0, total / jnp.where(denominator > 0, denominator, 1.0), 0.0)
