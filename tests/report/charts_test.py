"""Line charts: round ticks, honest thinning, nothing that a name could inject."""

from __future__ import annotations

import json
import math
import random
import re
from html import unescape

import pytest

from retool_jax.report import charts
from retool_jax.report.charts import Series


def data_of(figure: str) -> dict:
    return json.loads(unescape(re.search(r'data-chart="([^"]*)"', figure)[1]))


def test_ticks_are_round_and_enclose_the_data():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randint(-9, 9)
        high = low + abs(low) * 10 ** rng.uniform(-5, 5)
        found = charts.ticks(low, high)
        step = found[1] - found[0]
        assert found[0] <= low + 1e-6 * step and found[-1] >= high - 1e-6 * step
        assert 2 <= len(found) <= 8
        lead = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(lead - m) for m in (1, 2, 2.5, 5)) < 1e-4


@pytest.mark.parametrize('value', [0.0, 3.0, -2.0])
def test_a_flat_line_has_an_axis_too(value):
    figure = charts.line_chart('flat', '', [Series('a', 'tool', [(0, value), (1, value)])])
    assert 'NaN' not in figure and 'inf' not in figure and '<path' in figure


def test_points_that_are_not_finite_are_left_out_and_an_empty_chart_is_nothing():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    assert data_of(charts.line_chart('t', '', [Series('a', 'tool', points)]))['series'][0]['points'] == [[0, 1], [3, 2]]
    assert charts.line_chart('t', '', [Series('a', 'tool', points[1:3])]) == ''
    assert charts.charts('nothing', ['', '']) == ''


def test_long_lines_are_thinned_and_keep_their_end():
    (line,) = data_of(charts.line_chart('t', '', [Series('a', 'tool', [(i, i) for i in range(10_001)])]))['series']
    assert len(line['points']) <= charts.MOST_POINTS
    assert line['points'][-1] == [10_000, 10_000]


def test_small_shares_get_an_axis_of_their_own_and_large_ones_the_whole():
    small = charts.line_chart('t', '', [Series('a', 'tool', [(0, 0.0), (1, 0.012)])], unit='%')
    large = charts.line_chart('t', '', [Series('a', 'tool', [(0, 0.0), (1, 0.9)])], unit='%')
    assert '100 %' in large and '100 %' not in small and '0 %' in small


@pytest.mark.parametrize(
    'value, unit, text',
    [
        (0.97, '%', '97 %'),
        (0.0, '', '0'),
        (0.0025, '', '0.0025'),
        (3.1e-6, '', '3.1e-06'),
        (12_400, '', '12.4k'),
        (-4e11, '', '-4.0e+11'),
        (7, '', '7'),
    ],
)
def test_numbers_are_short(value, unit, text):
    assert charts.number(value, unit) == text


def test_names_cannot_inject_markup():
    figure = charts.line_chart('<b>"x', "<i>'&", [Series('<script>', 'tool', [(0, 1)])], legend=True)
    assert '<script>' not in figure and '<b>"' not in figure and "<i>'" not in figure
    assert data_of(figure)['series'][0]['label'] == '<script>'
