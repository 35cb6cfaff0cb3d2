"""One process of a rollout: `python -m tests.rollout.worker apart|together|teams|one[_slow] DECODE_ROWS DIRECTORY`.

Processes are joined by RETOOL_PROCESS….

apart: each process has engines of its own, weights from the global training mesh, episodes gathered. together: two
engines on a mesh over all processes, in lockstep. teams: an engine takes the devices of two processes of four, as the
run itself makes it. one: an engine on the first device. All but `teams` hold eight rows in each process.
Each rolls out twice with tools that answer at once, and twice with tools that answer at other times in every process
and both times; with _slow every process but the first takes a while over each call. Writes
DIRECTORY/<work>_<process>.pkl.
"""

from __future__ import annotations

import dataclasses
import pickle
import random
import sys
import time
from pathlib import Path

import jax
import numpy as np

from retool_jax.core import processes, sharding
from retool_jax.model import decoder
from retool_jax.rollout import hosts, shards, turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.sampler import Sampler
from retool_jax.text import template
from tests.fakes import FakePool
from tests.rollout.engine_test import CONFIG, PLAIN, SIZES, TABLE, TOKENIZER, TURNS, answer, requests


def make_engine(sampler: Sampler, kind=Engine, link=None) -> Engine:
    rules = turns.Rules(TURNS, TOKENIZER, TABLE, lambda r: r.stdout)
    return kind(sampler, rules, PLAIN, FakePool(answer), seed=1, purpose=1, link=link)


def make_sampler(mesh, decode_rows: int) -> Sampler:
    """decode_rows: of all engines on the mesh."""
    engines = shards.count(mesh)
    share = {name: getattr(SIZES, name) // engines for name in ('rows', 'feed_rows')}
    sizes = dataclasses.replace(SIZES, decode_rows=decode_rows // engines, **share)
    return Sampler(CONFIG, sizes, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids, mesh)


def train_params(mesh):
    """The same weights in every process, each with the parts of its own devices."""
    host = jax.tree.map(np.asarray, jax.jit(lambda: decoder.init(CONFIG, jax.random.key(0)))())
    rules = decoder.fit_rules(CONFIG, mesh, sharding.TRAIN_RULES)
    shardings = sharding.shardings(mesh, decoder.logical_axes(CONFIG), rules)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), host, shardings)


def dealt_out() -> list[jax.Device]:
    """All devices, of each process in turn."""
    return np.array(jax.devices()).reshape(jax.process_count(), -1).T.ravel().tolist()


def apart(decode_rows: int):
    """The tensor axis fits twice into a process, though on the training mesh it runs through both."""
    mesh = sharding.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 2}, dealt_out())
    assert len({d.process_index for d in mesh.devices[0, 0]}) == jax.process_count()
    assert hosts.team(mesh) == (jax.process_index(),)
    assert hosts.team(sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 8})) == (0, 1)
    local = hosts.local_mesh(mesh)
    assert dict(local.shape) == {'data': 2, 'fsdp': 1, 'tensor': 2}
    engine = make_engine(make_sampler(local, decode_rows), hosts.Apart)
    return engine, hosts.make_sync(CONFIG, SIZES.dtype, mesh)(train_params(mesh))


def together(decode_rows: int):
    """The tensor axis runs through both processes."""
    mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 4}, dealt_out())
    assert len({d.process_index for d in mesh.devices[0, 0]}) == jax.process_count()
    sampler = make_sampler(mesh, decode_rows)
    return make_engine(sampler, link=hosts.Lockstep()), sampler.sync(train_params(mesh))


def teams(decode_rows: int):
    """The tensor axis takes the devices of two processes; on the training mesh it runs through all four."""
    mesh = sharding.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 4}, dealt_out())
    assert len({d.process_index for d in mesh.devices[0, 0]}) == jax.process_count() == 4
    sampler = make_sampler(hosts.local_mesh(mesh), decode_rows)
    members = hosts.team_of(sampler)
    assert members == hosts.team(mesh) == ((0, 1), (2, 3))[jax.process_index() // 2] and sampler.engines == 1
    engine = make_engine(sampler, hosts.Apart, hosts.Lockstep(members))
    return engine, hosts.make_sync(CONFIG, SIZES.dtype, mesh)(train_params(mesh))


def one(decode_rows: int):
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.local_devices()[:1])
    sampler = make_sampler(mesh, decode_rows)
    return make_engine(sampler), sampler.sync(train_params(mesh))


KINDS = {'apart': apart, 'together': together, 'teams': teams, 'one': one}


class BusyPool(FakePool):
    """A pool on a machine that is busy with something else, in every process but the first."""

    def submit(self, code):
        time.sleep(1.0 * jax.process_index())
        return super().submit(code)


def held_up(kind: str, decode_rows: int) -> list:
    """What each process did in five rollouts; in the first two they compile."""
    engine, weights = KINDS[kind](decode_rows)
    engine.executor, found = BusyPool(answer), []
    for step in range(5):
        engine.run(weights, 0, requests(), step)
        found.append(hosts.describe(engine.own, engine.link))
    return found


def rolled_out(kind: str, decode_rows: int) -> list:
    """(episodes, calls run here, episodes counted) of four rollouts."""
    engine, weights = KINDS[kind](decode_rows)
    found = []
    for run in range(4):
        rng, slow = random.Random(2 * jax.process_index() + run), 0.1 * (1 + jax.process_index()) * (run >= 2)
        engine.executor = FakePool(answer, lambda code: rng.random() * slow)  # noqa: B023
        episodes = engine.run(weights, 0, requests(), 4)
        found.append((episodes, len(engine.executor.codes), engine.stats.episodes))
    return found


def main(work: str, decode_rows: str, directory: str) -> None:
    processes.join()
    template.extract_snippet = lambda text: template.Snippet(text, 0)
    kind, _, slow = work.partition('_')
    found = (held_up if slow else rolled_out)(kind, int(decode_rows))
    long = processes.gather('x' * (10_000 * (1 + jax.process_index())))
    assert [len(x) for x in long] == [10_000 * (1 + i) for i in range(jax.process_count())]
    with open(Path(directory) / f'{work}_{jax.process_index()}.pkl', 'wb') as file:
        pickle.dump(found, file)


if __name__ == '__main__':
    main(*sys.argv[1:])
