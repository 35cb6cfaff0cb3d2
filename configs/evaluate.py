"""Scores a model on a problem file: avg@k, pass@k, maj@k.

    python launch/evaluate.py --config=configs/evaluate.py:tiny --config.problems=aime24.jsonl
    python launch/evaluate.py --config=configs/evaluate.py:qwen2_5_32b --config.problems=aime24.jsonl \
        --config.model.path=Qwen2.5-32B-Instruct
    python launch/evaluate.py --config=configs/evaluate.py:official --config.problems=aime24.jsonl \
        --config.model.path=ReTool-Qwen-32B --config.model.instruction=prompt.txt
    python launch/evaluate.py --config=configs/evaluate.py:qwen2_5_32b --config.problems=aime24.jsonl \
        --config.model.path=Qwen2.5-32B-Instruct --config.backend=endpoint \
        --config.endpoint.url=http://localhost:8000/v1 --config.endpoint.model=Qwen2.5-32B-Instruct

The last one scores a model that a server holds (vLLM, SGLang, llama.cpp) by the same rules, sandbox and judge.
`official` (of Qwen2.5-32B; official_SIZE of another size) scores what the authors scored: 16,384 tokens for every
segment between two tool outputs, up to the model's context in all, as many calls as it likes, their feedback. Their
prompt is given as a file, their lenient rule is the row of that name; ours, by the box alone, stands above it.

Hardware: tiny, 2 CPU cores, a minute or two; 32B, 8 × 80 GiB or a v5p host. The same command goes on where it was
stopped. Expected: tiny, random weights: 0. The paper's 67.0 % on AIME 2024 and 49.3 % on AIME 2025 (32B, 400 steps,
P) are `official`'s lenient avg@32; of the other budgets nobody has published a score.
"""

from ml_collections import ConfigDict, config_dict

from configs import base, cards

OFFICIAL = 'official'


def get_config(arg: str = 'tiny') -> ConfigDict:
    return cards.fitted(make, 'evaluate', arg)


def make(arg: str) -> ConfigDict:
    name, official = arg, arg == OFFICIAL or arg.startswith(f'{OFFICIAL}_')
    if official:
        arg = arg.removeprefix(OFFICIAL).removeprefix('_') or 'qwen2_5_32b'
    tiny = base.is_tiny(arg)
    config = ConfigDict(
        {
            'run': base.run(name, 'evaluate'),
            'problems': config_dict.placeholder(str),  # .jsonl, .json, .parquet, .array_record or a folder of them
            'limit': config_dict.placeholder(int),  # the first problems only
            'samples': 8 if tiny else 32,  # per problem; P: 32
            'backend': 'engine',  # 'endpoint': a model behind a server
            'endpoint': base.endpoint(),
            'model': base.model(arg),
            'mesh': base.mesh(arg),
            'sampler': base.sampler(arg),
            'turns': base.turns(arg),
            'sampling': base.sampling(training=False),
            'sandbox': base.sandbox(arg),
            'feedback': base.feedback(arg),
            'reward': base.reward(),
        }
    )
    if tiny:  # real problems are longer than the demo's, and a few longer than this: they count as LENGTH
        config.sampler.slots = config.turns.max_tokens = 1024
        config.sampler.min_bound = 256
    if official:
        set_official(config, tiny)
    return config


def set_official(config: ConfigDict, tiny: bool) -> None:
    """The authors' evaluation code (O) in the place of this project's budgets."""
    config.turns.max_turn_tokens = 1024 if tiny else 16384  # O: of every call of their engine
    config.turns.max_tokens = config.sampler.slots = 2048 if tiny else 32768  # the context of Qwen2.5
    config.turns.max_turns = config.turns.max_calls = config.turns.max_tokens  # O: no cap, and none of these is reached
    config.turns.on_answer = 'eos'  # O stops at </code> and at the end of the text alone
    config.sampler.rows //= 2  # of twice the slots
    config.feedback.style, config.feedback.max_chars = 'official', 400  # O: over 400 characters, both ends of 200
