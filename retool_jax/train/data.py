"""The stream of problems: grain over random-access sources, with one integer as its whole state.

A stream is an endless `grain.MapDataset`: its i-th problem depends on the sources, the weights, the
seed and i alone. So a run resumes from a cursor, and the global batch is the same however many hosts
share it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import grain

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import problems

Source = Sequence[Problem] | str | pathlib.Path


def stream(sources: Sequence[Source], weights: Sequence[float] | None, seed: int) -> grain.MapDataset:
    """An endless dataset of Problems: each source shuffled anew every epoch, mixed by `weights`.

    A source is a list of problems, or the path of anything `problems.read` reads; files written by
    `problems.write_array_record` are read at random, not loaded. Weights None: every problem of every
    source equally often.
    """
    if not sources:
        raise UserError('data: no source given')
    opened = [open_source(source) for source in sources]
    if weights is None:
        weights = [len(dataset) for dataset in opened]
    if len(weights) != len(sources) or min(weights) <= 0:
        raise UserError(f'data weights {list(weights)}: one above 0 for each of {len(sources)} sources')
    endless = [
        # A seed per source, or equal sources would be drawn in step; repeat() reshuffles each epoch.
        dataset.seed(seed * 1000 + number).shuffle().repeat()
        for number, dataset in enumerate(opened)
    ]
    if len(endless) == 1:
        return endless[0]
    total = sum(weights)
    return grain.MapDataset.mix(endless, [weight / total for weight in weights])


def open_source(source: Source) -> grain.MapDataset:
    """One source as a dataset of Problems, each once, in order."""
    if isinstance(source, str | pathlib.Path):
        path = pathlib.Path(source)
        if path.is_file() and path.name.endswith('.array_record') and _is_ours(path):
            records = grain.sources.ArrayRecordDataSource([str(path)])
            return grain.MapDataset.source(records).map(problems.decode_problem)
        source = problems.read(path)
    if not len(source):
        raise UserError('data: a source without problems')
    return grain.MapDataset.source(source)


def next_batch(
    dataset: grain.MapDataset, cursor: int, count: int, process_index: int = 0, process_count: int = 1
) -> tuple[list[Problem], int]:
    """This host's share of the `count` problems at `cursor`, and the cursor after them.

    Host p of n takes the problems cursor + p, cursor + p + n, …: the hosts' shares are disjoint and
    their union does not depend on n. Raises ValueError if n does not divide `count`.
    """
    if count <= 0 or count % process_count or not 0 <= process_index < process_count or cursor < 0:
        raise ValueError(
            f'data: batch of {count} at cursor {cursor} for process {process_index} of {process_count}: '
            'the batch must be a positive multiple of the number of processes'
        )
    return [dataset[i] for i in range(cursor + process_index, cursor + count, process_count)], cursor + count


def _is_ours(path: pathlib.Path) -> bool:
    """Whether the first record is a Problem of ours (other JSON records are read by schema, whole)."""
    try:
        records = grain.sources.ArrayRecordDataSource([str(path)])
        problems.decode_problem(records[0])
    except Exception:  # whatever is wrong, the reader says it in one line naming the place
        return False
    return True
