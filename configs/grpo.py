"""GRPO (arXiv 2402.03300): no critic, each episode compared with the others of its problem.

    python launch/ppo.py --config=configs/grpo.py:tiny --config.model.path=runs/sft_tiny/final

Variants by value: Dr. GRPO (2503.20783) is advantage.kind=dr_grpo, loss.aggregation=seq-mean-token-sum,
loss.aggregation_constant=16384; RLOO (2402.14740) is advantage.kind=rloo; GSPO (2507.18071) is loss.kind=gspo,
loss.clip_low=3e-4, loss.clip_high=4e-4, loss.dual_clip=None, loss.correction=sequence: weights of single tokens would
tear the one ratio of a sequence apart again.

Hardware: as configs/ppo.py, less a critic. Scores: R's 60 % mean@30 on AIME 2025 (32B, 150 steps from its own cold
start at 24 %) is of its values, --config.loss.aggregation=token-mean --config.loss.clip_high=0.28
--config.loss.correction=none; with the published GRPO's, below, nobody has published one.
"""

from ml_collections import ConfigDict

from configs import base, cards


def get_config(arg: str = 'tiny') -> ConfigDict:
    return cards.fitted(make, 'grpo', arg)


def make(arg: str) -> ConfigDict:
    config = base.reinforcement(arg, 'grpo')
    tiny = base.is_tiny(arg)
    config.advantage.kind = 'grpo'
    config.advantage.whiten = False  # the group's own deviation is all the scaling there is
    config.loss.aggregation = 'seq-mean-token-mean'  # as published; 'token-mean' is DAPO's
    config.loss.clip_high = 0.2  # one ε, as published
    config.loss.kl_coef = 0.0  # P: 0, and R; 0.04 as published
    config.ppo.critic = 'none'
    config.ppo.critic_warmup_steps = 0
    config.ppo.problems_per_step = 32 if tiny else 512  # R
    config.ppo.samples = 8 if tiny else 16  # R; 64 as published
    config.ppo.minibatches = 2 if tiny else 8  # R: 64 problems an update; 1 as published
    return config
