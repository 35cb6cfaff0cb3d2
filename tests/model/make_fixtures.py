"""Makes tests/model/fixtures: tiny Llama, Qwen2 and Qwen3 checkpoints and the logits of transformers' own models.

    make baselines
    .baselines/torch/bin/python tests/model/make_fixtures.py tests/model/fixtures
    .baselines/torch/bin/python tests/model/make_fixtures.py tests/model/fixtures/qwen2_grouped --adapt

Made with torch 2.13.0, transformers 5.24.0 and peft 0.21.2. Needs nothing of this project. The live tests run it
again with other seeds, larger shapes (--scale) and random ones (--random), and with --read to have
transformers load a directory of ours, with --adapter peft an adapter of ours beside it.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
import transformers

LENGTHS = (28, 17, 5)  # right-padded rows
PLAIN = {'rope_type': 'default'}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8}
# Of 8 pairs at base 100 two are kept, five slowed by the whole factor, one by a part of it.
LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
KINDS = {'llama': transformers.LlamaConfig, 'qwen2': transformers.Qwen2Config, 'qwen3': transformers.Qwen3Config}


def make(
    kind: type,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tied: bool,
    *,
    theta=1e6,
    rope=PLAIN,
    width=None,
    scale=1,
    **more,
) -> transformers.PretrainedConfig:
    return kind(
        vocab_size=40,
        hidden_size=(width or heads * head_dim) * scale,
        intermediate_size=24 * scale,
        num_hidden_layers=2,
        num_attention_heads=heads * scale,
        num_key_value_heads=kv_heads * scale,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
        rope_parameters=rope | {'rope_theta': theta},
        **more,
    )


def cases(scale: int) -> dict[str, transformers.PretrainedConfig]:
    """Head and group shapes, tied and untied, biases, plain rotary embedding, YaRN and Llama 3's."""
    llama, two, three = (functools.partial(make, kind, scale=scale) for kind in KINDS.values())
    three = functools.partial(three, width=16)
    return {
        'qwen2_grouped': two(4, 2, 4, tied=False),
        'qwen2_tied': two(7, 1, 2, tied=True, theta=1e4),
        'qwen2_yarn': two(2, 2, 8, tied=False, theta=1e2, rope=YARN),
        'qwen3_grouped': three(4, 2, 8, tied=False),
        'qwen3_tied': three(3, 3, 4, tied=True),
        'qwen3_yarn': three(4, 1, 8, tied=True, theta=1e2, rope=YARN | {'attention_factor': 1.25}),
        'qwen3_biased': three(4, 2, 6, tied=False, attention_bias=True),
        'llama_grouped': llama(4, 2, 4, tied=False),
        'llama_one_kv_head': llama(3, 1, 8, tied=True, theta=1e4),
        'llama_own_head_dim': llama(4, 4, 6, tied=False, width=20, theta=5e5),
        'llama_biased': llama(4, 2, 4, tied=False, attention_bias=True, mlp_bias=True),
        'llama_llama3': llama(4, 2, 16, tied=True, theta=1e2, rope=LLAMA3),
        'llama_yarn': llama(2, 2, 8, tied=False, theta=1e2, rope=YARN),
    }


def random_cases(count: int, seed: int) -> dict[str, transformers.PretrainedConfig]:
    """`count` shapes of each family: groups from one query head to all, tied by turns, rotary kinds in turn."""
    rng, found = np.random.default_rng(seed), {}
    for name, kind in KINDS.items():
        for number in range(count):
            kv_heads = int(rng.integers(1, 4))
            heads = int(rng.integers(2, 6)) if number == 0 else kv_heads * int(rng.integers(1, 4))
            found[f'{name}_{number}'] = make(
                kind,
                heads,
                1 if number == 0 else kv_heads,
                2 * int(rng.integers(1, 9)),
                bool(number % 2),
                theta=float(10 ** rng.uniform(2, 6)),
                rope=(PLAIN, LLAMA3, YARN)[number % 3],
                width=heads * int(rng.integers(3, 12)),
            )
    return found


def golden(model, seed: int) -> dict[str, np.ndarray]:
    """tokens [B, T], lengths [B], f32 logits [B, T, V], zeros at padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    valid = np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64))).logits
    return {
        'tokens': tokens.astype(np.int32),
        'lengths': np.array(LENGTHS, np.int32),
        'logits': np.where(valid[..., None], logits.float().numpy(), 0.0),
    }


def adapt(model, directory: Path, seed: int) -> None:
    """What a model with the adapter in a directory says; one that is not there is made, beside every projection."""
    import peft

    if directory.exists():
        model = peft.PeftModel.from_pretrained(model, directory).eval()
    else:
        torch.manual_seed(seed)
        names = [f'{name}_proj' for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')]
        every = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=names, task_type='CAUSAL_LM')
        model = peft.get_peft_model(model, every).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if 'lora_' in name:
                    weight.normal_(0.0, 0.3)  # B too, which peft makes 0
        model.save_pretrained(directory)
        (directory / 'README.md').unlink()
    np.savez_compressed(directory / 'golden.npz', **golden(model, seed))


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument('directory', type=Path)
    flags.add_argument('--seed', type=int, default=0)
    flags.add_argument('--random', type=int, default=0, help='so many random shapes of each family instead')
    flags.add_argument('--scale', type=int, default=1, help='multiplies widths and heads')
    flags.add_argument('--read', action='store_true', help='add golden.npz to a directory that is there')
    flags.add_argument('--adapt', action='store_true', help='add an adapter of peft to a directory that is there')
    flags.add_argument('--adapter', type=Path, help='add golden.npz to an adapter of the directory that is there')
    flags = flags.parse_args()
    torch.set_num_threads(1)
    if flags.read or flags.adapt or flags.adapter:
        model = transformers.AutoModelForCausalLM.from_pretrained(flags.directory, dtype=torch.float32).eval()
        if not flags.read:
            adapt(model, flags.adapter or flags.directory / 'adapter', flags.seed)
            return
        np.savez_compressed(flags.directory / 'golden.npz', **golden(model, flags.seed))
        return
    made = random_cases(flags.random, flags.seed) if flags.random else cases(flags.scale)
    for number, (name, config) in enumerate(made.items()):
        torch.manual_seed(flags.seed + number)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for weight_name, weight in model.named_parameters():
                # Larger than at initialization, so that attention is not nearly uniform; every bias and norm counts.
                weight.normal_(1.0 if 'norm' in weight_name else 0.0, 0.3 if weight.ndim == 2 else 0.2)
        model.save_pretrained(flags.directory / name)
        (flags.directory / name / 'generation_config.json').unlink(missing_ok=True)
        np.savez_compressed(flags.directory / name / 'golden.npz', **golden(model, flags.seed + number))


if __name__ == '__main__':
    main()
