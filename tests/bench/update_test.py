"""The bench of the update counts right, measures a real update, and its binary ends in one JSON line."""

import json
import subprocess
import sys

import pytest

from retool_jax.bench import update
from retool_jax.bench.update import Shape
from retool_jax.core.cli import ROOT

SMALL = {
    'layers': 1,
    'width': 32,
    'mlp': 48,
    'heads': 2,
    'kv_heads': 2,
    'vocab': 64,
    'tokens': 32,
    'rows': 8,
    'micro_rows': 8,
    'vocab_chunk': 64,
}


def test_operations_are_those_of_the_matrices_and_of_the_square_of_attention():
    config = update.model_config(Shape(layers=3, width=16, mlp=40, heads=4, kv_heads=2, vocab=100, tokens=8))
    layer = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 40
    assert update.flops_per_token(config, 8) == 6 * (3 * layer + 16 * 100) + 12 * 3 * 16 * 8


@pytest.mark.slow
def test_a_small_shape_is_measured(monkeypatch):
    monkeypatch.setattr(update, 'MATMUL', 64)
    monkeypatch.setattr(update, 'PEER', ROOT / 'nowhere')
    found = update.measure(Shape(**SMALL), 2, lambda line: None)
    assert found['tokens'] == 32 and found['update_s'] > 0 and found['matmul_gflops'] > 0
    share = found['gflops'] / found['matmul_gflops']
    assert found['share_of_matmul'] == pytest.approx(share, rel=0.05, abs=2e-4)
    assert found['tokens_per_s'] == pytest.approx(8 * 32 / found['update_s'], rel=0.02)


def test_a_field_that_a_shape_has_not_is_named():
    done = subprocess.run(
        [sys.executable, ROOT / 'launch/bench_update.py', "--shape={'depth': 3}"],
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: unknown config key 'shape.depth'")


@pytest.mark.slow
def test_the_binary_ends_in_one_line_of_json_with_torch_beside_it():
    done = subprocess.run(
        [sys.executable, ROOT / 'launch/bench_update.py', f'--shape={SMALL}', '--repeats=2'],
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['share_of_matmul'] > 0
    if update.PEER.exists():
        assert found['torch_update_s'] > 0 and found['torch_gflops'] > 0
