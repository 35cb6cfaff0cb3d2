"""Group baselines, and which episodes and groups count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.algo import groups
from tests.algo import slow

advantage = functools.partial(jax.jit, static_argnums=(0, 4))(groups.group_advantages)


def of_one_group(kind: str, rewards: list[float]) -> list[float]:
    n = len(rewards)
    ones = np.ones(n, bool)
    return advantage(kind, np.float32(rewards), np.zeros(n, np.int32), ones, 1).tolist()


def test_four_samples_with_one_right_answer_give_the_textbook_numbers():
    rewards = [1.0, -1.0, -1.0, -1.0]
    assert of_one_group('dr_grpo', rewards) == [1.5, -0.5, -0.5, -0.5]
    assert of_one_group('grpo', rewards) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)  # std is 1
    assert of_one_group('rloo', rewards) == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3])


def test_grpo_adds_one_millionth_to_the_deviation():
    found = of_one_group('grpo', [-1e-6, 0.0, 1e-6])  # std is 1e-6
    assert found == pytest.approx([-0.5, 0, 0.5], abs=5e-6)  # where a mean rounds, the middle is not exactly 0


@pytest.mark.parametrize('kind', groups.KINDS)
def test_group_advantages_equal_the_slow_reference_in_any_order(kind):
    rng = np.random.default_rng(0)
    reward = rng.choice([-1.0, 0.3, 1.0], 40).astype(np.float32)
    group, valid = rng.integers(0, 7, 40).astype(np.int32), rng.random(40) < 0.7
    peers = {g: [float(r) for r, h, v in zip(reward, group, valid) if v and h == g] for g in range(7)}
    expected = [slow.group_advantage(kind, float(r), peers[g]) if v else 0.0 for r, g, v in zip(reward, group, valid)]
    found = np.asarray(advantage(kind, reward, group, valid, 7))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    order = rng.permutation(40)
    shuffled = advantage(kind, reward[order], group[order], valid[order], 7)
    np.testing.assert_allclose(shuffled, found[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', groups.KINDS)
@pytest.mark.parametrize('reward', [0.1, -1.0, 1 / 3, 1e-8, 1e4])
def test_equal_rewards_give_exactly_zero_whatever_their_rounding(kind, reward):
    assert of_one_group(kind, [reward] * 7) == [0.0] * 7


@pytest.mark.parametrize('kind', groups.KINDS)
def test_a_group_of_one_gets_its_reward(kind):
    assert of_one_group(kind, [0.25]) == [0.25]
    reward, group = np.float32([0.25, 9.0, np.nan]), np.int32([0, 0, -1])
    alone = advantage(kind, reward, group, np.array([True, False, False]), 1)
    assert alone.tolist() == [0.25, 0, 0]


@pytest.mark.parametrize('kind', groups.KINDS)
def test_void_episodes_leave_the_baseline_and_get_nothing(kind):
    reward, group = np.float32([1, -1, -1, 5]), np.zeros(4, np.int32)
    found = advantage(kind, reward, group, np.array([True, True, True, False]), 1).tolist()
    assert found[:3] == pytest.approx(of_one_group(kind, [1.0, -1.0, -1.0]))
    assert found[3] == 0


def test_every_group_is_centred_and_an_empty_group_harms_nobody():
    reward = np.float32([1, 0, 3, 5, 5])
    found = advantage('dr_grpo', reward, np.int32([0, 0, 3, 3, 3]), np.ones(5, bool), 6)
    assert found.tolist() == pytest.approx([0.5, -0.5, -4 / 3, 2 / 3, 2 / 3])


def test_group_advantages_are_the_same_vmapped():
    reward = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    group, valid = np.arange(8, dtype=np.int32) // 4, np.arange(8) != 5
    mapped = jax.vmap(lambda r: groups.group_advantages('grpo', r, group, valid, 2))(reward)
    for row, r in zip(mapped, reward):
        np.testing.assert_allclose(row, advantage('grpo', r, group, valid, 2), rtol=1e-6)


def test_a_kind_without_groups_is_refused():
    with pytest.raises(ValueError, match=r"advantage.kind='gae'.*grpo"):
        groups.group_advantages('gae', jnp.zeros(1), jnp.zeros(1, int), jnp.ones(1, bool), 1)


@pytest.mark.parametrize('drop_void', [True, False])
@pytest.mark.parametrize('mask_truncated', [True, False])
def test_void_leaves_baseline_and_update_truncated_leaves_the_update_only(drop_void, mask_truncated):
    rows = np.array([[v, t, p] for v in (0, 1) for t in (0, 1) for p in (0, 1)], bool)
    baseline, update = groups.episode_masks(
        rows[:, 0], rows[:, 1], rows[:, 2], drop_void=drop_void, mask_truncated=mask_truncated
    )
    for (void, truncated, present), in_baseline, in_update in zip(rows, baseline, update):
        assert in_baseline == (present and not (void and drop_void))
        assert in_update == (in_baseline and not (truncated and mask_truncated))


def test_the_overlong_penalty_grows_over_the_buffer_and_stops_at_minus_one():
    found = groups.overlong_penalty(jnp.array([0, 12, 13, 14, 16, 20]), 16, 4)
    np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -1, -1])


def test_an_overlong_buffer_of_zero_turns_the_penalty_off():
    np.testing.assert_array_equal(groups.overlong_penalty(jnp.array([0, 16, 99]), 16, 0), 0)


@pytest.mark.parametrize('buffer', [-1, 17])
def test_an_overlong_buffer_beyond_the_budget_is_refused(buffer):
    with pytest.raises(ValueError, match=f'overlong buffer {buffer} must lie in .0, 16.'):
        groups.overlong_penalty(jnp.array([1]), 16, buffer)


def test_dynamic_sampling_keeps_exactly_the_groups_whose_valid_rewards_differ():
    reward = np.array([1, -1, 1, 1, -1, 1, 1, 0.5])
    group = np.array([0, 0, 1, 1, 2, 2, 3, 5])
    valid = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
    kept = groups.unequal_groups(reward, group, valid, 6)
    assert kept.tolist() == [True, False, False, False, False, False]
    assert isinstance(kept, np.ndarray)


def test_groups_that_dynamic_sampling_drops_have_no_gradient_to_give():
    rng = np.random.default_rng(2)
    reward, group = rng.choice([-1.0, 1.0], 30).astype(np.float32), np.arange(30, dtype=np.int32) // 3
    kept = groups.unequal_groups(reward, group, np.ones(30, bool), 10)
    assert 0 < kept.sum() < 10
    found = np.asarray(advantage('grpo', reward, group, np.ones(30, bool), 10)).reshape(10, 3)
    assert (np.abs(found).sum(1) > 0).tolist() == kept.tolist()
