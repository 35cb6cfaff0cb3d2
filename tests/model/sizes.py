"""Small models for the tests of this room."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core.pytrees import Params
from retool_jax.model import decoder
from retool_jax.model.config import ModelConfig


def make_config(model_type: str = 'qwen2', **changes) -> ModelConfig:
    """Four query heads, two KV heads, a head size that is not width / heads."""
    sizes = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=10000.0,
        max_position_embeddings=256,
    )
    return ModelConfig(model_type=model_type, **(sizes | changes))


def make_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random weights without the zeros and ones of initialization, so that a bias or a norm left out shows."""
    rng = np.random.default_rng(seed)
    centred = {'o_proj', 'gate_proj', 'up_proj', 'down_proj'}  # biases of mean 1 here would drown what tokens say

    def make(path, leaf):
        mean = 0.0 if len(leaf.shape) >= 3 or centred & {key.key for key in path} else 1.0
        return jnp.asarray(rng.normal(mean, 0.15, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(make, decoder.abstract_params(config))


def make_tokens(config: ModelConfig, rows: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, width)).astype(np.int32)
