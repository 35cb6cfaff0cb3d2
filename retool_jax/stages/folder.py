"""A run's folder: who may write to it, and what it was made with."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax

from retool_jax.core import episode_files, metrics, mirror, processes, settings, storage
from retool_jax.core.cli import command
from retool_jax.core.errors import UserError
from retool_jax.core.metrics import Metrics
from retool_jax.core.signals import uninterrupted
from retool_jax.rollout.journal import Journal
from retool_jax.stages import owner
from retool_jax.stages.config import ENGINE, RunSettings
from retool_jax.stages.owner import NAME, Claim, Owner

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Keys of folders that earlier versions made, where the stage has none of that name; neither changed a run.
RETIRED = ('backend', 'turns.tools')
RENAMED = {'sampler.group': 'sampler.feed_rows'}  # keys of such folders that have another name by now
# Keys that earlier versions had not, with what they did.
ADDED = {
    'checkpoints.every_s': 0.0,
    'forward.gradient_dtype': 'float32',
    'mesh.slices': 1,
    'sampler.weights': 'float',
} | {f'{block}.kind': 'adamw' for block in ('optimizer', 'critic_optimizer', 'sft_optimizer', 'text.optimizer')}
LATE_S = 10.0  # in which a file is seen by other hosts: NFS keeps for seconds that there was none
HOST = socket.gethostname()
DATA = 'data.json'
# What a run is worth going on with, or, where it kept nothing, worth reading.
RESULTS = ('metrics.jsonl', 'episodes', 'checkpoints', 'stopped', 'dropped.jsonl', 'answers', 'round_1')


class Stage(Protocol):
    """A dataclass of stages/config.py: what a run reads."""

    @property
    def run(self) -> RunSettings: ...


@contextlib.contextmanager
def claimed(stage: Stage, free: Sequence[str] = (), brief: Sequence[str] = ()) -> Iterator[Path]:
    """Makes `run.dir` with its config.json, or goes on in one that the same configuration made; owned for a block.

    A run that ends in an error or a stop before its first result leaves no trace. Of a folder in a store it is the
    working copy. free: keys or blocks that may differ from last time; brief: of `mirror.Mirror`. Raises: UserError
    naming the keys that differ, or the run that owns the folder. Of a run's processes one asks, owns and writes, and
    the others end as it does.
    """
    if not storage.is_store(stage.run.dir):
        with _claimed(stage, Path(stage.run.dir), free) as directory:
            yield directory
        return
    address, claims = stage.run.dir, []
    try:
        token = processes.first(lambda: _claim_address(address, claims))
        guard = lambda: owner.check(address, token, processes.leads())
        copy = mirror.working_folder(address, jax.process_index())
        with mirror.mirrored(mirror.Mirror(address, copy, brief, guard)) as copy, _claimed(stage, copy, free):
            mirror.publish(copy)
            yield copy
    finally:
        with uninterrupted():
            for claim in claims:
                claim.close()


def _claim_address(address: str, claims: list[Claim]) -> str:
    """Takes a folder of a store, a run's or an empty one; returns its owner's token."""
    owner.patiently(lambda: claims.append(Claim(address)))
    names = storage.names('run.dir', address)
    if 'config.json' not in names:
        # A run of several processes that leaves no trace is cleared away by one, and another may publish its journal
        # after that.
        journals = [name for name in names if fnmatch.fnmatch(name, 'journal*.jsonl')]
        if len(names) > len(journals):
            raise UserError(f'run.dir={address!r} holds other files; choose a new or empty folder')
        storage.remove('run.dir', address, journals)
    return claims[-1].token


@contextlib.contextmanager
def _claimed(stage: Stage, directory: Path, free: Sequence[str]) -> Iterator[Path]:
    """`claimed` in a folder of this file system."""
    there = directory.is_dir()
    fresh = not there or not any(path.name != NAME for path in directory.iterdir())
    owners: list[Owner] = []
    try:
        token = processes.first(lambda: _claim(stage, directory, free, owners))
        if not storage.is_store(stage.run.dir):
            _check_shared(directory, token)
        yield directory
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            error.filename = str(directory)  # a write that fails does not know of which file
        if fresh and owners and directory.is_dir() and not has_results(directory):
            for path in list(directory.iterdir()) if there else [directory]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif not there and not owners:
            with contextlib.suppress(OSError):  # another run may have made it, and work in it
                directory.rmdir()
        raise
    finally:
        with uninterrupted():
            for held in owners:
                held.close()


def _check_shared(directory: Path, token: str) -> None:
    """Raises a UserError in all processes where one does not see the file that the one that leads has just written."""
    if processes.count() == 1:
        return
    began = time.monotonic()
    while not (sees := owner.token(directory) == token) and time.monotonic() - began < LATE_S:
        time.sleep(0.1)
    blind = [place for place, sees in processes.gather((f'process {jax.process_index()} on {HOST}', sees)) if not sees]
    if blind:
        raise UserError(
            f'run.dir={str(directory)!r} is another folder for {", ".join(blind)}; choose one on storage that all '
            'processes see'
        )


def _claim(stage: Stage, directory: Path, free: Sequence[str], owners: list[Owner]) -> str:
    """Takes the folder; returns its owner's token."""
    file, place = directory / 'config.json', str(mirror.place(directory))
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise UserError(f'run.dir={place!r}: config.json is damaged; choose another folder') from None
        retired = [key for key in RETIRED if not hasattr(stage, key)]
        if hasattr(stage, 'backend') and before.get('backend') in (None, 'local'):  # an evaluation of earlier versions
            before['backend'] = ENGINE
        if hasattr(stage, 'lora') and 'lora' not in before:  # all weights were trained
            before['lora'] = settings.to_json(dataclasses.replace(stage.lora, rank=0))
        found = settings.differences(before, stage, ignore=('run.dir', *retired, *free), renamed=RENAMED)
        found = {key: pair for key, pair in found.items() if pair != (settings.ABSENT, ADDED.get(key, settings.ABSENT))}
        # A run that was refused before its first result left a configuration that binds nobody.
        if found and has_results(directory):
            raise UserError(
                f'run.dir={place!r} holds a run of another configuration '
                f'({settings.describe(found)}); choose another folder'
            )
    # Empty folders are nobody's: a thread that opens checkpoints may make one after its run was told to stop.
    elif any(path.name not in ('config.json.new', NAME) and not path.is_dir() for path in directory.rglob('*')):
        raise UserError(f'run.dir={place!r} holds other files; choose a new or empty folder')
    elif directory.is_file():
        raise UserError(f'run.dir={place!r} is a file; choose a new or empty folder')
    directory.mkdir(parents=True, exist_ok=True)
    # One that is taken is in the list of those that are given free.
    owner.patiently(lambda: owners.append(Owner(directory)))
    write(file, settings.to_json(stage))
    return owners[-1].token


def write(path: Path, content: object) -> None:
    """Writes a file of JSON, which is there whole or as it was: a killed run must not damage what it goes on from."""
    new = path.with_name(f'{path.name}.new')
    new.write_text(json.dumps(content, indent=2))
    new.replace(path)


def bind(directory: Path, found: Mapping[str, Mapping[str, int | str]]) -> None:
    """Holds a run to the data that it began with: {name: {'count': …, 'sha256': …}}, kept in data.json.

    Raises: UserError where results stand in the folder and the data of one name are others now.
    """
    processes.first(lambda: _bind(directory, found))


def _bind(directory: Path, found: Mapping[str, Mapping[str, int | str]]) -> None:
    file, place = directory / DATA, str(mirror.place(directory))
    if file.exists() and has_results(directory):
        before = json.loads(file.read_text())
        for name, now in found.items():
            if before.get(name, now) != now:
                raise UserError(
                    f'{name} is not what the run in {place!r} began with ({before[name]["count"]} '
                    f'entries then, {now["count"]} now, or others); put it back, or choose another run.dir'
                )
    write(file, found)


def open_journal(directory: Path) -> Journal:
    """The tool results of a run: each process writes its own file, and reads those of all."""
    name = 'journal.jsonl' if processes.leads() else f'journal_{jax.process_index()}.jsonl'
    return Journal(directory / name, others=sorted(directory.glob('journal*.jsonl')))


def has_results(directory: Path) -> bool:
    """Whether a run, or a stage in a folder below it, has left anything that is worth going on with."""
    places = [directory, *(file.parent for file in directory.glob('*/*/config.json'))]
    paths = [place / name for place in places for name in RESULTS]
    return any(any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size for path in paths)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into the line that says how to go on; the last checkpoint is intact."""
    try:
        yield
    except KeyboardInterrupt as stop:
        how = f'; the same command goes on from the last checkpoint:\n{command()}' if processes.leads() else ''
        raise type(stop)(f'stopped{how}') from stop


def rewind(directory: Path, step: int, writer: Metrics) -> None:
    """Cuts metrics, TensorBoard, hosts and episodes back to the steps before `step`, which is run next.

    Of a run's processes one cuts, once all have read what they go on from.
    """
    processes.wait()
    if not processes.leads():
        return
    writer.rewind(step - 1 if step else None)
    if (directory / metrics.HOSTS).exists():
        metrics.cut(directory / metrics.HOSTS, step - 1)
    if (directory / 'episodes').is_dir():
        episode_files.rewind(directory / 'episodes', step - 1)
