"""Text traces rewritten into traces that compute: the first half of the paper's cold start (ReTool §2.2).

    python launch/rewrite.py --config=configs/rewrite.py:tiny --config.model.path=runs/sft_tiny/final
    python launch/rewrite.py --config=configs/rewrite.py:smollm2_135m --config.model.path=SmolLM2-135M-Instruct \
        --config.traces=gsm8k_train.jsonl
    python launch/rewrite.py --config=configs/rewrite.py:qwen2_5_32b --config.model.path=Qwen2.5-32B-Instruct \
        --config.traces=OpenThoughts.parquet --config.rewriter.kind=endpoint \
        --config.endpoint.url=http://localhost:8000/v1 --config.endpoint.model=Qwen/Qwen2.5-32B-Instruct
    python launch/rewrite.py --config=configs/rewrite.py:qwen2_5_7b --config.model.path=Qwen2.5-7B-Instruct \
        --config.traces=problems.jsonl --config.rewriter.kind=self --config.rewriter.rounds=2

Hardware: 'calculator' and 'endpoint' a CPU, of the model they need the tokenizer alone; 'self' what PPO's rollout
needs, and SFT's between rounds. Next: launch/sft.py with the episodes/ of the run's folder, or launch/cold_start.py
with its kept.jsonl.
"""

from ml_collections import ConfigDict, config_dict

from configs import base, cards


def get_config(arg: str = 'tiny') -> ConfigDict:
    return cards.fitted(make, 'rewrite', arg)


def make(arg: str) -> ConfigDict:
    tiny = base.is_tiny(arg)
    return ConfigDict(
        {
            'run': base.run(arg, 'rewrite'),
            'traces': config_dict.placeholder(str),  # tiny: none, the embedded task's problems
            'golds': config_dict.placeholder(str),
            'problems': 512 if tiny else 100_000,
            'rewriter': {
                'kind': 'self' if tiny else 'calculator',
                'candidates': 4,
                'temperature': 0.7,
                'max_tokens': 16384,
                'finish': True,
                'judge': False,
                # tiny: it knows no other words that lead to a call.
                'hint': '<code>\n' if tiny else 'Maybe I should compute this with Python.',
                'places': ('think', 'wait', 'answer'),
                'mattered': True,
                'rounds': 1,
            },
            'endpoint': base.endpoint(),
            'filters': {
                'per_problem': config_dict.placeholder(int),
                'pass_rate_low': config_dict.placeholder(float),
                'pass_rate_high': config_dict.placeholder(float),
                'short_lines': 2,
                'short_share': config_dict.placeholder(float),
                'min_tokens': config_dict.placeholder(int),
            },
            'max_tokens': base.turns(arg).max_tokens,
            'model': base.model(arg),
            'lora': base.lora(),
            'mesh': base.mesh(arg),
            'sampler': base.sampler(arg),
            'turns': base.turns(arg),
            'sampling': base.sampling(training=True),
            'forward': base.forward(arg),
            # Between rounds: launch/sft.py's, shorter where a round keeps few traces.
            'optimizer': (
                base.optimizer(1e-3, schedule='cosine', warmup_steps=5, weight_decay=0.1, b2=0.95)
                if tiny
                else base.optimizer(1e-5, schedule='cosine', warmup_steps=12, b2=0.95)
            ),
            'sft': {
                'steps': 60 if tiny else 125,
                'epochs': 0 if tiny else 2,
                'batch_tokens': 2900 if tiny else 131072,
                'evaluation_share': 0.0,
            },
            'sandbox': base.sandbox(arg),
            'feedback': base.feedback(arg),
            'reward': base.reward(),
        }
    )
