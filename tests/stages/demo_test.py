"""The demo, small, through its real binary: what it leaves behind and that it can be told again."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from retool_jax.core import episode_files, metrics

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    'recipe.problems_seen': 60, 'recipe.sft_steps': 4, 'recipe.lead_steps': 2, 'recipe.problems': 12,
    'recipe.apart_problems': 12, 'recipe.samples': 2, 'ppo.steps': 2, 'ppo.problems_per_step': 4,
    'turns.max_tokens': 64, 'turns.max_turn_tokens': 64,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp('demo') / 'run'
    command = [sys.executable, ROOT / 'launch/demo.py', '--config=configs/demo.py', f'--config.run.dir={directory}',
               *(f'--config.{key}={value}' for key, value in SMALL.items())]
    tell = lambda: subprocess.run(command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True,
                                  text=True, timeout=900)
    return directory, tell(), tell


def test_the_folder_holds_everything_that_is_promised(run):
    directory, done, _ = run
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
    directory, done, _ = run
    summary = json.loads((directory / 'summary.json').read_text())
    assert f'{100 * summary["tool_rl"]["avg"]:.1f}' in done.stdout
    for family in summary['sft']['families']:
        assert family in done.stdout


def test_the_trained_model_is_a_hugging_face_directory(run):
    from transformers import AutoConfig

    directory, _, _ = run
    assert AutoConfig.from_pretrained(directory / 'tool_rl').model_type == 'qwen2'
    assert (directory / 'tool_rl' / 'model.safetensors').stat().st_size > 3_000_000
    assert (directory / 'tool_rl' / 'tokenizer.json').exists()


def test_told_again_it_gives_the_same_scores(run):
    directory, _, tell = run
    before = json.loads((directory / 'summary.json').read_text())
    done = tell()
    assert done.returncode == 0, done.stderr
    after = json.loads((directory / 'summary.json').read_text())
    assert all(after[name] == before[name] for name in ('base', 'sft', 'tool_rl', 'text_rl'))
