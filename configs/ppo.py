"""Reinforcement learning from outcomes, with the interpreter or (model.tools=False) without.

    python launch/ppo.py --config=configs/ppo.py:tiny --config.model.path=runs/sft_tiny/final
    python launch/ppo.py --config=configs/ppo.py:qwen2_5_32b --config.model.path=runs/sft_qwen2_5_32b/final \
        --config.data.sources="('dapo-math-17k.parquet',)" --config.validation.problems=aime24.jsonl

Hardware: tiny, 2 CPU cores, minutes; 32B, a v5p-128 slice or 64 × 80 GiB (launch/plan.py proves it first).
Expected: 32B, 400 steps: 67 % avg@32 on AIME 2024 (P); text-only RL 40 % after 1,080.
"""

from ml_collections import ConfigDict, config_dict

from configs import base


def get_config(arg: str = 'tiny') -> ConfigDict:
    tiny = base.is_tiny(arg)
    return ConfigDict({
        'run': base.run(arg, 'ppo'),
        'data': base.data(),
        'model': base.model(arg),
        'mesh': base.mesh(),
        'forward': base.forward(arg),
        'sampler': base.sampler(arg),
        'turns': base.turns(arg),
        'train_sampling': base.sampling(training=True),
        'evaluate_sampling': base.sampling(training=False),
        'sandbox': base.sandbox(arg),
        'feedback': base.feedback(arg),
        'reward': base.reward(),
        'optimizer': base.optimizer(3e-4 if tiny else 1e-6),  # 1e-6: P
        'critic_optimizer': base.optimizer(1e-3 if tiny else 2e-6),  # 2e-6: R
        'advantage': base.advantage(),
        'loss': base.loss(),
        'ppo': base.ppo(arg),
        'checkpoints': base.checkpoints(every=10),
        'validation': {
            'problems': config_dict.placeholder(str),  # a problem file; none: no validation
            'limit': config_dict.placeholder(int),
            'every': 10,  # steps
            'samples': 8 if tiny else 32,  # P: 32
        },
    })
