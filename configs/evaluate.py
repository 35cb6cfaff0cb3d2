"""Scores a model on a problem file: avg@k, pass@k, maj@k.

    python launch/evaluate.py --config=configs/evaluate.py:tiny --config.problems=aime24.jsonl
    python launch/evaluate.py --config=configs/evaluate.py:qwen2_5_32b --config.problems=aime24.jsonl \
        --config.model.path=Qwen2.5-32B-Instruct

Hardware: tiny, 2 CPU cores, a minute or two; 32B, 8 × 80 GiB or a v5p host. The same command goes on
where it was stopped. Expected: tiny, random weights: 0; 32B after RL: about 67 % avg@32 on AIME 2024 (P).
"""

from ml_collections import ConfigDict, config_dict

from configs import base


def get_config(arg: str = 'tiny') -> ConfigDict:
    tiny = base.is_tiny(arg)
    config = ConfigDict({
        'run': base.run(arg, 'evaluate'),
        'problems': config_dict.placeholder(str),  # .jsonl, .json, .parquet, .array_record or a folder of them
        'limit': config_dict.placeholder(int),  # the first problems only
        'samples': 8 if tiny else 32,  # per problem; P: 32
        'model': base.model(arg),
        'mesh': base.mesh(arg),
        'sampler': base.sampler(arg),
        'turns': base.turns(arg),
        'sampling': base.sampling(training=False),
        'sandbox': base.sandbox(arg),
        'feedback': base.feedback(arg),
        'reward': base.reward(),
    })
    if tiny:  # real problems are longer than the demo's, and a few longer than this: they count as LENGTH
        config.sampler.slots = config.turns.max_tokens = 1024
        config.sampler.min_bound = 256
    return config
