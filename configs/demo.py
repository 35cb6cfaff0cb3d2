"""The whole story on one CPU machine: cold start, SFT, RL with and without the interpreter.

    make demo        (python launch/demo.py --config=configs/demo.py)

The same command goes on wherever it was stopped.
Hardware: 2 CPU cores, 6 GiB. Time: about 12 minutes. Expected: see the table in README.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    arg = 'tiny'
    turns = base.turns(arg)
    ppo = base.ppo(arg)
    return ConfigDict(
        {
            'run': base.run(arg, 'demo'),
            'model': base.model(arg),
            'mesh': base.mesh(),
            'forward': base.forward(arg),
            'sampler': base.sampler(arg),
            'turns': turns,
            'train_sampling': base.sampling(training=True),
            'evaluate_sampling': base.sampling(training=True),  # the policy as it is: when it calls is the point
            'sandbox': base.sandbox(arg),
            'feedback': base.feedback(arg),
            'reward': base.reward(),
            'sft_optimizer': base.optimizer(3e-3, schedule='cosine', warmup_steps=20, weight_decay=0.1, b2=0.95),
            'optimizer': base.optimizer(1.5e-4, warmup_steps=2, weight_decay=0.0, b2=0.95),
            'critic_optimizer': base.optimizer(1e-2, warmup_steps=2, weight_decay=0.0, b2=0.95),
            'advantage': base.advantage(),
            'loss': base.loss(),
            'ppo': ppo,
            'mix': base.mix(),
            'recipe': {
                'problems_seen': 12000,
                # Worked steps of hard families are long and beyond such a model: a text-only cold start of nothing
                # else would teach it little of what it can do.
                'text_needy': 0.33,
                'sft_steps': 540,
                'lead_steps': 260,
                'sft_batch_tokens': 2900,
                'problems': 240,  # held out: new operands
                'apart_problems': 60,  # of each of the sets scored apart
                'samples': 8,
            },
        }
    )
