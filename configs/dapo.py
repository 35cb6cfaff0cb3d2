"""DAPO (arXiv 2503.14476): GRPO with clip-higher, dynamic sampling, a mean over tokens and overlong shaping.

    python launch/ppo.py --config=configs/dapo.py:tiny --config.model.path=runs/sft_tiny/final

Groups whose samples are all right or all wrong are replaced by the next problems of the stream, in its order.
Hardware: as configs/ppo.py, less a critic; up to ppo.dynamic_rounds times the rollouts. Scores: DAPO's 50 % avg@32 on
AIME 2024 is of Qwen2.5-32B (base) with --config.model.tools=False, 20,480 tokens of answer behind a prompt of 2,048
(turns.max_tokens, sampler.slots and forward.row_width 22528, turns.max_turn_tokens 20480) and
--config.loss.correction=none; with ReTool's tools and 16,384 tokens, as here, nobody has published one.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = 'tiny') -> ConfigDict:
    config = base.reinforcement(arg, 'dapo')
    tiny = base.is_tiny(arg)
    config.advantage.kind = 'grpo'
    config.advantage.whiten = False
    config.loss.aggregation = 'token-mean'  # its §3.3
    config.loss.clip_low, config.loss.clip_high = 0.2, 0.28  # its §3.1
    config.loss.kl_coef = 0.0  # its §2.3
    config.ppo.critic = 'none'
    config.ppo.critic_warmup_steps = 0
    config.ppo.problems_per_step = 32 if tiny else 512  # its §4.1
    config.ppo.samples = 8 if tiny else 16  # its §4.1
    config.ppo.minibatches = 2 if tiny else 16  # its §4.1: 16 updates a step
    if not tiny:
        config.optimizer.warmup_steps = 20 * 16  # its §4.1: 20 rollout steps; its script: 10 updates
        config.optimizer.weight_decay = 0.1  # its script
    config.ppo.dynamic_rounds = 3  # H; its §3.2 samples until the batch is full, its script at most 30 such rounds
    config.ppo.overlong_buffer = 20 if tiny else 4096  # its §4.1
    return config
