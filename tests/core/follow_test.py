"""A follower sends every metric of every step once, whatever is killed on the way, and training knows nothing of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retool_jax.core import follow, metrics
from retool_jax.core.errors import UserError
from retool_jax.core.metrics import Metrics
from retool_jax.stages import owner
from tests import several
from tests.core import follow_run

ROOT = Path(__file__).parents[2]
HAS_TRACKIO = importlib.util.find_spec('trackio') is not None
needs_trackio = pytest.mark.skipif(not HAS_TRACKIO, reason="no trackio: pip install 'retool_jax[trackio]'")
TRACKERS = ['file', pytest.param('trackio', marks=[needs_trackio, pytest.mark.slow])]


def values(step: int) -> dict:
    return {'rewards/mean': step / 3, 'tools/calls': step, 'loss': float('nan') if step == 2 else 1.0, 'phase': 'ppo'}


def make_run(directory: Path) -> Path:
    """A folder as a run has it that works there."""
    directory.mkdir(parents=True)
    (directory / 'config.json').write_text('{"run": {"seed": 3}, "ppo": {"steps": 4}}')
    (directory / follow.OWNER).write_text('{}')
    return directory


def start(directory: Path, to: str, *flags: str) -> subprocess.Popen:
    """A follower of a folder, whose trackers keep what they get beside it."""
    place = directory.parent
    return subprocess.Popen(
        [sys.executable, '-m', 'tests.core.follow_run', str(directory), f'--to={to}', '--every=0.05', *flags],
        cwd=ROOT,
        env=os.environ | {'FOLLOWED': str(place / 'followed.jsonl'), 'TRACKIO_DIR': str(place), 'HF_HUB_OFFLINE': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(child: subprocess.Popen) -> None:
    child.kill()
    child.communicate()


def stored(directory: Path, to: str) -> list[dict]:
    """What a tracker has of all runs, in the order in which it came."""
    if to == 'file':
        path = directory.parent / 'followed.jsonl'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path = directory.parent / f'{follow.PROJECT}.db'
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(f'file:{path}?mode=ro', uri=True)) as base:
        try:
            rows = base.execute('SELECT run_name, step, metrics FROM metrics ORDER BY id').fetchall()
        except sqlite3.OperationalError:  # its tables are not made yet
            return []
    return [{'run': run, 'step': step} | json.loads(found) for run, step, found in rows]


def expected(directory: Path, to: str) -> list[dict]:
    name = json.loads((directory / follow.NAMES).read_text())[to]
    return [{'run': name, 'step': line['step']} | follow.numbers(line) for line in metrics.read(directory)]


def until(ready, child: subprocess.Popen) -> None:
    while not ready():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize('to', TRACKERS)
def test_every_metric_of_every_step_is_sent_once_though_follower_and_run_are_killed(tmp_path, to):
    directory = make_run(tmp_path / 'run')
    has = lambda step: any(line['step'] == step for line in stored(directory, to))
    child = start(directory, to)
    with Metrics(directory, tensorboard=False) as writer:
        for step in range(8):
            writer.write(step, values(step))
        until(lambda: has(5), child)
        kill(child)  # in the middle of what it has been sent
        with open(directory / metrics.FILE, 'a') as file:
            file.write('{"step": 8, "rewards/me')  # as a run that is killed may leave it
        child = start(directory, to)
        until(lambda: has(7) or (to == 'file' and has(5)), child)
        kill(child)
    with Metrics(directory, tensorboard=False) as writer:  # the run goes on from an earlier checkpoint
        writer.rewind(4)
        child = start(directory, to)
        for step in range(5, 20):
            writer.write(step, values(step))
            time.sleep(0.05)
        until(lambda: has(17), child)
    (directory / follow.OWNER).unlink()  # the run ends, and with it the follower
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert f' steps sent to {to}\n' in out
    found = stored(directory, to)
    assert [line['step'] for line in found] == list(range(20))
    assert found == expected(directory, to)
    assert found[3] == {'run': found[0]['run'], 'step': 3, 'rewards/mean': 1.0, 'tools/calls': 3, 'loss': 1.0}
    assert 'loss' not in found[2]
    again = start(directory, to, '--once')
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and f': 0 steps sent to {to}\n' in out, err
    assert len(stored(directory, to)) == 20


@needs_trackio
@pytest.mark.slow
def test_a_run_of_two_processes_is_followed_into_trackio(tmp_path):
    directory, steps, child = tmp_path / 'run', 20, start(tmp_path / 'run', 'trackio')
    keys = {
        'run.dir': directory, 'ppo.steps': steps, 'ppo.problems_per_step': 4, 'ppo.samples': 2, 'mesh.tensor': 2,
        'turns.max_tokens': 96, 'turns.max_turn_tokens': 96, 'sampler.rows': 4, 'sampler.slots': 128,
        'sampler.min_bound': 128, 'forward.micro_rows': 4, 'forward.row_width': 96, 'forward.logprob_chunk': 96,
        'forward.unroll': 1, 'sandbox.zygotes': 1, 'sandbox.spares': 1,
    }  # fmt: skip
    flags = [f'--config.{key}={value}' for key, value in keys.items()]
    followers = [child]

    def kill_twice() -> None:
        for moment in (5, 12):
            while len(stored(directory, 'trackio')) < moment:
                if followers[-1].poll() is not None:
                    return
                time.sleep(0.1)
            kill(followers[-1])
            followers.append(start(directory, 'trackio'))

    thread = threading.Thread(target=kill_twice)
    thread.start()
    try:
        several.run(2, ['launch/ppo.py', '--config=configs/ppo.py:tiny', *flags])
        _, err = followers[-1].communicate(timeout=120)
    finally:
        thread.join()
        for follower in followers:
            if follower.poll() is None:
                kill(follower)
    assert len(followers) == 3 and followers[-1].returncode == 0, err
    found = stored(directory, 'trackio')
    assert [line['step'] for line in found] == list(range(steps)) and found == expected(directory, 'trackio')
    assert len(found[0]) > 40


def test_a_follower_that_is_told_to_stop_sends_the_rest_and_ends_well(tmp_path):
    directory = make_run(tmp_path / 'run')
    with Metrics(directory, tensorboard=False) as writer:
        writer.write(0, values(0))
    child = start(directory, 'file', '--every=600')
    until((directory / follow.NAMES).exists, child)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (0, f'{directory}: 1 steps sent to file\n'), err
    assert stored(directory, 'file') == expected(directory, 'file')


@pytest.fixture
def file_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, 'TRACKERS', dict(follow.TRACKERS))
    monkeypatch.setattr(follow, 'library', follow.library)
    monkeypatch.setenv('FOLLOWED', str(tmp_path / 'followed.jsonl'))
    follow_run.install()


def send(directory: Path, **options) -> int:
    return follow.follow(directory, 'file', 'p', follow.Stop(), 0.01, **{'once': True} | options)


def test_a_folder_that_is_made_anew_is_another_run(tmp_path, file_tracker):
    for steps in (3, 2):
        directory = make_run(tmp_path / 'run')
        with Metrics(directory, tensorboard=False) as writer:
            for step in range(steps):
                writer.write(step, values(step))
        assert send(directory) == steps and send(directory) == 0
        directory.rename(tmp_path / f'moved{steps}')
    moved = tmp_path / 'moved2'
    with Metrics(moved, tensorboard=False) as writer:
        writer.write(2, values(2))
    assert send(moved) == 1  # it is the run that it was, wherever it lies
    found = stored(tmp_path / 'run', 'file')
    assert [line['step'] for line in found] == [0, 1, 2, 0, 1, 2] and len({line['run'] for line in found}) == 2


def test_a_run_that_has_not_begun_is_waited_for(tmp_path, file_tracker):
    stop = follow.Stop()
    stop.set()
    assert follow.follow(tmp_path / 'none', 'file', 'p', stop, 0.01) == 0 and not (tmp_path / 'none').exists()


def test_training_and_follower_speak_of_the_same_file():
    assert follow.OWNER == owner.NAME


def test_what_a_tracker_refuses_is_one_line(tmp_path, file_tracker):
    class Refusing:
        def __init__(self, *_):
            raise RuntimeError('no key')

    follow.TRACKERS['file'] = Refusing
    with Metrics(make_run(tmp_path / 'run'), tensorboard=False) as writer:
        writer.write(0, values(0))
    with pytest.raises(UserError, match=r'--to=file: it does not take the run \(RuntimeError: no key\)'):
        send(tmp_path / 'run')


@pytest.mark.parametrize('to', sorted(follow.TRACKERS))
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, to):
    program = (
        f'import sys; sys.modules[{to!r}] = None; sys.argv = ["follow", {str(tmp_path)!r}, "--to={to}"]\n'
        'from retool_jax.core import follow; sys.exit(follow.main())'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'error: --to={to}: {to} is not installed') and f"'retool_jax[{to}]'" in done.stderr


@pytest.mark.parametrize(
    ('flags', 'told'), [(['--once'], 'holds no metrics.jsonl'), (['--every=0'], '--every=0 must be above 0')]
)
def test_other_mistakes_are_one_line(tmp_path, flags, told):
    child = start(tmp_path / 'run', 'file', *flags)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2 and err.startswith('error: ') and told in err and err.count('\n') == 1
