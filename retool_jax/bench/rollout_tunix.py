"""google-tunix's own sampler at the sizes of bench/rollout.py, in its environment: `python rollout_tunix.py DIR SLOTS`.

Reads one JSON object per line – rows, prompt, new – and answers each with the seconds of one call; the first line
is its version. The same weights, T = 1 with log-probabilities. Nothing of this package is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
import time
from pathlib import Path


class Numbers:
    """A tokenizer whose texts are ids in decimal."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return ' '.join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def main(directory: str, slots: int) -> None:
    import jax
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params

    raw = json.loads((Path(directory) / 'config.json').read_text())
    config = qwen2.ModelConfig(
        num_layers=raw['num_hidden_layers'],
        vocab_size=raw['vocab_size'],
        embed_dim=raw['hidden_size'],
        hidden_dim=raw['intermediate_size'],
        num_heads=raw['num_attention_heads'],
        head_dim=raw['head_dim'],
        num_kv_heads=raw['num_key_value_heads'],
        rope_theta=int(raw['rope_theta']),
        norm_eps=raw['rms_norm_eps'],
        use_tied_embedding=raw['tie_word_embeddings'],
    )
    mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = params.create_model_from_safe_tensors(directory, config, mesh)
        sampler = Sampler(model, Numbers(), CacheConfig(slots, config.num_layers, config.num_kv_heads, config.head_dim))
        print(json.dumps({'version': importlib.metadata.version('google-tunix')}), flush=True)
        rng = random.Random(0)
        for line in sys.stdin:
            asked = json.loads(line)
            texts = [
                ' '.join(str(rng.randrange(2, config.vocab_size)) for _ in range(asked['prompt']))
                for _ in range(asked['rows'])
            ]
            began = time.perf_counter()
            # No id ends a row, as in the other samplers.
            out = sampler(
                texts,
                max_generation_steps=asked['new'],
                max_prompt_length=asked['prompt'],
                eos_tokens=[config.vocab_size],
                temperature=1.0,
                top_p=1.0,
                return_logprobs=True,
            )
            seconds = time.perf_counter() - began
            print(json.dumps({'seconds': seconds, 'tokens': sum(len(t) for t in out.tokens)}), flush=True)


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
