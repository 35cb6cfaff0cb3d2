"""The notebooks run from top to bottom, and each stands beside the script that it is paired with."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import nbformat
import numpy as np
import pytest

from retool_jax.train.learner import Learner
from retool_jax.train.pack import join
from retool_jax.train.state import init_state
from tests.report.synthesis import run_folder
from tests.train import small

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'notebooks').glob('*.py'))
NAMES = [script.stem for script in SCRIPTS]


def sources(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def test_there_are_four():
    assert NAMES == ['00_one_step', '01_rollout', '02_read_a_run', '03_own_task']


@pytest.mark.parametrize('script', SCRIPTS, ids=NAMES)
def test_script_and_notebook_say_the_same_and_the_notebook_has_been_run(script):
    notebook = nbformat.read(script.with_suffix('.ipynb'), as_version=4)
    assert sources(notebook) == sources(jupytext.read(script))
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == 'error']
    assert str(ROOT) not in script.with_suffix('.ipynb').read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of the kernel's own libraries
@pytest.mark.parametrize('script', SCRIPTS, ids=NAMES)
def test_a_notebook_runs_from_top_to_bottom(script, tmp_path, monkeypatch):
    import nbclient

    monkeypatch.setenv('RETOOL_RUN', str(run_folder(tmp_path / 'run', steps=3, problems=6, held_out=6)))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('XLA_FLAGS', '')
    done = nbclient.NotebookClient(
        jupytext.read(script), timeout=600, kernel_name='python3', resources={'metadata': {'path': str(script.parent)}}
    ).execute()
    assert any(cell.get('outputs') for cell in done.cells)


def test_a_run_is_read_by_its_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RETOOL_RUN', str(run_folder(tmp_path / 'run', steps=3, problems=6, held_out=6)))
    script = ROOT / 'notebooks' / '02_read_a_run.py'
    exec(compile(script.read_text(), str(script), 'exec'), {'__name__': 'notebook'})
    shown = capsys.readouterr().out
    assert 'files, the last:' in shown and 'failing snippets' in shown


def test_one_step_fits_on_a_page():
    assert len((ROOT / 'notebooks' / '00_one_step.py').read_text().splitlines()) <= 80


@pytest.mark.slow
def test_the_gradient_of_one_step_is_the_learner_s(monkeypatch, tmp_path):
    monkeypatch.setenv('RETOOL_MODEL', str(tmp_path / 'none'))  # random weights
    page, script = {'__name__': 'notebook'}, ROOT / 'notebooks' / '00_one_step.py'
    exec(compile(script.read_text(), str(script), 'exec'), page)

    forward = small.make_forward(row_width=200, row_segments=8, micro_rows=1, logprob_chunk=200, vocab_chunk=640)
    learner = Learner(
        page['model'].config,
        forward,
        small.recording(),
        small.one_device(),
        loss=small.make_loss(dual_clip=None, correction='none', entropy_coef=0.0),
        advantage=small.make_advantage(lam=1.0, whiten=False),
    )
    tree = {
        'policy': page['policy'],
        'critic': {'head': {'weight': jnp.zeros((page['model'].config.hidden_size, 1)), 'bias': jnp.zeros(1)}},
    }
    rows = len(page['batch'].tokens_BT)
    batch = learner.put(join([jax.device_get(page['batch'])])[0])
    scores = learner.score(tree, batch, rows, None, num_groups=32)
    state, _ = learner.ppo_step(init_state(tree, learner.optimizer), batch, scores, (0, rows))
    learned, shown = small.gradient(state), jax.device_get(page['gradient'])
    far = lambda a, b: np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b)) / sum(np.sum(y**2) for y in b))
    leaves = jax.tree.leaves
    assert far(leaves(shown['policy']), leaves(learned['policy'])) < 1e-5
    assert far([shown['critic']], [learned['critic']['head']['weight'][:, 0]]) < 1e-5
