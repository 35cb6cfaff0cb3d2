"""What a rollout did with its time: sums for the log, and a timeline of the rows for a browser."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np


@dataclasses.dataclass
class RolloutStats:
    """What one `run` did; seconds are wall clock of the host."""

    episodes: int = 0
    sampled_tokens: int = 0
    fed_tokens: int = 0  # prompts, tool outputs and episodes taken up again
    shared_tokens: int = 0  # of prompts that were copied from another row, of the same prompt or of its beginning
    prefix_feeds: int = 0  # how often the common beginning of all prompts was fed
    prefix_copies: int = 0  # rows that copied it
    decode_s: float = 0.0  # the device decodes
    extend_s: float = 0.0  # the device takes in prompts and tool outputs
    tools_blocked_s: float = 0.0  # no row could decode: everything waited for a tool
    total_s: float = 0.0
    row_steps: int = 0  # rows of all decode calls added up
    live_steps: int = 0  # of these the rows that were live
    tool_wall_s: list[float] = dataclasses.field(default_factory=list)  # in the sandbox, one per call
    tool_wait_s: list[float] = dataclasses.field(default_factory=list)  # from `</code>` to the engine's notice

    def __add__(self, other: RolloutStats) -> RolloutStats:
        """What two runs did, one after the other."""
        return RolloutStats(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    @property
    def tokens_per_s(self) -> float:
        return self.sampled_tokens / max(self.total_s, 1e-9)

    @property
    def occupancy(self) -> float:
        """Share of the rows of decode calls that were live."""
        return self.live_steps / max(self.row_steps, 1)

    def summary(self) -> dict[str, float]:
        """Rates, shares of the whole time, and quantiles of the tools' latency, by metric name."""
        share = lambda seconds: seconds / max(self.total_s, 1e-9)
        found = {
            'rollout/tokens_per_s': self.tokens_per_s,
            'rollout/slot_occupancy': self.occupancy,
            'rollout/decode_share': share(self.decode_s),
            'rollout/prefill_share': share(self.extend_s),
            'rollout/blocked_share': share(self.tools_blocked_s),
            'rollout/shared_prompt_ratio': self.shared_tokens / max(self.shared_tokens + self.fed_tokens, 1),
            'rollout/prefix_feeds': float(self.prefix_feeds),
            'rollout/prefix_copies': float(self.prefix_copies),
        }
        for name, values in (('seconds', self.tool_wall_s), ('wait', self.tool_wait_s)):
            for q in (50, 99):
                found[f'tools/{name}_p{q}'] = float(np.quantile(values, q / 100)) if values else 0.0
        return found


DEVICE = -1  # lane of the timeline


class Timeline:
    """Spans of rows and device, in the trace format that chrome://tracing and Perfetto open.

    Give one to `Engine.timeline` and save it after `run`: a lane for the device, one per row.
    """

    def __init__(self):
        self.events: list[dict] = []

    def span(self, lane: int, name: str, start_s: float, end_s: float, **details) -> None:
        """One span; lane −1 is the device, others are rows. Seconds of time.perf_counter."""
        self.events.append(
            {
                'name': name,
                'ph': 'X',
                'pid': 0,
                'tid': lane + 1,
                'ts': start_s * 1e6,
                'dur': max(end_s - start_s, 0.0) * 1e6,
                'args': details,
            }
        )

    def decoded(self, start_s: float, end_s: float, tokens: dict[int, int], tools: int) -> None:
        """One decode call. tokens: of each row that took part; tools: how many rows waited for one meanwhile."""
        self.span(DEVICE, 'decode', start_s, end_s, rows=len(tokens), tokens=sum(tokens.values()))
        self.count('rows', end_s, live=len(tokens), tools=tools)
        for row, count in tokens.items():
            self.span(row, 'decode', start_s, end_s, tokens=count)

    def fed(self, start_s: float, end_s: float, rows: list[int]) -> None:
        """Extend calls, from the first to the end of the last; a row stands in `rows` once a chunk."""
        for lane in [DEVICE, *sorted(set(rows))]:
            self.span(lane, 'extend', start_s, end_s, rows=len(rows))

    def count(self, name: str, at_s: float, **values: float) -> None:
        """A point of a stacked curve."""
        self.events.append({'name': name, 'ph': 'C', 'pid': 0, 'ts': at_s * 1e6, 'args': values})

    def save(self, path: str | Path) -> None:
        """Writes the trace as JSON."""
        lanes = sorted({e['tid'] for e in self.events if 'tid' in e})
        names = [
            {
                'name': 'thread_name',
                'ph': 'M',
                'pid': 0,
                'tid': lane,
                'args': {'name': f'row {lane - 1}' if lane else 'device'},
            }
            for lane in lanes
        ]
        Path(path).write_text(json.dumps({'traceEvents': names + self.events, 'displayTimeUnit': 'ms'}))
