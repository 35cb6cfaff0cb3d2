"""`MODEL@CARD` and `MODEL@SLICE`: a model's configuration with what lets it learn there (H throughout).

    python launch/plan.py --config=configs/grpo.py:qwen2_5_7b@1x80gb --topology=h100:1 --tokens=3072
    python launch/ppo.py --config=configs/grpo.py:qwen2_5_7b@1x80gb --config.model.path=runs/sft_qwen2_5_7b/final …
    python launch/plan.py --config=configs/ppo.py:qwen2_5_32b@v5p:4x4x4 --topology=v5p:4x4x4

CARD is a GPU's name, as launch/plan.py knows its figures, or its memory. A recipe is 256 episodes of at most 8,192
tokens a step, 100 steps. SLICE is written as for launch/plan.py, and says how a step is computed; what is learned
stays. SFT and evaluation take from both what they have as well: adapters, mesh, forward pass, sampler, turns.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ml_collections import ConfigDict

# The word after @ → a name of retool_jax/plan/chips.py.
CARDS = {
    '1x24gb': 'rtx4090', '1x40gb': 'a100_40', '1x48gb': 'l40s', '1x80gb': 'h100', '1x141gb': 'h200',
    'rtx4090': 'rtx4090', 'a100_40': 'a100_40', 'l40s': 'l40s', 'h100': 'h100', 'h200': 'h200',
}  # fmt: skip
SHARED = ('lora', 'mesh', 'forward', 'sampler', 'turns')  # blocks of which stages beside RL take their part
TOKENS = 8192
RL = {
    'turns.max_tokens': TOKENS, 'turns.max_turn_tokens': TOKENS, 'sampler.slots': TOKENS,
    'ppo.steps': 100, 'ppo.minibatches': 2,
}  # fmt: skip
GROUPS = {'ppo.problems_per_step': 32, 'ppo.samples': 8}  # of GRPO
# Rates over adapters are ten times those of all weights.
ADAPTERS = {'lora.rank': 32, 'optimizer.lr': 1e-5, 'critic_optimizer.lr': 2e-5}
# Before Hopper cuDNN takes rows of one episode, and they are padded; without it attention is many times slower.
AMPERE = {'forward.attention': 'cudnn', 'forward.row_segments': 1, 'forward.row_width': TOKENS}
RECIPES = {
    ('grpo', 'qwen2_5_1_5b', 'rtx4090'): ADAPTERS | AMPERE | {'sampler.rows': 32},
    ('ppo', 'qwen2_5_1_5b', 'rtx4090'): ADAPTERS | AMPERE | {  # a critic of its own would take more than a day
        'sampler.rows': 32, 'ppo.critic': 'head', 'loss.value_coef': 0.5,
    },
    ('grpo', 'qwen2_5_1_5b', 'a100_40'): ADAPTERS | AMPERE | {'sampler.rows': 64},
    ('ppo', 'qwen2_5_1_5b', 'a100_40'): ADAPTERS | AMPERE | {'sampler.rows': 64},
    ('grpo', 'qwen2_5_1_5b', 'l40s'): ADAPTERS | AMPERE | {'sampler.rows': 64},
    ('ppo', 'qwen2_5_1_5b', 'l40s'): ADAPTERS | AMPERE | {'sampler.rows': 64},
    ('ppo', 'qwen2_5_1_5b', 'h100'): {'sampler.rows': 64},  # all weights, and a critic of its own
    ('grpo', 'qwen2_5_7b', 'h100'): ADAPTERS | {'sampler.rows': 64},
    ('ppo', 'qwen2_5_7b', 'h100'): ADAPTERS | {'sampler.rows': 64},
    ('grpo', 'qwen3_4b', 'h100'): {  # all weights
        'optimizer.kind': 'adafactor', 'forward.gradient_dtype': 'bfloat16', 'sampler.rows': 24,
    },
    ('grpo', 'qwen2_5_7b', 'h200'): ADAPTERS | {'sampler.rows': 128},
    ('ppo', 'qwen2_5_7b', 'h200'): ADAPTERS | {'sampler.rows': 128},
}  # fmt: skip

# What `launch/plan.py --search` found (docs/scaling.md), of PPO with a critic of the policy's size. Rows are those that
# fit beside weights in 16 bits: with sampler.weights=int8 there is room for 45 on v6e, 19 on v5e, 128 on H100.
ENGINE = {'mesh.tensor': 8, 'sampler.feed_rows': 1}
LOCKSTEP = ENGINE | {'sampler.quota': 16}  # of two hosts, all of whose calls are as long: a tool's answer waits for one
SLICES = {
    ('qwen2_5_32b', 'v5p:4x4x4'): LOCKSTEP | {'sampler.rows': 128, 'forward.remat': 'dots', 'ppo.offload': False},
    ('qwen2_5_32b', 'v6e:8x8'): LOCKSTEP | {'sampler.rows': 37, 'forward.remat': 'dots_but_mlp'},
    ('qwen2_5_32b', 'v5e:16x16'): LOCKSTEP | {'sampler.rows': 11, 'forward.remat': 'dots_but_mlp'},
    ('qwen2_5_32b', 'h100:64'): ENGINE | {'sampler.rows': 120, 'forward.remat': 'dots_but_mlp'},
    ('qwen2_5_7b', 'h100:8'): {
        'mesh.tensor': 4,
        'sampler.rows': 256,
        'sampler.feed_rows': 2,
        'forward.remat': 'dots',
    },
}


def fitted(make: Callable[[str], ConfigDict], stage: str, arg: str) -> ConfigDict:
    """The configuration that `make` gives of MODEL, of ARG = MODEL, MODEL@CARD or MODEL@SLICE, with the recipe of the
    card or the sizes of the slice.

    stage: 'ppo' or 'grpo', or a stage that takes its part of either's recipe.
    Raises: ValueError for a card that is unknown, or for one or a slice that has nothing for this model.
    """
    model, at, word = arg.partition('@')
    config = make(model)
    if not at:
        return config
    trains = stage in ('ppo', 'grpo')
    if ':' in word:
        values = _sizes(model, word)
    else:
        values = RL | {'max_tokens': TOKENS} | (GROUPS if stage == 'grpo' else {'ppo.problems_per_step': 256})
        values |= _recipe(stage if trains else '', model, word)
    for key, value in values.items():
        *blocks, name = key.split('.')
        if trains or not blocks or blocks[0] in SHARED:
            _put(config, blocks, name, value)
    if 'lora.rank' in values and not trains and 'optimizer' in config:
        config.optimizer.lr *= 10
    config.run.dir = f'{config.run.dir}_{word.replace(":", "_")}'
    return config


def _put(config: ConfigDict, blocks: list[str], name: str, value: object) -> None:
    """Sets a key where the configuration has it."""
    for block in blocks:
        config = config.get(block, ConfigDict())
    if name in config:
        config[name] = value


def _sizes(model: str, slice: str) -> dict[str, object]:
    """The values of a model on a slice."""
    if (model, slice) in SLICES:
        return SLICES[model, slice]
    known = ['@'.join(key) for key in SLICES]
    near = difflib.get_close_matches(f'{model}@{slice}', known, n=1, cutoff=0)
    raise ValueError(
        f'no sizes for {model} on {slice} (did you mean {near[0]}?); there are {", ".join(known)}; '
        f'launch/plan.py --topology={slice} --search finds others'
    )


def _recipe(algorithm: str, model: str, word: str) -> dict[str, object]:
    """The values of a model on a card; '' takes either algorithm's."""
    if word not in CARDS:
        near = difflib.get_close_matches(word, CARDS, n=1, cutoff=0)
        raise ValueError(f'card {word!r} is unknown (did you mean {near[0]}?); choose one of {", ".join(CARDS)}')
    for (kind, name, card), values in RECIPES.items():
        if (name, card) == (model, CARDS[word]) and algorithm in (kind, ''):
            return values
    words = {name: word for word, name in reversed(CARDS.items())}
    known = [f'{kind}:{name}@{words[card]}' for kind, name, card in RECIPES]
    near = difflib.get_close_matches(f'{algorithm}:{model}@{word}', known, n=1, cutoff=0)
    raise ValueError(f'no recipe for {model} on {word} (did you mean {near[0]}?); there are {", ".join(known)}')
