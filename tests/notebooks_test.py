"""The notebooks run from top to bottom, and each stands beside the script that it is paired with."""

import os
import pathlib

import jupytext
import nbformat
import pytest

from tests.report.synthesis import run_folder

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'notebooks').glob('*.py'))
NAMES = [script.stem for script in SCRIPTS]


def sources(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def test_there_are_three():
    assert NAMES == ['01_rollout', '02_read_a_run', '03_own_task']


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
    done = nbclient.NotebookClient(jupytext.read(script), timeout=600, kernel_name='python3',
                                   resources={'metadata': {'path': str(script.parent)}}).execute()
    assert any(cell.get('outputs') for cell in done.cells)


def test_a_run_is_read_by_its_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('RETOOL_RUN', str(run_folder(tmp_path / 'run', steps=3, problems=6, held_out=6)))
    script = ROOT / 'notebooks' / '02_read_a_run.py'
    exec(compile(script.read_text(), str(script), 'exec'), {'__name__': 'notebook'})
    shown = capsys.readouterr().out
    assert 'files, the last:' in shown and 'failing snippets' in shown
