"""Learning adapters: gradients by the chain rule, nothing else moved, and the same step on every mesh."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retool_jax.core import sharding
from retool_jax.model import decoder, lora
from retool_jax.model.layers import PROJECTIONS, merge
from retool_jax.model.lora import LoRASettings
from retool_jax.train.learner import Learner
from retool_jax.train.pack import join, pack
from retool_jax.train.state import add_critic, init_state
from tests.model import mesh_test as model_mesh
from tests.model.sizes import make_params
from tests.train import small

LORA = LoRASettings(rank=2, alpha=3.0, targets=PROJECTIONS)
KL = small.make_loss(kl_coef=0.1)
EPISODES = small.make_episodes(16)


def make_tree(config, critic='backbone', seed=0):
    """What is trained: adapters of which no B is zero, others for the critic, and a head that is not zero."""
    rng = np.random.default_rng(seed)
    drawn = lambda tree: jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), tree)
    return drawn(add_critic(config, drawn(lora.abstract(config, LORA)), critic))


def merged(frozen, adapters):
    """The weights that adapters make, for a learner that knows none."""
    whole = jax.tree.map(jnp.copy, lora.over(frozen, adapters, LORA.scale))  # a step takes what it is given
    return whole | {'layers': jax.vmap(merge)(whole['layers'])}


def chained(gradient, adapters):
    """Gradients of A and B by those of W = W₀ + s·A·B: s·(dL/dW)·Bᵀ and s·Aᵀ·(dL/dW), layer by layer."""
    if 'lora_A' not in adapters:
        return {name: chained(gradient[name], node) for name, node in adapters.items()}
    a, b = (np.asarray(adapters[name]['weight'], np.float64) for name in ('lora_A', 'lora_B'))
    a_LIR, b_LRO = a.reshape(len(a), -1, LORA.rank), b.reshape(len(b), LORA.rank, -1)
    g_LIO = np.asarray(gradient['weight'], np.float64).reshape(len(a), a_LIR.shape[1], b_LRO.shape[2])
    da, db = g_LIO @ b_LRO.swapaxes(1, 2), a_LIR.swapaxes(1, 2) @ g_LIO
    return {
        'lora_A': {'weight': LORA.scale * da.reshape(a.shape)},
        'lora_B': {'weight': LORA.scale * db.reshape(b.shape)},
    }


def make_learner(**changes) -> Learner:
    return Learner(
        small.CONFIG, small.make_forward(), small.recording(), small.one_device(), adapter_scale=LORA.scale, **changes
    )


def moved_by(optimizer, tree, gradients):
    updates, _ = optimizer.update(gradients, optimizer.init(tree), tree)
    return optax.apply_updates(tree, updates)


def test_a_supervised_step_is_the_optimizers_on_the_chain_rule_of_the_full_gradient():
    frozen, adapters = make_params(small.CONFIG), make_tree(small.CONFIG, 'none')['policy']
    learner, batch = make_learner(), pack(EPISODES, width=48, rows=8, segments=3)
    kept = jax.device_get(adapters)
    full, told = learner.sft_step(init_state({'policy': merged(frozen, adapters)}, learner.optimizer), batch)
    wanted = chained(small.gradient(full)['policy'], kept)
    learner = learner.over(frozen)
    loss = learner.sft_loss({'policy': adapters}, batch)
    state, metrics = learner.sft_step(init_state({'policy': adapters}, learner.optimizer), batch)
    found = small.gradient(state)
    assert jax.tree.structure(found) == jax.tree.structure({'policy': wanted})
    assert small.distance(found, {'policy': wanted}) < 1e-5
    assert float(metrics['sft/loss']) == pytest.approx(float(told['sft/loss']), rel=1e-5) == pytest.approx(loss)
    step = moved_by(small.recording(), {'policy': kept}, found)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), state.params, step)
    jax.tree.map(np.testing.assert_array_equal, frozen, make_params(small.CONFIG))


@pytest.mark.slow
@pytest.mark.parametrize('critic', ['head', 'backbone'])
def test_a_ppo_step_with_critic_and_reference_is_that_of_the_merged_weights_by_the_chain_rule(critic):
    frozen, tree = make_params(small.CONFIG), make_tree(small.CONFIG, critic)
    whole = {'policy': merged(frozen, tree['policy']), 'critic': dict(tree['critic'])}
    if critic == 'backbone':
        whole['critic']['backbone'] = merged(frozen, tree['critic']['backbone'])
    batch, ((_, stop),) = join([pack(EPISODES, width=48, rows=8, segments=3, groups=[0] * 16)])

    def take(learner, tree, reference):
        rows = learner.put(batch)
        scores = learner.score(tree, rows, stop, reference, num_groups=1)
        state, metrics = learner.ppo_step(
            init_state(jax.tree.map(jnp.copy, tree), learner.optimizer), rows, scores, (0, stop)
        )
        return small.gradient(state), jax.device_get(metrics), jax.device_get(scores)

    make = functools.partial(make_learner, loss=KL, advantage=small.make_advantage())
    full, told, scored = take(make(), whole, frozen)
    found, metrics, scores = take(make().over(frozen), tree, {})  # no adapters: the reference is the frozen model
    wanted = {'policy': chained(full['policy'], tree['policy']), 'critic': {'head': full['critic']['head']}}
    if critic == 'backbone':
        wanted['critic']['backbone'] = chained(full['critic']['backbone'], tree['critic']['backbone'])
    assert small.distance(found['policy'], wanted['policy']) < 1e-5
    assert small.distance(found['critic'], wanted['critic']) < 1e-5
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), scores, scored)
    assert np.abs(scores.reference_logprob_BT - scores.logprob_BT).max() > 0.1
    for name in metrics.keys() - {'actor/grad_norm', 'critic/grad_norm'}:
        np.testing.assert_allclose(metrics[name], told[name], rtol=1e-4, atol=1e-5, err_msg=name)


def step_on(mesh):
    """Gradients, parameters after AdamW and metrics of a PPO step over adapters, the critic's own among them."""
    config = model_mesh.CONFIG
    rules, own = decoder.fit_rules(config, mesh, sharding.TRAIN_RULES), lora.logical_axes(config, LORA)
    words = {'policy': own, 'critic': {'head': {'weight': ('embed', None), 'bias': (None,)}, 'backbone': own}}
    place = lambda tree, axes: jax.device_put(tree, sharding.shardings(mesh, axes, rules))
    learner = Learner(
        config,
        small.make_forward(micro_rows=8, vocab_chunk=40, remat='full', unroll=1),
        small.recording(),
        mesh,
        loss=small.make_loss(),
        advantage=small.make_advantage(),
        adapter_scale=LORA.scale,
    ).over(place(make_params(config), decoder.logical_axes(config)))
    state = init_state(place(make_tree(config), words), learner.optimizer)
    placed = jax.tree.map(lambda x: x.sharding, state.params)
    batch, ((_, stop),) = join([pack(EPISODES, width=48, rows=8, segments=2, groups=[0] * 16)], 8)
    batch = learner.put(batch)
    state, metrics = learner.ppo_step(
        state, batch, learner.score(state.params, batch, stop, None, num_groups=1), (0, stop)
    )
    for before, after in zip(jax.tree.leaves(placed), jax.tree.leaves(state.params)):
        assert after.sharding.is_equivalent_to(before, after.ndim)
    return small.gradient(state), jax.device_get(state.params), jax.device_get(metrics)


@functools.cache
def on_one_device():
    return step_on(small.one_device())


@pytest.mark.slow
@pytest.mark.parametrize(
    'sizes',
    [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8],
    ids=lambda s: 'x'.join(map(str, s)),
)
def test_a_step_over_adapters_is_that_of_one_device(sizes):
    found, expected = step_on(sharding.make_mesh(dict(zip(sharding.AXES, sizes)))), on_one_device()
    small.assert_same_step(found, expected)
