"""Advantages: what each acted token, or each episode of a group, did better than expected.

Axes: B rows, T time, N episodes per row (segments.py), E episodes. `acted` is True on the tokens that
the policy wrote. Everything is computed in float32 over the batch it is given, so give it the global
batch, before it is cut into mini-batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from retool_jax.algo import groups, segments
from retool_jax.algo.settings import AdvantageSettings

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Bool, Float, Int


def reward_on_last_acted(
    reward_BN: Float[Array, 'B N'] | Float[Array, ' B'],
    acted_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T']:
    """Puts each episode's reward on its last acted token, 0 elsewhere.

    The last token of an episode may be the interpreter's; GAE over acted tokens would never see a reward
    there (verl writes it at the last valid token of the response, acted or not).

    Args:
      reward_BN: rewards of the row's episodes, [B, N]; [B] where a row is one episode.
      acted_BT: True where the policy wrote the token.
      segment_ids_BT: 0 = padding, 1…N; None where a row is one episode.

    Returns:
      reward_BT. The reward of an episode without any acted token appears nowhere.
    """
    if segment_ids_BT is None:
        segment_ids_BT = segments.whole_rows(acted_BT)
    reward_BN = reward_BN.reshape(acted_BT.shape[0], -1).astype(jnp.float32)
    last_BN = segments.last_acted(acted_BT, segment_ids_BT, reward_BN.shape[1])
    here_BT = acted_BT & (jnp.arange(acted_BT.shape[1])[None] == segments.per_token(last_BN, segment_ids_BT))
    return jnp.where(here_BT, segments.per_token(reward_BN, segment_ids_BT), 0.0)


def gae(
    reward_BT: Float[Array, 'B T'],
    value_BT: Float[Array, 'B T'],
    acted_BT: Bool[Array, 'B T'],
    gamma: float,
    lam: float,
    segment_ids_BT: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """Estimates advantages by GAE that steps over tokens the policy did not write.

    Right to left, with V⁺ = G = 0 at the end of every episode:
      δ = R_t + γV⁺ − V_t,  a = δ + γλG,  V⁺ ← mV_t + (1−m)V⁺,  G ← ma + (1−m)G,  A_t = mG
    Equal to plain GAE on the sequence with the other tokens deleted, so a long tool output costs no
    discount and bootstraps from no value that was never trained. TRL's PPO steps through every token.

    See "High-Dimensional Continuous Control Using GAE" (https://arxiv.org/abs/1506.02438).

    Args:
      reward_BT: rewards; those on tokens that are not acted are ignored.
      value_BT: V(state before token t), from the critic that is about to be trained.
      acted_BT: True where the policy wrote the token.
      gamma, lam: in [0, 1], per acted token.
      segment_ids_BT: credit never crosses from one id to another; None where a row is one episode.

    Returns:
      advantage_BT and return_BT = A + V (before whitening), both 0 where not acted.
    """
    if segment_ids_BT is None:
        segment_ids_BT = segments.whole_rows(acted_BT)
    # Selected, not multiplied: whatever stands in unacted places, NaN included, stays out.
    reward_BT = jnp.where(acted_BT, reward_BT, 0.0).astype(jnp.float32)
    value_BT = jnp.where(acted_BT, value_BT, 0.0).astype(jnp.float32)

    def step(carry, xs):
        next_value_B, next_advantage_B, next_segment_B = carry
        reward_B, value_B, acted_B, segment_B = xs
        same_B = segment_B == next_segment_B
        next_value_B = jnp.where(same_B, next_value_B, 0.0)
        next_advantage_B = jnp.where(same_B, next_advantage_B, 0.0)
        delta_B = reward_B + gamma * next_value_B - value_B
        next_advantage_B = jnp.where(acted_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = jnp.where(acted_B, value_B, next_value_B)
        return (next_value_B, next_advantage_B, segment_B), jnp.where(acted_B, next_advantage_B, 0.0)

    xs = jax.tree.map(jnp.transpose, (reward_BT, value_BT, acted_BT, segment_ids_BT))
    zeros_B = jnp.zeros_like(reward_BT[:, 0])
    _, advantage_TB = jax.lax.scan(step, (zeros_B, zeros_B, segment_ids_BT[:, -1]), xs, reverse=True)
    advantage_BT = advantage_TB.T
    return advantage_BT, advantage_BT + value_BT


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of the numbers under a mask (scalars)."""

    count: jax.Array
    mean: jax.Array
    deviation: jax.Array


def moments(x: Float[Array, '*shape'], mask: Bool[Array, '*shape']) -> Moments:
    """Measures the numbers under a mask, in two passes about one of them.

    Shifting by the smallest first makes equal numbers give a deviation of exactly 0: (x−μ)/√1e-8 would
    blow a rounding error of 6e-8 in μ up to 6e-4.
    """
    x = jnp.where(mask, x, 0.0).astype(jnp.float32)
    count = jnp.sum(mask).astype(jnp.float32)
    origin = jnp.where(count > 0, jnp.min(jnp.where(mask, x, jnp.inf)), 0.0)
    shifted = jnp.where(mask, x - origin, 0.0)
    mean = jnp.sum(shifted) / jnp.maximum(count, 1.0)
    return Moments(count, origin + mean, jnp.sum(jnp.where(mask, shifted - mean, 0.0) ** 2))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Joins the moments of two disjoint parts, for batches kept in arrays of several lengths.

    See "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (Chan et al., 1979).
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    gap = b.mean - a.mean
    return Moments(count, a.mean + gap * share, a.deviation + b.deviation + gap**2 * a.count * share)


def whiten(x_BT: Float[Array, 'B T'], mask_BT: Bool[Array, 'B T'], over: Moments | None = None) -> Float[Array, 'B T']:
    """Shifts and scales to mean 0 and variance 1 over a mask: (x − μ)/√(σ² + 1e-8), σ² unbiased.

    verl's masked_whiten, except that a mask of one element gives 0 here and an error there. TRL's uses the
    same constant.

    Args:
      x_BT, mask_BT: numbers and where they count.
      over: moments of the global batch where x_BT is only a part of it.

    Returns:
      The whitened numbers, 0 outside the mask; all 0 where the numbers are equal or only one.
    """
    over = moments(x_BT, mask_BT) if over is None else over
    variance = over.deviation / jnp.maximum(over.count - 1.0, 1.0)
    spread = (over.deviation > 0).astype(jnp.float32)
    return jnp.where(mask_BT, spread * (x_BT - over.mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def explained_variance(
    value_BT: Float[Array, 'B T'], return_BT: Float[Array, 'B T'], mask_BT: Bool[Array, 'B T']
) -> Float[Array, '']:
    """Measures how much of the returns the critic foresaw: 1 − Var(G − V)/Var(G), 0 where all G are equal."""
    missed, whole = moments(return_BT - value_BT, mask_BT), moments(return_BT, mask_BT)
    # Equal returns leave rounding behind, which is no spread.
    spread = whole.deviation > 1e-6 * (whole.deviation + jnp.square(whole.mean) * mask_BT.sum())
    return jnp.where(spread, 1.0 - missed.deviation / jnp.where(spread, whole.deviation, 1.0), 0.0)


def advantages(
    settings: AdvantageSettings,
    reward_BT: Float[Array, 'B T'],
    acted_BT: Bool[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    *,
    baseline_BN: Bool[Array, 'B N'],
    update_BN: Bool[Array, 'B N'],
    value_BT: Float[Array, 'B T'] | None = None,
    group_BN: Int[Array, 'B N'] | None = None,
    num_groups: int | None = None,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """Computes the advantages that the settings name, for a whole global batch.

    Args:
      settings: which, and with what constants.
      reward_BT: rewards per token (`reward_on_last_acted`, less the KL penalty where it is in the reward).
        Group kinds sum it over the acted tokens of an episode, so there the penalty moves the baseline too.
      acted_BT, segment_ids_BT: as everywhere; a row without packing has N = 1 and `segments.whole_rows`.
      baseline_BN: episodes that count in their group's baseline (`groups.episode_masks`).
      update_BN: episodes that are trained on; whitening measures their acted tokens.
      value_BT: needed where settings.needs_values.
      group_BN, num_groups: the problem of every episode and their number (static); needed where
        settings.needs_groups.

    Returns:
      advantage_BT, 0 outside the update. return_BT, the critic's target: A + V before whitening for gae,
      the discounted reward-to-go otherwise.

    Raises:
      ValueError: the kind needs values or groups, and none are given.
    """
    num_segments = update_BN.shape[1]
    mask_BT = segments.in_update(acted_BT, update_BN, segment_ids_BT)
    if settings.needs_values:
        if value_BT is None:
            raise ValueError('advantage.kind=gae needs value_BT; score the batch with the critic')
        advantage_BT, return_BT = gae(reward_BT, value_BT, acted_BT, settings.gamma, settings.lam, segment_ids_BT)
    else:  # reward-to-go is GAE without a critic
        no_value_BT = jnp.zeros_like(reward_BT)
        advantage_BT, return_BT = gae(reward_BT, no_value_BT, acted_BT, settings.gamma, 1.0, segment_ids_BT)
    if settings.needs_groups:
        if group_BN is None or num_groups is None:
            raise ValueError(f'advantage.kind={settings.kind!r} needs group_BN and num_groups')
        reward_BN = segments.per_segment(jnp.where(acted_BT, reward_BT, 0.0), segment_ids_BT, num_segments)
        advantage_E = groups.group_advantages(
            settings.kind, reward_BN.ravel(), group_BN.ravel(), baseline_BN.ravel(), num_groups
        )
        advantage_BT = segments.per_token(advantage_E.reshape(reward_BN.shape), segment_ids_BT)
    advantage_BT = jnp.where(mask_BT, advantage_BT, 0.0)
    return (whiten(advantage_BT, mask_BT) if settings.whiten else advantage_BT), return_BT
