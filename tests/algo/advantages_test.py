"""Advantages against plain Python, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.algo import advantages, segments
from retool_jax.algo.settings import ADVANTAGE_KINDS, AdvantageSettings
from tests.algo import slow

SEEDS = range(4)
ARRANGEMENTS = tuple(slow.arrangements(slow.tales(0)))


def choose(kind: str, gamma: float = 0.9, lam: float = 0.8, whiten: bool | None = None) -> AdvantageSettings:
    whiten = kind in ('gae', 'reinforce_pp', 'reinforce_pp_baseline') if whiten is None else whiten
    return AdvantageSettings(kind=kind, gamma=gamma, lam=lam, whiten=whiten)


@jax.jit
def gae(arrays, gamma, lam):
    return advantages.gae(arrays['reward'], arrays['old_value'], arrays['acted'], gamma, lam, arrays['segment_ids'])


def run_gae(layout: slow.Layout, gamma: float, lam: float):
    return gae(layout.arrays, gamma, lam)


@functools.partial(jax.jit, static_argnums=0)
def estimate(settings: AdvantageSettings, arrays):
    return advantages.advantages(
        settings,
        arrays['reward'],
        arrays['acted'],
        arrays['segment_ids'],
        baseline_BN=arrays['baseline'],
        update_BN=arrays['update'],
        value_BT=arrays['old_value'],
        group_BN=arrays['group'],
        num_groups=3,
    )


def run(settings: AdvantageSettings, layout: slow.Layout):
    return estimate(settings, layout.arrays)


def close(found: dict[int, list[float]], expected: list[list[float]], tolerance: float = 1e-5):
    flat = [np.concatenate([x[i] for i in range(len(expected))]) for x in (found, expected)]
    assert np.linalg.norm(flat[0] - flat[1]) <= tolerance * np.linalg.norm(flat[1])


def test_gae_gives_the_worked_example_with_two_tool_tokens_in_the_middle():
    reward, value = jnp.array([[0, 0, 0, 0, 1.0]]), jnp.array([[0.5, 0.4, 9, 9, 0.3]])
    acted = jnp.array([[True, True, False, False, True]])
    advantage, returns = advantages.gae(reward, value, acted, 1.0, 0.95)
    np.testing.assert_allclose(advantage[0], [0.43675, 0.565, 0, 0, 0.7], rtol=1e-6)
    np.testing.assert_allclose(returns[0], [0.93675, 0.965, 0, 0, 1.0], rtol=1e-6)


@pytest.mark.parametrize('gamma, lam', [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize('seed', SEEDS)
def test_gae_is_the_definition_on_the_acted_tokens_alone(seed, gamma, lam):
    episodes = slow.tales(seed)
    expected = [slow.spread(t, slow.gae(t.at('reward'), t.at('old_value'), gamma, lam)) for t in episodes]
    advantage, returns = run_gae(slow.arrangements(episodes)['plain'], gamma, lam)
    layout = slow.arrangements(episodes)['plain']
    close(layout.back(advantage), expected)
    values = [slow.spread(t, t.at('old_value')) for t in episodes]
    sums = [[a + v for a, v in zip(x, y)] for x, y in zip(expected, values)]
    close(layout.back(returns), sums)


@pytest.mark.parametrize('seed', SEEDS)
def test_deleting_tool_spans_leaves_gae_unchanged(seed):
    episodes = slow.tales(seed)
    whole = slow.arrangements(episodes)['plain']
    cut = [
        slow.Tale([True] * sum(t.acted), {name: t.at(name) for name in slow.FIELDS}, t.score, t.group) for t in episodes
    ]
    bare = slow.arrangements(cut)['plain']
    for before, after in zip(run_gae(whole, 0.9, 0.8), run_gae(bare, 0.9, 0.8)):
        np.testing.assert_array_equal(np.asarray(before)[whole.acted], np.asarray(after)[bare.acted])


@pytest.mark.parametrize('name', ARRANGEMENTS)
def test_gae_never_carries_credit_over_an_episode_boundary(name):
    episodes = slow.tales(5)
    layout = slow.arrangements(episodes)[name]
    expected = [slow.spread(t, slow.gae(t.at('reward'), t.at('old_value'), 0.9, 0.8)) for t in episodes]
    close(layout.back(run_gae(layout, 0.9, 0.8)[0]), expected)


def test_gae_never_reads_the_rewards_and_values_of_tokens_that_are_not_acted():
    layout = slow.arrangements(slow.tales(1))['packed']
    spoiled = {x: np.where(layout.acted, layout.arrays[x], np.nan) for x in ('reward', 'old_value')}
    clean = run_gae(layout, 0.9, 0.8)
    for a, b in zip(clean, gae(layout.arrays | spoiled, 0.9, 0.8)):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.asarray(b)[~layout.acted] == 0)


def test_gae_is_the_same_jitted_and_vmapped():
    layout = slow.arrangements(slow.tales(2))['packed']
    arrays = (layout.reward, layout.old_value, layout.acted)
    plain = advantages.gae(*arrays, 0.9, 0.8, layout.segment_ids)
    jitted = run_gae(layout, 0.9, 0.8)
    stacked = [jnp.stack([x, x[::-1]]) for x in (*arrays, layout.segment_ids)]
    mapped = jax.vmap(lambda r, v, m, s: advantages.gae(r, v, m, 0.9, 0.8, s))(*stacked)
    for a, b, c in zip(plain, jitted, mapped):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(a, c[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(a, c[1][::-1], rtol=1e-6, atol=1e-6)


def test_the_reward_sits_on_the_last_acted_token_not_on_the_tool_output_after_it():
    acted = jnp.array([[False, True, True, False, False], [False, True, False, True, True], [False] * 5])
    found = advantages.reward_on_last_acted(jnp.array([0.5, -1.0, 1.0]), acted)
    np.testing.assert_array_equal(found, [[0, 0, 0.5, 0, 0], [0, 0, 0, 0, -1], [0] * 5])


@pytest.mark.parametrize('name', ARRANGEMENTS)
def test_every_packed_episode_keeps_its_own_reward(name):
    episodes = slow.tales(3)
    layout = slow.arrangements(episodes)[name]
    found = layout.back(advantages.reward_on_last_acted(layout.score, layout.acted, layout.segment_ids))
    for i, tale in enumerate(episodes):
        last = max(t for t, m in enumerate(tale.acted) if m)
        assert found[i] == [pytest.approx(tale.score) if t == last else 0 for t in range(len(tale.acted))]


def test_whitening_gives_unbiased_variance_one_over_the_mask_and_zero_outside():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(5, 3, (4, 9)).astype(np.float32), rng.random((4, 9)) < 0.5
    found = np.asarray(advantages.whiten(x, mask))
    np.testing.assert_allclose(found[mask], slow.whitened(x[mask].tolist()), rtol=1e-5, atol=1e-6)
    assert np.all(found[~mask] == 0)
    np.testing.assert_allclose(found[mask].std(ddof=1), 1, rtol=1e-5)
    spoiled = advantages.whiten(np.where(mask, x, np.nan), mask)
    np.testing.assert_array_equal(found, spoiled)


def test_whitening_adds_one_hundred_millionth_to_the_variance():
    x = np.float32([[-1e-4, 0, 1e-4]])  # variance 1e-8
    found = advantages.whiten(x, np.ones((1, 3), bool))
    np.testing.assert_allclose(found, [[-1 / np.sqrt(2), 0, 1 / np.sqrt(2)]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('value', [0.0, 0.1, -1.0, 1e6, 1 / 3])
@pytest.mark.parametrize('count', [0, 1, 3, 36])
def test_whitening_equal_numbers_gives_exactly_zero(value, count):
    mask = np.arange(36).reshape(4, 9) < count
    np.testing.assert_array_equal(jax.jit(advantages.whiten)(np.full((4, 9), value, np.float32), mask), 0)


def test_moments_of_parts_whiten_as_the_whole_does():
    rng = np.random.default_rng(1)
    x, mask = rng.normal(100, 1e-1, (6, 9)).astype(np.float32), rng.random((6, 9)) < 0.5
    mask[2:3] = False
    parts = [slice(0, 2), slice(2, 3), slice(3, 6)]
    joined = advantages.moments(x[parts[0]], mask[parts[0]])
    for part in parts[1:]:
        joined = advantages.merge_moments(joined, advantages.moments(x[part], mask[part]))
    pieces = np.concatenate([advantages.whiten(x[p], mask[p], joined) for p in parts])
    np.testing.assert_allclose(pieces, advantages.whiten(x, mask), rtol=2e-3, atol=2e-4)


def test_explained_variance_is_one_for_a_seer_and_zero_for_the_mean():
    returns = jnp.array([[1.0, 2.0, 4.0, 9.0]])
    mask = jnp.array([[True, True, True, False]])
    values = jnp.array([[1.5, 2.0, 3.0, 7.0]])
    missed = np.array([-0.5, 0, 1])
    expected = 1 - np.var(missed) / np.var([1, 2, 4])
    assert float(advantages.explained_variance(returns, returns, mask)) == 1
    mean = jnp.full_like(returns, 5)
    assert float(advantages.explained_variance(mean, returns, mask)) == pytest.approx(0, abs=1e-6)
    assert float(advantages.explained_variance(values, returns, mask)) == pytest.approx(expected, rel=1e-6)
    assert float(advantages.explained_variance(values, jnp.ones_like(returns), mask)) == 0


@pytest.mark.parametrize('kind', ADVANTAGE_KINDS)
@pytest.mark.parametrize('seed', SEEDS)
def test_every_kind_equals_its_slow_reference_in_every_arrangement(kind, seed):
    episodes = slow.tales(seed)
    expected = slow.advantages(choose(kind), episodes)
    for layout in slow.arrangements(episodes).values():
        found, returns = run(choose(kind), layout)
        close(layout.back(found), expected)
        assert np.all(np.isfinite(found)) and np.all(np.isfinite(returns))


@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'rloo'])
def test_whitening_may_follow_any_kind(kind):
    episodes = slow.tales(7)
    layout = slow.arrangements(episodes)['packed']
    found, _ = run(choose(kind, whiten=True), layout)
    close(layout.back(found), slow.advantages(choose(kind, whiten=True), episodes))


def test_reinforce_pp_returns_are_the_discounted_reward_to_go():
    acted = jnp.array([[True, False, True, True]])
    reward = advantages.reward_on_last_acted(jnp.array([2.0]), acted)
    _, returns = advantages.advantages(
        choose('reinforce_pp', gamma=0.5),
        reward,
        acted,
        segments.whole_rows(acted),
        baseline_BN=jnp.ones((1, 1), bool),
        update_BN=jnp.ones((1, 1), bool),
    )
    np.testing.assert_array_equal(returns, [[0.5, 0, 1, 2]])


def test_an_episode_outside_the_update_neither_gets_an_advantage_nor_moves_the_whitening():
    episodes = slow.tales(4)
    out = [i for i, tale in enumerate(episodes) if not tale.update]
    assert out
    layout = slow.arrangements(episodes)['plain']
    found, _ = run(choose('gae'), layout)
    assert all(x == 0 for i in out for x in layout.back(found)[i])
    for i in out:
        episodes[i].lists['reward'] = [1e3] * len(episodes[i].acted)
    again, _ = run(choose('gae'), slow.arrangements(episodes)['plain'])
    np.testing.assert_array_equal(found, again)


def test_a_kind_without_its_inputs_is_refused_by_name():
    acted = jnp.ones((1, 3), bool)
    one = dict(baseline_BN=jnp.ones((1, 1), bool), update_BN=jnp.ones((1, 1), bool))
    for kind, name in (('gae', 'value_BT'), ('grpo', 'group_BN')):
        with pytest.raises(ValueError, match=name):
            advantages.advantages(choose(kind), jnp.zeros((1, 3)), acted, segments.whole_rows(acted), **one)
