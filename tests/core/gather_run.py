"""One process that gathers synthetic episodes: `python -m tests.core.gather_run EPISODES TOKENS DIRECTORY`.

Processes are joined by RETOOL_PROCESS…; each makes its part of the episodes. Writes DIRECTORY/PROCESS.json: bytes of
all columns, memory that was in use before any episode was made and at most (MiB), seconds of the gather, what it holds.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np

from retool_jax.core import columns, processes
from retool_jax.core.columns import Column
from retool_jax.core.records import Episode, Problem, Stop, ToolCall, Verdict


def make(i: int, tokens: int) -> Episode:
    """Whole episode `i`, its columns as an engine leaves them."""
    rng = np.random.default_rng(i)
    acted = np.arange(tokens) % 1000 > 200
    ids = rng.integers(0, 152_000, tokens, np.int32)
    logprobs = np.where(acted, -rng.random(tokens, np.float32), np.float32(0))
    call = ToolCall(0, 'print(1)', Verdict.OK, f'{i}\n' * 200, '', f'{i}\n' * 200, 200, 0.25)
    versions = np.where(acted, 7, -1).astype(np.int32)
    found = [Column(x) for x in (ids, acted, logprobs, versions)]
    return Episode(Problem(f'p{i}', 'why?', '7', 's', ''), 0, 7, *found, 200, [call], 1, Stop.EOS)


def digest(episodes: list[Episode]) -> str:
    found = hashlib.sha256()
    for e in episodes:
        found.update(repr((e.problem, e.prompt_length, e.calls, e.stop)).encode())
        for name in columns.DTYPES:
            found.update(np.asarray(getattr(e, name)))
    return found.hexdigest()


def resident() -> float:
    """MiB in use now."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


def main(episodes: str, tokens: str, directory: str) -> None:
    processes.join()
    count, process, total = jax.process_count(), jax.process_index(), int(episodes)
    processes.gather(process)  # what it takes to begin with
    before = resident()
    made = [make(i, int(tokens)) for i in range(total * process // count, total * (process + 1) // count)]
    processes.wait()
    began = time.perf_counter()
    found = processes.gather((made, 0))
    seconds = time.perf_counter() - began
    peak = processes.peaks()[1] / 2**20
    whole = [e for part, _ in found for e in part]
    held = sum(getattr(e, name).array.nbytes for e in whole for name in columns.DTYPES)
    figures = {'columns': held, 'before': before, 'peak': peak, 'seconds': seconds, 'digest': digest(whole)}
    (Path(directory) / f'{process}.json').write_text(json.dumps(figures))


if __name__ == '__main__':
    main(*sys.argv[1:])
