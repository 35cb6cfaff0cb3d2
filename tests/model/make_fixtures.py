"""Makes tests/model/fixtures: tiny Qwen2 and Qwen3 checkpoints and the logits of transformers' own models.

    make baselines
    .baselines/torch/bin/python tests/model/make_fixtures.py tests/model/fixtures

Made with torch 2.13.0 and transformers 5.23.0. Needs nothing of this project. The live test runs it
again with other seeds and shapes, and with --read to have transformers load a directory of ours.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import torch
import transformers

LENGTHS = (28, 17, 5)  # right-padded rows
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8}


def cases(scale: int) -> dict[str, transformers.PretrainedConfig]:
    """Head and group shapes, tied and untied, plain rotary embedding and YaRN."""
    def make(kind, heads, kv_heads, head_dim, tied, theta=1e6, yarn=None):
        rope = (yarn or {'rope_type': 'default'}) | {'rope_theta': theta}
        width = heads * head_dim if kind is transformers.Qwen2Config else 16
        return kind(vocab_size=40, hidden_size=width * scale, intermediate_size=24 * scale, num_hidden_layers=2,
                    num_attention_heads=heads * scale, num_key_value_heads=kv_heads * scale, head_dim=head_dim,
                    tie_word_embeddings=tied, max_position_embeddings=32, rope_parameters=rope)
    two, three = transformers.Qwen2Config, transformers.Qwen3Config
    return {
        'qwen2_grouped': make(two, 4, 2, 4, tied=False),
        'qwen2_tied': make(two, 7, 1, 2, tied=True, theta=1e4),
        'qwen2_yarn': make(two, 2, 2, 8, tied=False, theta=1e2, yarn=YARN),
        'qwen3_grouped': make(three, 4, 2, 8, tied=False),
        'qwen3_tied': make(three, 3, 3, 4, tied=True),
        'qwen3_yarn': make(three, 4, 1, 8, tied=True, theta=1e2, yarn=YARN | {'attention_factor': 1.25}),
    }


def golden(model, seed: int) -> dict[str, np.ndarray]:
    """tokens [B, T], lengths [B], f32 logits [B, T, V], zeros at padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    valid = np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64))).logits
    return {'tokens': tokens.astype(np.int32), 'lengths': np.array(LENGTHS, np.int32),
            'logits': np.where(valid[..., None], logits.float().numpy(), 0.0)}


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument('directory', type=pathlib.Path)
    flags.add_argument('--seed', type=int, default=0)
    flags.add_argument('--scale', type=int, default=1, help='multiplies widths and heads')
    flags.add_argument('--read', action='store_true', help='add golden.npz to a directory that is there')
    flags = flags.parse_args()
    torch.set_num_threads(1)
    if flags.read:
        model = transformers.AutoModelForCausalLM.from_pretrained(flags.directory, dtype=torch.float32).eval()
        np.savez_compressed(flags.directory / 'golden.npz', **golden(model, flags.seed))
        return
    for number, (name, config) in enumerate(cases(flags.scale).items()):
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
