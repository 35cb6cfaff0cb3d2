"""Policy and critic losses: values and gradients against plain Python, and what must not change them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.algo import losses, segments, tallies
from tests.algo import slow
from tests.algo.settings_test import loss_settings

EVERYTHING = dict(entropy_coef=0.01, kl_coef=0.3)
CASES = {
    'ppo': loss_settings(),
    'ppo, clip-higher, dual clip, token correction, k1': loss_settings(
        clip_high=0.28, dual_clip=1.3, correction='token', correction_cap=1.1, kl_kind='k1', **EVERYTHING
    ),
    'ppo, GRPO means, sequence correction, k3': loss_settings(
        aggregation='seq-mean-token-mean',
        correction='sequence',
        correction_low=0.8,
        correction_high=1.25,
        correction_cap=1.1,
        **EVERYTHING,
    ),
    'ppo, Dr. GRPO means, KL in the reward': loss_settings(
        aggregation='seq-mean-token-sum', aggregation_constant=16.0, kl_in='reward', **EVERYTHING
    ),
    'gspo': loss_settings(kind='gspo', aggregation='seq-mean-token-mean', clip_low=0.1, clip_high=0.15),
    'cispo, k2': loss_settings(kind='cispo', clip_low=1.0, clip_high=0.3, kl_kind='k2', **EVERYTHING),
}
case = pytest.mark.parametrize('settings', CASES.values(), ids=CASES)


def denominators(settings, arrays):
    mask = segments.in_update(arrays['acted'], arrays['update'], arrays['segment_ids'])
    layout = (mask, arrays['segment_ids'], arrays['update'].shape[1])
    policy = losses.denominator(settings.aggregation, *layout, settings.aggregation_constant)
    return policy, losses.denominator('token-mean', *layout)


@functools.partial(jax.jit, static_argnums=0)
def actor(settings, arrays, denominator):
    mask = segments.in_update(arrays['acted'], arrays['update'], arrays['segment_ids'])

    def objective(logprob, entropy):
        return losses.actor_loss(
            settings,
            logprob_BT=logprob,
            entropy_BT=entropy,
            old_logprob_BT=arrays['old'],
            sampler_logprob_BT=arrays['sampler'],
            advantage_BT=arrays['advantage'],
            mask_BT=mask,
            segment_ids_BT=arrays['segment_ids'],
            num_segments=arrays['update'].shape[1],
            denominator=denominator,
            reference_logprob_BT=arrays['reference'],
        )

    grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, found), gradients = grad(arrays['logprob'], arrays['entropy'])
    return loss, found, gradients


@functools.partial(jax.jit, static_argnums=0)
def critic(settings, arrays, denominator):
    mask = segments.in_update(arrays['acted'], arrays['update'], arrays['segment_ids'])

    def objective(value):
        return losses.critic_loss(
            settings,
            value_BT=value,
            old_value_BT=arrays['old_value'],
            return_BT=arrays['returns'],
            mask_BT=mask,
            denominator=denominator,
        )

    (loss, found), gradient = jax.value_and_grad(objective, has_aux=True)(arrays['value'])
    return loss, found, gradient


def run(settings, layout):
    return actor(settings, layout.arrays, denominators(settings, layout.arrays)[0])


def flat(layout, gradient) -> np.ndarray:
    back = layout.back(gradient)
    return np.concatenate([back[i] for i in sorted(back)])


def distance(a, b) -> float:
    return float(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), 1e-30))


@case
@pytest.mark.parametrize('seed', range(3))
def test_the_actor_loss_and_its_gradient_equal_the_slow_reference_in_every_arrangement(settings, seed):
    episodes = slow.tales(seed)
    current = [tale.at('logprob') for tale in episodes]
    expected = slow.actor_loss(settings, episodes, current, current)
    slopes = slow.actor_gradient(settings, episodes)
    slopes = np.concatenate([slow.spread(tale, row) for tale, row in zip(episodes, slopes)])
    assert np.linalg.norm(slopes) > 0
    first = None
    for layout in slow.arrangements(episodes).values():
        loss, _, (gradient, entropy_gradient) = run(settings, layout)
        assert float(loss) == pytest.approx(expected, rel=2e-5, abs=2e-6)
        gradient = flat(layout, gradient)
        assert distance(gradient, slopes) < 1e-4  # the reference differentiates by differences
        first = gradient if first is None else first
        assert distance(gradient, first) < 1e-5
        assert np.all(np.isfinite(entropy_gradient))


@case
def test_splitting_the_batch_changes_neither_loss_nor_gradient_nor_metrics(settings):
    layout = slow.arrangements(slow.tales(11))['plain']
    whole, metrics, (gradient, _) = run(settings, layout)
    denominator = denominators(settings, layout.arrays)[0]
    parts = []
    for i in range(0, 9, 3):
        part = {name: x[i : i + 3] for name, x in layout.arrays.items()}
        parts.append(actor(settings, part, denominator))
    assert distance(sum(p[0] for p in parts), whole) < 1e-5
    assert distance(np.concatenate([p[2][0] for p in parts]), gradient) < 1e-5
    merged = functools.reduce(tallies.merge, (p[1] for p in parts), tallies.empty(metrics))
    for name, x in tallies.results(metrics).items():
        assert float(tallies.results(merged)[name]) == pytest.approx(float(x), rel=1e-5, abs=1e-6), name
    assert float(tallies.results(merged)['actor/pg_loss']) == pytest.approx(
        float(tallies.results(metrics)['actor/pg_loss']), rel=1e-5
    )


@case
def test_what_stands_at_tokens_outside_the_update_changes_nothing_and_gets_no_gradient(settings):
    layout = slow.arrangements(slow.tales(12))['packed']
    mask = np.asarray(segments.in_update(layout.acted, layout.update, layout.segment_ids))
    loss, metrics, gradients = run(settings, layout)
    for junk in (math.nan, math.inf, -math.inf, 1e30):
        spoiled = layout.arrays | {n: np.where(mask, layout.arrays[n], np.float32(junk)) for n in slow.FIELDS}
        again = actor(settings, spoiled, denominators(settings, layout.arrays)[0])
        for a, b in zip(jax.tree.leaves((loss, metrics, gradients)), jax.tree.leaves(again)):
            np.testing.assert_array_equal(a, b)
    assert all(np.all(np.asarray(g)[~mask] == 0) for g in gradients)


@pytest.mark.parametrize('kind', ['ppo', 'gspo', 'cispo'])
def test_before_any_update_the_ratio_is_one_and_nothing_is_clipped(kind):
    settings = loss_settings(kind=kind, aggregation='seq-mean-token-mean', clip_low=0.01, clip_high=0.01)
    layout = slow.arrangements(slow.tales(13))['packed']
    layout.arrays['old'] = layout.arrays['logprob']
    _, metrics, (gradient, _) = run(settings, layout)
    metrics = tallies.results(metrics)
    for name in ('actor/pg_clipfrac', 'actor/pg_clipfrac_dual', 'actor/ppo_kl'):
        assert float(metrics[name]) == 0
    assert float(metrics['actor/ratio_max']) == 1
    # and each loss is then the policy gradient, −A ∇ℓ
    mask = np.asarray(segments.in_update(layout.acted, layout.update, layout.segment_ids))
    counts = np.asarray(
        segments.per_token(segments.per_segment(jnp.asarray(mask), layout.segment_ids, 4), layout.segment_ids)
    )
    sequences = float(denominators(settings, layout.arrays)[0])
    advantage = np.where(mask, layout.advantage, 0)
    if kind == 'gspo':
        advantage = np.asarray(segments.sequence_mean(advantage, jnp.asarray(mask), layout.segment_ids, 4))
    expected = np.where(mask, -advantage / np.maximum(counts, 1) / sequences, 0)
    assert distance(gradient, expected) < 1e-5


def per_token(settings, ratio, advantage):
    """One token a row, so that each is a sequence, too."""
    ratio, advantage = (np.float32(x)[:, None] for x in (ratio, advantage))
    mask = np.ones(ratio.shape, bool)
    loss, found = losses.policy_loss(
        settings, np.log(ratio), np.zeros_like(ratio), advantage, mask, segments.whole_rows(mask), 1
    )
    return loss[:, 0], {name: float(x) for name, x in tallies.results(found).items()}


@pytest.mark.parametrize('kind', ['ppo', 'gspo'])
def test_the_clip_is_pessimistic_and_the_dual_clip_bounds_bad_surprises(kind):
    settings = loss_settings(kind=kind, clip_high=0.3, dual_clip=3.0, aggregation='seq-mean-token-mean')
    ratio, advantage = [1.1, 1.5, 0.5, 1.5, 0.5, 9.0], [1, 1, 1, -1, -1, -2]
    loss, metrics = per_token(settings, ratio, advantage)
    np.testing.assert_allclose(loss, [-1.1, -1.3, -0.5, 1.5, 0.8, 6.0], rtol=1e-5)
    assert metrics['actor/pg_clipfrac'] == pytest.approx(2 / 6)
    assert metrics['actor/pg_clipfrac_dual'] == pytest.approx(1 / 6)
    assert metrics['actor/ratio_max'] == pytest.approx(9, rel=1e-5)
    assert metrics['actor/ppo_kl'] == pytest.approx(-np.log(ratio).mean(), rel=1e-5)
    unbounded, _ = per_token(loss_settings(kind=kind, aggregation='seq-mean-token-mean'), ratio, advantage)
    assert float(unbounded[-1]) == pytest.approx(18, rel=1e-5)


def test_cispo_counts_ratios_outside_its_range_as_clipped():
    settings = loss_settings(kind='cispo', clip_low=1.0, clip_high=0.5)
    _, metrics = per_token(settings, [0.01, 1.0, 1.4, 1.6], [1, 1, 1, -1])
    assert metrics['actor/pg_clipfrac'] == pytest.approx(1 / 4)


@pytest.mark.parametrize('kind', ['ppo', 'gspo', 'cispo'])
def test_the_loss_of_a_masked_token_is_zero_even_where_everything_there_is_nan(kind):
    settings = loss_settings(kind=kind, dual_clip=3.0, aggregation='seq-mean-token-mean')
    mask = np.array([[True, False, True]])
    x = np.where(mask, np.float32(-0.5), np.nan)
    loss, _ = losses.policy_loss(settings, x, 2 * x, x, mask, segments.whole_rows(mask), 1)
    assert float(loss[0, 1]) == 0 and np.all(np.isfinite(loss))


def test_absurd_log_ratios_stay_finite():
    for kind in ('ppo', 'gspo', 'cispo'):
        settings = loss_settings(kind=kind, aggregation='seq-mean-token-mean')
        mask = np.ones((2, 1), bool)
        loss, found = losses.policy_loss(
            settings,
            np.float32([[-1e5], [0]]),
            np.float32([[0], [-1e5]]),
            -np.ones((2, 1), np.float32),
            mask,
            segments.whole_rows(mask),
            1,
        )
        assert np.all(np.isfinite(loss))
        assert float(found['actor/ratio_max'].value) == pytest.approx(math.exp(20))


def test_rejected_tokens_stay_in_the_denominator():
    settings = loss_settings(correction='sequence', correction_low=0.9, correction_high=1.1, correction_cap=2.0)
    layout = slow.arrangements(slow.tales(14))['plain']
    layout.arrays['old'] = layout.arrays['sampler'] = layout.arrays['logprob']
    layout.arrays['update'][:] = layout.arrays['baseline'][:] = True
    layout.arrays['advantage'] = np.ones_like(layout.advantage)
    kept = float(run(settings, layout)[0])
    layout.arrays['sampler'] = layout.arrays['sampler'].copy()
    layout.arrays['sampler'][0] -= 1.0  # the whole of the first episode
    lost = float(run(settings, layout)[0])
    share = layout.acted[0].sum() / layout.acted.sum()
    assert kept == pytest.approx(-1, rel=1e-5)
    assert lost == pytest.approx(-(1 - share), rel=1e-5)


def test_the_three_kl_estimators_have_the_means_and_gradients_that_they_claim():
    rng = np.random.default_rng(0)
    logits, other = rng.normal(size=(2, 6)).astype(np.float32)
    other = jax.nn.log_softmax(other)

    def expectation(kind, logits):
        logprob = jax.nn.log_softmax(logits)
        each = losses.kl(kind, logprob[None], other[None], jnp.ones((1, 6), bool))[0]
        return jnp.sum(jnp.exp(jax.lax.stop_gradient(logprob)) * each)

    def divergence(p, q):
        return jnp.sum(jnp.exp(p) * (p - q))

    forward = jax.grad(lambda z: divergence(jax.nn.log_softmax(z), other))(logits)
    backward = jax.grad(lambda z: divergence(other, jax.nn.log_softmax(z)))(logits)
    true = float(divergence(jax.nn.log_softmax(logits), other))
    for kind in ('k1', 'k3'):
        assert float(expectation(kind, logits)) == pytest.approx(true, rel=1e-5)
    slopes = {k: jax.grad(lambda z, k=k: expectation(k, z))(logits) for k in ('k1', 'k2', 'k3')}
    np.testing.assert_allclose(slopes['k1'], 0, atol=1e-6)
    np.testing.assert_allclose(slopes['k2'], forward, atol=1e-6)
    np.testing.assert_allclose(slopes['k3'], backward, atol=1e-6)


@pytest.mark.parametrize('kind', ['k1', 'k2', 'k3'])
def test_kl_equals_the_slow_reference_and_is_zero_between_equals(kind):
    x, y = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    x[0, 0], mask = 50, np.arange(15).reshape(3, 5) % 4 != 3
    found = np.asarray(losses.kl(kind, x, y, mask))
    triples = zip(x.flat, y.flat, mask.flat)
    expected = [slow.kl(kind, float(a), float(b)) if m else 0.0 for a, b, m in triples]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.kl(kind, x, x, mask), 0)


def test_kl_in_the_reward_is_taken_off_acted_tokens_only():
    reward, old, reference = np.random.default_rng(2).normal(size=(3, 2, 4)).astype(np.float32)
    acted = np.array([[0, 1, 1, 0], [1, 0, 0, 1]], bool)
    settings = loss_settings(kl_in='reward', kl_coef=0.5, kl_kind='k1')
    found = losses.reward_less_kl(settings, reward, old, reference, acted)
    np.testing.assert_allclose(found, np.where(acted, reward - 0.5 * (old - reference), reward), rtol=1e-6)
    for settings in (loss_settings(kl_in='loss', kl_coef=0.5), loss_settings(kl_in='reward', kl_coef=0.0)):
        np.testing.assert_array_equal(losses.reward_less_kl(settings, reward, old, reference, acted), reward)


def test_kl_in_the_reward_stays_out_of_the_loss_but_is_reported():
    layout = slow.arrangements(slow.tales(15))['plain']
    bare, _, (gradient, _) = run(loss_settings(), layout)
    loss, metrics, (same, _) = run(loss_settings(kl_in='reward', kl_coef=9.0), layout)
    assert float(loss) == float(bare)
    np.testing.assert_array_equal(gradient, same)
    assert 'actor/kl' in metrics


def test_a_kl_penalty_without_a_reference_is_refused():
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match=r'loss.kl_coef=0.5 needs reference_logprob_BT'):
        losses.actor_loss(
            loss_settings(kl_coef=0.5),
            logprob_BT=one,
            entropy_BT=one,
            old_logprob_BT=one,
            sampler_logprob_BT=one,
            advantage_BT=one,
            mask_BT=one > 0,
            segment_ids_BT=one.astype(int),
            num_segments=1,
            denominator=1.0,
        )


@pytest.mark.parametrize('value_clip', [None, 0.2, 1.0])
def test_the_critic_loss_equals_the_slow_reference_in_every_arrangement_and_any_split(value_clip):
    settings = loss_settings(value_clip=value_clip, value_coef=0.7)
    episodes = slow.tales(16)
    expected = slow.critic_loss(settings, episodes)
    first = None
    for name, layout in slow.arrangements(episodes).items():
        denominator = denominators(settings, layout.arrays)[1]
        loss, metrics, gradient = critic(settings, layout.arrays, denominator)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert float(tallies.results(metrics)['critic/vf_loss']) == pytest.approx(expected / 0.7, rel=1e-5)
        first = flat(layout, gradient) if first is None else first
        assert distance(flat(layout, gradient), first) < 1e-5
        if name == 'plain':
            halves = [{n: x[h] for n, x in layout.arrays.items()} for h in (slice(0, 4), slice(4, 9))]
            halves = [critic(settings, half, denominator) for half in halves]
            assert float(sum(h[0] for h in halves)) == pytest.approx(expected, rel=1e-5)
            assert distance(np.concatenate([h[2] for h in halves]), gradient) < 1e-5


def test_the_value_clip_keeps_the_larger_error():
    value, old, returns = (np.float32([x]) for x in ([1.0, 1.0, 0.3], [0.0, 0.0, 0.2], [1.0, 0.0, 1.0]))
    mask = np.ones((1, 3), bool)
    loss, metrics = losses.value_loss(value, old, returns, mask, 0.2)
    np.testing.assert_allclose(loss[0], [0.5 * 0.8**2, 0.5 * 1.0, 0.5 * 0.7**2], rtol=1e-6)
    assert float(tallies.results(metrics)['critic/vf_clipfrac']) == pytest.approx(1 / 3)


def test_the_actor_loss_is_the_same_vmapped():
    settings = CASES['ppo, GRPO means, sequence correction, k3']
    layout = slow.arrangements(slow.tales(17))['plain']
    stacked = {name: np.stack([x, x[::-1]]) for name, x in layout.arrays.items()}
    denominator = denominators(settings, layout.arrays)[0]
    loss, _, _ = run(settings, layout)
    mapped, _, _ = jax.vmap(lambda arrays: actor(settings, arrays, denominator))(stacked)
    np.testing.assert_allclose(mapped, [loss, loss], rtol=1e-5)


def test_a_batch_that_nobody_is_trained_on_gives_zero_and_no_nan():
    for settings in CASES.values():
        layout = slow.arrangements(slow.tales(18))['plain']
        layout.arrays['update'] = np.zeros_like(layout.update)
        loss, metrics, gradients = run(settings, layout)
        assert float(loss) == 0
        assert all(np.all(np.asarray(g) == 0) for g in gradients)
        assert all(np.isfinite(float(x)) for x in tallies.results(metrics).values())
