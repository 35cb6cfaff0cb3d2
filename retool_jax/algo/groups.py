"""Groups: the samples of one problem, their common baseline, and what of a batch is trained on.

Axes: E episodes, P problems (one group each). Rewards are per episode here, tokens come later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Bool, Float, Int

KINDS = ('grpo', 'dr_grpo', 'rloo', 'reinforce_pp_baseline')


class _Groups(NamedTuple):
    """What a group of valid episodes has in common, seen from each of its members [E]."""

    count_E: jax.Array
    centred_E: jax.Array  # R − mean, exactly 0 where the group's rewards are equal
    deviation_E: jax.Array  # Σ (R − mean)²


def _groups(reward_E: jax.Array, group_E: jax.Array, valid_E: jax.Array, num_groups: int) -> _Groups:
    # The same shift by the smallest member as in `moments`, and for the same reason: GRPO divides by
    # a deviation that may be nothing but rounding (three rewards of 0.1 would give advantages of 7e-3).
    member_EP = valid_E[:, None] & (group_E[:, None] == jnp.arange(num_groups)[None])

    def total(x_E):
        return jnp.sum(jnp.where(member_EP, x_E[:, None], 0.0), axis=0)

    def back(x_P):
        return jnp.sum(jnp.where(member_EP, x_P[None], 0.0), axis=1)

    reward_E = jnp.where(valid_E, reward_E, 0.0).astype(jnp.float32)
    count_P = jnp.sum(member_EP, axis=0).astype(jnp.float32)
    lowest_P = jnp.min(jnp.where(member_EP, reward_E[:, None], jnp.inf), axis=0)
    shifted_E = jnp.where(valid_E, reward_E - back(jnp.where(count_P > 0, lowest_P, 0.0)), 0.0)
    centred_E = shifted_E - back(total(shifted_E) / jnp.maximum(count_P, 1.0))
    return _Groups(back(count_P), centred_E, back(total(centred_E**2)))


def group_advantages(
    kind: str,
    reward_E: Float[Array, ' E'],
    group_E: Int[Array, ' E'],
    valid_E: Bool[Array, ' E'],
    num_groups: int,
) -> Float[Array, ' E']:
    """Compares an episode's reward with those of the other samples of its problem.

      grpo                                 (R − mean)/(std + 1e-6), std unbiased
      dr_grpo, reinforce_pp_baseline       R − mean (the latter is whitened per token afterwards)
      rloo                                 n/(n−1)·(R − mean) = R − mean of the others
    A group of one has no one to be compared with: R. A group of equal rewards: exactly 0.

    TRL's GRPO adds 1e-4 to the deviation where this adds 1e-6 (as verl does); verl's gives a group of one
    R/(1 + 1e-6).

    See GRPO https://arxiv.org/abs/2402.03300, Dr. GRPO https://arxiv.org/abs/2503.20783, RLOO
    https://arxiv.org/abs/2402.14740, REINFORCE++ https://arxiv.org/abs/2501.03262.

    Args:
      kind: one of KINDS.
      reward_E: one number per episode of the global batch.
      group_E: problem of the episode, 0…num_groups−1, in any order.
      valid_E: False for episodes that leave the baseline (void ones, empty places); n counts the others.
      num_groups: static.

    Returns:
      advantage_E, 0 where not valid.

    Raises:
      ValueError: the kind is none of KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f'advantage.kind={kind!r} compares no groups; choose one of {", ".join(KINDS)}')
    count_E, centred_E, deviation_E = _groups(reward_E, group_E, valid_E, num_groups)
    others_E = jnp.maximum(count_E - 1.0, 1.0)
    if kind == 'grpo':
        advantage_E = centred_E / (jnp.sqrt(deviation_E / others_E) + 1e-6)
    elif kind == 'rloo':
        advantage_E = centred_E * count_E / others_E
    else:
        advantage_E = centred_E
    advantage_E = jnp.where(count_E == 1, reward_E, advantage_E)
    return jnp.where(valid_E, advantage_E, 0.0)


def episode_masks(
    void: Bool[Array, '*shape'],
    truncated: Bool[Array, '*shape'],
    present: Bool[Array, '*shape'],
    *,
    drop_void: bool,
    mask_truncated: bool,
) -> tuple[Bool[Array, '*shape'], Bool[Array, '*shape']]:
    """Decides which episodes count in the group baseline and which are trained on.

    A void episode leaves both; a truncated one (stopped by a budget) leaves the update only: that its
    problem is hard within the budget is still news for the others. TRL's mask_truncated_completions and
    DAPO's overlong filtering do the same to truncated ones.

    See SimpleTIR https://arxiv.org/abs/2509.02479 and DAPO https://arxiv.org/abs/2503.14476.

    Args:
      void, truncated, present: one flag per episode, any shape; absent places count nowhere.
      drop_void, mask_truncated: the config's switches.

    Returns:
      (baseline, update).
    """
    baseline = present & ~void if drop_void else present
    return baseline, (baseline & ~truncated if mask_truncated else baseline)


def overlong_penalty(acted_count: Int[Array, '*shape'], acted_budget: int, buffer: int) -> Float[Array, '*shape']:
    """Penalises the last stretch before the budget, softly.

      0 for L ≤ L_max − L_c;  −(L − (L_max − L_c))/L_c beyond;  never below −1

    See DAPO https://arxiv.org/abs/2503.14476, eq. 13. L counts acted tokens, where DAPO (without tools)
    and verl count the whole response. What tools print leaves the policy less: it comes off L_max, or an episode
    that they fill would reach its end unpenalised.

    Args:
      acted_count: L, tokens that the policy wrote.
      acted_budget: L_max, how many it may write: the budget less the prompt and the tools' tokens.
      buffer: L_c; 0 turns the penalty off.

    Raises:
      ValueError: the buffer does not lie in [0, acted_budget].
    """
    if not 0 <= buffer <= acted_budget:
        raise ValueError(f'overlong buffer {buffer} must lie in [0, {acted_budget}], the acted budget')
    over = (jnp.asarray(acted_count) - (acted_budget - buffer)).astype(jnp.float32)
    return -jnp.clip(over / buffer, 0.0, 1.0) if buffer else jnp.zeros_like(over)


def unequal_groups(reward_E: np.ndarray, group_E: np.ndarray, valid_E: np.ndarray, num_groups: int) -> np.ndarray:
    """Finds the groups that dynamic sampling keeps: those whose valid rewards differ.

    A host function (numpy in and out), since it decides what is sampled next. A group with fewer than two
    valid episodes has nothing that differs. Give it correctness, 0 or 1, as DAPO's own filter reads accuracy: the
    overlong penalty, or a style of reward that lifts wrong answers by their calls, would make groups differ that
    are wrong throughout.

    See DAPO https://arxiv.org/abs/2503.14476, eq. 11.

    Returns:
      bool [num_groups].
    """
    reward_E, group_E, valid_E = np.asarray(reward_E), np.asarray(group_E), np.asarray(valid_E, bool)
    low, high = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(low, group_E[valid_E], reward_E[valid_E])
    np.maximum.at(high, group_E[valid_E], reward_E[valid_E])
    return high > low
