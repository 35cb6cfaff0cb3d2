"""Device-side records: the pytrees that cross a jit boundary.

Read this second (after `records`). Axes: B batch row, T time, S cache slot, K KV heads, H head
size, V vocabulary; L layers. Every field is described with its shape and dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Params = Any  # nested dict of arrays, named as in Hugging Face checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8KV:
    """Keys or values of one layer in 8 bits: values × scale."""

    values: jax.Array  # int8 [B, K, S, H]
    scale: jax.Array  # f32 [B, K, S], the largest magnitude of a slot's head ÷ 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
    """A matrix of the sampling layout in 8 bits: values × scale."""

    values: jax.Array  # int8, in the shape of the matrix, input axes first
    scale: jax.Array  # f32, of the output axes: the largest magnitude of an output channel ÷ 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every row, one array per layer (a stacked cache would be copied whole)."""

    k: list[jax.Array | Int8KV]  # L × [B, K, S, H], rotated keys
    v: list[jax.Array | Int8KV]  # L × [B, K, S, H]
    length_B: jax.Array  # int32, tokens whose KV is stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleState:
    """Everything the sampler carries between calls; B are the rows of the engine."""

    cache: KVCache
    logits_BV: jax.Array  # f32, for the token after the cached ones
    tag_B: jax.Array  # int32, state of the tag automaton
    live_B: jax.Array  # bool, may sample
    stop_B: jax.Array  # int32, why the row last stopped (rollout.sampler.STOP_*)
    allowance_B: jax.Array  # int32, tokens the row may still sample before it is stopped
    key_B: jax.Array  # PRNG keys, one per row: folded over (purpose, step, problem, sample)
    temperature_B: jax.Array  # f32, 0 is greedy
    top_p_B: jax.Array  # f32, 1 keeps everything
    top_k_B: jax.Array  # int32, 0 keeps everything
    min_p_B: jax.Array  # f32, 0 keeps everything


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed episodes: several episodes may share a row, told apart by `segment_ids_BT`.

    Every [B, T] array is aligned to the token itself: `logprob[b, t]` is that of `tokens[b, t]`
    given what stands before it in the same segment, and in the beginning that this goes on from.
    """

    tokens_BT: jax.Array  # int32
    segment_ids_BT: jax.Array  # int32, 1…N within a row, 0 is padding; beyond N a beginning that episodes share
    positions_BT: jax.Array  # int32, from 0 within each episode
    acted_BT: jax.Array  # bool, True where the policy wrote the token
    sampler_logprob_BT: jax.Array  # f32, 0 where not acted
    reward_BN: jax.Array  # f32, entry n belongs to segment n + 1 of the row
    group_BN: jax.Array  # int32, episodes of one problem share a group; -1 is no episode
    baseline_BN: jax.Array  # bool, episodes that count in their group's baseline
    update_BN: jax.Array  # bool, episodes that are trained on
    # int32, the shared beginning that a token's segment goes on from, else its own segment; None: none is shared.
    prefix_ids_BT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What the update needs beside the batch, computed once before it. All f32 [B, T]."""

    logprob_BT: jax.Array  # of the policy before the update; zeros where the update's own pass has it
    entropy_BT: jax.Array  # of the policy's distribution at each token; zeros there, too
    reference_logprob_BT: jax.Array  # zeros where there is no reference
    value_BT: jax.Array  # of the critic before the update, zeros where there is none
    advantage_BT: jax.Array
    return_BT: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters with their optimizer: one for the policy, one for a separate critic."""

    step: jax.Array  # int32, optimizer steps taken
    params: Params  # what is trained, f32: master weights, or adapters over frozen ones (model/lora.py)
    opt_state: Any
