"""The engine as a library: what a notebook needs, and what a light process is spared."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from retool_jax.core.cli import ROOT
from retool_jax.model import hf
from retool_jax.model.config import load_config
from retool_jax.rollout import Engine, open_model
from retool_jax.rollout.settings import SamplingSettings
from retool_jax.stages import embedded
from tests.fakes import FakePool


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """The embedded model with random weights, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp('library')
    embedded.write_model(folder / 'sizes')
    config = load_config(folder / 'sizes')
    hf.save(folder / 'model', config, embedded.init(config, jax.random.key(0)), jnp.float32, folder / 'sizes')
    return folder / 'model'


def test_questions_become_episodes_in_a_few_lines(directory):
    model = open_model(directory, 'tiny')
    engine = Engine(model, FakePool({}), rows=4, max_tokens=96)
    episodes = engine.ask(['What is 2 + 3?', 'What is 7 * 8?'], samples=3)
    assert [(e.problem.question, e.sample) for e in episodes] == [
        (q, s) for q in ('What is 2 + 3?', 'What is 7 * 8?') for s in range(3)
    ]
    assert all(e.stop is not None and e.acted_count > 0 and len(e.tokens) <= 96 for e in episodes)
    assert len({model.text(e) for e in episodes}) > 1
    again = engine.ask(['What is 7 * 8?'], samples=3)
    assert [e.tokens for e in again] == [e.tokens for e in episodes[3:]]  # same question, step and sample
    assert [e.tokens for e in engine.ask(['What is 7 * 8?'], samples=3, step=1)] != [e.tokens for e in again]


def test_tokens_are_drawn_as_the_caller_says(directory):
    model = open_model(directory, 'tiny', tools=False)
    greedy = Engine(model, rows=4, max_tokens=64, temperature=0.0)
    assert len({model.text(e) for e in greedy.ask(['What is 2 + 3?'], samples=4)}) == 1
    assert greedy.sampling == SamplingSettings(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    with pytest.raises(TypeError, match='topp'):
        Engine(model, rows=4, max_tokens=64, topp=0.9)


def test_a_name_that_is_not_there_is_refused_as_usual():
    with pytest.raises(ImportError, match='Motor'):
        from retool_jax.rollout import Motor  # noqa: F401


def test_a_process_that_reads_a_journal_is_spared_the_model():
    program = (
        'import sys, retool_jax.rollout, retool_jax.rollout.journal; '
        'print(*sorted({"jax", "flax", "transformers"} & set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
