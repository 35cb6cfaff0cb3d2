"""The parts of a block: weights declared once with shape, words of their axes, initializer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retool_jax.core.pytrees import Int8Weight, Params
from retool_jax.core.sharding import constrain, gather
from retool_jax.model import int8
from retool_jax.model.config import Llama3Scaling, ModelConfig, YarnScaling

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Float, Int

PROJECTIONS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')  # of a block
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q_BTNH times H^-½, k_BTKH, v_BTKH → BTNH


def declare(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float = 0.0, mean: float = 0.0
) -> nnx.Param:
    """A f32 weight N(mean, scale²) whose dimensions carry the words `axes` (core.sharding.LOGICAL)."""
    value = jnp.full(shape, mean, jnp.float32)
    if scale:
        value += scale * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · w, computed in f32 as the original does (bf16 squares lose the mean)."""

    def __init__(self, size: int, axis: str, eps: float, rngs: nnx.Rngs):
        self.weight = declare(rngs, (size,), (axis,), mean=1.0)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
    """A linear map; `weight` has the input axes first, whatever their number. LoRA puts a narrow one beside it."""

    def __init__(self, inputs: dict[str, int], outputs: dict[str, int], *, bias: bool, scale: float, rngs: nnx.Rngs):
        shape = (*inputs.values(), *outputs.values())
        self.weight = declare(rngs, shape, (*inputs, *outputs), scale)
        self.bias = declare(rngs, tuple(outputs.values()), tuple(outputs)) if bias else nnx.data(None)
        self.lora_A = self.lora_B = nnx.data(None)
        self.axes, self.contracted = (*inputs, *outputs), len(inputs)

    def adapt(self, rank: int, rngs: nnx.Rngs) -> None:
        """x·W becomes x·W + (x·A)·B (LoRA, arXiv 2106.09685 §4.1), with peft's first weights: B is 0, and A has the
        variance of its uniform distribution, 1 ÷ 3 inputs."""
        named = list(zip(self.axes, self.weight.shape, strict=True))
        inputs, outputs, narrow = dict(named[: self.contracted]), dict(named[self.contracted :]), {'rank': rank}
        deviation = (3 * math.prod(inputs.values())) ** -0.5
        self.lora_A = Projection(inputs, narrow, bias=False, scale=deviation, rngs=rngs)
        self.lora_B = Projection(narrow, outputs, bias=False, scale=0.0, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight.get_value()
        if isinstance(weight, Int8Weight):
            y = int8.multiply(x, weight, x.dtype)
        else:
            dims = (tuple(range(x.ndim - self.contracted, x.ndim)), tuple(range(self.contracted)))
            y = jax.lax.dot_general(x, gather(weight, x.dtype, *self.axes), (dims, ((), ())))
        if self.lora_A is not None:
            y = y + self.lora_B(self.lora_A(x))
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return checkpoint_name(y, self.axes[self.contracted])  # the name is for forward.remat, which keeps some


class Attention(nnx.Module):
    """Grouped-query attention. The caller passes the function that attends, so that one module serves the full
    forward pass and the KV cache."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, n, k, h = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        scale = config.initializer_range
        q_out, kv_out = {'heads': n, 'head_dim': h}, {'kv_heads': k, 'head_dim': h}
        bias = config.qkv_bias
        self.q_proj = Projection({'embed': d}, q_out, bias=bias, scale=scale, rngs=rngs)
        self.k_proj = Projection({'embed': d}, kv_out, bias=bias, scale=scale, rngs=rngs)
        self.v_proj = Projection({'embed': d}, kv_out, bias=bias, scale=scale, rngs=rngs)
        self.o_proj = Projection(
            {'heads': n, 'head_dim': h}, {'embed': d}, bias=config.attention_bias, scale=scale, rngs=rngs
        )
        norm = lambda: RMSNorm(h, 'head_dim', config.rms_norm_eps, rngs) if config.qk_norm else nnx.data(None)
        self.q_norm, self.k_norm = norm(), norm()

    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = constrain(rotate(q_BTNH, rope, q_BTNH.shape[-1] ** -0.5), 'batch', None, 'heads', None)
        return self.o_proj(attend(q_BTNH, rotate(k_BTKH, rope), v_BTKH))


class MLP(nnx.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f = {'embed': config.hidden_size}, {'mlp': config.intermediate_size}
        scale, bias = config.initializer_range, config.mlp_bias
        self.gate_proj = Projection(d, f, bias=bias, scale=scale, rngs=rngs)
        self.up_proj = Projection(d, f, bias=bias, scale=scale, rngs=rngs)
        self.down_proj = Projection(f, d, bias=bias, scale=scale, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        return self.down_proj(constrain(hidden_BTF, 'batch', None, 'mlp'))


class Block(nnx.Module):
    """One pre-norm decoder layer.

    On a training mesh the residual is split over the row's length, what the matmuls read is not: each
    device has all positions for its heads and its part of the MLP. (Left to itself the partitioner gathers
    every weight instead: at 32B and 18,432 tokens that is five times the bytes.)
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, 'embed', config.rms_norm_eps, rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, 'embed', config.rms_norm_eps, rngs)
        self.mlp = MLP(config, rngs)

    def adapt(self, rank: int, targets: Collection[str], rngs: nnx.Rngs) -> None:
        """Puts an adapter beside each of the projections `targets`."""
        for part in (self.self_attn, self.mlp):
            for name in PROJECTIONS:
                if name in targets and hasattr(part, name):
                    getattr(part, name).adapt(rank, rngs)

    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        whole = lambda x_BTD: constrain(x_BTD, 'batch', None, None)
        split = lambda x_BTD: constrain(x_BTD, 'batch', 'seq', None)
        x_BTD = x_BTD + split(self.self_attn(whole(self.input_layernorm(x_BTD)), rope, attend))
        return x_BTD + split(self.mlp(whole(self.post_attention_layernorm(x_BTD))))


def merge(params: Params) -> Params:
    """Parameters of a layer, or of one of its modules, with their adapters added up: W + A·B, in f32, in W's place."""
    merged = {name: merge(node) if isinstance(node, dict) else node for name, node in params.items()}
    if 'lora_A' not in merged:
        return merged
    a, b = (merged.pop(name)['weight'] for name in ('lora_A', 'lora_B'))
    # An accelerator multiplies f32 in fewer bits unless it is told otherwise.
    product = jnp.tensordot(a, b, axes=1, precision='highest')
    return merged | {'weight': merged['weight'].astype(jnp.float32) + product}


def change_matrices(layer: Params, change: Callable[[Any, int], Any]) -> Params:
    """A layer with change(matrix, number of its input axes) in the place of each projection's matrix."""
    changed = {name: change_matrices(node, change) if isinstance(node, dict) else node for name, node in layer.items()}
    for name in PROJECTIONS:
        if name in changed:
            inputs = 2 if name == 'o_proj' else 1  # heads × head_dim
            changed[name] |= {'weight': change(changed[name]['weight'], inputs)}
    return changed


def rope_table(
    config: ModelConfig,
    positions_BT: Int[Array, 'B T'],
) -> tuple[Float[Array, 'B T half'], Float[Array, 'B T half']]:
    """cos and sin of the rotary angles, f32 [B, T, H/2] (bf16 angles are wrong beyond a few hundred tokens)."""
    inv_freq, scale = inverse_frequencies(config)
    angle = positions_BT[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each rotary pair, f32 [H/2], and the factor on cos and sin.

    Both are made on the host and rounded as the original rounds them: at position 32,768 one unit in the
    last place is 0.002 rad, and an accelerator's power function is off by more.
    """
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    period = (config.rope_theta**exponent).astype(np.float32)
    match config.rope_scaling:
        case None:
            return 1 / period, 1.0
        case Llama3Scaling() as scaling:
            return _slow(scaling, 1 / period), 1.0
        case YarnScaling() as scaling:
            return _stretch(config, scaling, period)


def _slow(scaling: Llama3Scaling, inv_freq: np.ndarray) -> np.ndarray:
    """Llama 3.1: pairs that turn seldom in the original context are slowed by `factor`, those that turn often are kept;
    a ramp over the number of turns lies between."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / inv_freq)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * inv_freq / scaling.factor + kept * inv_freq).astype(np.float32)


def _stretch(config: ModelConfig, yarn: YarnScaling, period: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): low frequencies are stretched, high ones kept, a ramp between."""
    half = config.head_dim // 2

    def turns(rotations: float) -> float:  # the dimension that makes so many rotations in the original context
        context = yarn.original_max_position_embeddings
        return config.head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(turns(yarn.beta_fast)), 0)
    high = min(math.ceil(turns(yarn.beta_slow)), config.head_dim - 1)
    width = high - low or 0.001
    kept = 1 - np.clip((np.arange(half, dtype=np.float32) - low) / np.float32(width), 0, 1)
    scale = yarn.attention_factor
    if scale is None:
        scale = 1.0 if yarn.factor <= 1 else 0.1 * math.log(yarn.factor) + 1.0
    return 1 / (np.float32(yarn.factor) * period) * (1 - kept) + 1 / period * kept, scale


def rotate(
    x_BTNH: Float[Array, 'B T N H'], rope: tuple[Float[Array, 'B T half'], Float[Array, 'B T half']], scale: float = 1.0
) -> Float[Array, 'B T N H']:
    """Rotary embedding, halves convention (dimension i pairs with i + H/2), times `scale`.

    Computed in f32 and rounded once: a scale applied after the cast is rounded again, by some kernels and not by
    others (H^-½ of 128 is no power of two).
    """
    cos, sin = (t[:, :, None, :] for t in rope)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return (jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1) * scale).astype(x_BTNH.dtype)
