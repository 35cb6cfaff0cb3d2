"""What a configuration chooses of the science: two frozen blocks, checked when they are made."""

from __future__ import annotations

import dataclasses

from retool_jax.algo import groups
from retool_jax.core.checks import above, check, one_of, within
from retool_jax.core.errors import UserError

ADVANTAGE_KINDS = ('gae', 'reinforce_pp', *groups.KINDS)
LOSS_CHOICES = {
    'kind': ('ppo', 'gspo', 'cispo'),
    'aggregation': ('token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum'),
    'kl_kind': ('k1', 'k2', 'k3'),
    'kl_in': ('loss', 'reward'),
    'correction': ('none', 'token', 'sequence'),
}
LARGE = 1e9  # a coefficient or a clip beyond it is a slip of the hand
LOG_RATIO_LIMIT = 20.0  # e^20 is far beyond any clip, and far below the overflow of float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """Which advantage, and its constants.

    gamma, lam: discount and GAE mixing, per acted token (gamma serves gae and reinforce_pp, lam gae).
    whiten: mean 0 and variance 1 over the acted tokens of the global batch, as a last step.
    """

    kind: str
    gamma: float
    lam: float
    whiten: bool

    def __post_init__(self):
        check(self, kind=one_of(ADVANTAGE_KINDS), gamma=within(0, 1), lam=within(0, 1))
        if self.kind.startswith('reinforce_pp') and not self.whiten:
            raise UserError(
                f'whiten=False contradicts advantage.kind={self.kind!r}, which always whitens; '
                'set advantage.whiten=True, or advantage.kind=dr_grpo for an unwhitened group baseline'
            )

    @property
    def needs_values(self) -> bool:
        """True where a critic's values enter."""
        return self.kind == 'gae'

    @property
    def needs_groups(self) -> bool:
        """True where an episode is compared with the other samples of its problem."""
        return self.kind in groups.KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Which policy loss, how it is summed, and what is added to it.

    clip_low, clip_high: r is clipped to [1 − low, 1 + high]; DAPO's clip-higher is high > low.
    dual_clip: c > 1, the bound −A·c where A < 0; None turns it off.
    aggregation_constant: tokens that a sequence's sum is divided by (seq-mean-token-sum), else None.
    entropy_coef, kl_coef: weights; the KL penalty stands in the loss or in the reward (`kl_in`).
    value_coef: weight of the critic's loss. value_clip: how far V may leave V_old, None turns it off.
    correction: weights for ℓₒ − ℓₛ, truncated at `correction_cap`; `sequence`, which GSPO takes, also rejects
      episodes whose geometric mean exp(mean(ℓₒ − ℓₛ)) lies outside [correction_low, correction_high].
    """

    kind: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    aggregation: str
    aggregation_constant: float | None
    entropy_coef: float
    kl_coef: float
    kl_kind: str
    kl_in: str
    value_coef: float
    value_clip: float | None
    correction: str
    correction_cap: float
    correction_low: float
    correction_high: float

    def __post_init__(self):
        check(self, **{name: one_of(choices) for name, choices in LOSS_CHOICES.items()})
        check(self, clip_low=within(0, 1), clip_high=within(0, LARGE), dual_clip=above(1, LARGE),
              aggregation_constant=above(0, LARGE), entropy_coef=within(0, LARGE), kl_coef=within(0, LARGE),
              value_coef=within(0, LARGE), value_clip=above(0, LARGE), correction_cap=within(1, LARGE),
              correction_low=within(0, 1), correction_high=within(1, LARGE))
        if self.aggregation == 'seq-mean-token-sum' and self.aggregation_constant is None:
            raise UserError(
                f'aggregation_constant={self.aggregation_constant} must be positive, since '
                'loss.aggregation=seq-mean-token-sum divides by it; set it to the tokens the policy may write'
            )
        if self.kind == 'gspo' and self.aggregation != 'seq-mean-token-mean':
            raise UserError(
                f'aggregation={self.aggregation!r} would weight the one ratio of a GSPO sequence by its '
                'length; set loss.aggregation=seq-mean-token-mean'
            )

    @property
    def needs_reference(self) -> bool:
        """True where the reference policy's logprobs enter."""
        return self.kl_coef > 0
