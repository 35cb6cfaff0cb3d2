"""Means over a global batch: what they count, and that parts add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.algo import aggregation, segments
from retool_jax.algo.settings import LOSS_CHOICES

MODES = LOSS_CHOICES['aggregation']
LOSS = jnp.array([[1.0, 2.0, 9.0, 4.0, 6.0], [3.0, 9.0, 9.0, 9.0, 9.0]])
MASK = jnp.array([[True, True, False, True, False], [True, False, False, False, False]])
PACKED = jnp.array([[1, 1, 1, 2, 2], [1, 1, 2, 2, 0]])  # three episodes with a masked token, one without


@pytest.mark.parametrize(
    'mode, count, total',
    [
        ('token-mean', 4, 1 + 2 + 4 + 3),
        ('seq-mean-token-mean', 3, (1 + 2) / 2 + 4 + 3),
        ('seq-mean-token-sum', 3 * 8, 1 + 2 + 4 + 3),
    ],
)
def test_each_mode_counts_and_sums_what_its_name_says(mode, count, total):
    found = aggregation.denominator(mode, MASK, PACKED, 2, 8.0)
    assert float(found) == count
    assert float(aggregation.aggregate(LOSS, MASK, PACKED, 2, mode, found)) == pytest.approx(total / count)


@pytest.mark.parametrize('mode', MODES)
def test_padding_rows_columns_and_spare_segments_count_nowhere(mode):
    def pad(x):
        return jnp.pad(x, ((1, 2), (0, 3)))

    plain = aggregation.denominator(mode, MASK, PACKED, 2, 8.0)
    padded = aggregation.denominator(mode, pad(MASK), pad(PACKED), 5, 8.0)
    assert float(plain) == float(padded)
    a = aggregation.aggregate(LOSS, MASK, PACKED, 2, mode, plain)
    b = aggregation.aggregate(pad(LOSS), pad(MASK), pad(PACKED), 5, mode, plain)
    assert float(a) == pytest.approx(float(b))


@pytest.mark.parametrize('mode', MODES)
def test_denominators_and_quotients_of_parts_add_up_to_the_whole(mode):
    whole = aggregation.denominator(mode, MASK, PACKED, 2, 8.0)
    parts = [(LOSS[i : i + 1], MASK[i : i + 1], PACKED[i : i + 1], 2) for i in range(2)]
    assert float(sum(aggregation.denominator(mode, *p[1:], 8.0) for p in parts)) == float(whole)
    split = sum(aggregation.aggregate(*p, mode, whole) for p in parts)
    assert float(split) == pytest.approx(float(aggregation.aggregate(LOSS, MASK, PACKED, 2, mode, whole)))


@pytest.mark.parametrize('mode', MODES)
def test_a_part_with_nothing_to_train_gives_zero_even_under_a_zero_denominator(mode):
    nothing = jnp.zeros_like(MASK)
    assert float(aggregation.denominator(mode, nothing, PACKED, 2, 8.0)) == 0
    slope = jax.grad(lambda x: aggregation.aggregate(x, nothing, PACKED, 2, mode, jnp.float32(0)))(LOSS)
    np.testing.assert_array_equal(slope, 0)


def test_tokens_are_counted_exactly_where_float32_could_not_add_one():
    mask = jnp.ones((2**12, 2**12 + 1), bool).at[0, 0].set(False)
    count = jax.jit(aggregation.denominator, static_argnums=(0, 3))
    found = count('token-mean', mask, segments.whole_rows(mask), 1)
    assert int(found) == int(np.float32(2**24 + 2**12 - 1))


def test_an_episode_outside_the_update_leaves_numerator_and_denominator():
    valid = jnp.array([[True, False], [True, True]])
    mask = segments.in_update(MASK, valid, PACKED)
    assert float(aggregation.denominator('token-mean', mask, PACKED, 2)) == 3
    assert float(aggregation.denominator('seq-mean-token-mean', mask, PACKED, 2)) == 2
    assert float(aggregation.numerator(LOSS, mask, PACKED, 2, 'seq-mean-token-mean')) == (1 + 2) / 2 + 3


def test_segments_sum_count_and_hand_back_by_id():
    np.testing.assert_array_equal(segments.per_segment(LOSS, PACKED, 3), [[12, 10, 0], [12, 18, 0]])
    np.testing.assert_array_equal(segments.per_segment(MASK, PACKED, 2), [[2, 1], [1, 0]])
    np.testing.assert_array_equal(segments.last_acted(MASK, PACKED, 2), [[1, 3], [0, -1]])
    back = segments.per_token(jnp.array([[5.0, 7.0], [1.0, 2.0]]), PACKED)
    np.testing.assert_array_equal(back, [[5, 5, 5, 7, 7], [1, 1, 2, 2, 0]])
    flags = segments.per_token(jnp.array([[True, False], [False, True]]), PACKED)
    np.testing.assert_array_equal(flags, [[1, 1, 1, 0, 0], [0, 0, 1, 1, 0]])
    means = segments.sequence_mean(LOSS, MASK, PACKED, 2)
    np.testing.assert_array_equal(means, [[1.5, 1.5, 1.5, 4, 4], [3, 3, 0, 0, 0]])


@pytest.mark.parametrize('mode', MODES)
def test_losses_at_masked_places_are_never_read(mode):
    spoiled = jnp.where(MASK, LOSS, jnp.nan)
    total = jnp.float32(4)
    a, b = (aggregation.aggregate(x, MASK, PACKED, 2, mode, total) for x in (LOSS, spoiled))
    assert float(a) == float(b)
