"""What a configuration chooses of the science: two frozen blocks, checked when they are made."""

from __future__ import annotations

import dataclasses

from retool_jax.algo import groups
from retool_jax.core.errors import UserError

ADVANTAGE_KINDS = ('gae', 'reinforce_pp', *groups.KINDS)
LOSS_CHOICES = {
    'kind': ('ppo', 'gspo', 'cispo'),
    'aggregation': ('token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum'),
    'kl_kind': ('k1', 'k2', 'k3'),
    'kl_in': ('loss', 'reward'),
    'correction': ('none', 'token', 'sequence'),
}
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
        if self.kind not in ADVANTAGE_KINDS:
            choices = ', '.join(ADVANTAGE_KINDS)
            raise UserError(f'advantage.kind={self.kind!r} is unknown; choose one of {choices}')
        for name in ('gamma', 'lam'):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f'advantage.{name}={getattr(self, name)} must lie in [0, 1]')
        if self.kind.startswith('reinforce_pp') and not self.whiten:
            raise UserError(
                f'advantage.whiten=False contradicts advantage.kind={self.kind!r}, which always whitens; '
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
    correction: weights for ℓₒ − ℓₛ, truncated at `correction_cap`; `sequence` also rejects episodes whose
      geometric mean lies outside [correction_low, correction_high].
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
        for name, choices in LOSS_CHOICES.items():
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise UserError(f'loss.{name}={value!r} is unknown; choose one of {", ".join(choices)}')
        bounds = {
            'clip_low': (0 <= self.clip_low <= 1, 'must lie in [0, 1]'),
            'clip_high': (self.clip_high >= 0, 'must not be negative'),
            'dual_clip': (self.dual_clip is None or self.dual_clip > 1, 'must exceed 1, or be None'),
            'kl_coef': (self.kl_coef >= 0, 'must not be negative'),
            'value_coef': (self.value_coef >= 0, 'must not be negative'),
            'value_clip': (self.value_clip is None or self.value_clip > 0, 'must be positive, or None'),
            'correction_cap': (self.correction_cap >= 1, 'must be at least 1: equal policies have weight 1'),
            'correction_low': (0 <= self.correction_low <= 1, 'must lie in [0, 1]'),
            'correction_high': (self.correction_high >= 1, 'must be at least 1'),
        }
        for name, (holds, remedy) in bounds.items():
            if not holds:
                raise UserError(f'loss.{name}={getattr(self, name)} {remedy}')
        if self.aggregation == 'seq-mean-token-sum' and not (self.aggregation_constant or 0) > 0:
            raise UserError(
                f'loss.aggregation_constant={self.aggregation_constant} must be positive, since '
                'loss.aggregation=seq-mean-token-sum divides by it; set it to the tokens the policy may write'
            )
        if self.kind == 'gspo' and self.aggregation != 'seq-mean-token-mean':
            raise UserError(
                f'loss.aggregation={self.aggregation!r} would weight the one ratio of a GSPO sequence by its '
                'length; set loss.aggregation=seq-mean-token-mean'
            )

    @property
    def needs_reference(self) -> bool:
        """True where the reference policy's logprobs enter."""
        return self.kl_coef > 0
