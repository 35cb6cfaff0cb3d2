"""The picture of a run for a README or a paper; matplotlib is imported when it is drawn."""

from __future__ import annotations

import os
from pathlib import Path

from retool_jax.core import mirror
from retool_jax.core.errors import UserError
from retool_jax.report import labels, scores
from retool_jax.report.curves import held_out, series_of
from retool_jax.report.runs import Run

# As in page.css, light; dark enough on white, bright enough on a dark README's card.
COLOURS = {'tool': '#2459d6', 'text': '#c2570c', 'sft': '#0d8a7c', 'textsft': '#8a6d1f', 'base': '#8b93a0'}
INK, SOFT, LINE = '#1d2128', '#626a76', '#e4e5e0'
PANELS = (
    ('rewards/correct', 'Right answers', True),
    ('tools/code_ratio', 'Answers with code', True),
    ('response_length/mean', 'Response length, tokens', False),
)
SMOOTH_FROM = 60  # RL steps from which on a running mean is drawn over the raw line


def curves(run_dir: str | os.PathLike) -> Path:
    """Draws a run's RL curves, both models on the same axes, and its final scores; writes curves.png there.

    Returns the picture's path. Raises: UserError where the run has neither RL curves nor scores.
    """
    with mirror.visited(run_dir) as directory:
        return mirror.place(_curves(Run(directory)))


def _curves(run: Run) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ppo = [p for p in run.points if p.stage == 'ppo']
    panels = [(title, share, series) for metric, title, share in PANELS if (series := series_of(ppo, metric))]
    blocks = scores.score_blocks(run.summary)
    count = len(panels) + bool(blocks)
    if not count:
        raise UserError(
            f'run folder {str(mirror.place(run.directory))!r} holds neither RL metrics nor scores: nothing to draw'
        )
    style = {'font.size': 9.5, 'text.color': INK, 'axes.labelcolor': SOFT, 'xtick.color': SOFT, 'ytick.color': SOFT}
    with rc_context(style):
        figure = Figure(figsize=(3.4 * count, 2.9), dpi=160, layout='constrained', facecolor='white')
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, count, squeeze=False)[0]
        for axis, (title, share, series) in zip(axes, panels):
            _draw_lines(axis, series, share)
            if title == PANELS[0][1]:
                for dots in held_out(run.points):
                    axis.plot(
                        [x for x, _ in dots.points],
                        [100 * y for _, y in dots.points],
                        'o',
                        markersize=6.5,
                        markerfacecolor='white',
                        markeredgewidth=1.8,
                        markeredgecolor=COLOURS[dots.colour],
                        zorder=4,
                        clip_on=False,
                    )
            _dress(axis, title, share)
            axis.set_xlabel('RL step')
        if panels and len(axes[0].get_lines()) > 1:
            axes[0].legend(handles=axes[0].get_lines()[:2], frameon=False, loc='best', fontsize=8.5, labelcolor=INK)
        if blocks:
            _draw_scores(axes[-1], blocks)
    target = run.directory / 'curves.png'
    figure.savefig(target)
    return target


def _draw_lines(axis, series, share: bool) -> None:
    scale = 100 if share else 1
    for line in series:
        xs, ys = [x for x, _ in line.points], [scale * y for _, y in line.points]
        colour = COLOURS.get(line.colour, COLOURS['tool'])
        if len(xs) >= SMOOTH_FROM:
            axis.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.9)
            reach = len(ys) // 30
            windows = [ys[max(0, i - reach) : i + reach + 1] for i in range(len(ys))]
            ys = [sum(w) / len(w) for w in windows]
        axis.plot(xs, ys, color=colour, linewidth=1.9, label=line.label, marker='o' if len(xs) == 1 else None)


def _draw_scores(axis, blocks: dict) -> None:
    """A bar per model with its 95 % interval; the score stands above it."""
    for i, (name, block) in enumerate(blocks.items()):
        colour, value = COLOURS[labels.model(name, i)[1]], 100 * block['avg']
        low, high = (100 * x for x in block.get('ci') or (block['avg'],) * 2)
        axis.bar(i, value, color=colour, width=0.66, alpha=0.85)
        reach = [[max(value - low, 0)], [max(high - value, 0)]]
        axis.errorbar(i, value, yerr=reach, color=INK, capsize=3, linewidth=1.1)
        axis.text(i, high + 2, f'{value:.1f}', ha='center', va='bottom', fontsize=8.5)
    names = [labels.SHORT.get(name, name.replace('_', ' ')).replace(' ', '\n') for name in blocks]
    axis.set_xticks(range(len(blocks)), names, fontsize=8)
    _dress(axis, 'Score on held-out problems', True)


def _dress(axis, title: str, share: bool) -> None:
    axis.set_title(title, fontsize=10, fontweight='bold', loc='left', color=INK)
    axis.grid(axis='y', color=LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ('top', 'right', 'left'):
        axis.spines[side].set_visible(False)
    axis.spines['bottom'].set_color(LINE)
    axis.tick_params(length=0)
    if share:
        axis.set_ylim(0, 104)
        axis.set_yticks([0, 25, 50, 75, 100], ['0 %', '25', '50', '75', '100 %'])
