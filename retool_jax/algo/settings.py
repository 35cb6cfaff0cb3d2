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
    """Which advantage, and its constants."""

    # 'gae' (PPO, with a critic), 'grpo', 'dr_grpo', 'rloo', 'reinforce_pp_baseline' (over the samples of a problem),
    # or 'reinforce_pp'. P: PPO
    kind: str
    gamma: float  # discount per acted token, 0 to 1, of gae and reinforce_pp. P does not say; R 1
    lam: float  # GAE's mixing per acted token, 0 to 1. P does not say; R 1
    whiten: bool  # True: mean 0 and variance 1 over the acted tokens of the global batch, as a last step. R True

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
    """Which policy loss, how it is summed, and what is added to it; r = π/π_old of a token, A its advantage."""

    kind: str  # 'ppo', 'gspo' (one ratio an episode) or 'cispo' (the ratio as a weight). P: PPO
    clip_low: float  # r is clipped to at least 1 − clip_low, 0 to 1. P does not say; R 0.2
    # r is clipped to at most 1 + clip_high, at least 0; DAPO's clip-higher is high > low. P does not say; R 0.28
    clip_high: float
    # c > 1: the loss of a token with A < 0 is at most −A·c; None: no such bound. P does not say; R 10
    dual_clip: float | None
    # 'token-mean' (every acted token equally), 'seq-mean-token-mean' or 'seq-mean-token-sum'. R token-mean
    aggregation: str
    # tokens, above 0, that an episode's sum is divided by in seq-mean-token-sum; None in the others
    aggregation_constant: float | None
    entropy_coef: float  # weight of the entropy, at least 0. R 0
    kl_coef: float  # weight of the KL to the first policy, at least 0; 0 needs no reference weights. P 0
    kl_kind: str  # estimator of that KL: 'k1', 'k2' or 'k3'
    kl_in: str  # where it stands: in the 'loss', or in the 'reward' of each token
    value_coef: float  # weight of the critic's loss, at least 0. R 1
    value_clip: float | None  # how far V may leave V_old, above 0; None: as far as it likes. R 0.5
    # weights exp(ℓₒ − ℓₛ) of trainer over sampler: 'none', by 'token', or by 'sequence' (GSPO's), which also rejects
    # episodes. H token, since the two differ in bf16; R none
    correction: str
    correction_cap: float  # the largest such weight, at least 1. H 2
    # smallest geometric mean exp(mean(ℓₒ − ℓₛ)) of an episode that `sequence` keeps, 0 to 1. H 0.5
    correction_low: float
    correction_high: float  # the largest one, at least 1. H 2

    def __post_init__(self):
        check(self, **{name: one_of(choices) for name, choices in LOSS_CHOICES.items()})
        check(
            self,
            clip_low=within(0, 1),
            clip_high=within(0, LARGE),
            dual_clip=above(1, LARGE),
            aggregation_constant=above(0, LARGE),
            entropy_coef=within(0, LARGE),
            kl_coef=within(0, LARGE),
            value_coef=within(0, LARGE),
            value_clip=above(0, LARGE),
            correction_cap=within(1, LARGE),
            correction_low=within(0, 1),
            correction_high=within(1, LARGE),
        )
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
