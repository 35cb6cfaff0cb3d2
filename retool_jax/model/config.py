"""What a checkpoint's config.json says, as one frozen record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from retool_jax.core import pointers
from retool_jax.core.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')  # of activations
WEIGHTS = ('float', 'int8')  # of the sampling layout: in a dtype, or matrices in 8 bits (model/int8.py)
ARCHITECTURES = {'LlamaForCausalLM': 'llama', 'Qwen2ForCausalLM': 'qwen2', 'Qwen3ForCausalLM': 'qwen3'}
CONTEXTS = {'llama': 2048, 'qwen2': 32768, 'qwen3': 32768}  # transformers' max_position_embeddings where none is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071) as Hugging Face's `rope_scaling` states it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's context extension as Hugging Face's `rope_scaling` states it.

    Pairs that turn fewer than `low_freq_factor` times in the original context are slowed by `factor`, those that turn
    more than `high_freq_factor` times are kept.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a dense decoder of the Llama, Qwen2 or Qwen3 family; field names are Hugging Face's."""

    model_type: str  # 'llama', 'qwen2' (biased q, k, v) or 'qwen3' (normalised q, k)
    vocab_size: int  # padded width of the logits, not the tokenizer's size
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: YarnScaling | Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    attention_bias: bool = False  # llama, qwen3: of q, k, v and o; qwen2's q, k, v have theirs without this
    mlp_bias: bool = False  # llama

    @property
    def context(self) -> int:
        """Positions that the weights were trained on, or that YaRN stretches them to, which is seldom written into
        `max_position_embeddings` (Llama 3's stretch always is)."""
        scaling = self.rope_scaling
        stretched = (
            int(scaling.factor * scaling.original_max_position_embeddings) if isinstance(scaling, YarnScaling) else 0
        )
        return max(self.max_position_embeddings, stretched)

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == 'qwen2'

    @property
    def qk_norm(self) -> bool:
        return self.model_type == 'qwen3'

    def parameter_count(self) -> int:
        """Number of weights, a tied head counted once."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        n, k = self.num_attention_heads, self.num_key_value_heads
        layer = 2 * d + d * h * (2 * n + 2 * k) + 3 * d * f
        layer += h * (n + 2 * k) if self.qkv_bias else 0
        layer += (d if self.attention_bias else 0) + (2 * f + d if self.mlp_bias else 0)
        layer += 2 * h if self.qk_norm else 0
        return self.num_hidden_layers * layer + d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)


def from_hf(raw: dict, where: str = 'config.json') -> ModelConfig:
    """Reads a Hugging Face config dict. Raises: UserError naming what is not supported."""
    by_type = {kind: name for name, kind in ARCHITECTURES.items()}
    names = raw.get('architectures') or [by_type.get(raw.get('model_type', ''), raw.get('model_type', 'none'))]
    if names[0] not in ARCHITECTURES:
        raise UserError(f'{where}: architecture {names[0]} is not supported; supported are {", ".join(ARCHITECTURES)}')
    if raw.get('hidden_act', 'silu') != 'silu':
        raise UserError(f'{where}: hidden_act {raw["hidden_act"]} is not supported; these models use silu')
    if raw.get('use_sliding_window'):
        raise UserError(f'{where}: use_sliding_window is true; only full attention is supported')
    if others := set(raw.get('layer_types') or ()) - {'full_attention'}:
        raise UserError(f'{where}: layer_types holds {min(others)}; only full_attention is supported')
    missing = [
        key
        for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
        if key not in raw
    ]
    if missing:
        raise UserError(f'{where}: field {missing[0]} is missing')
    kind = ARCHITECTURES[names[0]]
    for key, fixed in {'attention_bias': {'qwen2': True}, 'mlp_bias': {'qwen2': False, 'qwen3': False}}.items():
        if kind in fixed and raw.get(key, fixed[kind]) != fixed[kind]:
            raise UserError(f'{where}: {key} {raw[key]} is not supported for {names[0]}')
    heads = raw['num_attention_heads']
    width = 128 if kind == 'qwen3' else raw['hidden_size'] // heads  # the original's defaults
    rope = _rope(raw, where)
    return ModelConfig(
        model_type=kind,
        vocab_size=raw['vocab_size'],
        hidden_size=raw['hidden_size'],
        intermediate_size=raw['intermediate_size'],
        num_hidden_layers=raw['num_hidden_layers'],
        num_attention_heads=heads,
        num_key_value_heads=raw.get('num_key_value_heads') or heads,
        head_dim=raw.get('head_dim') or width,
        rms_norm_eps=raw.get('rms_norm_eps', 1e-6),
        rope_theta=float(rope.get('rope_theta') or raw.get('rope_theta') or 10000.0),
        rope_scaling=_scaling(rope, raw, where),
        tie_word_embeddings=bool(raw.get('tie_word_embeddings', False)),
        max_position_embeddings=raw.get('max_position_embeddings', CONTEXTS[kind]),
        initializer_range=raw.get('initializer_range', 0.02),
        attention_bias=kind != 'qwen2' and bool(raw.get('attention_bias')),
        mlp_bias=bool(raw.get('mlp_bias')),
    )


def _rope(raw: dict, where: str) -> dict:
    """The rotary block as transformers chooses it: `rope_scaling`, else `rope_parameters`; what it says of the base
    frequency goes before the field beside it. Both may be written once for each kind of layer."""
    name = 'rope_scaling' if raw.get('rope_scaling') else 'rope_parameters'
    block = raw.get(name) or {}
    if isinstance(block, dict) and isinstance(block.get('full_attention'), dict):
        block = block['full_attention']
    if not isinstance(block, dict):
        raise UserError(f'{where}: {name}={block!r} is not supported; give a record such as {{"rope_type": "default"}}')
    return block


def _scaling(scaling: dict, raw: dict, where: str) -> YarnScaling | Llama3Scaling | None:
    kind = scaling.get('rope_type') or scaling.get('type') or 'default'
    scaling = {'partial_rotary_factor': raw.get('partial_rotary_factor') or 1.0} | scaling
    plain = {'partial_rotary_factor': 1.0, 'truncate': True, 'mscale': None, 'mscale_all_dim': None}
    for key, value in plain.items():
        if scaling.get(key, value) != value:
            raise UserError(f'{where}: rope_scaling {key}={scaling[key]} is not supported')
    if kind == 'default':
        return None
    if kind not in ('llama3', 'yarn'):
        raise UserError(f'{where}: rope_scaling type {kind} is not supported; supported are default, llama3, yarn')
    longest = raw.get('max_position_embeddings', 32768)
    original = scaling.get('original_max_position_embeddings') or longest
    if kind == 'llama3':
        return _llama3(scaling, int(original), where)
    return YarnScaling(
        factor=float(scaling.get('factor') or longest / original),
        original_max_position_embeddings=int(original),
        beta_fast=float(scaling.get('beta_fast') or 32),
        beta_slow=float(scaling.get('beta_slow') or 1),
        attention_factor=scaling.get('attention_factor'),
    )


def _llama3(scaling: dict, original: int, where: str) -> Llama3Scaling:
    factors = {name: scaling.get(name) or 0.0 for name in ('factor', 'low_freq_factor', 'high_freq_factor')}
    for name, value in factors.items():
        if not value > 0:
            raise UserError(f'{where}: rope_scaling {name}={value}; type llama3 needs a positive number')
    if factors['low_freq_factor'] >= factors['high_freq_factor']:
        raise UserError(
            f'{where}: rope_scaling low_freq_factor={factors["low_freq_factor"]} is not below '
            f'high_freq_factor={factors["high_freq_factor"]}'
        )
    return Llama3Scaling(**factors, original_max_position_embeddings=original)


def to_hf(config: ModelConfig) -> dict:
    """The config.json that transformers loads."""
    raw = dataclasses.asdict(config)
    if config.model_type == 'qwen2':  # has no such field: its biases are fixed
        del raw['attention_bias']
    kind = {v: k for k, v in ARCHITECTURES.items()}[config.model_type]
    scaling = raw.pop('rope_scaling')
    name = {type(None): 'default', YarnScaling: 'yarn', Llama3Scaling: 'llama3'}[type(config.rope_scaling)]
    rope = {'rope_type': name} | (scaling or {})
    return raw | {
        'architectures': [kind],
        'hidden_act': 'silu',
        'torch_dtype': 'float32',
        'rope_parameters': rope | {'rope_theta': config.rope_theta},
        'rope_scaling': None if scaling is None else rope,
        'use_sliding_window': False,
    }


def load_config(directory: str | Path) -> ModelConfig:
    """Reads `directory/config.json`. Raises: UserError where there is none, or `from_hf` cannot read it."""
    path = Path(directory) / 'config.json'
    if not path.is_file():
        raise UserError(f'model.path: {directory} holds no config.json; give a Hugging Face model directory')
    pointers.refuse(path)
    try:
        raw = json.loads(path.read_text())
    except ValueError:
        raise UserError(f'model.path: {path} is no JSON; download it again') from None
    if not isinstance(raw, dict):
        raise UserError(f'model.path: {path} holds no object with fields; download it again')
    return from_hf(raw, str(path))


TINY = ModelConfig(
    model_type='qwen2',
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)
