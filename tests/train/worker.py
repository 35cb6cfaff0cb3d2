"""One process of a run over eight devices in all: updates from an episode file, or the restoring of a checkpoint.

    RETOOL_PROCESSES=2 RETOOL_COORDINATOR=127.0.0.1:9876 RETOOL_PROCESS=0 python -m tests.train.worker update DIR

Reads DIR/episodes; writes DIR/run (checkpoints, metrics) and DIR/<work>.npz, the parameters as every process
has them. Run by processes_test.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from retool_jax.core import episode_files, processes, sharding
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.metrics import Metrics
from retool_jax.model import decoder
from retool_jax.train.learner import Learner
from retool_jax.train.pack import join, pack
from retool_jax.train.state import init_state
from tests.train import small

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}
FORWARD = dict(micro_rows=4, row_segments=3)


def start_state(mesh, optimizer, critic: str):
    """The same weights in every process; each makes the parts of its own devices."""
    axes = decoder.logical_axes(small.CONFIG)
    words = {
        'policy': axes,
        'critic': {
            'head': {'weight': ('embed', None), 'bias': (None,)},
            'backbone': {name: axes[name] for name in ('embed_tokens', 'layers', 'norm')},
        },
    }
    tree = jax.tree.map(np.asarray, small.make_tree(critic))
    shardings = sharding.shardings(mesh, {name: words[name] for name in tree}, sharding.TRAIN_RULES)
    place = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
    return init_state(jax.tree.map(place, tree, shardings), optimizer)


def whole(tree):
    """Host copies of arrays that lie on several processes."""
    return [np.asarray(multihost_utils.process_allgather(x, tiled=True)) for x in jax.tree.leaves(tree)]


def update(directory: Path, mesh) -> list[np.ndarray]:
    """A supervised step and two PPO steps; saves the last state."""
    episodes = episode_files.read(directory / 'episodes')
    optimizer = optax.adamw(small.LR, weight_decay=0.01)
    make = lambda **kwargs: Learner(small.CONFIG, small.make_forward(**FORWARD), optimizer, mesh, **kwargs)
    batch = pack(episodes, width=48, rows=4, segments=3, groups=[int(e.problem.id[1:]) for e in episodes])
    sft, found = make().sft_step(start_state(mesh, optimizer, 'none'), batch)

    learner = make(loss=small.make_loss(), advantage=small.make_advantage())
    state = start_state(mesh, optimizer, 'backbone')
    batch, ((_, stop),) = join([batch])
    batch = learner.put(batch)
    own = [s.data.shape[0] for s in batch.tokens_BT.addressable_shards]
    assert sum(own) == batch.tokens_BT.shape[0] * MESH['tensor'] // jax.process_count()  # each reads its own rows
    scores = learner.score(state.params, batch, stop, None, num_groups=4)
    metrics = []
    for _ in range(2):
        state, more = learner.ppo_step(state, batch, scores, (0, stop))
        metrics.append(jax.device_get(more))
    with Metrics(directory / 'run', active=processes.leads(), tensorboard=False) as writer:
        writer.write(0, jax.device_get(found))
        for step, more in enumerate(metrics, start=1):
            writer.write(step, more)
    with Checkpoints(directory / 'run' / 'checkpoints', keep_last=1) as checkpoints:
        checkpoints.save(2, state, {'step': 2}, wait=True)
    return whole((sft.params, state.params, state.opt_state))


def restore(directory: Path, mesh) -> list[np.ndarray]:
    """The saved parameters and moments, on this run's processes."""
    state = start_state(mesh, optax.adamw(small.LR, weight_decay=0.01), 'backbone')
    with Checkpoints(directory / 'run' / 'checkpoints', keep_last=1) as checkpoints:
        state, meta = checkpoints.restore(2, state)
    assert meta == {'step': 2} and int(state.step) == 2
    return whole((state.params, state.opt_state))


def main(work: str, directory: str, name: str) -> None:
    processes.join()
    mesh = sharding.make_mesh(MESH)
    assert mesh.size == 8
    leaves = {'update': update, 'restore': restore}[work](Path(directory), mesh)
    np.savez(Path(directory) / f'{name}_{jax.process_index()}.npz', *leaves)


if __name__ == '__main__':
    main(*sys.argv[1:])
