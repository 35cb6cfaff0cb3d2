"""The demo, small, through its real binary: what it leaves behind, and that it goes on wherever it was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool_jax.core import episode_files, metrics

ROOT = Path(__file__).parents[2]
SMALL = {
    'recipe.problems_seen': 60, 'recipe.sft_steps': 4, 'recipe.lead_steps': 2, 'text.lead_steps': 3,
    'recipe.problems': 12, 'recipe.apart_problems': 12, 'recipe.samples': 2, 'ppo.steps': 2, 'ppo.problems_per_step': 4,
    'turns.max_tokens': 64, 'turns.max_turn_tokens': 64,
}  # fmt: skip

ENVIRONMENT = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}

pytestmark = pytest.mark.slow


def command(directory):
    return [
        sys.executable,
        ROOT / 'launch/demo.py',
        '--config=configs/demo.py',
        f'--config.run.dir={directory}',
        *(f'--config.{key}={value}' for key, value in SMALL.items()),
    ]


def tell(directory):
    return subprocess.run(command(directory), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp('demo') / 'run'
    return directory, tell(directory)


def test_the_folder_holds_everything_that_is_promised(run):
    directory, done = run
    assert done.returncode == 0, done.stderr
    summary = json.loads((directory / 'summary.json').read_text())
    for name in ('base', 'sft', 'tool_rl', 'text_rl'):
        assert {'avg', 'ci', 'k', 'problems', 'families'} <= summary[name].keys()
        assert summary[name]['k'] == 2 and summary[name]['problems'] == 12
    assert summary['steps'] == 2 and summary['seed'] == 0 and summary['seconds'] > 0
    assert {'before', 'after'} == summary['code_ratio'].keys()
    assert (directory / 'report.html').stat().st_size > 10_000
    assert list((directory / 'tensorboard').iterdir())
    phases = [line['phase'] for line in metrics.read(directory)]
    assert [phases.count(p) for p in ('sft_tool', 'sft_text', 'ppo_tool', 'ppo_text')] == [4, 4, 2, 2]
    made = episode_files.read(directory / 'episodes', 'tool_00001')
    assert len(made) == 16 and all(len(e.tokens) == len(e.acted) == len(e.logprobs) for e in made)


def test_the_last_lines_say_the_same_in_a_table(run):
    directory, done = run
    summary = json.loads((directory / 'summary.json').read_text())
    assert f'{100 * summary["tool_rl"]["avg"]:.1f}' in done.stdout
    for family in summary['sft']['families']:
        assert family in done.stdout


def test_the_trained_model_is_a_hugging_face_directory(run):
    from transformers import AutoConfig

    directory, _ = run
    assert AutoConfig.from_pretrained(directory / 'tool_rl').model_type == 'qwen2'
    assert (directory / 'tool_rl' / 'model.safetensors').stat().st_size > 3_000_000
    assert (directory / 'tool_rl' / 'tokenizer.json').exists()


def test_told_again_it_says_the_same_at_once(run):
    directory, _ = run
    before = (directory / 'summary.json').read_text()
    kept = {path: path.stat().st_mtime_ns for path in directory.glob('**/episodes/*')}
    done = tell(directory)
    assert done.returncode == 0, done.stderr
    assert (directory / 'summary.json').read_text() == before
    assert {path: path.stat().st_mtime_ns for path in directory.glob('**/episodes/*')} == kept


def test_each_stage_left_a_folder_of_its_own(run):
    directory, _ = run
    for kind in ('tool', 'text'):
        for stage, result in (('cold_start', 'episodes/cold_start.jsonl.gz'), ('sft', 'final'), ('ppo', 'final')):
            assert json.loads((directory / kind / stage / 'config.json').read_text())['run']['seed'] == 0
            assert (directory / kind / stage / result).exists()
    weights = lambda path: (directory / path / 'model.safetensors').read_bytes()
    assert weights('tool_rl') == weights('tool/ppo/final') != weights('tool/sft/final')


MOMENTS = {  # what is there when the demo is killed
    'in the first evaluation': lambda d: (d / 'journal.jsonl').exists(),
    'in fine-tuning, the easiest traces done': lambda d: (d / 'tool/sft/checkpoints/2').is_dir(),
    'between two held-out sets': lambda d: (d / 'episodes/val_sft_new_operands.jsonl.gz').exists(),
    'after the first step of PPO': lambda d: bool(metrics.read(d / 'tool/ppo')),
    'in the text-only line, its policy being written': lambda d: any((d / 'text/ppo').glob('final*')),
}


def test_killed_at_five_moments_it_ends_as_the_undisturbed_one(run, tmp_path):
    whole, directory = run[0], tmp_path / 'run'
    for name, reached in MOMENTS.items():
        child = subprocess.Popen(
            command(directory), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not reached(directory):
            assert child.poll() is None, f'ended before it was killed {name}'
            time.sleep(0.01)
        child.kill()
        assert child.wait() == -signal.SIGKILL, name
    done = tell(directory)
    assert done.returncode == 0, done.stderr
    read = lambda folder: {k: v for k, v in json.loads((folder / 'summary.json').read_text()).items() if k != 'seconds'}
    assert read(directory) == read(whole)
    for path in ('tool_rl/model.safetensors', 'text/ppo/final/model.safetensors'):
        assert (directory / path).read_bytes() == (whole / path).read_bytes()
    clocks = ('time', 'rollout/', 'tools/seconds', 'tools/wait')
    lines = lambda folder: [
        {name: x for name, x in line.items() if not name.startswith(clocks)} for line in metrics.read(folder)
    ]
    assert lines(directory) == lines(whole)
    assert episode_files.names(directory / 'episodes') == episode_files.names(whole / 'episodes')
