"""Two processes of four devices do what one of eight does, and each other number takes up their checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from retool_jax.core import console, episode_files, processes
from retool_jax.core.errors import UserError
from retool_jax.core.records import ExecResult, Verdict
from retool_jax.stages import cold_start
from retool_jax.stages.folder import open_journal
from tests import several
from tests.fakes import byte_tokenizer
from tests.train import small


def run(count: int, work: str, directory: Path, name: str) -> list[list[np.ndarray]]:
    """The worker in so many processes; what each saw at the end."""
    several.run(count, ['tests.train.worker', work, str(directory), name])
    loaded = [np.load(directory / f'{name}_{i}.npz') for i in range(count)]
    return [[x[key] for key in x.files] for x in loaded]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A fixed episode file, and the run of two processes over it."""
    directory = tmp_path_factory.mktemp('two')
    episode_files.write(directory / 'episodes', 'fixed', small.make_episodes(8), byte_tokenizer().decode)
    return directory, run(2, 'update', directory, 'two')


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(folder, tmp_path):
    directory, (first, second) = folder
    episode_files.write(tmp_path / 'episodes', 'fixed', small.make_episodes(8), byte_tokenizer().decode)
    (one,) = run(1, 'update', tmp_path, 'one')
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)  # both hold the same
    assert len(one) == len(first)
    change = np.concatenate([np.abs(a - b).ravel() for a, b in zip(one, first)])
    assert change.mean() < 0.05 * small.LR and change.max() < 2 * small.LR
    read = lambda where: [json.loads(line) for line in (where / 'run' / 'metrics.jsonl').read_text().splitlines()]
    for a, b in zip(read(tmp_path), read(directory), strict=True):  # one process wrote, every step once
        assert a.keys() == b.keys()
        for name in a.keys() - {'time'}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 4])
def test_a_checkpoint_of_two_processes_is_taken_up_by_another_number(folder, count):
    directory, (saved, _) = folder
    for found in run(count, 'restore', directory, f'restored{count}'):
        for a, b in zip(found, saved[-len(found) :], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    'env, missing',
    [
        ({'RETOOL_PROCESSES': '2'}, 'RETOOL_COORDINATOR'),
        ({'RETOOL_PROCESSES': '2', 'RETOOL_COORDINATOR': 'x:1'}, 'RETOOL_PROCESS'),
        ({'RETOOL_PROCESSES': 'two', 'RETOOL_COORDINATOR': 'x:1', 'RETOOL_PROCESS': '0'}, 'RETOOL_PROCESSES'),
    ],
)
def test_a_process_that_is_not_told_which_it_is_is_refused(monkeypatch, env, missing):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f'^{missing}: '):
        processes.join()


def test_auto_is_refused_with_one_line_where_there_is_no_cluster():
    program = 'from retool_jax.core import cli, processes; cli.run_plain(processes.join)'
    outside = {name: value for name, value in os.environ.items() if not name.startswith(('SLURM', 'OMPI', 'TPU'))}
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=several.ROOT, env=outside | {processes.PROCESSES: 'auto'},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: RETOOL_PROCESSES=auto finds no cluster here') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('count', ['auto', '2'])
def test_work_of_one_process_is_refused_to_several(monkeypatch, count):
    monkeypatch.setenv(processes.PROCESSES, count)
    with pytest.raises(UserError, match=f'^RETOOL_PROCESSES={count}: a cold start is made by one process'):
        cold_start.run(None)
    monkeypatch.setenv(processes.PROCESSES, '1')
    processes.refuse('a cold start')


def test_a_process_alone_joins_nobody_and_leads(monkeypatch):
    monkeypatch.delenv('RETOOL_PROCESSES', raising=False)
    processes.join()
    assert processes.leads()


def test_what_the_one_that_leads_refuses_is_refused():
    assert processes.first(lambda: 7) == 7
    with pytest.raises(ValueError, match='no such thing'):
        processes.first(lambda: (_ for _ in ()).throw(ValueError('no such thing')))


def test_a_process_that_does_not_lead_says_nothing_and_has_a_journal_of_its_own(monkeypatch, tmp_path, capsys):
    result = lambda text: ExecResult(Verdict.OK, text, '')
    with contextlib.closing(open_journal(tmp_path)) as journal:
        journal.put('0/p/0/1/a', result('of the first'))
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    console.say('hello')
    console.banner(model='tiny')
    with console.progress('RL', 3) as advance:
        advance('text', n=2)
    with contextlib.closing(open_journal(tmp_path)) as journal:
        assert journal.get('0/p/0/1/a').stdout == 'of the first'
        journal.put('0/q/0/1/b', result('of the second'))
    assert capsys.readouterr() == ('', '')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['journal.jsonl', 'journal_1.jsonl']
    monkeypatch.undo()
    with contextlib.closing(open_journal(tmp_path)) as journal:  # a later run of one process
        assert journal.get('0/q/0/1/b').stdout == 'of the second'
