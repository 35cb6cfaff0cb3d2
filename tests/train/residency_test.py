"""Where the large buffers are in each phase."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retool_jax.train.ppo import Progress, sampling_weights
from retool_jax.train.residency import Residency
from retool_jax.train.state import init_state

HOST, DEVICE = 'pinned_host', 'device'
TABLE = {  # policy, critic, optimizer, reference
    'sync': (DEVICE, HOST, HOST, HOST),
    'rollout': (HOST, HOST, HOST, HOST),
    'score': (DEVICE, DEVICE, HOST, DEVICE),
    'update': (DEVICE, DEVICE, DEVICE, HOST),
}


def make_state():
    tree = {name: {'weight': jnp.arange(6.0).reshape(2, 3) + i} for i, name in enumerate(('policy', 'critic'))}
    return init_state(tree, optax.adamw(1e-3))


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize('phases', [('sync', 'rollout', 'score', 'update', 'sync'), ('update', 'rollout', 'update')])
def test_each_phase_holds_what_the_table_says_and_no_bit_changes(phases):
    state = expected = make_state()
    residency = Residency(True, reference={'weight': jnp.ones(3)})
    for phase in phases:
        state = residency.enter(phase, state)
        found = tuple(
            kinds(tree)
            for tree in (state.params['policy'], state.params['critic'], state.opt_state, residency.reference)
        )
        assert found == tuple({kind} for kind in TABLE[phase]), phase
        jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert kinds(residency.whole(state)) == {DEVICE}


def test_without_a_critic_or_a_reference_there_is_less_to_move():
    state = init_state({'policy': {'weight': jnp.ones(3)}}, optax.adamw(1e-3))
    residency = Residency(True)
    assert kinds(residency.enter('rollout', state).opt_state) == {HOST} and residency.reference is None


def test_nothing_moves_unless_asked():
    state = make_state()
    assert Residency(False).enter('rollout', state) is state


def test_sampling_weights_are_made_of_weights_on_the_device_which_then_wait_on_the_host():
    progress, seen = Progress(make_state()), []
    weights = sampling_weights(progress, Residency(True), lambda policy: seen.append(kinds(policy)) or policy['weight'])
    assert seen == [{DEVICE}] and kinds(weights) == {DEVICE}
    assert kinds(progress.state.params) == kinds(progress.state.opt_state) == {HOST}
