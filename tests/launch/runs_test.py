"""Whole runs through the real binaries: to the end, killed and gone on with, stopped and told how to go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool_jax.core import cli, episode_files, metrics, settings
from retool_jax.core.records import Episode, Problem, Stop
from retool_jax.stages import evaluate, sft
from retool_jax.stages.config import FineTuning
from retool_jax.text import template
from retool_jax.text.tokenizer import load_tokenizer
from tests.launch import launcher, mistakes

ROOT = Path(__file__).parents[2]
AIME = ROOT.parent / 'shared' / 'data' / 'aime24.jsonl'
MATH = AIME.with_name('math500.jsonl')
needs_data = pytest.mark.skipif(not (AIME.exists() and MATH.exists()), reason='the problem files are not there')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A model that compiles in seconds, problems and traces for it."""
    folder = tmp_path_factory.mktemp('runs')
    mistakes.write_models(folder)
    problems = [Problem(f'p{i}', f'What is {i} + 1?', str(i + 1), 'test', '') for i in range(12)]
    lines = [{'id': p.id, 'problem': p.question, 'answer': p.answer} for p in problems]
    lines[1]['problem'] *= 30  # beyond the budget
    (folder / 'sums.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    tokenizer, tiny = load_tokenizer(folder / 'model'), template.make_template('tiny')
    traces = []
    for problem in problems:
        trace = Episode(problem, sample=0, step=0, stop=Stop.EOS, turns=1)
        trace.append(template.prompt_ids(tiny, tokenizer, problem.question), acted=False)
        trace.prompt_length = len(trace.tokens)
        ids = [*tokenizer.encode(template.wrap_answer(problem.answer)), *template.end_ids(tiny, tokenizer)]
        trace.append(ids, acted=True, logprobs=[0.0] * len(ids))
        traces.append(trace)
    episode_files.write(folder / 'traces', 'cold_start', traces, tokenizer.decode)
    return folder


def evaluate_flags(files, run, problems='sums.jsonl', **changes):
    changes = {
        'problems': files / problems,
        'model.path': files / 'model',
        'run.dir': run,
        'samples': 2,
        'sampler.rows': 4,
        'sampler.slots': 256,
        'sampler.min_bound': 256,
        'turns.max_tokens': 256,
        'turns.max_turn_tokens': 24,
        'sandbox.zygotes': 1,
    } | changes
    return ['--config=configs/evaluate.py:tiny', *(f'--config.{key}={value}' for key, value in changes.items())]


def sft_flags(files, run, **changes):
    changes = {
        'traces': files / 'traces',
        'model.path': files / 'model',
        'run.dir': run,
        'sft.batch_tokens': 150,
        'sft.steps': 12,
        'checkpoints.every': 4,
        'forward.micro_rows': 8,
    } | changes
    return ['--config=configs/sft.py:tiny', *(f'--config.{key}={value}' for key, value in changes.items())]


def tuning(files, run, **changes):
    return settings.build(FineTuning, cli.parse_config(['x', *sft_flags(files, run, **changes)]))


def command(name, flags):
    return [sys.executable, str(ROOT / 'launch' / f'{name}.py'), *flags]


def start(name, flags):
    return subprocess.Popen(
        command(name, flags),
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': ''},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(name, flags):
    child = start(name, flags)
    out, err = child.communicate(timeout=900)
    assert child.returncode == 0, err
    return out


def stop(child, number, ready):
    """Sends a signal as soon as `ready()` holds; (exit status, stderr)."""
    while child.poll() is None and not ready():
        time.sleep(0.02)
    child.send_signal(number)
    _, err = child.communicate(timeout=300)
    return child.returncode, err


@pytest.mark.slow
def test_an_evaluation_from_files_to_report(files, tmp_path):
    with launcher.start() as launch:
        done = launch('evaluate', *evaluate_flags(files, tmp_path / 'run'))
        assert done.returncode == 0, done.stderr
        again = launch('evaluate', *evaluate_flags(files, tmp_path / 'run'))
        other = launch('evaluate', *evaluate_flags(files, tmp_path / 'run', samples=4))
    for words in ('12 problems × 2 samples', 'avg@2', 'pass@2', 'maj@2', 'exact string', 'lenient rule', 'LENGTH'):
        assert words in done.stdout
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {
        'config.json',
        'episodes',
        'journal.jsonl',
        'metrics.jsonl',
        'report.html',
        'summary.json',
        'tensorboard',
    }
    found = json.loads((tmp_path / 'run/summary.json').read_text())['sums']
    assert (found['problems'], found['k'], len(found['by_problem'])) == (12, 2, 12)
    assert found['by_problem']['p1']['truncated'] == 1.0 and found['by_problem']['p1']['length'] == 0.0
    assert len(episode_files.read(tmp_path / 'run/episodes')) == 24
    assert 'Score by problem' in (tmp_path / 'run/report.html').read_text()
    assert again.returncode == 0 and again.stdout == done.stdout
    assert other.returncode == 2 and '(samples: 2, now 4)' in other.stderr


@pytest.mark.slow
def test_eight_devices_write_what_one_writes(files, tmp_path):
    eight = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    with launcher.start() as launch:
        for name, mesh, env in (('one', {}, {}), ('eight', {'mesh.fsdp': 2, 'mesh.tensor': 4}, eight)):
            done = launch('evaluate', *evaluate_flags(files, tmp_path / name, **mesh), env=env)
            assert done.returncode == 0, done.stderr
    one, many = (episode_files.read(tmp_path / name / 'episodes') for name in ('one', 'eight'))
    # Sums in another order differ by 1e-6, which flips one sampled token in many thousands.
    assert sum(a.tokens == b.tokens for a, b in zip(one, many)) >= len(one) - 2


@pytest.mark.slow
def test_a_stopped_fine_tuning_goes_on_to_the_same_model(files, tmp_path, monkeypatch):
    def run(name, stop_at=None):
        write = metrics.Metrics.write

        def stopping(self, step, values):
            write(self, step, values)
            if step == stop_at:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(metrics.Metrics, 'write', stopping)
            sft.run(tuning(files, tmp_path / name))
        lines = [{k: v for k, v in line.items() if k != 'time'} for line in metrics.read(tmp_path / name)]
        return lines, (tmp_path / name / 'final' / 'model.safetensors').read_bytes()

    whole = run('whole')
    assert [line['step'] for line in whole[0]] == list(range(12))
    for stop_at in (2, 9):  # before the first checkpoint, and after the second
        with pytest.raises(KeyboardInterrupt, match='the same command goes on'):
            run('stopped', stop_at)
    assert run('stopped') == whole
    with pytest.raises(cli.UserError, match=r'optimizer.lr: 0.003, now 1.0\); choose another folder'):
        sft.run(tuning(files, tmp_path / 'stopped', **{'optimizer.lr': 1.0}))


@pytest.mark.slow
@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signalled_fine_tuning_says_how_to_go_on(files, tmp_path, number, status):
    flags = lambda name: sft_flags(files, tmp_path / name, **{'sft.steps': 400, 'checkpoints.every': 40})
    end('sft', flags('whole'))
    child = start('sft', flags('stopped'))
    returned, err = stop(child, number, lambda: len(metrics.read(tmp_path / 'stopped')) >= 100)
    assert returned == status and 'Traceback' not in err
    assert err.rstrip().splitlines()[-1].startswith('python launch/sft.py --config=configs/sft.py:tiny')
    end('sft', flags('stopped'))
    read = lambda name: (tmp_path / name / 'final' / 'model.safetensors').read_bytes()
    assert read('stopped') == read('whole')


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(files, tmp_path):
    flags = sft_flags(files, tmp_path / 'run', **{'sft.steps': 100_000, 'checkpoints.every': 1000})
    first = start('sft', flags)
    while len(metrics.read(tmp_path / 'run')) < 3:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    second = start('sft', flags)
    _, err = second.communicate(timeout=300)
    assert second.returncode == 2
    assert f'in use by process {first.pid} on {socket.gethostname()}' in err.splitlines()[-1]
    first.kill()
    first.communicate()
    third, owner = start('sft', flags), tmp_path / 'run' / 'owner.json'
    returned, err = stop(third, signal.SIGTERM, lambda: f'"pid": {third.pid},' in owner.read_text())
    assert returned == 143 and not owner.exists(), err


def kept(run):
    return len(episode_files.names(run / 'episodes' / evaluate.UNFINISHED))


@pytest.mark.slow
@needs_data
def test_a_killed_evaluation_of_aime_ends_with_the_same_result(files, tmp_path):
    flags = lambda name: evaluate_flags(
        files, tmp_path / name, problems=AIME, **{'sampler.slots': 1024, 'turns.max_tokens': 1024, 'sampler.rows': 8}
    )
    end('evaluate', flags('whole'))
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = kept(tmp_path / 'killed')
        child = start('evaluate', flags('killed'))
        returned, err = stop(child, number, lambda: kept(tmp_path / 'killed') > before)  # noqa: B023
        assert returned == status, err
        if number != signal.SIGKILL:
            assert 'Traceback' not in err and 'the same command goes on' in err
            assert err.rstrip().splitlines()[-1].startswith('python launch/evaluate.py')
    end('evaluate', flags('killed'))
    read = lambda name, file: (tmp_path / name / file).read_bytes()
    assert read('killed', 'summary.json') == read('whole', 'summary.json')
    assert read('killed', 'episodes/val_aime24.npz') == read('whole', 'episodes/val_aime24.npz')


@pytest.mark.slow
@needs_data
def test_every_problem_of_math500_is_counted(files, tmp_path):
    end(
        'evaluate',
        evaluate_flags(
            files,
            tmp_path / 'run',
            problems=MATH,
            **{'samples': 1, 'sampler.slots': 1024, 'turns.max_tokens': 1024, 'sampler.rows': 32},
        ),
    )
    found = json.loads((tmp_path / 'run/summary.json').read_text())['math500']
    assert found['problems'] == len(found['by_problem']) == 500 and sum(found['stops'].values()) == 500
    assert len(found['families']) == 7
    episodes = episode_files.read(tmp_path / 'run/episodes')
    long = [e for e in episodes if e.prompt_length >= 1024]
    assert long and all(e.stop == Stop.LENGTH and not e.reward.correct for e in long)
