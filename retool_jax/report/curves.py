"""The section of learning curves: everything that metrics.jsonl holds, both models on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from retool_jax.report import labels
from retool_jax.report.charts import Series, charts, line_chart
from retool_jax.report.runs import Point

# (metric, title, what it is, unit), in the page's order.
CURVES = (
    ('What it does', (
        ('rewards/correct', 'Right answers', 'share of the step’s episodes', '%'),
        ('tools/code_ratio', 'Answers with code', 'share of the step’s episodes', '%'),
        ('response_length/mean', 'Response length', 'tokens that the model wrote', ''),
        ('tools/calls', 'Calls per answer', 'refused ones included', ''),
        ('tools/failure_frequency', 'Failing calls', 'share of calls', '%'),
        ('void_turn_ratio', 'Void answers', 'some turn had neither snippet nor answer', '%'),
    )),
    ('How the policy moves', (
        ('actor/entropy', 'Entropy', 'nats per token', ''),
        ('actor/ppo_kl', 'KL of the step', 'old to new policy, nats per token', ''),
        ('actor/pg_clipfrac', 'Clipped ratios', 'share of tokens', '%'),
        ('actor/grad_norm', 'Gradient norm', 'before clipping', ''),
        ('mismatch/logprob_abs_max', 'Sampler − trainer', 'largest |Δ log p| of the step', ''),
        ('mismatch/kl', 'Sampler ∥ trainer', 'KL, nats per token', ''),
        ('critic/explained_var', 'Explained variance', 'of returns, by the critic', ''),
        ('critic/vf_loss', 'Value loss', '', ''),
    )),
    ('Where the time goes', (
        ('time/step_s', 'Whole step', 'seconds', ''),
        ('time/rollout_s', 'Rollout', 'seconds', ''),
        ('time/tools_blocked_s', 'Waiting for tools', 'seconds in which no row could decode', ''),
        ('time/update_s', 'Update', 'seconds', ''),
        ('rollout/tokens_per_s', 'Sampling speed', 'tokens a second', ''),
        ('tools/seconds_p99', 'Slowest calls', '99th percentile, seconds', ''),
    )),
)  # fmt: skip
SFT_CURVES = (
    ('sft/loss', 'Loss', 'nats per token the model should write', ''),
    ('sft/held_out_loss', 'Held-out loss', 'the same, on traces never trained on', ''),
    ('sft/entropy', 'Entropy', 'nats per token', ''),
    ('actor/grad_norm', 'Gradient norm', 'before clipping', ''),
)
# Evaluations of the demo's models stand at the ends of the RL curves.
ENDS = {'sft': ('tool', 0.0), 'tool_rl': ('tool', 1.0), 'text_sft': ('text', 0.0), 'text_rl': ('text', 1.0)}


def section(points: Sequence[Point]) -> str:
    """Curves of RL (both models on the same axes), of supervised training, and of whatever else was logged."""
    ppo = [p for p in points if p.stage == 'ppo']
    groups, used = [], set()
    for title, curves in CURVES:
        made = []
        for metric, name, note, unit in curves:
            series = series_of(ppo, metric)
            if metric == 'rewards/correct':
                series += held_out(points)
            made.append(line_chart(name, note, series, unit=unit))
            used.add(metric)
        groups.append(charts(title, made))
    sft = [p for p in points if p.stage == 'sft']
    groups.append(
        charts(
            'Supervised fine-tuning',
            [line_chart(name, note, series_of(sft, metric), unit=unit) for metric, name, note, unit in SFT_CURVES],
        )
    )
    rest = sorted({name for p in ppo for name, value in p.values.items() if value} - used)
    vals = [name for name in rest if name.startswith('val/')]
    groups.insert(
        0,
        charts(
            'Evaluations', [line_chart(name.removeprefix('val/'), '', series_of(ppo, name), unit='%') for name in vals]
        ),
    )
    groups.append(
        charts(
            'Everything else that was logged',
            [line_chart(name, '', series_of(ppo, name)) for name in rest if name not in vals],
            folded=True,
        )
    )
    groups = [group for group in groups if group]
    return _legend(ppo) + ''.join(groups) if groups else ''


def _legend(points: Sequence[Point]) -> str:
    kinds = list(dict.fromkeys(p.kind for p in points))
    if len(kinds) < 2:
        return ''
    names = ''.join(
        f'<span><i class="swatch k-{colour}"></i>{escape(title)}</span>' for title, colour in map(labels.kind, kinds)
    )
    rings = ''.join(f'<i class="swatch ring k-{labels.kind(kind)[1]}"></i>' for kind in kinds)
    return f'<p class="legend">{names}<span>{rings}held-out problems, before and after RL</span></p>'


def series_of(points: Sequence[Point], metric: str) -> list[Series]:
    """One line per kind of model."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        if metric in p.values:
            lines.setdefault(p.kind, []).append((p.x, p.values[metric]))
    return [Series(*labels.kind(kind), line) for kind, line in lines.items()]


def held_out(points: Sequence[Point]) -> list[Series]:
    """The demo's headline evaluations before and after RL, as dots at the ends of the RL curves."""
    last = {
        kind: max((p.x for p in points if p.stage == 'ppo' and p.kind == kind), default=0.0)
        for kind in ('tool', 'text')
    }
    dots: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        if p.stage == 'val' and p.kind in ENDS:
            kind, end = ENDS[p.kind]
            score = next((v for name, v in p.values.items() if '/avg@' in name), None)
            if score is not None:
                dots.setdefault(kind, []).append((end * last[kind], score))
    look = {kind: labels.kind(kind) for kind in dots}
    return [Series(f'{look[kind][0]}, held out', look[kind][1], line, dots=True) for kind, line in dots.items()]
