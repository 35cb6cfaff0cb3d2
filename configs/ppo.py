"""Reinforcement learning from outcomes, with the interpreter or (model.tools=False) without: ReTool's PPO.

    python launch/ppo.py --config=configs/ppo.py:tiny --config.model.path=runs/sft_tiny/final
    python launch/ppo.py --config=configs/ppo.py:qwen2_5_32b --config.model.path=runs/sft_qwen2_5_32b/final \
        --config.data.sources="('dapo-math-17k.parquet',)" --config.validation.problems=aime24.jsonl

The algorithm is a choice of values; configs/grpo.py and configs/dapo.py are two others:
    advantage.kind    gae (with ppo.critic=head or backbone), grpo, dr_grpo, rloo, reinforce_pp,
                      reinforce_pp_baseline (all with ppo.critic=none and ppo.samples above 1)
    loss.kind         ppo (loss.clip_low, clip_high, dual_clip), gspo, cispo
    loss.aggregation  token-mean, seq-mean-token-mean, seq-mean-token-sum
    loss.kl_coef      against the first policy, loss.kl_kind k1, k2, k3, in loss.kl_in loss or reward
    loss.correction   sampler against trainer: none, token, sequence
    reward.style      paper (±1), verl (shaped)
    ppo.drop_void, ppo.mask_truncated, ppo.overlong_buffer, ppo.dynamic_rounds, ppo.quanta (partial rollouts)
One half alone: halves.train=False keeps episodes without training, halves.episodes=runs/NAME/episodes trains
on kept ones. --dry_run takes one step on fake tools, writes nothing and prints the memory.

Hardware: tiny, 2 CPU cores, minutes; 32B, a v5p-128 slice or 64 × 80 GiB (launch/plan.py proves it first).
Scores: the paper's 67.0 % avg@32 on AIME 2024 (400 steps; text-only RL 40.0 % after 1,080) are of a run of which the
values marked P in configs/base.py are known, under configs/evaluate.py:official; the others are R's or ours, and with
them nobody has published a score. R's own PPO is --config.ppo.minibatches=4 --config.loss.correction=none, 250 steps
from its GRPO model of 150 (configs/grpo.py): 55 % mean@30 on AIME 2025.
"""

from ml_collections import ConfigDict

from configs import base, cards


def get_config(arg: str = 'tiny') -> ConfigDict:
    return cards.fitted(lambda model: base.reinforcement(model, 'ppo'), 'ppo', arg)
