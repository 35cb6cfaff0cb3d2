"""Folders as TFDS prepares them, without TensorFlow."""

import subprocess
import sys
from pathlib import Path

from tests.tasks.rows import TEN, dapo, retool, write


def test_tfds_builders_write_folders_that_are_read_again_without_tensorflow(tmp_path):
    script = f"""
import sys
from retool_jax.tasks import builders, problems
for builder, source in ((builders.Aime2024, 'ten.jsonl'), (builders.DapoMath17k, 'dapo.jsonl')):
    made = builder(path={str(tmp_path)!r} + '/' + source, data_dir={str(tmp_path / 'tfds')!r})
    made.download_and_prepare()
    assert problems.read(made.data_dir) == problems.read({str(tmp_path)!r} + '/' + source), source
made = builders.RetoolSft(path={str(tmp_path / 'sft.jsonl')!r}, data_dir={str(tmp_path / 'tfds')!r})
made.download_and_prepare()
assert problems.read_traces(made.data_dir) == problems.read_traces({str(tmp_path / 'sft.jsonl')!r})
assert 'tensorflow' not in sys.modules
"""
    write(tmp_path / 'ten.jsonl', TEN)
    write(tmp_path / 'dapo.jsonl', [dapo('Q é', '5', 'u1'), dapo('R', '6', 'u2')])
    write(tmp_path / 'sft.jsonl', [{'id': 'a', **retool('1+1?', r'It is \boxed{2}')}])
    run = subprocess.run([sys.executable, '-c', script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
