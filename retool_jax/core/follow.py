"""`python -m retool_jax.core.follow RUN --to=trackio` shows the metrics of a run, as it writes them, in a tracker.

It is a process of its own, which reads metrics.jsonl: training knows nothing of it and waits for nothing. Every step is
sent once, whatever is killed on the way: each start asks the tracker for the last step that it has, and what a resumed
run writes again, the tracker has already. It ends when the run does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from retool_jax.core import cli, metrics, streams
from retool_jax.core.errors import UserError

OWNER = 'owner.json'  # in a run's folder while the run works there (stages/owner.py)
NAMES = 'followed.json'  # there too: the run's name in each tracker, {'trackio': 'ppo_tiny-5f3a90c2'}
PROJECT = 'retool_jax'
TICK_S = 0.2  # in which a signal is heeded


class Stop:
    """Set by a signal: a threading.Event has a lock, which the thread that the handler interrupts may hold."""

    told = False

    def set(self, *_) -> None:
        self.told = True

    def wait(self, seconds: float) -> bool:
        """Sleeps for so long at most; whether it is set."""
        until = time.monotonic() + seconds
        while not self.told and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, TICK_S))
        return self.told


class Tracker(Protocol):
    """Where metrics go."""

    last: int  # the newest step that it has of the run, -1 for none

    def send(self, step: int, values: dict[str, float]) -> None:
        """Takes the numbers of a step; steps ascend."""

    def close(self) -> None:
        """Returns when all that was sent is stored."""


class Trackio:
    """A run in trackio's database on this machine (TRACKIO_DIR).

    Raises:
      UserError: trackio is told to write somewhere else.
    """

    def __init__(self, directory: Path, project: str, name: str, config: dict[str, Any]):
        trackio = library('trackio')
        for variable in ('TRACKIO_SPACE_ID', 'TRACKIO_SERVER_URL'):
            if os.environ.get(variable):
                raise UserError(
                    f'{variable} is set: only the database of this machine can be asked for the last step; unset it'
                )
        os.environ['TRACKIO_STORAGE_MODE'] = 'sqlite'  # what else it writes on network storage is not asked either
        from trackio.sqlite_storage import SQLiteStorage

        last = SQLiteStorage.get_max_step_for_run(project, name)
        self.last = -1 if last is None else last
        self._run = trackio.init(
            project=project,
            name=name,
            config=config,
            resume='allow',
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def send(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """A run at Weights & Biases; with WANDB_MODE=offline below the run's folder, for `wandb sync`."""

    def __init__(self, directory: Path, project: str, name: str, config: dict[str, Any]):
        wandb = library('wandb')
        self._run = wandb.init(project=project, id=name, name=name, config=config, resume='allow', dir=directory)
        self.last = self._run.step - 1  # of a run that goes on `step` is the next one

    def send(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, str, dict[str, Any]], Tracker]] = {'trackio': Trackio, 'wandb': Wandb}


def library(name: str) -> Any:
    """The library of a tracker.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"--to={name}: {name} is not installed; it comes with the extra `{name}`: pip install 'retool_jax[{name}]'"
        ) from None


def follow(directory: Path, to: str, project: str, stop: Stop, every_s: float = 5.0, once: bool = False) -> int:
    """Sends the steps of a run until it ends or `stop` is set; once: those that are there. Returns how many it sent.

    Without `once` it waits for a run that has not begun.

    Raises:
      UserError: there is no run to send, the tracker is not installed or refuses it, or metrics.jsonl is damaged.
    """
    library(to)  # before anything is waited for
    if once and not (directory / metrics.FILE).exists():
        raise UserError(f'{directory} holds no {metrics.FILE}: give the folder that a run writes to')
    while not (once or ((directory / OWNER).exists() and (directory / 'config.json').exists())):
        if stop.wait(every_s):
            return 0
    tracker, count = _open(directory, to, project), 0
    try:
        while True:
            over = once or stop.told or not (directory / OWNER).exists()  # asked before the last lines are read
            for line in metrics.read(directory):
                if line['step'] > tracker.last:
                    tracker.send(line['step'], numbers(line))
                    tracker.last, count = line['step'], count + 1
            if over:
                return count
            stop.wait(every_s)
    finally:
        tracker.close()


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What a tracker is sent of a line of metrics: its numbers, but for the step and the clock."""
    kept = lambda name, value: name not in ('step', 'time') and isinstance(value, (int, float))
    return {name: value for name, value in line.items() if kept(name, value)}


def _open(directory: Path, to: str, project: str) -> Tracker:
    name, config = _name(directory, to), {}
    if (directory / 'config.json').exists():
        config = json.loads((directory / 'config.json').read_text())
    try:
        return TRACKERS[to](directory, project, name, config)
    except UserError:
        raise
    except Exception as error:  # whatever a client or its service says
        raise UserError(f'--to={to}: it does not take the run ({type(error).__name__}: {error})') from error


def _name(directory: Path, to: str) -> str:
    """The run's name in a tracker: of its own for each folder that was made, though two may be called alike."""
    file = directory / NAMES
    names = json.loads(file.read_text()) if file.exists() else {}
    if to not in names:
        names[to] = f'{directory.resolve().name}-{secrets.token_hex(4)}'
        new = file.with_name(f'{NAMES}.new')
        new.write_text(json.dumps(names))
        new.replace(file)
    return names[to]


@streams.ends_unread()
def main() -> int:
    parser = argparse.ArgumentParser(
        prog='python -m retool_jax.core.follow', description='Sends the metrics of a run to a tracker as they come.'
    )
    parser.add_argument('run', type=Path, help='the folder that a run writes to')
    parser.add_argument('--to', choices=sorted(TRACKERS), required=True, help='the tracker')
    parser.add_argument('--project', default=PROJECT, help='the project there')
    parser.add_argument('--every', type=float, default=5.0, help='seconds between two looks at the run')
    parser.add_argument('--once', action='store_true', help='send what is there, and end')
    options = parser.parse_args()
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # the end that it is made for: the rest is sent
        signal.signal(number, stop.set)
    try:
        if not options.every > 0:
            raise UserError(f'--every={options.every:g} must be above 0')
        count = follow(options.run, options.to, options.project, stop, options.every, options.once)
    except Exception as error:
        return cli.tell(error)
    print(f'{options.run}: {count} steps sent to {options.to}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
