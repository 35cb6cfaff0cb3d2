"""Engines side by side in one program: each is `mesh.tensor` devices of a mesh, with rows of its own.

Every engine runs the same program on its rows, by shard_map over the axes that engines lie along; what tensor holds is
left to the partitioner. So no KV crosses engines, a row's bits are those of an engine alone, and kernels that see one
device run where tensor is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax

from retool_jax.core import sharding
from retool_jax.core.pytrees import Int8KV, KVCache, SampleState
from retool_jax.model import decoder
from retool_jax.model.config import ModelConfig

AXES = ('data', 'fsdp')  # of a mesh: along which engines lie
STATIC = ('bound', 'truncate')  # arguments that programs are compiled for


def count(mesh: sharding.AnyMesh | None) -> int:
    """Engines on a mesh; without one there is one, where its weights are."""
    return 1 if mesh is None else mesh.shape['data'] * mesh.shape['fsdp']


def spread(function: Callable, mesh: sharding.AnyMesh | None, own: Collection[str]) -> Callable:
    """`function`, of keyword arguments, as every engine runs it on its part of those that `own` names.

    Their leading axis is split over the engines, as is that of all results; the other arguments each engine has whole.
    """
    if mesh is None or count(mesh) == 1:
        return function
    mine = jax.P(AXES)
    axes = mesh.axis_names if mesh.shape['tensor'] == 1 else AXES

    def everywhere(**arguments: Any):
        fixed = {name: arguments.pop(name) for name in STATIC if name in arguments}
        return jax.shard_map(
            lambda given: function(**given, **fixed),
            mesh=mesh,
            in_specs=({name: mine if name in own else jax.P() for name in arguments},),
            out_specs=mine,
            axis_names=frozenset(axes),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(arguments)

    return everywhere


def any_engine(flag: jax.Array, mesh: sharding.AnyMesh | None) -> jax.Array:
    """Whether `flag` is true in this engine or, where loops hold collectives and all engines leave them together, in
    any one of them; inside of `spread`."""
    if mesh is None or count(mesh) == 1 or mesh.shape['tensor'] == 1:
        return flag
    return jax.lax.psum(flag.astype('int32'), AXES) > 0


def shardings(config: ModelConfig, cache_dtype: str, mesh: sharding.AnyMesh) -> tuple[SampleState, jax.NamedSharding]:
    """Shardings of the state of all engines on a mesh, and of what every device holds whole.

    Raises: UserError where a size of the model does not divide over the mesh.
    """
    rules = decoder.fit_rules(config, mesh, sharding.SAMPLE_RULES)
    lies = lambda *words: jax.NamedSharding(mesh, sharding.spec(words, rules))
    one = lies('batch', 'kv_heads', None, 'head_dim')
    if cache_dtype == 'int8':
        one = Int8KV(values=one, scale=lies('batch', 'kv_heads', None))
    kv = [one] * config.num_hidden_layers
    row = lies('batch')
    state = SampleState(
        cache=KVCache(k=kv, v=kv, length_B=row),
        logits_BV=lies('batch', 'vocab'),
        tag_B=row,
        live_B=row,
        stop_B=row,
        allowance_B=row,
        key_B=row,
        temperature_B=row,
        top_p_B=row,
        top_k_B=row,
        min_p_B=row,
    )
    return state, lies()
