"""Which large buffers a device holds in which phase of an RL step; the others wait in the host's memory.

| phase   | policy, f32 | critic | optimizer state | reference | sampling weights | KV cache |
|---------|-------------|--------|-----------------|-----------|------------------|----------|
| sync    | x           |        |                 |           | x                |          |
| rollout |             |        |                 |           | x                | x        |
| score   | x           | x      |                 | x         |                  |          |
| update  | x           | x      | x               |           |                  |          |

The last two columns need no moving: sync makes the first, the rollout the other, and both are dropped when it returns.
Without `ppo.offload` sync and rollout are one: everything is always on the device. Weights that are frozen
under adapters stay on the device in every phase, and are the reference too.
"""

from __future__ import annotations

import dataclasses

import jax

from retool_jax.core.pytrees import Params, TrainState

ON_DEVICE = {
    'sync': ('policy',),
    'rollout': (),
    'score': ('policy', 'critic', 'reference'),
    'update': ('policy', 'critic', 'optimizer'),
}


@dataclasses.dataclass
class Residency:
    """Moves what may wait to the host and back; moving changes no bit.

    offload: False leaves everything on the device (small models: a copy costs more than the room).
    """

    offload: bool
    reference: Params | None = None

    def enter(self, phase: str, state: TrainState) -> TrainState:
        """The state with what `phase` needs on the device and the rest on the host; the reference follows."""
        if not self.offload:
            return state
        here = ON_DEVICE[phase]
        move = lambda tree, name: _move(tree, 'device' if name in here else 'pinned_host')
        self.reference = move(self.reference, 'reference')
        params = {part: move(tree, part) for part, tree in state.params.items()}
        return dataclasses.replace(state, params=params, opt_state=move(state.opt_state, 'optimizer'))

    def whole(self, state: TrainState) -> TrainState:
        """The state on the device, as a checkpoint is written."""
        return self.enter('update', state)


def _move(tree, kind: str):
    """Every array of a tree in the memory `kind` of its own devices."""

    def put(x):
        if not isinstance(x, jax.Array) or x.sharding.memory_kind == kind:
            return x
        return jax.device_put(x, x.sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)
