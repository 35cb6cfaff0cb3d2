"""The section on code: the paper's six metrics, self-correction, and what snippets are for."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from html import escape

from retool_jax.report import labels
from retool_jax.report.analysis import PURPOSES, CodeUse
from retool_jax.report.charts import Series, charts, line_chart, number
from retool_jax.report.runs import Part

Uses = Mapping[Part, CodeUse]

# (title, what it is, value, unit). The sixth metric, the pass rate of the last snippet, has two lines.
METRICS: tuple[tuple[str, str, Callable[[CodeUse], float | None], str], ...] = (
    ('Response length', 'tokens that the model wrote, per answer', lambda u: u.response_length, ''),
    ('Code ratio', 'share of answers with code', lambda u: u.code_ratio, '%'),
    ('Code lines', 'lines of code per answer', lambda u: u.code_lines, ''),
    ('Correct codes', 'snippets that ran, over the set', lambda u: u.correct_codes, ''),
    ('Invocation timing', 'start of the first snippet ÷ length of the answer', lambda u: u.timing, '%'),
    ('Last passes, right', 'last snippets that ran, among right answers with code', lambda u: u.last_pass_right, '%'),
    ('Last passes, wrong', 'last snippets that ran, among wrong answers with code', lambda u: u.last_pass_wrong, '%'),
    ('Self-correction', 'failing snippets that a later one repaired', lambda u: u.self_correction, '%'),
)
CORRECTION = (
    'A failing snippet counts as repaired when a later one of the same answer ran without a fault and is a revision '
    'of it: another text, of whose words and signs at least half are common to both.'
)
PURPOSE = 'Read from each snippet’s syntax tree, never by running it; the first rule that fits names it.'


def section(uses: Uses) -> str:
    """Curves over training, the same numbers of every evaluation, and purposes before and after."""
    training: dict[str, list[tuple[Part, CodeUse]]] = {}
    for part, use in sorted(uses.items()):
        if part.training:
            training.setdefault(part.kind, []).append((part, use))
    made = []
    for title, note, pick, unit in METRICS:
        if not title.startswith('Last'):
            made.append(
                line_chart(title, note, [_line(*labels.kind(k), rows, pick) for k, rows in training.items()], unit=unit)
            )
    passes = [
        _line(f'{word} answers{_of(kind, training)}', word, rows, pick)
        for kind, rows in training.items()
        for word, pick in (('right', lambda u: u.last_pass_right), ('wrong', lambda u: u.last_pass_wrong))
    ]
    made.insert(5, line_chart('Last snippet passes', '', passes, unit='%', legend=True))
    return charts('Over training, from the saved episodes', made) + _evaluations(uses) + _purposes(uses, training)


def _line(label: str, colour: str, rows: Sequence[tuple[Part, CodeUse]], pick: Callable) -> Series:
    return Series(label, colour, [(part.step, value) for part, use in rows if (value := pick(use)) is not None])


def _of(kind: str, training: Mapping) -> str:
    """The model's name, where more than one of them writes code."""
    coding = [k for k, rows in training.items() if any(use.code_ratio for _, use in rows)]
    return f', {labels.kind(kind)[0]}' if len(coding) > 1 else ''


def _evaluations(uses: Uses) -> str:
    rows = []
    for part, use in sorted(uses.items(), key=lambda item: labels.order(item[0])):
        if not part.training:
            cells = ''.join(f'<td>{_value(pick(use), unit)}</td>' for _, _, pick, unit in METRICS)
            rows.append(
                f'<tr><th scope="row">{escape(labels.title(part))}</th><td>{use.answers:,}</td>{cells}'
                f'<td>{use.failures:,}</td></tr>'
            )
    if not rows:
        return ''
    head = ''.join(f'<th scope="col" title="{escape(note)}">{escape(title)}</th>' for title, note, _, _ in METRICS)
    return (
        f'<section class="card space"><h3>On the evaluation answers <small>{escape(CORRECTION)}</small></h3>'
        f'<div class="scroll"><table class="dense"><thead><tr><td></td><th scope="col">Answers</th>{head}'
        f'<th scope="col">Failing snippets</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return '–'
    return f'{100 * value:.1f} %' if unit == '%' else f'{value:,}' if isinstance(value, int) else number(value)


def _purposes(uses: Uses, training: Mapping[str, Sequence[tuple[Part, CodeUse]]]) -> str:
    """Bars of what snippets are for: of every evaluated model, all its sets together; else of training's ends."""
    counts: dict[str, collections.Counter[str]] = {}
    for part, use in sorted(uses.items(), key=lambda item: labels.order(item[0])):
        if not part.training:
            name, data = labels.split_evaluation(part)
            title = labels.model(name)[0] if name else data.replace('_', ' ')
            counts.setdefault(title, collections.Counter()).update(use.purposes)
    if not counts:
        for kind, rows in training.items():
            edge = max(1, len(rows) // 10)
            for title, some in (('first steps', rows[:edge]), ('last steps', rows[-edge:])):
                for _, use in some:
                    counts.setdefault(f'{labels.kind(kind)[0]}, {title}', collections.Counter()).update(use.purposes)
    counts = {title: tally for title, tally in counts.items() if tally}
    if not counts:
        return ''
    seen = [p for p in PURPOSES if any(tally[p] for tally in counts.values())]
    legend = ''.join(f'<span title="{escape(PURPOSES[p])}"><i class="swatch p-{p}"></i>{p}</span>' for p in seen)
    rows = []
    for title, tally in counts.items():
        total = tally.total()
        parts = ''.join(
            f'<i class="p-{p}" style="width:{100 * tally[p] / total:.3f}%" '
            f'title="{p}: {tally[p]:,} ({100 * tally[p] / total:.1f} %)"></i>'
            for p in seen
            if tally[p]
        )
        rows.append(
            f'<tr><th scope="row">{escape(title)}</th><td>{total:,}</td>'
            f'<td class="bars"><div class="share">{parts}</div></td></tr>'
        )
    rules = ''.join(f'<dt><i class="swatch p-{p}"></i>{p}</dt><dd>{escape(rule)}</dd>' for p, rule in PURPOSES.items())
    return (
        f'<section class="card space"><h3>What snippets are for <small>{escape(PURPOSE)}</small></h3>'
        f'<p class="legend">{legend}</p><table class="wide"><thead><tr><td></td><th scope="col">Snippets</th>'
        f'<td>share by purpose</td></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'<details><summary>The rules, in order</summary><dl>{rules}</dl></details></section>'
    )
