"""PPO on meshes: every factorisation of the devices makes the step of one device, critic and all."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.model import decoder
from retool_jax.train.learner import Learner
from retool_jax.train.pack import join, pack
from retool_jax.train.state import add_critic, init_state
from tests.model.mesh_test import CONFIG, collectives, is_logits
from tests.model.sizes import make_params
from tests.train import small

SIZES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]
QUICK = ((1, 2, 4),)  # more tensor parts than KV heads
EPISODES = small.make_episodes(16)


@functools.cache
def make_tree():
    """Policy and critic of CONFIG on the host; the critic's head is not zero."""
    tree = jax.tree.map(np.asarray, add_critic(CONFIG, make_params(CONFIG), 'backbone'))
    tree['critic']['head']['weight'] = np.random.default_rng(0).normal(0, 0.1, (32, 1)).astype(np.float32)
    return tree


def scored_on(mesh, rows=8):
    """A learner on a mesh, its first state, a batch and how many of its rows count, and the batch's scores."""
    rules, axes = decoder.fit_rules(CONFIG, mesh, sharding.TRAIN_RULES), decoder.logical_axes(CONFIG)
    words = {
        'policy': axes,
        'critic': {
            'head': {'weight': ('embed', None), 'bias': (None,)},
            'backbone': {name: axes[name] for name in ('embed_tokens', 'layers', 'norm')},
        },
    }
    learner = Learner(
        CONFIG,
        small.make_forward(micro_rows=rows, vocab_chunk=40),
        small.recording(),
        mesh,
        loss=small.make_loss(),
        advantage=small.make_advantage(),
    )
    state = init_state(jax.device_put(make_tree(), sharding.shardings(mesh, words, rules)), learner.optimizer)
    batch, ((_, stop),) = join(
        [pack(EPISODES, width=48, rows=rows, segments=2, groups=[int(e.problem.id[1:]) for e in EPISODES])], rows
    )
    batch = learner.put(batch)
    return learner, state, batch, stop, learner.score(state.params, batch, stop, None, num_groups=8)


def step_on(mesh, rows=8):
    """Gradients, parameters after AdamW, metrics and scores of one PPO step."""
    learner, state, batch, stop, scores = scored_on(mesh, rows)
    placed = jax.tree.map(lambda x: x.sharding, state.params)
    state, metrics = learner.ppo_step(state, batch, scores, (0, stop))
    for before, after in zip(jax.tree.leaves(placed), jax.tree.leaves(state.params)):
        assert after.sharding.is_equivalent_to(before, after.ndim)
    return small.gradient(state), jax.device_get(state.params), jax.device_get(metrics), jax.device_get(scores)


@functools.cache
def on_one_device(rows=8):
    return step_on(small.one_device(), rows)


@pytest.mark.parametrize(
    'sizes',
    [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SIZES],
    ids=lambda s: 'x'.join(map(str, s)),
)
def test_a_ppo_step_is_that_of_one_device(sizes):
    assert_same_step(step_on(sharding.make_mesh(dict(zip(sharding.AXES, sizes)))), on_one_device())


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(3, 2, 1), (3, 1, 1)], ids=str)
def test_a_step_on_devices_that_are_no_power_of_two_is_that_of_one_device(sizes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[: np.prod(sizes)])
    assert_same_step(step_on(mesh, rows=6), on_one_device(6))


def test_a_supervised_step_on_six_devices_is_that_of_one():
    def run(mesh, rows):
        learner = Learner(CONFIG, small.make_forward(micro_rows=rows), small.recording(), mesh)
        params = {'policy': make_tree()['policy']}
        rules, axes = decoder.fit_rules(CONFIG, mesh, sharding.TRAIN_RULES), {'policy': decoder.logical_axes(CONFIG)}
        state = init_state(jax.device_put(params, sharding.shardings(mesh, axes, rules)), learner.optimizer)
        batch = pack(EPISODES, width=48, rows=learner.forward.micro_rows, segments=2)
        loss = learner.sft_loss(state.params, batch)
        state, metrics = learner.sft_step(state, batch)
        return small.gradient(state), loss, float(metrics['sft/loss'])

    found = run(sharding.make_mesh({'data': 3, 'fsdp': 2, 'tensor': 1}, jax.devices()[:6]), 0)
    expected = run(small.one_device(), 4)
    assert small.distance(found[0], expected[0]) < 1e-5
    assert found[1:] == pytest.approx(expected[1:], rel=1e-5)


def assert_same_step(found, expected):
    """Gradients, parameters, metrics and scores of `step_on`, up to the order of additions."""
    small.assert_same_step(found, expected)
    for a, b in zip(jax.tree.leaves(found[3]), jax.tree.leaves(expected[3])):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_a_ppo_update_gathers_no_logits_of_the_whole_vocabulary():
    learner, state, batch, stop, scores = scored_on(sharding.make_mesh(dict(zip(sharding.AXES, QUICK[0]))))
    micro, scored = next(learner._micro((batch, scores), 0, stop))
    policy = {'policy': state.params['policy']}
    found = collectives(
        learner._ppo.lower(
            params=policy,
            gradients=policy,
            micro=micro,
            scores=scored,
            denominators=learner._denominators(batch, 0, stop),
            fresh=np.bool_(False),
        ).compile()
    )
    assert {'all-gather', 'all-reduce'} <= {kind for kind, _ in found}
    assert [x for x in found if is_logits(x[1])] == []


@pytest.mark.parametrize(
    'forward, message',
    [
        (
            dict(micro_rows=6),
            r'forward.micro_rows=6 does not divide over data × fsdp = 4 devices; choose a multiple, or 0',
        ),
        (dict(row_width=49, logprob_chunk=49), r'forward.row_width=49 does not divide over tensor=2'),
    ],
)
def test_rows_that_do_not_divide_are_refused_by_name(forward, message):
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    with pytest.raises(ValueError, match=message):
        Learner(CONFIG, small.make_forward(**({'micro_rows': 4} | forward)), small.recording(), mesh)
    whole = Learner(CONFIG, small.make_forward(micro_rows=0), small.recording(), mesh)
    assert whole.forward.micro_rows == 4
