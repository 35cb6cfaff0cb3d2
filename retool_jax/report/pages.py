"""report.html: one self-contained page from a run's folder. Read `write` first."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from retool_jax.report import analysis, browser, labels, scores
from retool_jax.report.analysis import CodeUse
from retool_jax.report.browser import Limits
from retool_jax.report.charts import Series, line_chart
from retool_jax.report.runs import Part, Point, Run

HERE = Path(__file__).parent

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
SFT_CURVES = (('sft/loss', 'Loss', 'nats per token the model should write', ''),
              ('sft/entropy', 'Entropy', 'nats per token', ''), ('actor/grad_norm', 'Gradient norm', 'before clipping', ''))
USE_CURVES: tuple[tuple[str, str, Callable[[CodeUse], float | None], str], ...] = (
    ('Response length', 'tokens that the model wrote', lambda u: u.response_length, ''),
    ('Code ratio', 'share of answers with code', lambda u: u.code_ratio, '%'),
    ('Code lines', 'lines of code per answer', lambda u: u.code_lines, ''),
    ('Correct codes', 'snippets that ran, over the step’s answers', lambda u: u.correct_codes, ''),
    ('Invocation timing', 'start of the first snippet ÷ length of the answer', lambda u: u.timing, '%'),
)
# Evaluations of the demo's models stand at the ends of the RL curves.
ENDS = {'sft': ('tool', 0.0), 'tool_rl': ('tool', 1.0), 'text_sft': ('text', 0.0), 'text_rl': ('text', 1.0)}


def write(run_dir: str | os.PathLike, limits: Limits = Limits()) -> Path:  # noqa: B008
    """Writes run_dir/report.html, whole or not at all, and returns its path.

    Raises ValueError where the folder holds nothing to report or a file in it is damaged.
    """
    run = Run(run_dir)
    uses, chosen, read, total = read_episodes(run, limits)
    index, blocks = browser.embed(run, chosen, total, limits)
    sections = [
        ('Scores', scores.tiles(run.summary) + scores.tables(run.summary)),
        ('Learning curves', learning(run.points)),
        ('How code is used', code_use(uses, read, len(run.parts))),
        ('Episodes', _browser(index, total)),
    ]
    sections = [(title, body) for title, body in sections if body]
    anchors = [title.split()[0].lower() for title, _ in sections]
    nav = ''.join(f'<a href="#{a}">{escape(title)}</a>' for a, (title, _) in zip(anchors, sections))
    main = ''.join(f'<section id="{a}"><h2>{escape(title)}</h2>{body}</section>'
                   for a, (title, body) in zip(anchors, sections))
    data = f'<script type="application/json" id="index">{browser.dump(index)}</script>' + ''.join(
        f'<script type="application/json" id="e{i}">{block}</script>' for i, block in enumerate(blocks))
    name = run.directory.resolve().name
    page = (HERE / 'page.html').read_text(encoding='utf-8')
    for key, value in (('title', escape(name)), ('heading', escape(name)), ('facts', _facts(run)), ('nav', nav),
                       ('style', (HERE / 'page.css').read_text(encoding='utf-8')),
                       ('script', (HERE / 'page.js').read_text(encoding='utf-8')), ('main', main), ('data', data)):
        before, _, after = page.partition(f'<!-- {key} -->')
        page = before + value + after
    target = run.directory / 'report.html'
    new = target.with_name('.report.html.new')
    new.write_text(page, encoding='utf-8', errors='replace')
    os.replace(new, target)
    return target


def read_episodes(run: Run, limits: Limits) -> tuple[dict[Part, CodeUse], list[browser.Chosen], int, int]:
    """Analysis of every part that is read, a selection of episodes, parts read, and episodes in the folder."""
    parts = browser.spread(run.parts, limits.parts)
    share = max(1, limits.episodes // max(len(parts), 1))
    uses, chosen, counted = {}, [], 0
    for part, transcripts in browser.iterate(run, limits):
        uses[part] = analysis.analyse(transcripts)
        chosen += browser.choose(part, transcripts, share if counted + len(transcripts) else share)
        counted += len(transcripts)
    return uses, chosen, len(parts), counted


def _facts(run: Run) -> str:
    written = time.strftime('%Y-%m-%d %H:%M', time.localtime())
    return f'{escape(str(run.directory))} <i>·</i> written {written}'


def learning(points: Sequence[Point]) -> str:
    """Curves of RL (both models on the same axes), of supervised training, and of whatever else was logged."""
    ppo = [p for p in points if p.stage == 'ppo']
    groups, used = [], set()
    for title, curves in CURVES:
        charts = []
        for metric, name, note, unit in curves:
            series = series_of(ppo, metric)
            if metric == 'rewards/correct':
                series += held_out(points)
            charts.append(line_chart(name, note, series, unit=unit))
            used.add(metric)
        groups.append(_charts(title, charts))
    sft = [p for p in points if p.stage == 'sft']
    groups.append(_charts('Supervised fine-tuning', [
        line_chart(name, note, series_of(sft, metric), unit=unit) for metric, name, note, unit in SFT_CURVES]))
    rest = sorted({name for p in ppo for name in p.values} - used)
    vals = [name for name in rest if name.startswith('val/')]
    groups.insert(0, _charts('Evaluations', [line_chart(n.removeprefix('val/'), '', series_of(ppo, n), unit='%') for n in vals]))
    groups.append(_charts('Everything else that was logged', [
        line_chart(name, '', series_of(ppo, name)) for name in rest if name not in vals], folded=True))
    return ''.join(groups)


def series_of(points: Sequence[Point], metric: str) -> list[Series]:
    """One line per kind of model."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        if metric in p.values:
            lines.setdefault(p.kind, []).append((p.x, p.values[metric]))
    return [Series(*labels.kind(kind), line) for kind, line in lines.items()]


def held_out(points: Sequence[Point]) -> list[Series]:
    """The demo's headline evaluations before and after RL, as dots at the ends of the RL curves."""
    last = {kind: max((p.x for p in points if p.stage == 'ppo' and p.kind == kind), default=0.0)
            for kind in ('tool', 'text')}
    dots: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        if p.stage == 'val' and p.kind in ENDS:
            kind, end = ENDS[p.kind]
            score = next((v for name, v in p.values.items() if '/avg@' in name), None)
            if score is not None:
                dots.setdefault(kind, []).append((end * last[kind], score))
    return [Series(f'{labels.kind(kind)[0]}, held out', labels.kind(kind)[1], line, dots=True) for kind, line in dots.items()]


def code_use(uses: dict[Part, CodeUse], read: int, parts: int) -> str:
    """The paper's six metrics over training, self-correction, and what snippets are for."""
    training: dict[str, list[tuple[Part, CodeUse]]] = {}
    for part, use in uses.items():
        if part.training:
            training.setdefault(part.kind, []).append((part, use))
    line = lambda pick: [Series(*labels.kind(kind), [(p.step, v) for p, u in rows if (v := pick(u)) is not None])
                         for kind, rows in training.items()]
    charts = [line_chart(name, note, line(pick), unit=unit) for name, note, pick, unit in USE_CURVES]
    passes = [Series('right answers', 'right', [(p.step, u.last_pass_right) for p, u in rows if u.last_pass_right is not None])
              for kind, rows in training.items() if kind != 'text']
    passes += [Series('wrong answers', 'wrong', [(p.step, u.last_pass_wrong) for p, u in rows if u.last_pass_wrong is not None])
               for kind, rows in training.items() if kind != 'text']
    charts.append(line_chart('Last snippet passes', 'share, by whether the answer was right', passes, unit='%'))
    repaired = line_chart('Self-correction', 'failing snippets that a later one repaired',
                          line(lambda u: u.self_correction), unit='%')
    note = '' if read == parts else f'<p class="note">From {read} of {parts} files of episodes, evenly over the run.</p>'
    return note + _charts('The paper’s six, over training', charts) + _charts('Self-correction', [repaired]) + \
        purposes(uses)


def purposes(uses: dict[Part, CodeUse]) -> str:
    """What snippets are for, per evaluation, or at both ends of training where there was none."""
    rows = [(part.name.removeprefix('val_').replace('_', ' '), use) for part, use in uses.items()
            if not part.training and use.purposes]
    if not rows:
        return ''
    return '<pre>' + escape('\n'.join(f'{n}: {u.purposes}' for n, u in rows)) + '</pre>'


def _charts(title: str, charts: Sequence[str], folded: bool = False) -> str:
    charts = [c for c in charts if c]
    if not charts:
        return ''
    grid = f'<div class="charts">{"".join(charts)}</div>'
    if folded:
        return f'<details class="group"><summary>{escape(title)} <small>({len(charts)})</small></summary>{grid}</details>'
    return f'<div class="group"><h3>{escape(title)}</h3>{grid}</div>'


def _browser(index: dict, total: int) -> str:
    return '<div id="browser"></div>' if index['rows'] else ''
