"""Rollouts of several processes: in teams, each with engines on the devices of its processes alone.

An engine is `mesh.tensor` devices. Where those of a process are whole engines, a process is a team of its own, and
steps its engines with no word to others while tools answer. An engine that needs more is stepped by as few processes
as have whole ones between them: each runs the same loop over the same rows and the tools of its own rows, and one small
exchange per pass makes the answers known to them at the same point of the loop. Each team makes its part of the
requests; finished episodes are gathered at the end.

A process alone writes the same bits whenever tools answer. In a team of several that holds for answers in the same
passes alone: an all-reduce between processes adds up in an order that depends on a number's place (so do rings of
devices), and which row an episode gets depends on when others ended.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import socket
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from retool_jax.core import columns, processes, sharding
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, ExecResult
from retool_jax.model.config import ModelConfig
from retool_jax.rollout import sync
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Link, Request, by_prompt
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.stats import RolloutStats


class Lockstep:
    """The link of engines on the devices of several processes: row r's tools run in the (r mod count)-th of them."""

    def __init__(self, members: Sequence[int] = ()):
        """members: the processes, this one among them; none: all. All processes of the run have to make the call."""
        self.members = tuple(members) or tuple(range(jax.process_count()))
        self.place = self.members.index(jax.process_index())
        self.waited_s = 0.0
        processes.meet(self.members)

    def owns(self, row: int) -> bool:
        return row % len(self.members) == self.place

    def share(self, answers: dict[int, ExecResult], told: int) -> tuple[dict[int, ExecResult], int]:
        """The answers and signals of all of them; all act on them in the same pass."""
        began = time.perf_counter()
        found = processes.gather((answers, told), self.members)
        self.waited_s += time.perf_counter() - began
        return {row: result for part, _ in found for row, result in part.items()}, max(told for _, told in found)


class Apart(Engine):
    """The engines of one team of several, each on its own devices; all processes make the same calls of `run`."""

    def run(self, params: Params, version: int, requests: Sequence[Request], step: int, **options) -> list[Episode]:
        """`Engine.run` of this team's part of the requests; every process gets all episodes, in order.

        One that is told to stop leaves early, and all raise it once the others have.
        """
        made = self.make(params, version, share(self, requests), step, **options)
        for episode in made:  # unfinished ones too: who goes on with them makes copies
            columns.settle(episode)
        speaks = leads(self)
        found = processes.gather((made if speaks and not self.told else (), self.stats if speaks else None, self.told))
        processes.agree([told for *_, told in found])
        self.stats = total([stats for _, stats, _ in found if stats is not None])
        return [episode for made, *_ in found for episode in made]


def share(engine: Engine, requests: Sequence[Request]) -> list[Request]:
    """The requests that this process's team makes."""
    members = _members(engine)
    return part(requests, members[0] // len(members), jax.process_count() // len(members))


def leads(engine: Engine) -> bool:
    """Whether this process speaks for its team, all of which have the same episodes."""
    return _members(engine)[0] == jax.process_index()


def _members(engine: Engine) -> tuple[int, ...]:
    return (jax.process_index(),) if engine.link is None else engine.link.members


def part(requests: Sequence[Request], team: int, teams: int) -> list[Request]:
    """The requests of one team: a run of whole prompts, so that the samples of each share its prefill."""
    prompts = by_prompt(requests)
    start, stop = (len(prompts) * t // teams for t in (team, team + 1))
    return [request for run in prompts[start:stop] for request in run]


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


def needed(devices: int, tensor: int) -> int:
    """How many processes of so many devices have whole engines between them: 1 where one has."""
    return math.lcm(devices, tensor) // devices


def team(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """The processes that step the engines of this one together, itself among them, in order.

    Raises: UserError where processes have unlike numbers of devices, and not each has whole engines.
    """
    held, tensor = _by_process(mesh), mesh.shape['tensor']
    counts = {needed(len(devices), tensor): len(devices) for devices in held.values()}
    if len(counts) > 1:
        raise UserError(
            f'mesh.tensor={tensor}: processes of {" and ".join(map(str, sorted(counts.values())))} devices have no '
            'whole engines; choose one that divides both, or give each process as many devices'
        )
    (size,), own = counts, sorted(held).index(jax.process_index())
    return tuple(sorted(held)[own // size * size :][:size])


def team_of(sampler: Sampler) -> tuple[int, ...]:
    """The processes whose devices a sampler is on, in order."""
    return tuple(sorted({device.process_index for device in sampler.table.sharding.device_set}))


def engines_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh of all engines: the devices of `mesh`, the tensor axis as long but inside a team, engines over the rest.

    On a torus the training mesh's axes run along the torus, through several hosts.
    """
    return _mesh([d for _, devices in sorted(_by_process(mesh).items()) for d in devices], mesh)


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The part of `engines_mesh` that is this process's team's: the mesh of its own engines."""
    members = team(mesh)
    return _mesh([d for d in engines_mesh(mesh).devices.ravel() if d.process_index in members], mesh)


def make_sync(
    config: ModelConfig, dtype: str, mesh: jax.sharding.Mesh, weights: str = 'float'
) -> Callable[[Params], Params]:
    """`Sampler.sync` from the training layout on `mesh` to the sampling layout on each team's `local_mesh`."""
    # The cast weights stay split as in training; `device_put` then moves them to the engines' order of devices.
    cast = sync.Sync(config, dtype, mesh, sharding.TRAIN_RULES, weights)
    lies = lambda on: sync.shardings(config, on, sharding.SAMPLE_RULES, weights)
    spread, own = lies(engines_mesh(mesh)), lies(local_mesh(mesh))
    return lambda params: localise(jax.device_put(cast(params), spread), own)


def localise(tree: Params, shardings) -> Params:
    """Weights on `engines_mesh`, of which every team holds a whole copy, as arrays on its own devices; no copy."""

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
