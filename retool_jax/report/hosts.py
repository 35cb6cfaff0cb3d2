"""What each process of a run did, where there were several: hosts.jsonl as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

HEAD = (
    'process', 'host', 'steps', 'rollout, s', 'waited, s', 'slowest in', 'tokens/s', 'tools p99, s',
    'device peak, GiB', 'host peak, GiB',
)  # fmt: skip


def section(lines: Sequence[dict[str, Any]]) -> str:
    """A row for each process, means over its steps; '' for a run of one process."""
    by_process: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        by_process.setdefault((line['process'], line['host']), []).append(line)
    if len({process for process, _ in by_process}) < 2:
        return ''
    longest: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line['step'] not in longest or line['rollout_s'] > longest[line['step']]['rollout_s']:
            longest[line['step']] = line
    slowest = Counter((line['process'], line['host']) for line in longest.values())
    rows = []
    for (process, host), found in sorted(by_process.items()):
        mean = lambda key, found=found: statistics.fmean(line[key] for line in found)
        seconds = sum(line['rollout_s'] for line in found)
        rate = sum(line['sampled_tokens'] for line in found) / seconds if seconds else 0.0
        rows.append(
            [
                str(process),
                host,
                f'{len(found):,}',
                f'{mean("rollout_s"):.1f}',
                f'{mean("waiting_s"):.1f}',
                f'{slowest[process, host]:,}',
                f'{rate:,.0f}',
                f'{max(line["tools_p99_s"] for line in found):.2f}',
                _gib(found, 'device_peak_mb'),
                _gib(found, 'host_peak_mb'),
            ]
        )
    cells = lambda tag, texts: ''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)
    head = f'<thead><tr><th scope="row">{HEAD[0]}</th>{cells("th", HEAD[1:])}</tr></thead>'
    body = ''.join(f'<tr><th scope="row">{row[0]}</th>{cells("td", row[1:])}</tr>' for row in rows)
    note = 'Means over the steps; the tools’ 99th percentile and the peaks are the largest of any step.'
    return f'<p class="note">{note}</p><div class="scroll card"><table>{head}<tbody>{body}</tbody></table></div>'


def _gib(lines: Sequence[dict[str, Any]], key: str) -> str:
    known = [line[key] for line in lines if line[key] is not None]
    return f'{max(known) / 1024:.1f}' if known else '–'
