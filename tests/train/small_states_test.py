"""Optimizer states and gradients that take less memory: what they hold, and what they cost in a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retool_jax.core import sharding
from retool_jax.model import decoder
from retool_jax.train.learner import Learner
from retool_jax.train.pack import pack
from retool_jax.train.state import (
    OptimizerSettings,
    init_state,
    lowered,
    make_optimizer,
    round_by_chance,
    scale_by_adam_bf16,
)
from tests.model.sizes import make_config, make_params
from tests.train import small

WIDE = make_config(hidden_size=128, intermediate_size=256)  # matrices are factored from 128 on
EPISODES = small.make_episodes(16)


def make(kind: str, **changes):
    values = dict(lr=small.LR, schedule='constant', warmup_steps=0, b1=0.9, b2=0.95, weight_decay=0.1, grad_clip=1.0)
    return make_optimizer(OptimizerSettings(**values | dict(kind=kind) | changes), 10)


def bytes_of(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_rounding_by_chance_takes_a_neighbour_and_is_right_in_the_mean():
    x = np.float32([1.0, 1.001, -3.1415927, 1e-20, 0.0, 250.7])
    found = np.stack([round_by_chance(x, jax.random.key(i)) for i in range(4000)]).astype(np.float64)
    exact = np.float64(x)
    step = 2.0 ** (np.floor(np.log2(np.abs(np.where(exact == 0, 1, exact)))) - 7)  # bf16: 8 significant bits
    assert (np.abs(found - exact) < step).all()
    assert (np.abs(found.mean(axis=0) - exact) <= 4 * step / np.sqrt(4000)).all()
    assert (found[:, [0, 4]] == exact[[0, 4]]).all()  # what bf16 holds stays as it is


def test_second_moments_in_bf16_move_by_steps_that_are_smaller_than_bf16s():
    small_steps = scale_by_adam_bf16(0.9, 0.999)
    params = {'weight': jnp.zeros(1000)}
    state = small_steps.init(params)
    assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype('bfloat16')}
    update = jax.jit(small_steps.update)
    for _ in range(300):
        _, state = update({'weight': jnp.ones(1000)}, state, params)
    assert float(state.nu['weight'].astype(jnp.float32).mean()) == pytest.approx(1 - 0.999**300, rel=0.01)
    # To the nearest it would have stopped where a thousandth of 1 is less than half a step.
    nearest = jnp.bfloat16(0)
    for _ in range(300):
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
    assert float(nearest) == 0.25 < 0.99 * (1 - 0.999**300)


def test_adamw_in_bf16_makes_adamws_steps_in_half_the_memory():
    params = {'policy': make_params(WIDE)}
    rng, found = np.random.default_rng(0), {}
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(5)]
    for kind in ('adamw', 'adamw_bf16'):
        optimizer = make(kind)
        state, update, walked = optimizer.init(params), jax.jit(optimizer.update), params
        for gradient in gradients:
            changes, state = update(gradient, state, walked)
            walked = optax.apply_updates(walked, changes)
        found[kind] = (bytes_of(state), jax.tree.map(np.subtract, walked, params))
    assert found['adamw_bf16'][0] < 0.51 * found['adamw'][0]
    assert small.distance(found['adamw_bf16'][1], found['adamw'][1]) < 0.02


def test_adafactor_is_the_papers_in_next_to_no_memory():
    weight, norm = np.full((128, 256), 0.5, np.float32), np.ones(7, np.float32)
    params = {'policy': {'dense': {'weight': weight}, 'norm': {'weight': norm}}}
    rng, optimizer = np.random.default_rng(0), make('adafactor', grad_clip=1e9)
    state, walked = optimizer.init(params), params
    assert bytes_of(state) < 0.02 * weight.nbytes
    rows, columns, whole, now = np.zeros(128), np.zeros(256), np.zeros(7), (np.float64(weight), np.float64(norm))
    for t in (1, 2, 3):
        a, b = rng.normal(size=weight.shape).astype(np.float32), rng.normal(size=norm.shape).astype(np.float32)
        changes, state = optimizer.update({'policy': {'dense': {'weight': a}, 'norm': {'weight': b}}}, state, walked)
        walked = optax.apply_updates(walked, changes)
        decay = 1 - t**-0.8
        rows = decay * rows + (1 - decay) * np.square(a, dtype=np.float64).mean(axis=1)
        columns = decay * columns + (1 - decay) * np.square(a, dtype=np.float64).mean(axis=0)
        whole = decay * whole + (1 - decay) * np.square(b, dtype=np.float64)
        steps = a / np.sqrt(np.outer(rows, columns) / rows.mean()), b / np.sqrt(whole)
        clipped = [step / max(1.0, np.sqrt(np.square(step).mean())) for step in steps]
        now = now[0] - small.LR * (clipped[0] + 0.1 * now[0]), now[1] - small.LR * clipped[1]
    np.testing.assert_allclose(walked['policy']['dense']['weight'], now[0], atol=2e-6)
    np.testing.assert_allclose(walked['policy']['norm']['weight'], now[1], atol=2e-6)


def tuned(mesh, kind, **forward):
    """Two supervised steps of WIDE: the state after them and the metrics."""
    learner = Learner(WIDE, small.make_forward(micro_rows=4, **forward), make(kind), mesh)
    axes = {'policy': decoder.logical_axes(WIDE)}
    placed = sharding.shardings(mesh, axes, decoder.fit_rules(WIDE, mesh, sharding.TRAIN_RULES))
    state = init_state(jax.device_put({'policy': make_params(WIDE)}, placed), learner.optimizer)
    batch, lies = pack(EPISODES, width=48, rows=4, segments=2), jax.tree.map(lambda x: x.sharding, state)
    for _ in range(2):
        state, metrics = learner.sft_step(state, batch)
    for before, after in zip(jax.tree.leaves(lies), jax.tree.leaves(state)):
        assert after.sharding.is_equivalent_to(before, after.ndim)
    return jax.device_get((state, metrics))


@pytest.mark.parametrize('kind', [pytest.param('adamw_bf16', marks=pytest.mark.slow), 'adafactor'])
def test_on_a_mesh_steps_and_states_are_those_of_one_device_and_lie_as_they_began(kind):
    found, expected = (
        tuned(mesh, kind) for mesh in (sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}), small.one_device())
    )
    assert small.distance(found[0].params, expected[0].params) < 1e-4
    assert small.distance(found[0].opt_state, expected[0].opt_state) < 1e-2
    assert found[1]['sft/loss'] == pytest.approx(expected[1]['sft/loss'], rel=1e-4)


def test_gradients_in_the_forward_dtype_are_those_in_f32_rounded_and_the_loss_is_the_same_to_the_bit():
    found, batch = {}, pack(EPISODES, width=48, rows=2, segments=2)
    for dtype in ('float32', 'bfloat16'):
        forward = small.make_forward(dtype='bfloat16', gradient_dtype=dtype)
        learner = small.make_learner(rl=False, forward=forward)
        state = make_state(learner)
        zeros = learner._zeros(state.params)
        norms = zeros['policy']['norm']['weight'].dtype, zeros['policy']['layers']['input_layernorm']['weight'].dtype
        assert norms == (jnp.float32, jnp.float32)  # gains multiply in f32
        assert zeros['policy']['layers']['mlp']['up_proj']['weight'].dtype == dtype
        state, metrics = learner.sft_step(state, batch)
        found[dtype] = small.gradient(state), float(metrics['sft/loss'])
    assert found['bfloat16'][1] == found['float32'][1]
    assert 0 < small.distance(found['bfloat16'][0], found['float32'][0]) < 0.01
    assert {x.dtype for x in jax.tree.leaves(found['bfloat16'][0])} == {np.dtype('float32')}  # the optimizer's


def make_state(learner):
    return init_state({'policy': jax.tree.map(jnp.copy, small.make_tree('none')['policy'])}, learner.optimizer)


def test_a_critics_head_has_its_gradient_in_f32():
    low = lowered(small.make_tree('head'), 'bfloat16')
    assert {x.dtype for x in jax.tree.leaves(low['critic'])} == {jnp.dtype('float32')}
    assert low['policy']['embed_tokens']['weight'].dtype == jnp.bfloat16


@pytest.mark.parametrize('kind', ['adam', 'Adafactor', ''])
def test_an_unknown_optimizer_is_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match=f"kind='{kind}' is unknown; choose one of adamw, adamw_bf16, adafactor"):
        make(kind)


def test_a_gradient_dtype_that_is_neither_f32_nor_the_forward_passs_is_refused():
    with pytest.raises(ValueError, match=r"gradient_dtype='bfloat16': expected float32 or \./dtype=float32"):
        small.make_forward(gradient_dtype='bfloat16')
