"""Rollouts of several processes: each with its own engine, or all on one mesh in lockstep.

A model that fits the devices of one process is sampled by an engine per process, with no collective while tools
answer; finished episodes are gathered at the end. A larger one is sampled on a mesh over all processes: every
process runs the same loop over the same slots, each runs the tools of its own rows, and one small all-gather
per pass makes the answers known to all at the same point of the loop. Which of the two is the mesh's choice: whether
its tensor axis stays inside a process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core import mesh as meshes
from retool_jax.core import processes
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, ExecResult
from retool_jax.model import qwen
from retool_jax.model.config import QwenConfig
from retool_jax.rollout.engine import Engine, Request
from retool_jax.rollout.stats import RolloutStats


class Lockstep:
    """The link of engines on a mesh over all processes: row r's tools run in process r mod count."""

    def __init__(self):
        self.process, self.count = jax.process_index(), jax.process_count()

    def owns(self, row: int) -> bool:
        return row % self.count == self.process

    def share(self, answers: dict[int, ExecResult]) -> dict[int, ExecResult]:
        """The answers of all processes; an all-gather, so that all act on them in the same pass."""
        return {row: result for part in processes.gather(answers) for row, result in part.items()}


class Apart(Engine):
    """The engine of one process of several, each on its own devices; all of them make the same calls of `run`."""

    def run(self, params: Params, version: int, requests: Sequence[Request], step: int, **options) -> list[Episode]:
        """`Engine.run` of this process's part of the requests; every process gets all episodes, in order."""
        mine = part(requests, jax.process_index(), jax.process_count())
        made = super().run(params, version, mine, step, **options)
        found = processes.gather((made, self.stats))
        self.stats = total([stats for _, stats in found])
        return [episode for made, _ in found for episode in made]


def part(requests: Sequence[Request], process: int, count: int) -> list[Request]:
    """The requests of one process: a run of whole problems, so that its samples share a prompt's prefill."""
    groups: list[list[Request]] = []
    for request in requests:
        if not groups or groups[-1][-1].problem.id != request.problem.id:
            groups.append([])
        groups[-1].append(request)
    start, stop = (len(groups) * p // count for p in (process, process + 1))
    return [request for group in groups[start:stop] for request in group]


def total(parts: Sequence[RolloutStats]) -> RolloutStats:
    """What engines that ran side by side did together: counts add up, of times the longest counts."""
    found = RolloutStats()
    for field in dataclasses.fields(RolloutStats):
        values = [getattr(stats, field.name) for stats in parts]
        add = max if field.name.endswith('_s') and isinstance(values[0], float) else functools.partial(
            sum, start=type(values[0])())
        setattr(found, field.name, add(values))
    return found


def spans(mesh: jax.sharding.Mesh) -> bool:
    """Whether the tensor axis spans processes: then no process holds the sampling weights whole."""
    return any(len({d.process_index for d in lane}) > 1 for lane in _lanes(mesh))


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh of this process's own engine: its devices of `mesh`, the tensor axis as there, rows over the rest.

    Errors: ValueError where the tensor axis spans processes; such a model is sampled in lockstep.
    """
    if spans(mesh):
        raise ValueError(f'mesh: tensor={mesh.shape["tensor"]} spans processes; sample on the whole mesh')
    mine = [lane for lane in _lanes(mesh) if lane[0].process_index == jax.process_index()]
    return jax.sharding.Mesh(np.array(mine).reshape(len(mine), 1, -1), mesh.axis_names, axis_types=mesh.axis_types)


def make_sync(config: QwenConfig, dtype: str, mesh: jax.sharding.Mesh,
              local: jax.sharding.Mesh) -> Callable[[Params], Params]:
    """`Sampler.sync` from the training layout on `mesh` to the sampling layout on each process's `local` mesh."""
    place = lambda mesh: meshes.shardings(mesh, qwen.sampling_axes(config),
                                          qwen.fit_rules(config, mesh, meshes.SAMPLE_RULES))
    spread = jax.jit(functools.partial(qwen.to_sampling, config, dtype=jnp.dtype(dtype)), out_shardings=place(mesh))
    return lambda params: localise(spread(params), place(local))


def localise(tree: Params, shardings) -> Params:
    """Weights that every lane of a global mesh holds whole as arrays of a local mesh; no copy."""
    def one(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        held = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            x.shape, sharding, [held[d] for d in sharding.addressable_devices])
    return jax.tree.map(one, tree, shardings)


def _lanes(mesh: jax.sharding.Mesh) -> list:
    """Devices along the tensor axis, one array for each place on data × fsdp."""
    return list(mesh.devices.reshape(-1, mesh.shape['tensor']))
