"""Sizes of the models that configurations name, from their published config.json files."""

from __future__ import annotations

from retool_jax.core import storage
from retool_jax.core.errors import UserError
from retool_jax.model.config import TINY, ModelConfig, load_config

# hidden, intermediate, layers, heads, KV heads, vocabulary, tied head
_LLAMA = {
    'smollm2_135m': (576, 1536, 30, 9, 3, 49152, True),
    'smollm2_1_7b': (2048, 8192, 24, 32, 32, 49152, True),
    'llama3_1_8b': (4096, 14336, 32, 32, 8, 128256, False),
    'r1_distill_llama_8b': (4096, 14336, 32, 32, 8, 128256, False),
}
_QWEN2 = {
    'qwen2_5_0_5b': (896, 4864, 24, 14, 2, 151936, True),
    'qwen2_5_1_5b': (1536, 8960, 28, 12, 2, 151936, True),
    'qwen2_5_7b': (3584, 18944, 28, 28, 4, 152064, False),
    'qwen2_5_14b': (5120, 13824, 48, 40, 8, 152064, False),
    'qwen2_5_32b': (5120, 27648, 64, 40, 8, 152064, False),
    'r1_distill_qwen_32b': (5120, 27648, 64, 40, 8, 152064, False),
}
_QWEN3 = {
    'qwen3_0_6b': (1024, 3072, 28, 16, 8, 151936, True),
    'qwen3_4b': (2560, 9728, 36, 32, 8, 151936, True),
    'qwen3_8b': (4096, 12288, 36, 32, 8, 151936, False),
    'qwen3_32b': (5120, 25600, 64, 64, 8, 151936, False),
}
_TABLES = {'llama': _LLAMA, 'qwen2': _QWEN2, 'qwen3': _QWEN3}


def sizes(path: str | None, name: str) -> ModelConfig:
    """The model at `path`, or the published one of that name.

    Raises: UserError for a name without published sizes.
    """
    if path is not None:
        return load_config(storage.model_files('model.path', path))
    if name == 'tiny':
        return TINY
    kind = next((kind for kind, table in _TABLES.items() if name in table), None)
    if kind is None:
        known = ', '.join(known for table in _TABLES.values() for known in table)
        raise UserError(
            f'model.name={name!r} has no published sizes here; give model.path, a directory with a '
            f'config.json, or one of {known}'
        )
    hidden, mlp, layers, heads, kv_heads, vocab, tied = _TABLES[kind][name]
    return ModelConfig(
        model_type=kind,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128 if kind == 'qwen3' else hidden // heads,
        tie_word_embeddings=tied,
    )
