"""The headline: every score of summary.json with its interval, over families and sets."""

from __future__ import annotations

from html import escape
from typing import Any

from retool_jax.report import labels
from retool_jax.report.charts import number
from retool_jax.report.labels import MODELS

HEADLINE = ('base', 'sft', 'tool_rl', 'text_rl')


def score_blocks(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every scored model (or set, in an evaluation run) of a summary: {name: {'avg': …, 'ci': …, …}}."""
    if 'avg' in summary:
        return {'score': summary}
    blocks = {name: block for name, block in summary.items() if isinstance(block, dict) and 'avg' in block}
    if not blocks:
        for block in summary.values():
            if isinstance(block, dict):
                blocks |= {name: b for name, b in block.items() if isinstance(b, dict) and 'avg' in b}
    order = list(MODELS)
    return dict(sorted(blocks.items(), key=lambda item: order.index(item[0]) if item[0] in MODELS else len(order)))


def tiles(summary: dict[str, Any]) -> str:
    """The big numbers: one tile per model, then what the run was."""
    blocks = score_blocks(summary)
    shown = {name: b for name, b in blocks.items() if name in HEADLINE or name not in MODELS}
    big = [(*labels.model(name, i), block) for i, (name, block) in enumerate(shown.items())]
    if len(shown) == 1 and 'pass_ci' in big[0][2]:  # one set, scored in three ways
        (name, colour, block), k = big[0], big[0][2].get('k', 'k')
        big = [
            (f'{name}, {way}@{k}', colour, {'avg': block[way], 'ci': block[ci]})
            for way, ci in (('avg', 'ci'), ('pass', 'pass_ci'), ('maj', 'maj_ci'))
        ]
    made = []
    for title, colour, block in big:
        made.append(
            f'<div class="tile k-{colour}"><h3>{escape(title)}</h3><p class="big">{100 * block["avg"]:.1f}'
            f'<small> %</small></p>{_bar(block)}<p class="sub">{_interval(block)}</p></div>'
        )
    facts = []
    ratio = summary.get('code_ratio')
    if isinstance(ratio, dict) and {'before', 'after'} <= ratio.keys():
        facts.append(
            f'Answers with code, on families that need it: <b>{_percent(ratio["before"])}</b> before RL, '
            f'<b>{_percent(ratio["after"])}</b> after'
        )
    first = next(iter(shown.values()), {})
    if 'problems' in first and 'k' in first:
        kind = 'held-out problems' if blocks.keys() & MODELS.keys() else 'problems'
        facts.append(f'{first["problems"]} {kind} × {first["k"]} samples')
    for pair, gain in summary.get('gains', {}).items():
        models = ' − '.join(labels.model(name)[0] for name in pair.split(' − '))
        low, high = (f'{100 * x:.1f}' for x in gain['ci'])
        facts.append(f'{escape(models)}: <b>{100 * gain["points"]:+.1f}</b> points ({low} to {high})')
    if data := summary.get('data'):
        facts.append(
            f'{data["held_out_in_training"]} of {data["held_out_questions"]:,} held-out questions stand among '
            f'the {data["training_questions"]:,} of training'
        )
    facts += [f'{summary[key]:,} {word}' for key, word in (('steps', 'RL steps'),) if key in summary]
    if 'seconds' in summary:
        facts.append(f'{_duration(summary["seconds"])} in all')
    if 'seed' in summary:
        facts.append(f'seed {summary["seed"]}')
    return (f'<div class="tiles">{"".join(made)}</div>' if made else '') + (
        '<p class="facts">' + ' <i>·</i> '.join(facts) + '</p>' if facts else ''
    )


def tables(summary: dict[str, Any]) -> str:
    """Sets scored apart, then families, a column per model; then the rates beside the score."""
    blocks = score_blocks(summary)
    if not blocks:
        return ''
    apart = list(dict.fromkeys(s for block in blocks.values() for s in block.get('apart', {})))
    if 'apart' in next(iter(blocks.values())) or apart:
        headline = summary.get('headline', 'new_operands').replace('_', ' ')
        rows = [(f'held out: {headline}', {name: block for name, block in blocks.items()})]
        rows += [
            (s.replace('_', ' '), {name: b['apart'][s] for name, b in blocks.items() if s in b.get('apart', {})})
            for s in apart
        ]
    else:
        rows = [('all problems', blocks)] if len(blocks) > 1 else []  # one score stands in its tile
    cells = [(title, {n: _score_cell(b) for n, b in row.items()}) for title, row in rows]
    note = 'avg@k with its 95 % interval over problems; each set is scored apart'
    made = [_table('Score by set', note, blocks, cells, whole=True)] if rows else []
    families = sorted({f for block in blocks.values() for f in block.get('families', {}) if f})
    if families:
        made.append(
            _table(
                'Score by family',
                'avg@k on the headline set',
                blocks,
                [
                    (
                        f.replace('_', ' '),
                        {n: _heat(b['families'][f]) for n, b in blocks.items() if f in b.get('families', {})},
                    )
                    for f in families
                ],
            )
        )
    rates = [
        (title, {n: _rate(b[key], kind, b.get(f'{key}_ci')) for n, b in blocks.items() if key in b})
        for key, title, kind in RATES
    ]
    rates = [row for row in rates if row[1]]
    if rates:
        made.append(_table('Beside the score', 'of the same answers', blocks, rates))
    return '<div class="tables">' + ''.join(made) + '</div>' + _problems(blocks)


def _problems(blocks: dict[str, dict[str, Any]]) -> str:
    """A row per problem of the headline set, hardest last: what is known of it, or the score of every model."""
    records = {
        name: block['by_problem']
        for name, block in blocks.items()
        if all(isinstance(r, dict) for r in block.get('by_problem', {0: 0}).values())
    }
    if not records:
        return ''
    first = next(iter(records.values()))
    order = sorted(first, key=lambda p: -sum(r[p]['avg'] for r in records.values() if p in r))
    if len(records) == 1:
        head = [title for _, title in SHARES] + ['tokens', 'gold', 'most frequent answer']
        cells = lambda r: [
            *(_heat(r[key]) for key, _ in SHARES[:4]),
            *(f'<td>{100 * r[key]:.0f}</td>' for key, _ in SHARES[4:]),
            f'<td>{r["length"]:.0f}</td>',
            *(f'<td class="text">{escape(r[key])}</td>' for key in ('gold', 'answer')),
        ]
        rows = [(p, cells(first[p])) for p in order]
    else:
        head = [labels.SHORT.get(name) or labels.model(name)[0] for name in records]
        rows = [
            (p, [_heat(r[p]['avg']) if p in r else '<td class="none">–</td>' for r in records.values()]) for p in order
        ]
    body = ''.join(f'<tr><th scope="row">{escape(p)}</th>{"".join(row)}</tr>' for p, row in rows)
    head = ''.join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<details class="card space"{" open" if len(rows) <= 40 else ""}><summary><b>Score by problem</b> '
        f'<small>{len(rows)} problems, shares of their samples in %, the hardest last</small></summary>'
        f'<div class="scroll"><table class="dense problems"><thead><tr><td></td>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div></details>'
    )


SHARES = (
    ('avg', 'avg@k'),
    ('maj', 'maj@k'),
    ('exact', 'exact'),
    ('lenient', 'lenient'),
    ('code', 'with code'),
    ('truncated', 'truncated'),
)


RATES = (
    ('pass', 'pass@k', '%'), ('maj', 'maj@k', '%'), ('exact', 'exact string', '%'), ('lenient', 'lenient rule', '%'),
    ('format', 'answers in form', '%'), ('code_ratio', 'answers with code', '%'), ('calls', 'calls per answer', ''),
    ('call_failures', 'failing calls', '%'), ('length', 'tokens per answer', ''), ('turns', 'turns per answer', ''),
    ('truncated', 'truncated', '%'), ('void', 'void', '%'),
)  # fmt: skip


COLUMNS = 6  # of a table; further models stand below it. More than 3 take the whole width of the page


def _table(title: str, note: str, blocks: dict, rows: list[tuple[str, dict[str, str]]], whole: bool = False) -> str:
    names = list(blocks)
    parts = ''.join(
        _columns(names, range(start, min(start + COLUMNS, len(names))), rows) for start in range(0, len(names), COLUMNS)
    )
    whole = whole or len(names) > 3
    return (
        f'<section class="card{" whole" if whole else ""}"><h3>{escape(title)} <small>{escape(note)}</small></h3>'
        f'{parts}</section>'
    )


def _columns(names: list[str], chosen: range, rows: list[tuple[str, dict[str, str]]]) -> str:
    """The columns of some models; where the page is narrow, each cell says whose it is (page.css)."""
    titles = {names[i]: escape(labels.SHORT.get(names[i]) or labels.model(names[i])[0]) for i in chosen}
    head = ''.join(
        f'<th scope="col"><i class="swatch k-{labels.model(names[i], i)[1]}"></i>{titles[names[i]]}</th>'
        for i in chosen
    )
    cell = lambda cells, n: cells.get(n, '<td class="none">–</td>').replace('<td', f'<td data-of="{titles[n]}"', 1)
    body = ''.join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(cell(cells, n) for n in titles)}</tr>' for name, cells in rows
    )
    return (
        f'<div class="scroll folds"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _score_cell(block: dict) -> str:
    ci = block.get('ci')
    reach = f'<small>{100 * ci[0]:.1f} – {100 * ci[1]:.1f}</small>' if ci else ''
    return f'<td class="heat" style="--v:{block["avg"]:.3f}"><b>{100 * block["avg"]:.1f}</b>{reach}</td>'


def _heat(value: float) -> str:
    return f'<td class="heat" style="--v:{value:.3f}">{100 * value:.0f}</td>'


def _rate(value: float, kind: str, ci: list[float] | None) -> str:
    reach = f'<small>{100 * ci[0]:.1f} – {100 * ci[1]:.1f}</small>' if ci else ''
    return f'<td>{_percent(value) if kind == "%" else number(value)}{reach}</td>'


def _bar(block: dict) -> str:
    low, high = block.get('ci') or (block['avg'],) * 2
    return (
        f'<div class="bar"><i style="width:{100 * block["avg"]:.2f}%"></i>'
        f'<b style="left:{100 * low:.2f}%;width:{max(100 * (high - low), 0.4):.2f}%"></b></div>'
    )


def _interval(block: dict) -> str:
    ci = block.get('ci')
    return f'{100 * ci[0]:.1f} – {100 * ci[1]:.1f} <small>(95 %)</small>' if ci else '&nbsp;'


def _percent(value: float) -> str:
    return f'{100 * value:.1f} %'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s' if minutes else f'{rest} s'
