"""The stream of problems: grain over random-access sources, with one integer as its whole state.

A stream is an endless `grain.MapDataset`: its i-th problem depends on the sources, the weights, the
seed and i alone. So a run resumes from a cursor, and the global batch is the same however many hosts
share it. Where sources are joined is where a problem gets its identity: groups, journals, reports and
random keys go by `Problem.id` and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import gym, problems

Source = Sequence[Problem] | str | Path


def stream(
    sources: Sequence[Source | grain.MapDataset], weights: Sequence[float] | None, seed: int
) -> grain.MapDataset:
    """An endless dataset of Problems: each source shuffled anew every epoch, mixed by `weights`.

    Sources are what `open_sources` takes or what it gave. Weights None: every problem of every source equally often.

    Raises:
      UserError: weights that are not one above 0 for each source, or what `open_sources` refuses.
    """
    opened = open_sources(sources)
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


def open_sources(
    sources: Sequence[Source | grain.MapDataset], read: Callable[[Path], Sequence[Problem]] | None = None
) -> list[grain.MapDataset]:
    """Each source as a dataset of Problems, each once, in order, with ids that are unique over all of them.

    A source is a list of problems, the path of anything that `problems.read` reads, or a generator's name (`gym`),
    whose training problems it stands for; files written by `problems.write_array_record` are read at random, not
    loaded. `read` takes the place of the readers. A single source keeps its ids; of several, each
    puts its name before them ('gsm8k/train.jsonl/17'), so that two files with equal ids hold different problems.
    The same file named twice holds the same ones. Datasets stay as they are.

    Raises:
      UserError: no source, or one without problems or that cannot be read.
    """
    if not sources:
        raise UserError('data: no source given')
    if all(isinstance(source, grain.MapDataset) for source in sources):
        return list(sources)
    opened = [open_source(source, read) for source in sources]
    if len(opened) == 1:
        return opened
    return [dataset.map(functools.partial(_qualify, name)) for dataset, name in zip(opened, names(sources))]


def open_source(source: Source, read: Callable[[Path], Sequence[Problem]] | None = None) -> grain.MapDataset:
    """One source as a dataset of Problems, each once, in order. Raises: UserError where it has none."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file() and path.name.endswith('.array_record') and _is_ours(path):
            records = grain.sources.ArrayRecordDataSource([str(path)])
            return grain.MapDataset.source(records).map(problems.decode_problem)
        source = (read or _read)(path)
    if not len(source):
        raise UserError('data: a source without problems')
    return grain.MapDataset.source(source)


def names(sources: Sequence[Source]) -> list[str]:
    """A name for each source that no other has: the end of its path, as long as it takes, or the number of a list."""
    paths = [Path(s).absolute() if isinstance(s, str | Path) else Path(str(number)) for number, s in enumerate(sources)]
    depth, named = 0, {}
    while len(set(named)) < len(set(paths)):
        depth += 1
        named = {'/'.join(path.parts[-depth:]): path for path in paths}
    return ['/'.join(path.parts[-depth:]) for path in paths]


def title(source: str | Path) -> str:
    """A short name of a source, fit for a file's: of a path its stem, of a generator its name and parameters."""
    if gym.named(source):
        return re.sub(r'[^\w.=-]+', '_', str(source).removeprefix(gym.PREFIX))
    return Path(source).stem


def once(dataset: grain.MapDataset) -> Iterator[Problem]:
    """Every problem of a dataset, in order. grain's own iterator starts threads and is twenty times slower."""
    return (dataset[i] for i in range(len(dataset)))


def leave_out(
    datasets: Sequence[grain.MapDataset], fault: Callable[[Problem], str]
) -> tuple[list[grain.MapDataset], list[tuple[Problem, str]]]:
    """The datasets without the problems in which `fault` finds something, and those with what it is."""
    kept, left = [], []
    for dataset in datasets:
        verdicts = [(problem, fault(problem)) for problem in once(dataset)]
        left += [(problem, text) for problem, text in verdicts if text]
        indices = [i for i, (_, text) in enumerate(verdicts) if not text]
        kept.append(
            dataset if len(indices) == len(dataset) else grain.MapDataset.source(indices).map(dataset.__getitem__)
        )
    return kept, left


def fingerprint(dataset: grain.MapDataset) -> str:
    """A digest of every problem of a dataset, in order."""
    digest = hashlib.sha256()
    for problem in once(dataset):
        digest.update(problems.encode_problem(problem) + b'\n')
    return digest.hexdigest()


def next_batch(
    dataset: grain.MapDataset, cursor: int, count: int, process_index: int = 0, process_count: int = 1
) -> tuple[list[Problem], int]:
    """This host's share of the `count` problems at `cursor`, and the cursor after them.

    Host p of n takes the problems cursor + p, cursor + p + n, …: the hosts' shares are disjoint and
    their union does not depend on n. Raises: ValueError if n does not divide `count`.
    """
    if count <= 0 or count % process_count or not 0 <= process_index < process_count or cursor < 0:
        raise ValueError(
            f'data: batch of {count} at cursor {cursor} for process {process_index} of {process_count}: '
            'the batch must be a positive multiple of the number of processes'
        )
    return [dataset[i] for i in range(cursor + process_index, cursor + count, process_count)], cursor + count


def _read(path: Path) -> Sequence[Problem]:
    return gym.read(path, gym.TRAINING).problems if gym.named(path) else problems.read(path)


def _qualify(name: str, problem: Problem) -> Problem:
    return dataclasses.replace(problem, id=f'{name}/{problem.id}')


def _is_ours(path: Path) -> bool:
    """Whether the first record is a Problem of ours (other JSON records are read by schema, whole)."""
    try:
        records = grain.sources.ArrayRecordDataSource([str(path)])
        problems.decode_problem(records[0])
    except Exception:  # whatever is wrong, the reader says it in one line naming the place
        return False
    return True
