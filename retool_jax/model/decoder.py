"""Llama, Qwen2 and Qwen3: one set of blocks for training (scanned) and sampling (unrolled, cached).

Parameters live outside as nested dicts named as in Hugging Face checkpoints. The training layout
stacks the layers on a leading axis; the sampling layout (`to_sampling`) keeps them apart and holds
the output matrix as its own [D, V] array, tied or not (E.T costs five times a transposed copy at
batch 1); its matrices may be in 8 bits (model/int8.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Int8Weight, KVCache, Params
from retool_jax.core.sharding import constrain
from retool_jax.model import attention, int8, kernels, kv_cache
from retool_jax.model.config import ModelConfig
from retool_jax.model.layers import Block, Projection, RMSNorm, change_matrices, declare, merge, rope_table

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Float, Int

REMATS = ('none', 'full', 'attention', 'dots_but_mlp', 'dots', 'offload')
CUDNN = 'dot_product_attention_fwd_wrapper'  # the primitive of cuDNN's attention
OUTSIDE_MLP = ('heads', 'kv_heads', 'embed')  # what a layer's projections give, by the words of layers.Projection


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.weight = declare(
            rngs, (config.vocab_size, config.hidden_size), ('vocab', 'embed'), config.initializer_range
        )


class Decoder(nnx.Module):
    """The training layout: `layers` is one Block whose weights have a leading layer axis."""

    def __init__(self, config: ModelConfig, key: jax.Array, rank: int = 0, targets: tuple[str, ...] = ()):
        """rank, targets: of the adapters beside the layers' projections (model/lora.py)."""
        layer_key, rest = jax.random.split(key)
        rngs = nnx.Rngs(rest)
        self.embed_tokens = Embedding(config, rngs)
        keys = jax.random.split(layer_key, config.num_hidden_layers)

        def layer(key):
            rngs = nnx.Rngs(key)
            block = Block(config, rngs)
            block.adapt(rank, targets, rngs)
            return block

        self.layers = jax.vmap(layer)(keys)
        self.norm = RMSNorm(config.hidden_size, 'embed', config.rms_norm_eps, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(
                {'embed': config.hidden_size},
                {'vocab': config.vocab_size},
                bias=False,
                scale=config.initializer_range,
                rngs=rngs,
            )


@functools.cache
def _abstract(config: ModelConfig, rank: int = 0, targets: tuple[str, ...] = ()) -> Decoder:
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0), rank, targets))


@functools.cache
def _definition(config: ModelConfig, part: str, targets: tuple[str, ...]):
    """The static half of a module: 'layers' (a Block) or 'norm'."""
    return nnx.split(getattr(_abstract(config, 1, targets), part))[0]


def _bind(config: ModelConfig, part: str, params: Params):
    modules = [*params.get('self_attn', {}).items(), *params.get('mlp', {}).items()]
    adapted = tuple(sorted(name for name, own in modules if 'lora_A' in own))
    return nnx.merge(_definition(config, part, adapted), nnx.State(params))


def init(config: ModelConfig, key: jax.Array, rank: int = 0, targets: tuple[str, ...] = ()) -> Params:
    """Random f32 parameters in the training layout; with `rank`, those of adapters beside the projections `targets`."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, key, rank, targets)))


def abstract_params(config: ModelConfig, rank: int = 0, targets: tuple[str, ...] = ()) -> Params:
    """Shapes and dtypes of the training layout."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, rank, targets)))


def logical_axes(config: ModelConfig, rank: int = 0, targets: tuple[str, ...] = ()) -> dict:
    """The words of every weight's dimensions, in the shape of the training layout."""
    tree: dict = {}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(config, rank, targets))):
        node = tree
        for word in path[:-1]:
            node = node.setdefault(word, {})
        axes = variable.get_metadata('axes')
        node[path[-1]] = ('layers', *axes) if path[0] == 'layers' else axes
    return tree


def sampling_axes(config: ModelConfig, weights: str = 'float') -> dict:
    """The same for the sampling layout (`to_sampling`); a scale's are those of its matrix's outputs."""
    axes, head = logical_axes(config), ('embed', 'vocab')
    one = jax.tree.map(lambda words: words[1:], axes['layers'], is_leaf=lambda x: isinstance(x, tuple))
    if weights == 'int8':
        quantised = lambda words, inputs: Int8Weight(words, words[inputs:])
        one, head = change_matrices(one, quantised), quantised(head, 1)
    return axes | {'layers': [one] * config.num_hidden_layers, 'lm_head': {'weight': head}}


def fit_rules(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[str, ...]]:
    """The rules by which this model lies on this mesh: KV heads that do not divide are replicated.

    Raises: UserError naming the size of config.json that does not divide, and the mesh axes.
    """
    sizes = {
        'embed': 'hidden_size',
        'heads': 'num_attention_heads',
        'kv_heads': 'num_key_value_heads',
        'mlp': 'intermediate_size',
        'vocab': 'vocab_size',
    }
    fitted = dict(rules)
    for word, field in sizes.items():
        ways = math.prod(mesh.shape[axis] for axis in rules[word])
        if getattr(config, field) % ways == 0:
            continue
        if word != 'kv_heads':
            raise UserError(
                f'mesh: {field}={getattr(config, field)} does not divide over '
                f'{" × ".join(f"{axis}={mesh.shape[axis]}" for axis in rules[word])}; '
                f'choose a divisor'
            )
        fitted[word] = ()
    return fitted


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[Array, 'B T'],
    positions_BT: Int[Array, 'B T'],
    segment_ids_BT: Int[Array, 'B T'],
    prefix_ids_BT: Int[Array, 'B T'] | None = None,
    *,
    dtype=jnp.float32,
    attend: str = 'auto',
    segments: int = 1,
    remat: str = 'none',
    unroll: int = 1,
) -> Float[Array, 'B T D']:
    """Hidden states after the final norm, [B, T, D] in `dtype`, by a scan over layers.

    `prefix_ids_BT`: as in `Batch`; only where `attention.shares`.
    `remat`: 'none' keeps activations, 'full' recomputes each layer in the backward pass, 'attention' all of it but
    fused attention, 'dots_but_mlp' keeps what the projections give too, but for the MLP's gate and up, 'dots' all
    matmul results, 'offload' keeps those in the host's memory.
    `unroll`: layers per step of the scan (on CPU a fully unrolled tiny model trains a quarter faster and compiles
    four times slower).
    """
    x_BTD = params['embed_tokens']['weight'].astype(dtype)[tokens_BT]
    x_BTD = constrain(x_BTD, 'batch', 'seq', None)
    rope = rope_table(config, positions_BT)
    attend_full = attention.choose(attend, tokens_BT.shape[1], segments, dtype)
    ids = (segment_ids_BT,) if prefix_ids_BT is None else (segment_ids_BT, prefix_ids_BT)
    mix = lambda q, k, v: attend_full(q, k, v, *ids)

    def layer(x_BTD, layer_params):
        x_BTD = _bind(config, 'layers', layer_params)(x_BTD, rope, mix)
        return constrain(x_BTD, 'batch', 'seq', None), None

    if remat != 'none':
        layer = jax.checkpoint(layer, policy=_kept(remat), prevent_cse=False)
    x_BTD, _ = jax.lax.scan(layer, x_BTD, params['layers'], unroll=unroll)
    return _bind(config, 'norm', params['norm'])(x_BTD)


def _kept(remat: str) -> Callable[..., object]:
    """The results of a layer that wait for the backward pass, as a policy of `jax.checkpoint`."""
    policies = jax.checkpoint_policies
    dots, both = policies.dots_with_no_batch_dims_saveable, policies.save_from_both_policies
    fused = both(policies.save_only_these_names(kernels.KEPT), lambda primitive, *_, **__: primitive.name == CUDNN)
    match remat:
        case 'full':
            return policies.nothing_saveable
        case 'attention':
            return fused
        case 'dots_but_mlp':
            return both(policies.save_only_these_names(*OUTSIDE_MLP), fused)
        case 'dots':
            return both(dots, fused)
        case 'offload':
            return policies.offload_dot_with_no_batch_dims('device', 'pinned_host')


def head_weight(params: Params) -> jax.Array:
    """The output matrix [D, V] of either layout."""
    if 'lm_head' in params:
        return params['lm_head']['weight']
    return params['embed_tokens']['weight'].T


def unembed(params: Params, x_BD: Float[Array, '*rows D']) -> Float[Array, '*rows V']:
    """Logits in f32 for the last axis of `x`."""
    w_DV = head_weight(params)
    if isinstance(w_DV, Int8Weight):
        return int8.multiply(x_BD, w_DV, jnp.float32)
    return jnp.matmul(x_BD, w_DV.astype(x_BD.dtype), preferred_element_type=jnp.float32)


def to_sampling(config: ModelConfig, params: Params, dtype=jnp.float32, weights: str = 'float') -> Params:
    """Training layout → sampling layout, in `dtype` but for the gains of norms (f32); a jit on the same devices.

    weights: 'int8' takes the matrices of layers and head in 8 bits.
    """
    layers = [sampling_layer(params['layers'], i, dtype, weights) for i in range(config.num_hidden_layers)]
    return sampling_ends(params, dtype, weights) | {'layers': layers}


def sampling_layer(layers: Params, i: int | jax.Array, dtype=jnp.float32, weights: str = 'float') -> Params:
    """Layer `i` of the training layout's stack as the sampling layout has it: adapters added to their weights."""
    layer = merge(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), layers))
    return cast(change_matrices(layer, int8.quantise) if weights == 'int8' else layer, dtype)


def sampling_ends(params: Params, dtype=jnp.float32, weights: str = 'float') -> Params:
    """The sampling layout but for its layers: embeddings, last norm, head.

    The table of embeddings is never in 8 bits: a step reads one line a row of it, which saves no time, and a head that
    is tied to it has a copy of its own here.
    """
    head = head_weight(params)
    if weights == 'int8':
        head = int8.quantise(head, 1)
    return cast({'embed_tokens': params['embed_tokens'], 'norm': params['norm'], 'lm_head': {'weight': head}}, dtype)


def cast(params: Params, dtype) -> Params:
    """Weights as the trainer's forward pass reads them: the gains of norms, which multiply in f32, stay f32.

    Everything else is cast where the trainer uses it, to the same bits. Gains of bf16 raised the deviation between
    sampler and trainer from 1.8e-3 to 2.9e-3 as soon as training had moved them. Matrices in 8 bits stay as they are.
    """
    quantised = lambda x: isinstance(x, Int8Weight)
    kept = lambda path, x: quantised(x) or is_gain([entry.key for entry in path])
    cast_one = lambda path, x: x if kept(path, x) else x.astype(dtype)
    return jax.tree_util.tree_map_with_path(cast_one, params, is_leaf=quantised)


def is_gain(path: Sequence[str]) -> bool:
    """Whether the weight at `path` is the gain of a norm."""
    return any('norm' in word for word in path)


def extend(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens_BC: Int[Array, 'B C'],
    count_B: Int[Array, ' B'],
    bound: int,
    row_B: Int[Array, ' B'] | None = None,
    attend_one: Callable[..., jax.Array] | None = None,
) -> tuple[Float[Array, 'B C D'], KVCache]:
    """Runs a right-padded chunk per row through the cache; the sampling layout.

    tokens_BC: int32 [B, C]; count_B: valid tokens in each row (0 leaves the row's cache untouched).
    Reads cover the first `bound` slots, which must hold every row's length after the chunk.
    row_B: which rows of the cache the chunks belong to, out of range pads; None: all, in order.
    attend_one: by which chunks of one token of all rows attend (decoding.Kernel.attend); None: by XLA.
    Returns hidden states [B, C, D] (garbage beyond count) and the cache, longer by count.
    """
    chunk = tokens_BC.shape[1]
    offset_C = jnp.arange(chunk)
    inside_B = None if row_B is None else jnp.minimum(row_B, cache.length_B.shape[0] - 1)
    length_B = cache.length_B if row_B is None else cache.length_B[inside_B]
    positions_BC = length_B[:, None] + offset_C
    slot_BC = jnp.where(offset_C < count_B[:, None], positions_BC, kv_cache.slots(cache))  # out of range: dropped
    x_BCD = params['embed_tokens']['weight'][tokens_BC]
    rope = rope_table(config, positions_BC)
    keys, values = [], []
    for layer_params, k_BKSH, v_BKSH in zip(params['layers'], cache.k, cache.v):

        def attend(q, k, v):
            keys.append(kv_cache.write(k_BKSH, k, slot_BC, row_B))  # noqa: B023
            values.append(kv_cache.write(v_BKSH, v, slot_BC, row_B))  # noqa: B023
            if attend_one is not None:
                length_B = jnp.where(count_B > 0, positions_BC[:, 0] + 1, 1)  # who adds nothing reads next to nothing
                return attend_one(q[:, 0], keys[-1], values[-1], length_B, bound)[:, None]
            own = lambda kv: kv_cache.read(kv, bound, inside_B)
            return attention.cached(q, own(keys[-1]), own(values[-1]), positions_BC)

        x_BCD = _bind(config, 'layers', layer_params)(x_BCD, rope, attend)
    x_BCD = _bind(config, 'norm', params['norm'])(x_BCD)
    longer_B = cache.length_B + count_B if row_B is None else cache.length_B.at[row_B].add(count_B, mode='drop')
    return x_BCD, KVCache(k=keys, v=values, length_B=longer_B)
