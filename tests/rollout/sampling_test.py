"""Drawing tokens: against float64 references and exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.rollout import sampling


def draw(logits, seed=0, position=0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, truncate=True, rows=None):
    logits = jnp.asarray(logits, jnp.float32)
    b = logits.shape[0]
    keys = jax.random.split(jax.random.key(seed), b)
    full = lambda x, dtype: jnp.full(b, x, dtype)
    u = sampling.uniforms(keys, full(position, jnp.int32)[:, None])[:, 0]
    return sampling.draw(
        logits,
        u,
        full(temperature, jnp.float32),
        full(top_p, jnp.float32),
        full(top_k, jnp.int32),
        full(min_p, jnp.float32),
        truncate=truncate,
    )


def kept_set(logits, **settings):
    """The tokens that truncation keeps, read off the threshold."""
    z = logits - logits.max(-1, keepdims=True)
    args = {'top_p': 1.0, 'top_k': 0, 'min_p': 0.0} | settings
    b = len(logits)
    bound = sampling.threshold(
        jnp.asarray(z),
        jnp.exp(jnp.asarray(z)),
        jnp.full(b, args['top_p'], jnp.float32),
        jnp.full(b, args['top_k'], jnp.int32),
        jnp.full(b, args['min_p'], jnp.float32),
    )
    return np.asarray(z >= np.asarray(bound)[:, None])


LOGITS = np.random.default_rng(0).normal(0, 3, (32, 517)).astype(np.float32)


def test_frequencies_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    token, _ = draw(np.tile(logits, (20000, 1)))
    share = np.bincount(np.asarray(token), minlength=5) / 20000
    assert np.abs(share - np.exp(logits)).max() < 0.015


def test_logprobs_are_those_of_the_full_distribution_at_the_temperature():
    token, logprob = draw(LOGITS, temperature=0.7, top_p=0.5)
    z = LOGITS.astype(np.float64) / 0.7
    expected = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    assert np.abs(np.take_along_axis(expected, np.asarray(token)[:, None], 1)[:, 0] - logprob).max() < 1e-5


def test_zero_temperature_takes_the_largest_logit():
    token, _ = draw(LOGITS, temperature=0.0)
    assert (np.asarray(token) == LOGITS.argmax(-1)).all()


@pytest.mark.parametrize('top_p', [0.1, 0.5, 0.7, 0.95, 0.999])
def test_top_p_keeps_the_smallest_most_probable_set(top_p):
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    kept = kept_set(LOGITS, top_p=top_p)
    for row, mask in zip(p, kept):
        order = np.argsort(-row)
        n = int(np.searchsorted(np.cumsum(row[order]), top_p - 1e-7)) + 1
        missing, extra = set(order[:n]) - set(np.flatnonzero(mask)), set(np.flatnonzero(mask)) - set(order[:n])
        assert sum(row[list(missing | extra)]) < 1e-6


@pytest.mark.parametrize('top_k', [1, 2, 50])
def test_top_k_keeps_k_tokens(top_k):
    kept = kept_set(LOGITS, top_k=top_k)
    assert (kept.sum(-1) == top_k).all()
    assert (np.where(kept, LOGITS, -np.inf).max(-1) == LOGITS.max(-1)).all()


def test_min_p_keeps_what_is_near_the_best():
    p = np.exp(LOGITS - LOGITS.max(-1, keepdims=True))
    assert (kept_set(LOGITS, min_p=0.1) == (p >= 0.1)).mean() > 0.9999


def test_off_settings_draw_the_same_tokens_as_no_truncation():
    for position in range(5):
        a, b = draw(LOGITS, position=position), draw(LOGITS, position=position, truncate=False)
        assert (np.asarray(a[0]) == np.asarray(b[0])).all()


def test_drawn_tokens_are_in_the_kept_set():
    kept = kept_set(LOGITS, top_p=0.3, top_k=7)
    for position in range(50):
        token, _ = draw(LOGITS, position=position, top_p=0.3, top_k=7)
        assert np.take_along_axis(kept, np.asarray(token)[:, None], 1).all()


@pytest.mark.parametrize('vocabulary', [1, 2, 3, 5, 64, 517])
def test_inversion_equals_a_running_sum(vocabulary):
    rng = np.random.default_rng(vocabulary)
    weight = rng.random((200, vocabulary)) * (rng.random((200, vocabulary)) < 0.5)
    weight[:, rng.integers(vocabulary)] += 0.5
    u = rng.random(200)
    got = np.asarray(sampling.invert(jnp.asarray(weight, jnp.float32), jnp.asarray(u, jnp.float32)))
    assert (np.take_along_axis(weight, got[:, None], 1) > 0).all()
    cdf = np.cumsum(weight, -1)
    lower = np.take_along_axis(cdf - weight, got[:, None], 1)[:, 0]
    upper = np.take_along_axis(cdf, got[:, None], 1)[:, 0]
    goal = u * cdf[:, -1]
    assert ((goal >= lower - 1e-4) & (goal <= upper + 1e-4)).all()


def test_inversion_at_the_ends_never_takes_a_weightless_token():
    weight = jnp.asarray([[0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0]] * 2)
    assert sampling.invert(weight, jnp.asarray([0.0, 0.99999994])).tolist() == [2, 4]


def test_keys_depend_on_step_problem_and_sample_alone():
    base = jax.random.key(3)
    keys = lambda step, problems, samples: np.asarray(
        jax.random.key_data(
            sampling.row_keys(
                base,
                jnp.full(len(problems), step, jnp.uint32),
                jnp.asarray(problems, jnp.uint32),
                jnp.asarray(samples, jnp.int32),
            )
        )
    )
    one, other = keys(1, [5, 6, 5], [0, 0, 1]), keys(1, [6, 5, 5], [0, 1, 0])
    assert (one[0] == other[2]).all() and (one[1] == other[0]).all() and (one[2] == other[1]).all()
    assert len(np.unique(np.concatenate([one, keys(2, [5, 6, 5], [0, 0, 1])]), axis=0)) == 6
