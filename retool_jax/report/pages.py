"""report.html: one self-contained page from a run's folder. Read `write` first."""

from __future__ import annotations

import os
import time
from html import escape
from pathlib import Path

from retool_jax.core import mirror
from retool_jax.report import analysis, browser, code_use, curves, hosts, labels, scores, yields
from retool_jax.report.analysis import CodeUse
from retool_jax.report.browser import Limits
from retool_jax.report.runs import Part, Run

HERE = Path(__file__).parent


def write(run_dir: str | os.PathLike, limits: Limits = Limits()) -> Path:  # noqa: B008
    """Writes run_dir/report.html, whole or not at all, and returns its path.

    Raises: UserError where the folder holds nothing to report or a file in it is damaged.
    """
    with mirror.visited(run_dir) as directory:
        return mirror.place(_write(Run(directory), limits))


def _write(run: Run, limits: Limits) -> Path:
    uses, chosen = read_episodes(run, limits)
    index, blocks, with_tokens = browser.embed(run, chosen, limits)
    total = sum(map(run.count, run.parts))
    sections = [
        ('Scores', scores.tiles(run.summary) + scores.tables(run.summary)),
        ('Traces', yields.section(run.summary)),
        ('Learning curves', curves.section(run.points)),
        ('Hosts', hosts.section(run.hosts)),
        ('How code is used', _code_use(run, limits, uses)),
        ('Episodes', _browser(len(blocks), total, with_tokens)),
    ]
    sections = [(title, body) for title, body in sections if body]
    anchors = [title.split()[0].lower() for title, _ in sections]
    nav = ''.join(f'<a href="#{a}">{escape(title)}</a>' for a, (title, _) in zip(anchors, sections))
    main = ''.join(
        f'<section id="{a}"><h2>{escape(title)}</h2>{body}</section>' for a, (title, body) in zip(anchors, sections)
    )
    data = f'<script type="application/json" id="index">{browser.dump(index)}</script>' + ''.join(
        f'<script type="application/json" id="e{i}">{block}</script>' for i, block in enumerate(blocks)
    )
    name = run.directory.resolve().name
    page = (HERE / 'page.html').read_text(encoding='utf-8')
    for key, value in (
        ('title', escape(name)),
        ('heading', escape(name)),
        ('facts', _facts(run)),
        ('nav', nav),
        ('style', (HERE / 'page.css').read_text(encoding='utf-8')),
        ('script', (HERE / 'page.js').read_text(encoding='utf-8')),
        ('main', main),
        ('data', data),
    ):
        before, _, after = page.partition(f'<!-- {key} -->')
        page = before + value + after
    target = run.directory / 'report.html'
    new = target.with_name('.report.html.new')
    new.write_text(page, encoding='utf-8', errors='replace')
    os.replace(new, target)
    return target


def read_episodes(run: Run, limits: Limits) -> tuple[dict[Part, CodeUse], list[browser.Chosen]]:
    """The analysis of every part that is read, and a selection of their episodes; one part at a time."""
    parts = sorted(browser.spread(run.parts, limits.parts), key=labels.order)
    quotas = browser.quotas([run.count(part) for part in parts], limits.episodes)
    uses, chosen = {}, []
    for part, quota in zip(parts, quotas):
        transcripts = run.transcripts(part)
        if transcripts:
            uses[part] = analysis.analyse(transcripts)
            chosen += browser.choose(part, transcripts, quota)
    return uses, chosen


def _code_use(run: Run, limits: Limits, uses: dict[Part, CodeUse]) -> str:
    body, read = code_use.section(uses), len(browser.spread(run.parts, limits.parts))
    if not body or read == len(run.parts):
        return body
    return (
        f'<p class="note">From {read} of {len(run.parts)} files of episodes, evenly over the run, '
        f'both ends included.</p>{body}'
    )


def _facts(run: Run) -> str:
    written = time.strftime('%Y-%m-%d %H:%M', time.localtime())
    return f'{escape(str(run.directory))} <i>·</i> written {written}'


def _browser(count: int, total: int, with_tokens: int) -> str:
    """The empty browser, which the page's script fills, under a line that says what it holds."""
    if not count:
        return ''
    held = (
        f'All {total:,} saved episodes.'
        if count == total
        else (f'{count:,} of {total:,} saved episodes, drawn at random and evenly over models, sets and steps.')
    )
    if with_tokens < count:
        held += f' {with_tokens:,} of them carry their tokens; the others are text alone, to keep this file small.'
    return f'<p class="note">{held} Colours show who wrote what: {LEGEND}</p><div id="browser"></div>'


LEGEND = (
    '<span class="said"><span class="answer">the model’s answer</span></span>, '
    '<i class="swatch s-code"></i>the model’s code, <i class="swatch s-tool"></i>what the interpreter said.'
)
