"""Sampler/trainer weights."""

import numpy as np
import pytest

from retool_jax.algo import tallies
from retool_jax.algo.correction import correction
from tests.algo import slow
from tests.algo.settings_test import loss_settings

SETTINGS = {
    'none': loss_settings(),
    'token': loss_settings(correction='token', correction_cap=1.2),
    'sequence': loss_settings(correction='sequence', correction_cap=1.05, correction_low=0.9, correction_high=1.2),
}


def weigh(settings, layout):
    n = layout.update.shape[1]
    return correction(settings, layout.old, layout.sampler, layout.acted, layout.segment_ids, n)


@pytest.mark.parametrize('kind', SETTINGS)
@pytest.mark.parametrize('name', ['plain', 'packed'])
def test_weights_equal_the_slow_reference(kind, name):
    episodes = slow.tales(21)
    layout = slow.arrangements(episodes)[name]
    weight, _ = weigh(SETTINGS[kind], layout)
    found = layout.back(weight)
    expected = [slow.spread(tale, slow.weights(SETTINGS[kind], tale)) for tale in episodes]
    for i, row in enumerate(expected):
        assert found[i] == pytest.approx(row, rel=1e-5)
    if kind == 'sequence':  # the data hold every case: rejected, truncated, and weighted between
        seen = {w for tale in episodes for w in slow.weights(SETTINGS[kind], tale)}
        assert 0.0 in seen and 1.05 in seen and any(0.9 < w < 1.05 for w in seen)


def test_metrics_report_the_gap_what_was_truncated_and_what_was_rejected():
    old = np.float32([[0.0, 0.0, -9.0], [-1.0, -1.0, 0.0]])
    sampler = np.float32([[-1.0, 0.5, 9.0], [-1.0, -1.0, 7.0]])
    acted = np.array([[True, True, False], [True, True, False]])
    rows = np.ones((2, 3), np.int32)
    token = loss_settings(correction='token', correction_cap=2.0)
    _, metrics = correction(token, old, sampler, acted, rows, 1)
    found = {name: float(x) for name, x in tallies.results(metrics).items()}
    assert found['mismatch/logprob_abs_max'] == 1
    assert found['mismatch/episode_max'] == pytest.approx(0.75)
    assert found['mismatch/kl'] == pytest.approx((-1 + 0.5 + 0 + 0) / 4)
    assert found['mismatch/truncated'] == 1 / 4
    assert found['mismatch/rejected'] == 0
    assert found['mismatch/weight'] == pytest.approx((2 + np.exp(-0.5) + 1 + 1) / 4)
    sequence = loss_settings(correction='sequence', correction_low=0.99, correction_high=1.01, correction_cap=2.0)
    weight, metrics = correction(sequence, old, sampler, acted, rows, 1)
    np.testing.assert_array_equal(weight, [[0, 0, 0], [1, 1, 0]])
    assert float(tallies.results(metrics)['mismatch/rejected']) == 1 / 2


@pytest.mark.parametrize('kind', SETTINGS)
def test_equal_policies_have_weight_one_exactly(kind):
    layout = slow.arrangements(slow.tales(22))['packed']
    layout.arrays['sampler'] = layout.arrays['old']
    weight, metrics = weigh(SETTINGS[kind], layout)
    np.testing.assert_array_equal(weight, layout.acted.astype(np.float32))
    assert float(tallies.results(metrics)['mismatch/logprob_abs_max']) == 0


def test_an_absurd_gap_is_held():
    one = np.ones((1, 1), np.int32)
    for kind in ('token', 'sequence'):
        settings = loss_settings(correction=kind, correction_cap=1e9, correction_low=0.0, correction_high=1e9)
        for gap, expected in ((1e5, np.exp(20.0)), (-1e5, np.exp(-20.0))):
            weight, _ = correction(settings, np.float32([[gap]]), np.float32([[0]]), one > 0, one, 1)
            assert float(weight[0, 0]) == pytest.approx(expected, rel=1e-5)
