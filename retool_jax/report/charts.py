"""Line charts as inline SVG: drawn here, coloured by the page's style sheet, read out by its script."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
MOST_POINTS = 600  # of one line; longer ones are thinned
SMOOTH_FROM = 80  # points from which on a running mean is drawn over the raw line


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One line, or with `dots` loose points, of a chart; colours are the classes k-NAME of the style sheet."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def line_chart(
    title: str, note: str, series: Sequence[Series], *, unit: str = '', x_label: str = 'step', legend: bool = False
) -> str:
    """An HTML figure of series that share their axes; '' where there is no finite point.

    unit is '%' for shares: drawn from 0, and up to 100 % where they go that far.
    """
    series = [dataclasses.replace(s, points=_thin(s.points)) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ''
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    if unit == '%':
        whole = max(ys) > 0.4 or max(ys) <= 0
        y_ticks = [0, 0.25, 0.5, 0.75, 1.0] if whole else ticks(min(0.0, *ys), max(ys))
    else:
        y_ticks = ticks(min(ys), max(ys))
    y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    to_x = lambda x: LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    to_y = lambda y: HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    marks = []
    for y in y_ticks:
        marks.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(y):.1f}" y2="{to_y(y):.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{to_y(y) + 3.5:.1f}" text-anchor="end">'
            f'{number(y, unit)}</text>'
        )
    x_ticks = [x for x in ticks(x0, x1, 5, whole=True) if x0 <= x <= x1]
    for x in x_ticks:
        marks.append(f'<text class="tick" x="{to_x(x):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{x:,.0f}</text>')
    for s in series:
        place = [(to_x(x), to_y(y)) for x, y in s.points]
        if s.dots:
            marks += [f'<circle class="k-{s.colour} held" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in place]
            continue
        smooth = len(place) >= SMOOTH_FROM
        if len(place) == 1:
            marks.append(f'<circle class="k-{s.colour} dot" cx="{place[0][0]:.1f}" cy="{place[0][1]:.1f}" r="3"/>')
        marks.append(f'<path class="k-{s.colour} line{" raw" if smooth else ""}" d="{_path(place)}"/>')
        if smooth:
            marks.append(f'<path class="k-{s.colour} line" d="{_path(_smooth(place))}"/>')
    data = {
        'x0': x0,
        'x1': x1,
        'left': LEFT,
        'right': WIDTH - RIGHT,
        'unit': unit,
        'x_label': x_label,
        'series': [
            {
                'label': s.label,
                'colour': s.colour,
                'dots': s.dots,
                'points': [[_round(x), _round(y)] for x, y in s.points],
            }
            for s in series
        ],
    }
    return (
        f'<figure class="chart" data-chart="{html.escape(json.dumps(data), quote=True)}">'
        f'<figcaption><b>{html.escape(title)}</b><span>{html.escape(note)}</span>'
        f'{_names(series) if legend else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
        f'{"".join(marks)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


def charts(title: str, made: Sequence[str], folded: bool = False) -> str:
    """A titled grid of charts, those that are '' left out; '' where none is left."""
    made = [chart for chart in made if chart]
    if not made:
        return ''
    grid, title = f'<div class="charts">{"".join(made)}</div>', html.escape(title)
    if folded:
        return f'<details class="group"><summary>{title} <small>({len(made)})</small></summary>{grid}</details>'
    return f'<div class="group"><h3>{title}</h3>{grid}</div>'


def _names(series: Sequence[Series]) -> str:
    return ''.join(f'<span><i class="swatch k-{s.colour}"></i>{html.escape(s.label)}</span>' for s in series)


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers that enclose low … high, about `count` steps apart."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - (margin if low else 0), high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((step * m for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs((high - low) / s - count))
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float, unit: str = '') -> str:
    """A short number: '97 %', '0.0025', '3.1e-06', '12.4k', '-4.0e+11'."""
    if unit == '%':
        return f'{100 * value:.4g} %'
    if value == 0:
        return '0'
    size = abs(value)
    if 10_000 <= size < 1e7:
        return f'{value / 1000:.4g}k'
    return f'{value:.3g}' if 1e-3 <= size < 1e7 else f'{value:.1e}'


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Finite points, at most MOST_POINTS of them, the last one kept."""
    kept = [(x, y) for x, y in points if y is not None and math.isfinite(x) and math.isfinite(y)]
    every = -(-len(kept) // MOST_POINTS) or 1
    return kept[::-1][::every][::-1]


def _smooth(place: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over a twentieth of the line."""
    reach = max(2, len(place) // 40)
    smoothed = []
    for i, (x, _) in enumerate(place):
        near = place[max(0, i - reach) : i + reach + 1]
        smoothed.append((x, sum(y for _, y in near) / len(near)))
    return smoothed


def _path(place: Sequence[tuple[float, float]]) -> str:
    return 'M' + 'L'.join(f'{x:.1f},{y:.1f}' for x, y in place)


def _round(value: float) -> float:
    return float(f'{value:.5g}')
