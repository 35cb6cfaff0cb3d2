"""The embedded model: always the same files, a tokenizer without loss, attention that begins by copying."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from retool_jax.model import decoder
from retool_jax.model.config import TINY, load_config
from retool_jax.stages import embedded
from retool_jax.tasks import arithmetic
from retool_jax.text import template
from retool_jax.text.tokenizer import PROBES, load_tokenizer
from tests.model.sizes import make_config

SMALL = make_config('qwen2', hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp('embedded') / 'model'
    embedded.write_model(directory)
    return directory


@pytest.fixture(scope='module')
def params():
    return jax.device_get(jax.jit(lambda key: embedded.init(SMALL, key))(jax.random.key(0)))


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_files_are_the_same_in_every_process(directory, tmp_path):
    code = (
        'import sys; from pathlib import Path; from retool_jax.stages import embedded; '
        'embedded.write_model(Path(sys.argv[1]))'
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)], check=True, cwd=root, env=os.environ | {'PYTHONHASHSEED': '1'}
    )
    assert files(tmp_path) == files(directory)
    embedded.write_model(tmp_path)  # over what is there
    assert files(tmp_path) == files(directory)


def test_its_sizes_are_tiny_and_as_wide_as_its_tokenizer(directory):
    found = load_config(directory)
    assert found == dataclasses.replace(TINY, vocab_size=embedded.VOCAB_SIZE)
    assert load_tokenizer(directory).size == embedded.VOCAB_SIZE


@pytest.mark.parametrize('text', [*PROBES, bytes(range(256)).decode('latin-1')])
def test_any_text_comes_back_from_its_ids_byte_for_byte(directory, text):
    tokens = load_tokenizer(directory)
    ids = tokens.encode(text)
    assert tokens.spell(ids) == text.encode() and max(ids) < embedded.VOCAB_SIZE
    assert not set(ids) & set(tokens.special_ids.values())


def test_every_digit_is_one_id_and_so_is_nearly_every_word_of_the_task(directory):
    tokens, whole, words = load_tokenizer(directory), 0, 0
    for problem in arithmetic.problems('train', 200, seed=5):
        ids = template.prompt_ids(template.make_template('tiny'), tokens, problem.question)
        assert tokens.decode(ids, specials=True).count(problem.question) == 1
        pieces = [tokens.decode([i]).strip() for i in tokens.encode(problem.question)]
        assert [p for p in pieces if re.search(r'\d', p)] == re.findall(r'\d', problem.question)
        asked = re.findall(r'[A-Za-z]{2,}', problem.question)
        whole, words = whole + sum(word in pieces for word in asked), words + len(asked)
    assert words > 400 and whole / words > 0.8


def test_values_and_outputs_undo_each_other_in_every_layer(params):
    attention, size = params['layers']['self_attn'], SMALL.hidden_size
    flat = lambda name: attention[name]['weight'].reshape(SMALL.num_hidden_layers, size, size)
    for product, gain in (
        (flat('v_proj') @ flat('o_proj'), embedded.VALUE_GAIN),
        (flat('q_proj') @ flat('k_proj').swapaxes(1, 2), embedded.MATCH_GAIN),
    ):
        assert np.abs(product - gain**2 * np.eye(size)).max() < 0.15 * gain
    first, second = flat('v_proj')
    assert np.abs(first - second).max() > 0.1  # each layer has its own matrix


def test_all_else_is_the_ordinary_start_and_the_embedding_is_larger(params):
    plain = jax.device_get(decoder.init(SMALL, jax.random.key(0)))
    np.testing.assert_allclose(
        params['embed_tokens']['weight'], embedded.EMBED_GAIN * plain['embed_tokens']['weight'], rtol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, params['layers']['mlp'], plain['layers']['mlp'])
    assert jax.tree.structure(params) == jax.tree.structure(plain)


def test_a_head_attends_to_tokens_like_its_own(params):
    """Before rotation, the query of a token fits its own key best: what copying begins with."""
    attention = params['layers']['self_attn']
    x_TD = np.random.default_rng(0).normal(size=(30, SMALL.hidden_size))
    q, k = (np.einsum('TD,DNH->TNH', x_TD, attention[name]['weight'][0]) for name in ('q_proj', 'k_proj'))
    best = np.einsum('TNH,SNH->NTS', q, k).argmax(axis=-1)
    assert (best == np.arange(30)).mean() > 0.8


@pytest.mark.parametrize('changes', [{'num_key_value_heads': 1}, {'head_dim': 16}])
def test_sizes_without_a_square_projection_are_refused(changes):
    with pytest.raises(ValueError, match='heads must equal KV heads, and heads × head_dim hidden_size'):
        embedded.init(dataclasses.replace(SMALL, **changes), jax.random.key(0))
