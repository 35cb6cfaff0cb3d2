"""Nothing is lost: killed anywhere, a run that is started again ends as the undisturbed one, bit for bit."""

import contextlib
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import fsspec
import jax
import numpy as np
import pytest

from retool_jax.core import episode_files, metrics
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.cli import ROOT
from retool_jax.core.records import Episode, ExecResult, Problem, Verdict
from retool_jax.rollout.journal import Journal, call_key
from retool_jax.stages import ppo
from tests.core.metrics_test import events
from tests.train import killable
from tests.train.killable import STEPS


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a model and problems, what the undisturbed run left there, and the moments it passed."""

    folder: Path
    quanta: int
    whole: tuple
    log: list[str]


@pytest.fixture(scope='module')
def make_world(tmp_path_factory):
    @functools.cache
    def make(quanta):
        folder = tmp_path_factory.mktemp('world') / 'files'
        killable.make_model(folder)
        moments = killable.Moments()
        return World(folder, quanta, finish(folder, 'whole', quanta, moments), moments.log)

    return make


@pytest.fixture(scope='module')
def carrying(make_world):
    """Episodes get two quanta a step: most of them end steps after they began."""
    world = make_world(2)
    episodes, lines = world.whole[1:3]
    assert any(len(set(e.versions)) > 2 for e in episodes)  # -1 is that of prompts and tool output
    assert all(line['partial/carried'] > 0 for line in lines) and lines[-1]['partial/age_max'] > 0
    # Calls of a carried episode that were made under later weights: the journal must keep them.
    assert any(e.versions[call.position - 1] > e.step for e in episodes for call in e.calls)
    return world


@pytest.fixture(scope='module')
def waiting(make_world):
    """Every episode is waited for."""
    world = make_world(0)
    episodes = world.whole[1]
    assert len(episodes) == STEPS * 6 and sum(len(e.calls) for e in episodes) >= 2 * STEPS
    return world


def finish(folder, name, quanta, moments=lambda what: False, journal=True, address=None):
    """Runs to the end within this process: (state, episodes, metrics lines without clocks, model file, carried).

    address: the run's folder in a store, of which a copy is `folder`/`name` then.
    """
    left = []

    def keep(parts, directory):
        left.append((jax.device_get(parts.progress.state), parts.progress.carried))
        export(parts, directory)

    export = ppo.export
    with mock.patch.object(ppo, 'export', keep), killable.tiny_world(folder, name, journal, moments):
        ppo.run(killable.make_stage(folder, name, **{'ppo.quanta': quanta, 'run.dir': address or folder / name}))
    if address:
        fsspec.url_to_fs(address, use_listings_cache=False)[0].get(f'{address}/', str(folder / name), recursive=True)
    clocks = ('time', 'rollout/', 'tools/wait')
    lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in metrics.read(folder / name)]
    ((state, carried),) = left
    return (
        state,
        episode_files.read(folder / name / 'episodes'),
        lines,
        (folder / name / 'final' / 'model.safetensors').read_bytes(),
        carried,
    )


def live(world, name, *flags):
    """One life of the run in a process of its own."""
    return subprocess.run(
        [sys.executable, '-m', 'tests.train.killable', str(world.folder), name, f'--quanta={world.quanta}', *flags],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def assert_ends_alike(world, name, address=None):
    """Bit-equal in everything that is no clock, and every step once in every file."""
    found = finish(world.folder, name, world.quanta, address=address)
    whole, directory = world.whole, world.folder / name
    jax.tree.map(np.testing.assert_array_equal, found[0], whole[0])
    assert found[1] == whole[1] and found[2] == whole[2] and found[3] == whole[3] and found[4] == whole[4]
    assert [line['step'] for line in found[2]] == list(range(STEPS))
    hosts = metrics.read(directory / metrics.HOSTS)
    assert [(line['step'], line['process']) for line in hosts] == [(step, 0) for step in range(STEPS)]
    assert episode_files.names(directory / 'episodes') == [f'train_{step:05d}' for step in range(STEPS)]
    rewards = [step for step, name, _ in events(directory) if name == 'rewards/mean']
    assert rewards == list(range(STEPS))
    with open_checkpoints(directory) as checkpoints:
        assert checkpoints.latest() == STEPS
        assert checkpoints.meta(STEPS) == {
            'step': STEPS,
            'cursor': found[2][-1]['data/cursor'],
            'seed': 0,
            'carried': len(whole[4]),
        }
        kept = [ppo.carried_part(step) for step in checkpoints.steps()] if whole[4] else []
        assert set(episode_files.names(directory / ppo.CARRIED)) >= set(kept)


def open_checkpoints(directory):
    return Checkpoints(directory / 'checkpoints', keep_last=2, keep_best_metric='score')


def test_killed_at_three_moments_a_run_ends_as_the_undisturbed_one(carrying):
    log = carrying.log
    middle = log.count('inside journal') // STEPS - 1  # most calls of the first step have been answered
    for moment in (f'inside journal:{middle}', 'before metrics:0', f'after rename:{log.count("after rename") // 2}'):
        done = live(carrying, 'three', f'--at={moment}')
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert_ends_alike(carrying, 'three')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['waiting', 'carrying'])
def test_without_the_journal_that_test_fails(kind, request):
    world = request.getfixturevalue(kind)
    assert live(world, 'careless', '--at=before metrics:0', '--no_journal').returncode < 0
    found = finish(world.folder, 'careless', world.quanta, journal=False)
    assert found[1] != world.whole[1] and found[3] != world.whole[3]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['waiting', 'carrying'])
def test_killed_at_twenty_moments_a_run_ends_as_the_undisturbed_one(kind, request):
    world, rng = request.getfixturevalue(kind), random.Random(0)
    kinds = sorted(set(world.log))
    assert len(kinds) == 8
    flags = [f'--at={what}:{rng.randrange(world.log.count(what))}' for what in kinds]
    flags += [f'--at={what}:0' for what in kinds] + [f'--after={rng.uniform(0, 4):.2f}' for _ in range(8)]
    rng.shuffle(flags)
    killed = runs = 0
    while killed < 20:  # four deaths a run; a life that ends before its moment has finished the run
        done = live(world, f'run{runs}', flags[killed % len(flags)])
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        killed += done.returncode != 0
        if done.returncode == 0:
            rng.shuffle(flags)
        if done.returncode == 0 or killed % 4 == 0:
            assert_ends_alike(world, f'run{runs}')
            runs += 1


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['waiting', 'carrying'])
def test_sigterm_saves_the_last_whole_step_and_says_how_to_go_on(kind, request):
    world = request.getfixturevalue(kind)
    for after in (0.5, 2.0, 3.5):
        done = live(world, 'told', f'--after={after}', '--signal=SIGTERM')
        assert done.returncode in (143, 0), done.stderr
        if done.returncode == 143:
            assert 'stopped; the same command goes on from the last checkpoint' in done.stderr
            with open_checkpoints(world.folder / 'told') as checkpoints:
                assert (checkpoints.latest() or 0) == len(metrics.read(world.folder / 'told'))
    assert_ends_alike(world, 'told')


def test_a_journal_forgets_steps_that_are_committed_and_goes_on(tmp_path):
    problem = Problem('p/1', 'Q?', '1', 'test', '')
    keys = [call_key(Episode(problem, sample=0, step=step), 'x') for step in (0, 1, 1, 10)]
    keys[2] += 'y'
    with contextlib.closing(Journal(tmp_path / 'j')) as journal:
        for key in keys:
            journal.put(key, ExecResult(Verdict.OK, key, ''))
        journal.forget(1)
        journal.put('10/z/0/0/q', ExecResult(Verdict.OK, 'later', ''))
        assert journal.get(keys[0]) is None
    with contextlib.closing(Journal(tmp_path / 'j')) as journal:
        assert [journal.get(key) and journal.get(key).stdout for key in keys] == [None, *keys[1:]]
        assert journal.get('10/z/0/0/q').stdout == 'later'
        journal.forget(11)
        assert not journal.results and (tmp_path / 'j').read_bytes() == b''
