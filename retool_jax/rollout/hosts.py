"""Rollouts of several processes: each with its own engine, or all on one mesh in lockstep.

A model that fits the devices of one process is sampled by an engine per process, with no collective while tools
answer; finished episodes are gathered at the end. A larger one is sampled on a mesh over all processes: every
process runs the same loop over the same rows, each runs the tools of its own rows, and one small exchange
per pass makes the answers known to all at the same point of the loop. Which of the two follows from the mesh: whether
its tensor axis fits into a process.

Engines of their own write the same bits whenever tools answer. In lockstep that holds for answers in the same passes
alone: an all-reduce between processes adds up in an order that depends on a number's place (so do rings of devices),
and which row an episode gets depends on when others ended.
"""

from __future__ import annotations

import dataclasses
import functools
import socket
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from retool_jax.core import columns, processes, sharding
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, ExecResult
from retool_jax.model.config import ModelConfig
from retool_jax.rollout import sync
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Link, Request
from retool_jax.rollout.stats import RolloutStats


class Lockstep:
    """The link of engines on a mesh over all processes: row r's tools run in process r mod count."""

    def __init__(self):
        self.process, self.count = jax.process_index(), jax.process_count()
        self.waited_s = 0.0

    def owns(self, row: int) -> bool:
        return row % self.count == self.process

    def share(self, answers: dict[int, ExecResult], told: int) -> tuple[dict[int, ExecResult], int]:
        """The answers and signals of all processes; all act on them in the same pass."""
        began = time.perf_counter()
        found = processes.gather((answers, told))
        self.waited_s += time.perf_counter() - began
        return {row: result for part, _ in found for row, result in part.items()}, max(told for _, told in found)


class Apart(Engine):
    """The engine of one process of several, each on its own devices; all of them make the same calls of `run`."""

    def run(self, params: Params, version: int, requests: Sequence[Request], step: int, **options) -> list[Episode]:
        """`Engine.run` of this process's part of the requests; every process gets all episodes, in order.

        One that is told to stop leaves early, and all raise it once the others have.
        """
        mine = part(requests, jax.process_index(), jax.process_count())
        made = self.make(params, version, mine, step, **options)
        for episode in made:  # unfinished ones too: who goes on with them makes copies
            columns.settle(episode)
        found = processes.gather((made if not self.told else (), self.stats, self.told))
        processes.agree([told for *_, told in found])
        self.stats = total([stats for _, stats, _ in found])
        return [episode for made, *_ in found for episode in made]


def part(requests: Sequence[Request], process: int, count: int) -> list[Request]:
    """The requests of one process: a run of whole prompts, so that the samples of each share its prefill."""
    groups: list[list[Request]] = []
    for request in requests:
        if not groups or groups[-1][-1].prompt != request.prompt:
            groups.append([])
        groups[-1].append(request)
    start, stop = (len(groups) * p // count for p in (process, process + 1))
    return [request for group in groups[start:stop] for request in group]


def total(parts: Sequence[RolloutStats]) -> RolloutStats:
    """The statistics of engines that ran side by side: counts add up, a time is that of the slowest."""
    found = RolloutStats()
    for field in dataclasses.fields(RolloutStats):
        values = [getattr(stats, field.name) for stats in parts]
        add = (
            max
            if field.name.endswith('_s') and isinstance(values[0], float)
            else functools.partial(sum, start=type(values[0])())
        )
        setattr(found, field.name, add(values))
    return found


def describe(own: RolloutStats, link: Link | None) -> list[dict[str, float | int | str | None]]:
    """What each process did in a rollout, and on which machine, in their order; every process has to make the call.

    own: of this process's engine; link: the engine's, whose clock begins anew. rollout_s is the time of its own part,
    without that of the link, waiting_s what the slowest took longer. Peaks of memory are since the process began: of
    its fullest device, None where devices do not say, and of the process in the host's memory.
    """
    device, host = processes.peaks()
    waited_s = 0.0
    if link is not None:
        waited_s, link.waited_s = link.waited_s, 0.0
    mine = {
        'process': jax.process_index(),
        'host': socket.gethostname(),
        'rollout_s': own.total_s - waited_s,
        'sampled_tokens': own.sampled_tokens,
        'tools_p99_s': own.summary()['tools/seconds_p99'],
        'device_peak_mb': None if device is None else device / 2**20,
        'host_peak_mb': host / 2**20,
    }
    lines = processes.gather(mine)
    longest_s = max(line['rollout_s'] for line in lines)
    return [line | {'waiting_s': longest_s - line['rollout_s']} for line in lines]


def spans(mesh: jax.sharding.Mesh) -> bool:
    """Whether the tensor axis needs the devices of several processes: none of them holds the sampling weights whole."""
    return any(len(devices) % mesh.shape['tensor'] for devices in _by_process(mesh).values())


def engines_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh of all engines: the devices of `mesh`, the tensor axis as long but inside a process, rows over the rest.

    On a torus the training mesh's axes run along the torus, through several hosts.
    Raises: ValueError where the tensor axis spans processes; such a model is sampled in lockstep.
    """
    if spans(mesh):
        raise ValueError(f'mesh: tensor={mesh.shape["tensor"]} spans processes; sample on the whole mesh')
    return _mesh([d for _, devices in sorted(_by_process(mesh).items()) for d in devices], mesh)


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The part of `engines_mesh` that is this process's: the mesh of its own engine."""
    own = [d for d in engines_mesh(mesh).devices.ravel() if d.process_index == jax.process_index()]
    return _mesh(own, mesh)


def make_sync(
    config: ModelConfig, dtype: str, mesh: jax.sharding.Mesh, weights: str = 'float'
) -> Callable[[Params], Params]:
    """`Sampler.sync` from the training layout on `mesh` to the sampling layout on each process's `local_mesh`."""
    # The cast weights stay split as in training; `device_put` then moves them to the engines' order of devices.
    cast = sync.Sync(config, dtype, mesh, sharding.TRAIN_RULES, weights)
    lies = lambda on: sync.shardings(config, on, sharding.SAMPLE_RULES, weights)
    spread, own = lies(engines_mesh(mesh)), lies(local_mesh(mesh))
    return lambda params: localise(jax.device_put(cast(params), spread), own)


def localise(tree: Params, shardings) -> Params:
    """Weights on `engines_mesh`, of which every process holds a whole copy, as arrays on its own devices; no copy."""

    def one(x: jax.Array, home: jax.sharding.Sharding) -> jax.Array:
        held = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(x.shape, home, [held[d] for d in home.addressable_devices])

    return jax.tree.map(one, tree, shardings)


def _by_process(mesh: jax.sharding.Mesh) -> dict[int, list[jax.Device]]:
    found: dict[int, list[jax.Device]] = {}
    for device in sorted(mesh.devices.ravel(), key=lambda d: d.id):
        found.setdefault(device.process_index, []).append(device)
    return found


def _mesh(devices: list[jax.Device], like: jax.sharding.Mesh) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(
        np.array(devices).reshape(-1, 1, like.shape['tensor']), like.axis_names, axis_types=like.axis_types
    )
