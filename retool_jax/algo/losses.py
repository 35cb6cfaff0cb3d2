"""Losses of the policy and the critic, per token, and how they are summed over a global batch.

Notation: ℓ current logprob, ℓₒ old (before the update), ℓₛ the sampler's, ℓᵣ the reference's, all at the
sampling temperature; A advantage; r = exp(clamp(ℓ − ℓₒ, ±20)); m the mask of `segments.in_update`. Only ℓ
(and the critic's V, the entropy) carries gradient. What stands in unmasked places, NaN included, changes
neither a loss nor a gradient.

Summing is aggregation.py's: `actor_loss` and `critic_loss` take the denominator of the global mini-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from retool_jax.algo import segments
from retool_jax.algo.aggregation import aggregate, denominator, numerator
from retool_jax.algo.correction import correction
from retool_jax.algo.settings import LOG_RATIO_LIMIT, LossSettings
from retool_jax.algo.tallies import Mean, Tallies, max_over, mean_over

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Bool, Float, Int


def _difference(a_BT, b_BT, mask_BT):
    # Selecting before exp keeps NaN and overflow of unmasked places out of the gradient, too.
    return jnp.where(mask_BT, a_BT.astype(jnp.float32) - b_BT.astype(jnp.float32), 0.0)


def _bounded(log_ratio_BT):
    return jnp.clip(log_ratio_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(
    settings: LossSettings,
    logprob_BT: Float[Array, 'B T'],
    old_logprob_BT: Float[Array, 'B T'],
    advantage_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    num_segments: int,
) -> tuple[Float[Array, 'B T'], Tallies]:
    """Computes the policy loss of every token, not yet summed.

      ppo    L₁ = max(−A·r, −A·clip(r, 1−ε_lo, 1+ε_hi)); where A < 0: min(L₁, −A·c)
      gspo   the same with s = exp(Σ m(ℓ−ℓₒ)/Σ m) of the sequence in the place of r
      cispo  −sg(clip(r))·A·ℓ: no token loses its gradient

    verl's gspo writes sg(s)·π/sg(π), with the same gradient where A is constant over a sequence, and has no
    dual clip; here it applies where it is set. TRL's cispo clips above only and counts from 0: clip_low = 1
    and clip_high = its epsilon_high − 1 say the same. TRL does not bound ℓ − ℓₒ; verl does, as here: beyond ±20 a
    ratio has no gradient. GSPO's one ratio stays one only under loss.correction=sequence or none (`correction`).

    See PPO https://arxiv.org/abs/1707.06347, dual clip https://arxiv.org/abs/1912.09729, clip-higher
    https://arxiv.org/abs/2503.14476, GSPO https://arxiv.org/abs/2507.18071, CISPO
    https://arxiv.org/abs/2506.13585.

    Args:
      settings: kind, clip_low, clip_high, dual_clip are read.
      logprob_BT, old_logprob_BT: ℓ, ℓₒ of the token at each place (not of the next).
      advantage_BT: A.
      mask_BT: `segments.in_update`.
      segment_ids_BT, num_segments: 0 = padding, 1…N; N static.

    Returns:
      loss_BT (unmasked places hold 0), and tallies: actor/pg_clipfrac (tokens whose clipped side counts),
      actor/pg_clipfrac_dual, actor/ppo_kl (k1, ℓₒ − ℓ), actor/ratio_max (of the ratio that is clipped).
    """
    advantage_BT = jnp.where(mask_BT, jax.lax.stop_gradient(advantage_BT), 0.0)
    old_logprob_BT = jax.lax.stop_gradient(old_logprob_BT)
    log_ratio_BT = _difference(logprob_BT, old_logprob_BT, mask_BT)
    tallies: Tallies = {'actor/ppo_kl': mean_over(-_bounded(log_ratio_BT), mask_BT)}
    if settings.kind == 'gspo':
        log_ratio_BT = segments.sequence_mean(log_ratio_BT, mask_BT, segment_ids_BT, num_segments)
    ratio_BT = jnp.exp(_bounded(log_ratio_BT))
    clipped_BT = jnp.clip(ratio_BT, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    dual_BT = jnp.zeros_like(mask_BT)
    if settings.kind == 'cispo':
        moved_BT = clipped_BT != ratio_BT
        loss_BT = -jax.lax.stop_gradient(clipped_BT) * advantage_BT * jnp.where(mask_BT, logprob_BT, 0.0)
    else:
        free_BT, bound_BT = -advantage_BT * ratio_BT, -advantage_BT * clipped_BT
        moved_BT = bound_BT > free_BT
        loss_BT = jnp.maximum(free_BT, bound_BT)
        if settings.dual_clip is not None:
            ceiling_BT = -advantage_BT * settings.dual_clip
            dual_BT = (advantage_BT < 0) & (loss_BT > ceiling_BT)
            loss_BT = jnp.where(dual_BT, ceiling_BT, loss_BT)
    tallies['actor/pg_clipfrac'] = mean_over(moved_BT, mask_BT)
    tallies['actor/pg_clipfrac_dual'] = mean_over(dual_BT, mask_BT)
    tallies['actor/ratio_max'] = max_over(ratio_BT, mask_BT)
    return loss_BT, jax.lax.stop_gradient(tallies)


def kl(
    kind: str,
    logprob_BT: Float[Array, 'B T'],
    other_logprob_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
) -> Float[Array, 'B T']:
    """Estimates KL(current ‖ other) at each sampled token from d = ℓ − ℓᵣ, clamped to ±20.

      k1 = d;  k2 = d²/2;  k3 = e^(−d) + d − 1

    As a loss, on tokens of the current policy, only k2 has the gradient of KL(current ‖ other) on average;
    k1's is 0, k3's that of KL(other ‖ current). verl has the three (and clamps k3 again, to ±10), TRL's GRPO
    always k3, unbounded. Of k1 and k2 verl bounds nothing.

    See http://joschu.net/blog/kl-approx.html.

    Returns:
      kl_BT, 0 outside the mask.
    """
    d_BT = _bounded(_difference(logprob_BT, other_logprob_BT, mask_BT))
    if kind == 'k1':
        return d_BT
    return d_BT**2 / 2 if kind == 'k2' else jnp.expm1(-d_BT) + d_BT


def reward_less_kl(
    settings: LossSettings,
    reward_BT: Float[Array, 'B T'],
    old_logprob_BT: Float[Array, 'B T'],
    reference_logprob_BT: Float[Array, 'B T'],
    acted_BT: Bool[Array, 'B T'],
) -> Float[Array, 'B T']:
    """Takes the KL penalty off the rewards of acted tokens, R − β·KL(old ‖ reference), if it goes there."""
    if settings.kl_in != 'reward' or not settings.needs_reference:
        return reward_BT
    return reward_BT - settings.kl_coef * kl(settings.kl_kind, old_logprob_BT, reference_logprob_BT, acted_BT)


def actor_loss(
    settings: LossSettings,
    *,
    logprob_BT: Float[Array, 'B T'],
    entropy_BT: Float[Array, 'B T'],
    old_logprob_BT: Float[Array, 'B T'],
    sampler_logprob_BT: Float[Array, 'B T'],
    advantage_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    num_segments: int,
    denominator: Float[Array, ''],
    reference_logprob_BT: Float[Array, 'B T'] | None = None,
) -> tuple[Float[Array, ''], Tallies]:
    """Sums what the policy is trained on: w·L − entropy_coef·H + kl_coef·KL, each by the one aggregation.

    Args:
      denominator: of the *global* mini-batch, by `denominator(settings.aggregation, …)`.
      reference_logprob_BT: needed where settings.needs_reference.
      others: as in `policy_loss` and `correction`.

    Returns:
      A scalar that adds up over the parts of the mini-batch, and tallies: those of `policy_loss` and
      `correction`, actor/pg_loss, actor/entropy, and actor/kl where there is a reference (token means,
      but pg_loss in the aggregation's own mean).

    Raises:
      ValueError: settings.needs_reference, and there are no logprobs of one.
    """
    layout = (mask_BT, segment_ids_BT, num_segments)
    loss_BT, tallies = policy_loss(settings, logprob_BT, old_logprob_BT, advantage_BT, *layout)
    weight_BT, mismatch = correction(settings, old_logprob_BT, sampler_logprob_BT, *layout)
    loss_BT = weight_BT * loss_BT
    total_BT = loss_BT
    tallies |= mismatch
    tallies['actor/pg_loss'] = _mean_as_aggregated(settings, loss_BT, *layout)
    tallies['actor/entropy'] = mean_over(entropy_BT, mask_BT)
    if settings.entropy_coef:
        total_BT = total_BT - settings.entropy_coef * jnp.where(mask_BT, entropy_BT, 0.0)
    if settings.needs_reference:
        if reference_logprob_BT is None:
            raise ValueError(f'loss.kl_coef={settings.kl_coef} needs reference_logprob_BT; or set it to 0')
        kl_BT = kl(settings.kl_kind, logprob_BT, jax.lax.stop_gradient(reference_logprob_BT), mask_BT)
        tallies['actor/kl'] = mean_over(kl_BT, mask_BT)
        if settings.kl_in == 'loss':
            total_BT = total_BT + settings.kl_coef * kl_BT
    loss = aggregate(total_BT, *layout, settings.aggregation, denominator)
    return loss, jax.lax.stop_gradient(tallies)


def value_loss(
    value_BT: Float[Array, 'B T'],
    old_value_BT: Float[Array, 'B T'],
    return_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    clip: float | None,
) -> tuple[Float[Array, 'B T'], Tallies]:
    """Computes the critic's loss per token: ½·max((V−G)², (clip(V, V_old ± c)−G)²), or ½(V−G)² without c.

    verl's form, ½ included; TRL's PPO has it too and weights it 0.1.

    See PPO https://arxiv.org/abs/1707.06347 and its first code for the clip.

    Args:
      value_BT: V, with gradient; V_t is the value of the state before token t.
      old_value_BT: V_old, before the update. return_BT: G = A + V_old before whitening.
      mask_BT: `segments.in_update`. clip: c or None.

    Returns:
      loss_BT, 0 outside the mask; critic/vf_clipfrac and critic/value_mean.
    """
    return_BT, old_value_BT = jax.lax.stop_gradient((return_BT, old_value_BT))
    value_BT = jnp.where(mask_BT, value_BT.astype(jnp.float32), 0.0)
    return_BT = jnp.where(mask_BT, return_BT, 0.0)
    old_value_BT = jnp.where(mask_BT, old_value_BT, 0.0)
    free_BT = (value_BT - return_BT) ** 2
    bound_BT = free_BT
    if clip is not None:
        bound_BT = (jnp.clip(value_BT, old_value_BT - clip, old_value_BT + clip) - return_BT) ** 2
    tallies = {
        'critic/vf_clipfrac': mean_over(bound_BT > free_BT, mask_BT),
        'critic/value_mean': mean_over(value_BT, mask_BT),
    }
    return 0.5 * jnp.maximum(free_BT, bound_BT), jax.lax.stop_gradient(tallies)


def critic_loss(
    settings: LossSettings,
    *,
    value_BT: Float[Array, 'B T'],
    old_value_BT: Float[Array, 'B T'],
    return_BT: Float[Array, 'B T'],
    mask_BT: Bool[Array, 'B T'],
    denominator: Float[Array, ''],
) -> tuple[Float[Array, ''], Tallies]:
    """Sums what the critic is trained on: value_coef · the mean of `value_loss` over tokens.

    Args:
      denominator: of the *global* mini-batch, by `denominator('token-mean', …)` whatever the policy's is.
      others: as in `value_loss`.

    Returns:
      A scalar that adds up over the parts of the mini-batch; the tallies of `value_loss`, and critic/vf_loss
      (before value_coef).
    """
    loss_BT, tallies = value_loss(value_BT, old_value_BT, return_BT, mask_BT, settings.value_clip)
    tallies['critic/vf_loss'] = jax.lax.stop_gradient(mean_over(loss_BT, mask_BT))
    row = segments.whole_rows(mask_BT)  # a mean over tokens asks for no segments
    return settings.value_coef * aggregate(loss_BT, mask_BT, row, 1, 'token-mean', denominator), tallies


def _mean_as_aggregated(settings, loss_BT, mask_BT, segment_ids_BT, num_segments) -> Mean:
    layout = (mask_BT, segment_ids_BT, num_segments)
    return Mean(
        numerator(loss_BT, *layout, settings.aggregation),
        denominator(settings.aggregation, *layout, settings.aggregation_constant),
    )
