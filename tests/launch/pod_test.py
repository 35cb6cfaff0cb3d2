"""Two processes at one run's binaries: what one process on as many devices would write, each line once."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from retool_jax.core import episode_files, metrics
from tests import several

LR = 3e-4
TINY = {
    'ppo.steps': 2,
    'ppo.problems_per_step': 4,
    'ppo.samples': 2,
    'ppo.overlong_buffer': 40,
    'checkpoints.every': 1,
    'validation.every': 2,
    'validation.samples': 1,
    'evaluate_sampling.top_p': 1.0,
    'advantage.whiten': False,
    'turns.max_tokens': 96,
    'turns.max_turn_tokens': 96,
    'sampler.rows': 4,  # of each of four engines
    'sampler.slots': 128,
    'sampler.min_bound': 128,
    'forward.micro_rows': 4,
    'forward.row_width': 96,
    'forward.logprob_chunk': 96,
    'forward.unroll': 1,
    'mesh.tensor': 2,
    'sandbox.zygotes': 1,
    'sandbox.spares': 1,
    'optimizer.lr': LR,
}


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / 'problems.jsonl'
    path.write_text(
        ''.join(json.dumps({'problem': f'What is {i} + 4?', 'answer': str(i + 4)}) + '\n' for i in range(3))
    )
    return path


def launch(count, name, directory, **keys):
    """A binary on eight devices, of so many processes in all."""
    keys = {'run.dir': directory} | keys
    written = several.run(
        count,
        [
            f'launch/{name}.py',
            f'--config=configs/{name}.py:tiny',
            *(f'--config.{key}={value}' for key, value in keys.items()),
        ],
    )
    return directory, written


def same_episodes(a, b, name):
    a, b = (episode_files.read(directory / 'episodes', name) for directory in (a, b))
    assert [(e.problem.id, e.sample, e.tokens, e.acted, e.reward) for e in a] == [
        (e.problem.id, e.sample, e.tokens, e.acted, e.reward) for e in b
    ]
    for x, y in zip(a, b):
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)


@pytest.mark.slow
def test_rl_of_two_processes_is_that_of_one(problems, tmp_path):
    keys = TINY | {'validation.problems': problems}
    (one, _), (two, written) = (launch(count, 'ppo', tmp_path / f'run{count}', **keys) for count in (1, 2))
    for name in ('train_00000', 'train_00001', 'val_00001'):
        same_episodes(one, two, name)
    for a, b in zip(metrics.read(one), metrics.read(two), strict=True):
        assert a.keys() == b.keys()
        # Of clocks, and of slots that two engines fill in other numbers of quanta.
        clock = lambda name: name.startswith('time') or name.endswith(('_s', '_share', '_occupancy')) or '/wait' in name
        for name in (name for name in a if not clock(name)):
            if isinstance(a[name], float):
                np.testing.assert_allclose(b[name], a[name], rtol=1e-3, atol=1e-5, err_msg=name)
            else:
                assert a[name] == b[name]
    first, second = (load_file(directory / 'final' / 'model.safetensors') for directory in (one, two))
    assert first.keys() == second.keys()
    change = np.concatenate([np.abs(first[name] - second[name]).ravel() for name in first])
    assert change.mean() < 0.05 * LR and change.max() < 2 * LR
    banner = re.compile(r'^processes +2$', re.MULTILINE)
    assert [len(banner.findall(text)) for text in written] == [1, 0]
    assert {path.name for path in two.glob('journal*')} == {'journal.jsonl', 'journal_1.jsonl'}
    assert {path.name for path in (two / 'checkpoints').iterdir()} == {'1', '2'}
    hosts = [(line['step'], line['process']) for line in metrics.read(two / metrics.HOSTS)]
    assert hosts == [(0, 0), (0, 1), (1, 0), (1, 1)] and '>Hosts</h2>' in (two / 'report.html').read_text()
    assert len(list((two / 'tensorboard').iterdir())) == 1
    # Another number of processes goes on from it, on a mesh of its own.
    launch(1, 'ppo', two, **keys | {'ppo.steps': 3})
    assert [line['step'] for line in metrics.read(two)] == [0, 1, 2]


@pytest.mark.slow
def test_an_evaluation_of_two_processes_is_that_of_one(problems, tmp_path):
    keys = {
        name: value for name, value in TINY.items() if name.partition('.')[0] in ('turns', 'sampler', 'mesh', 'sandbox')
    }
    keys |= {'problems': problems, 'samples': 2, 'sampling.top_p': 1.0}
    (one, _), (two, _) = (launch(count, 'evaluate', tmp_path / f'run{count}', **keys) for count in (1, 2))
    same_episodes(one, two, 'val_problems')
    assert (one / 'summary.json').read_bytes() == (two / 'summary.json').read_bytes()
    assert not (two / 'episodes' / 'unfinished').exists()


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(tmp_path):
    directory = tmp_path / 'run'
    directory.mkdir()
    (directory / 'mine.txt').write_text('mine')
    with pytest.raises(AssertionError) as refused:
        launch(2, 'ppo', directory, **TINY)
    assert str(refused.value).count('holds other files; choose a new or empty folder') == 2
    assert [path.name for path in directory.iterdir()] == ['mine.txt']
