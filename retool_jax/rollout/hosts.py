"""Rollouts of several processes: each with its own engine, or all on one mesh in lockstep.

A model that fits the devices of one process is sampled by an engine per process, with no collective while tools
answer; finished episodes are gathered at the end. A larger one is sampled on a mesh over all processes: every
process runs the same loop over the same slots, each runs the tools of its own rows, and one small all-gather
per pass makes the answers known to all at the same point of the loop.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, ExecResult
from retool_jax.rollout.engine import Engine, Request

SMALL = 4096  # bytes that go with the first all-gather; answers are cut to some hundred characters


def gather(item: object) -> list:
    """What each process gives, in the order of the processes; every process must call it."""
    if jax.process_count() == 1:
        return [item]
    data = np.frombuffer(pickle.dumps(item), np.uint8)
    first = np.zeros(8 + SMALL, np.uint8)
    first[:8] = np.frombuffer(np.int64(len(data)).tobytes(), np.uint8)
    first[8:8 + min(len(data), SMALL)] = data[:SMALL]
    all_first = np.asarray(multihost_utils.process_allgather(first))
    sizes = [int(np.frombuffer(row[:8].tobytes(), np.int64)[0]) for row in all_first]
    rests = [b''] * len(sizes)
    if (longest := max(sizes) - SMALL) > 0:  # padded to a power of two: few shapes are ever compiled
        rest = np.zeros(1 << (longest - 1).bit_length(), np.uint8)
        rest[:max(len(data) - SMALL, 0)] = data[SMALL:]
        rests = [row.tobytes() for row in np.asarray(multihost_utils.process_allgather(rest))]
    return [pickle.loads((row[8:].tobytes()[:size] + tail[:max(size - SMALL, 0)])[:size])
            for row, tail, size in zip(all_first, rests, sizes)]


class Lockstep:
    """The link of engines on a mesh over all processes: row r's tools run in process r mod count."""

    def __init__(self):
        self.process, self.count = jax.process_index(), jax.process_count()

    def owns(self, row: int) -> bool:
        return row % self.count == self.process

    def share(self, answers: dict[int, ExecResult]) -> dict[int, ExecResult]:
        """The answers of all processes; an all-gather, so that all act on them in the same pass."""
        return {row: result for part in gather(answers) for row, result in part.items()}


def part(requests: Sequence[Request], process: int, count: int) -> list[Request]:
    """The requests of one process: a run of whole problems, so that its samples share a prompt's prefill."""
    groups: list[list[Request]] = []
    for request in requests:
        if not groups or groups[-1][-1].problem.id != request.problem.id:
            groups.append([])
        groups[-1].append(request)
    start, stop = (len(groups) * p // count for p in (process, process + 1))
    return [request for group in groups[start:stop] for request in group]


def run(engine: Engine, params: Params, version: int, requests: Sequence[Request], step: int,
        **options) -> list[Episode]:
    """`Engine.run` with an engine per process: each makes its part, every process gets all episodes in order."""
    mine = part(requests, jax.process_index(), jax.process_count())
    made = engine.run(params, version, mine, step, **options)
    return [episode for part in gather(made) for episode in part]


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh of this process's own engine: the tensor axis as in `mesh`, over the process's first devices.

    Errors: ValueError where the tensor axis spans processes; such a model is sampled in lockstep.
    """
    for lane in mesh.devices.reshape(-1, mesh.shape['tensor']):
        if any(d.process_index != lane[0].process_index for d in lane):
            raise ValueError(f'mesh: tensor={mesh.shape["tensor"]} spans processes; sample on the whole mesh')
    mine = [lane for lane in mesh.devices.reshape(-1, mesh.shape['tensor'])
            if lane[0].process_index == jax.process_index()]
    return jax.sharding.Mesh(mine[0].reshape(1, 1, -1), mesh.axis_names, axis_types=mesh.axis_types)


def localise(tree: Params, shardings) -> Params:
    """Weights that every process holds whole (sync's result on the global mesh) as arrays of a local mesh; no copy.

    shardings: of `Sampler.placement(local_mesh(mesh))`.
    """
    def one(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        held = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            x.shape, sharding, [held[d] for d in sharding.addressable_devices])
    return jax.tree.map(one, tree, shardings)
