"""One process of a rollout: `python -m tests.rollout.worker apart|together|one DIRECTORY`, joined by RETOOL_PROCESS….

apart: an engine per process on the devices of that process, weights from the global training mesh, episodes gathered.
together: one engine on a mesh over all processes, in lockstep. one: an engine on the first device.
Each rolls out twice; tools answer at other times in every process and both times. Writes
DIRECTORY/<work>_<process>.pkl.
"""

from __future__ import annotations

import pathlib
import pickle
import random
import sys

import jax
import numpy as np

from retool_jax.core import mesh as meshes
from retool_jax.core import processes
from retool_jax.model import qwen
from retool_jax.rollout import hosts, turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.sampler import Sampler
from retool_jax.text import template
from tests.fakes import FakePool
from tests.rollout.engine_test import CONFIG, PLAIN, SIZES, TABLE, TOKENIZER, TURNS, answer, requests


def make_engine(sampler: Sampler, kind=Engine, link=None) -> Engine:
    rules = turns.Rules(TURNS, TOKENIZER, TABLE, lambda r: r.stdout)
    return kind(sampler, rules, PLAIN, FakePool(answer), seed=1, purpose=1, link=link)


def make_sampler(mesh=None) -> Sampler:
    return Sampler(CONFIG, SIZES, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids, mesh)


def train_params(mesh):
    """The same weights in every process, each with the parts of its own devices."""
    host = jax.tree.map(np.asarray, jax.jit(lambda: qwen.init(CONFIG, jax.random.key(0)))())
    shardings = meshes.shardings(mesh, qwen.logical_axes(CONFIG), qwen.fit_rules(CONFIG, mesh, meshes.TRAIN_RULES))
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), host, shardings)


def apart():
    """The tensor axis lies inside a process, which has two engines' worth of it."""
    mesh = meshes.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 2})
    local = hosts.local_mesh(mesh)
    assert not hosts.spans(mesh) and dict(local.shape) == {'data': 2, 'fsdp': 1, 'tensor': 2}
    weights = hosts.make_sync(CONFIG, SIZES.dtype, mesh, local)(train_params(mesh))
    return make_engine(make_sampler(local), hosts.Apart), weights


def together():
    """The tensor axis spans the processes: its devices are dealt out in turns."""
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1).T.ravel().tolist()
    mesh = meshes.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 4}, devices)
    assert hosts.spans(mesh)
    sampler = make_sampler(mesh)
    return make_engine(sampler, link=hosts.Lockstep()), sampler.sync(train_params(mesh))


def one():
    mesh = meshes.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.local_devices()[:1])
    sampler = make_sampler(mesh)
    return make_engine(sampler), sampler.sync(train_params(mesh))


def main(work: str, directory: str) -> None:
    processes.join()
    template.extract_snippet = lambda text: template.Snippet(text, 0)
    engine, weights = {'apart': apart, 'together': together, 'one': one}[work]()
    found = []
    for seed in range(2):
        rng = random.Random(2 * jax.process_index() + seed)
        engine.executor = FakePool(answer, lambda code: rng.random() * 0.1 * (1 + jax.process_index()))  # noqa: B023
        episodes = engine.run(weights, 0, requests(), 4)
        found.append((episodes, len(engine.executor.codes), engine.stats.episodes))
    long = processes.gather('x' * (10_000 * (1 + jax.process_index())))  # beyond what goes with the first all-gather
    assert [len(x) for x in long] == [10_000 * (1 + i) for i in range(jax.process_count())]
    with open(pathlib.Path(directory) / f'{work}_{jax.process_index()}.pkl', 'wb') as file:
        pickle.dump(found, file)


if __name__ == '__main__':
    main(*sys.argv[1:])
