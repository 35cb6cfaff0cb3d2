"""What a rewriting or a cold start kept and dropped, and the paper's statistics of what it kept."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from retool_jax.traces import repair
from retool_jax.traces.reasons import MORE_REASONS, REASONS

_STATISTICS = {  # key of outcome.statistics_of → words, how it is written
    'traces': ('traces', '{:,}'), 'problems': ('problems', '{:,}'), 'with_code': ('traces with code', '{:.1%}'),
    'calls': ('calls of a trace', '{:.2f}'), 'failing_calls': ('calls that fail', '{:.1%}'),
    'corrections': ('traces with a failing call and its correction', '{:.1%}'),
    'lines': ('lines of a snippet', '{:.1f}'), 'length_mean': ('tokens of a trace, mean', '{:,.0f}'),
    'length_p50': ('tokens of a trace, median', '{:,.0f}'), 'length_max': ('tokens of the longest', '{:,}'),
}  # fmt: skip


def section(summary: dict[str, Any]) -> str:
    """Tables of summary.json: what became of the traces, by source and rewriter, what was mended, what was kept."""
    counts, found = summary.get('counts'), summary.get('statistics')
    if not isinstance(counts, dict) or not isinstance(found, dict):
        return ''
    words, total = REASONS | MORE_REASONS, max(sum(counts.values()), 1)
    fates = [(words.get(name, name), f'{n:,}', f'{n / total:.1%}') for name, n in counts.items() if n]
    tables = [_table(('what became of traces', 'number', 'share'), fates)]
    rows = [
        (row['source'], row['rewriter'] or '–', f'{row["traces"]:,}', f'{row["kept"]:,}', _dropped(row['dropped']))
        for row in summary.get('yield', ())
    ]
    tables.append(_table(('source', 'rewriter', 'traces', 'kept', 'dropped'), rows))
    if mended := summary.get('repairs'):
        rules = [(repair.RULES.get(name, name), f'{n:,}') for name, n in mended.items()]
        tables.append(_table(('mended in what was kept', 'traces'), rules))
    told = [(words, form.format(found[key])) for key, (words, form) in _STATISTICS.items() if key in found]
    tables.append(_table(('of what was kept', ''), told))
    return f'<div class="tables">{"".join(tables)}</div>'


def _dropped(counts: dict[str, int]) -> str:
    return ', '.join(f'{n:,} {reason}' for reason, n in counts.items()) or '–'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = lambda tag, texts: ''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)
    first, *others = head
    body = ''.join(f'<tr><th scope="row">{escape(name)}</th>{cells("td", rest)}</tr>' for name, *rest in rows)
    heads = f'<thead><tr><th scope="row">{escape(first)}</th>{cells("th", others)}</tr></thead>'
    return f'<div class="scroll card"><table>{heads}<tbody>{body}</tbody></table></div>'
