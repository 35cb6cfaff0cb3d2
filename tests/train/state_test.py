"""Optimizer and state: schedules, what is decayed, what is held, and which critics there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.train.state import (
    OptimizerSettings,
    add_critic,
    init_state,
    make_optimizer,
    make_schedule,
)
from tests.model.sizes import make_config, make_params


def settings(**changes):
    return OptimizerSettings(
        **(
            dict(
                kind='adamw',
                lr=0.5,
                schedule='constant',
                warmup_steps=0,
                b1=0.9,
                b2=0.999,
                weight_decay=0.1,
                grad_clip=1.0,
            )
            | changes
        )
    )


def rates(schedule, at, steps=24, warmup=4):
    found = make_schedule(settings(schedule=schedule, warmup_steps=warmup), steps)
    return [float(found(step)) for step in at]


def walk(optimizer, params, gradients):
    """Parameters after each of the steps with these gradients."""
    state, found, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = params | {part: jax.tree.map(jnp.add, params[part], changes) for part, changes in updates.items()}
        found.append(params)
    return found


@pytest.mark.parametrize(('schedule', 'expected'), [
    ('constant', [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    ('linear', [0.5, 0.475, 0.25, 0.125, 0.025, 0.0]),
    ('cosine', [0.5, 0.5 * (1 + np.cos(np.pi / 20)) / 2, 0.25, 0.5 * (1 + np.cos(0.75 * np.pi)) / 2,
                0.5 * (1 + np.cos(0.95 * np.pi)) / 2, 0.0]),
    ('wsd', [0.5, 0.5, 0.5, 0.5, 0.1, 0.0]),  # the last quarter of 20 steps falls by a fifth each
])  # fmt: skip
def test_a_schedule_warms_up_and_then_takes_its_course(schedule, expected):
    assert rates(schedule, (0, 1, 2, 3)) == pytest.approx([0, 0.125, 0.25, 0.375])
    assert rates(schedule, (4, 5, 14, 19, 23, 24)) == pytest.approx(expected, abs=1e-7)
    assert rates(schedule, (0, 1, 10, 15, 19, 20), steps=20, warmup=0) == pytest.approx(expected, abs=1e-7)


def test_wsd_holds_its_rate_for_three_quarters_and_falls_in_a_straight_line():
    found = rates('wsd', range(101), steps=100, warmup=0)
    assert found[:76] == [0.5] * 76 and found[-1] == 0
    assert np.diff(found[75:]) == pytest.approx([-0.02] * 25, rel=1e-3)


@pytest.mark.parametrize('model_type', ['qwen2', 'qwen3'])
def test_matrices_are_decayed_and_norms_and_biases_are_not(model_type):
    config = make_config(model_type)
    params = add_critic(config, make_params(config), 'backbone')
    params['critic']['head'] = jax.tree.map(jnp.ones_like, params['critic']['head'])
    optimizer = make_optimizer(settings(), 10, settings())
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = dict(jax.tree_util.tree_leaves_with_path(walk(optimizer, params, [zeros])[0]))
    kept = set()
    for path, before in jax.tree_util.tree_leaves_with_path(params):
        words = {key.key for key in path}
        if words & {'bias', 'norm', 'input_layernorm', 'post_attention_layernorm', 'q_norm', 'k_norm'}:
            kept |= words
            np.testing.assert_array_equal(after[path], before)
        else:
            np.testing.assert_allclose(after[path], before * (1 - 0.5 * 0.1), rtol=1e-5)
    assert kept > {'norm', 'bias', 'input_layernorm', 'q_proj' if model_type == 'qwen2' else 'q_norm'}


def small_tree():
    weight = lambda x: {'layer': {'weight': jnp.full((2, 2), x)}}
    return {'policy': weight(1.0), 'critic': weight(1.0)}


def moves(states, part):
    """Which of the steps changed a part."""
    at = lambda tree: np.asarray(tree[part]['layer']['weight'])
    return [bool((at(a) != at(b)).any()) for a, b in zip([small_tree(), *states], states)]


def test_the_policy_is_held_while_the_critic_warms_up():
    ones = jax.tree.map(jnp.ones_like, small_tree())
    held = make_optimizer(settings(schedule='linear'), 8, settings(), critic_warmup_steps=3)
    states = walk(held, small_tree(), [{'critic': ones['critic']}] * 3 + [ones] * 5)
    assert moves(states, 'policy') == [False] * 3 + [True] * 5
    assert moves(states, 'critic') == [True] * 8
    plain = walk(make_optimizer(settings(schedule='linear'), 8, settings()), small_tree(), [ones] * 8)
    assert moves(plain, 'policy') == [True] * 8
    # The course of the schedule begins where the hold ends: first at the full rate, last at a fifth of it.
    sizes = [
        float(jnp.abs(b['policy']['layer']['weight'] - a['policy']['layer']['weight']).max())
        for a, b in itertools.pairwise(states[2:])
    ]
    assert sizes[0] > 0.5 > 0.15 > sizes[-1]


def test_a_part_without_gradients_keeps_its_moments_and_its_count():
    ones = jax.tree.map(jnp.ones_like, small_tree())
    optimizer = make_optimizer(settings(), 8, settings(), critic_warmup_steps=3)
    first = optimizer.init(small_tree())
    state, params = first, small_tree()
    for _ in range(3):
        updates, state = optimizer.update({'critic': ones['critic']}, state, params)
        assert set(updates) == {'critic'}
    jax.tree.map(np.testing.assert_array_equal, state['policy'], first['policy'])
    # The first step is then that of a policy that was never held, bias correction and all.
    moved = optimizer.update(ones, state, params)[0]['policy']
    jax.tree.map(np.testing.assert_array_equal, moved, optimizer.update(ones, first, params)[0]['policy'])


def test_each_part_is_clipped_on_its_own():
    optimizer = make_optimizer(settings(), 4, settings())
    gradients = lambda scale: [
        {'policy': {'layer': {'weight': jnp.full((2, 2), x)}}, 'critic': {'layer': {'weight': jnp.full((2, 2), scale)}}}
        for x in (0.1, 0.3)
    ]
    calm, wild = (walk(optimizer, small_tree(), gradients(scale))[-1] for scale in (0.1, 1e9))
    np.testing.assert_array_equal(calm['policy']['layer']['weight'], wild['policy']['layer']['weight'])
    # 1e9 counts as 0.5 a number, the norm of four of them being 1: two equal steps of AdamW.
    equal = walk(optimizer, small_tree(), gradients(0.5))[-1]
    np.testing.assert_allclose(wild['critic']['layer']['weight'], equal['critic']['layer']['weight'], rtol=1e-5)


def test_a_policy_without_a_critic_is_trained_alone():
    config = make_config()
    tree = add_critic(config, make_params(config), 'none')
    assert set(tree) == {'policy'}
    state = init_state(tree, make_optimizer(settings(), 4))
    assert int(state.step) == 0 and state.params is tree


def test_a_head_begins_at_zero_and_a_backbone_with_its_own_copy_of_the_policy():
    config = make_config()
    policy = make_params(config)
    head = add_critic(config, policy, 'head')
    assert set(head['critic']) == {'head'} and head['policy'] is policy
    assert head['critic']['head']['weight'].shape == (config.hidden_size, 1)
    assert not any(np.any(x) for x in jax.tree.leaves(head['critic']))
    trunk = add_critic(config, policy, 'backbone')['critic']['backbone']
    assert set(trunk) == {'embed_tokens', 'layers', 'norm'}  # no output matrix
    for name, part in trunk.items():
        jax.tree.map(np.testing.assert_array_equal, part, policy[name])
    jax.tree.map(lambda x: x.delete(), trunk)  # as a donated state does
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(policy))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="schedule='step' is unknown; choose one of constant, cosine, linear, wsd"):
        make_schedule(settings(schedule='step'), 10)
    with pytest.raises(ValueError, match="critic 'heads' is unknown; choose one of none, head, backbone"):
        add_critic(make_config(), make_params(make_config()), 'heads')


@pytest.mark.parametrize('kind', ['head', 'backbone'])
def test_critic_and_counters_lie_on_every_device_of_the_policys_mesh(kind):
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 8, 'tensor': 1})
    whole = jax.NamedSharding(mesh, jax.P())
    config = make_config()
    policy = jax.device_put(make_params(config), whole)
    state = init_state(add_critic(config, policy, kind), make_optimizer(settings(), 4, settings()))
    assert {x.sharding.mesh for x in jax.tree.leaves(state)} == {mesh}
