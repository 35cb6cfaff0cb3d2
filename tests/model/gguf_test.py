"""GGUF files in: their numbers, configuration and refusals, and transformers' own reading of the same files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from gguf import GGMLQuantizationType as Kind

from retool_jax.core.errors import UserError
from retool_jax.model import convert, gguf, hf, layers
from retool_jax.model.config import Llama3Scaling, YarnScaling, load_config
from retool_jax.model.tensor_files import SINGLE, read_headers
from retool_jax.text.tokenizer import load_tokenizer
from tests.model import gguf_files, parity_test
from tests.model.ggml_blocks import decode
from tests.model.sizes import make_config
from tests.text.strings import make_strings

ROOT = Path(__file__).resolve().parents[2]
QUANTS = (Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.Q4_0)
FLOATS = (Kind.F16, Kind.BF16, Kind.F32)
MODELS = {
    'llama_quantised': (gguf_files.wide('llama'), QUANTS),
    'llama_biased': (gguf_files.wide('llama', attention_bias=True, mlp_bias=True, num_key_value_heads=8), FLOATS),
    'qwen2_quantised': (gguf_files.wide('qwen2', tie_word_embeddings=True), QUANTS),
    'qwen2_floats': (gguf_files.wide('qwen2'), FLOATS),
    'qwen3_quantised': (gguf_files.wide('qwen3', tie_word_embeddings=True, head_dim=48), QUANTS),
}


@pytest.fixture(scope='module')
def vocab():
    return gguf_files.byte_level('qwen2')


def make(tmp_path, vocab, config=None, kinds=FLOATS, change=None) -> Path:
    gguf_files.write(tmp_path / 'model.gguf', config or gguf_files.wide('llama'), vocab, kinds, change=change)
    return tmp_path / 'model.gguf'


@pytest.mark.parametrize('name', MODELS)
def test_a_file_becomes_the_directory_that_its_blocks_and_its_order_of_rows_make(tmp_path, vocab, name):
    config, kinds = MODELS[name]
    stored = gguf_files.write(tmp_path / 'model.gguf', config, vocab, kinds)
    convert.from_gguf(gguf.read(tmp_path / 'model.gguf'), tmp_path / 'out')
    found = load_config(tmp_path / 'out')
    assert dataclasses.replace(found, rms_norm_eps=config.rms_norm_eps) == config
    assert found.rms_norm_eps == pytest.approx(config.rms_norm_eps, rel=1e-6)  # the header holds 32 bits of it
    tensors = safetensors.numpy.load_file(tmp_path / 'out' / SINGLE)
    assert tensors.keys() == stored.keys()
    for name, (data, kind) in stored.items():
        np.testing.assert_allclose(tensors[name], decode(data, kind), rtol=1e-6, atol=1e-9, err_msg=name)
        assert np.abs(tensors[name]).max() > 1e-3
    hf.load(tmp_path / 'out', found)  # and it is a whole directory
    assert {kind for _, kind in stored.values()} >= set(kinds)


def test_what_a_file_holds_exactly_decides_the_dtype(tmp_path, vocab):
    config = make_config('qwen2', vocab_size=600)
    for kind, given, wanted in ((Kind.BF16, None, 'BF16'), (Kind.F16, None, 'F32'), (Kind.F16, 'bfloat16', 'BF16')):
        gguf_files.write(tmp_path / 'model.gguf', config, vocab, (kind,))
        out = tmp_path / f'{kind.name}_{given}'
        convert.from_gguf(gguf.read(tmp_path / 'model.gguf'), out, given)
        assert {tensor.dtype for tensor in read_headers(out).values()} == {wanted}


def test_parts_of_a_tensor_are_the_whole(tmp_path, vocab, monkeypatch):
    path = make(tmp_path, vocab, kinds=QUANTS)
    convert.from_gguf(gguf.read(path), tmp_path / 'whole')
    monkeypatch.setattr(gguf, 'BLOCK', 1000)  # three rows and a bit
    convert.from_gguf(gguf.read(path), tmp_path / 'parts')
    assert (tmp_path / 'parts' / SINGLE).read_bytes() == (tmp_path / 'whole' / SINGLE).read_bytes()


def test_yarn_is_read_from_the_header_and_llama_3_from_its_tensor(tmp_path, vocab):
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=64)
    path = make(tmp_path, vocab, make_config('qwen2', vocab_size=600, rope_scaling=yarn))
    assert gguf.load_config(gguf.read(path)).rope_scaling == yarn

    scaling = Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    config = make_config('llama', vocab_size=600, rope_theta=500000.0, head_dim=64)
    slowed = layers.inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))[0]
    factors = (layers.inverse_frequencies(config)[0] / slowed).astype(np.float32)
    with_factors = lambda values: lambda metadata, tensors: tensors.update({gguf.ROPE_FACTORS: (values, Kind.F32)})
    path = make(tmp_path, vocab, config, change=with_factors(factors))
    assert gguf.load_config(gguf.read(path)).rope_scaling == scaling
    path = make(tmp_path, vocab, config, change=with_factors(np.ones_like(factors)))
    assert gguf.load_config(gguf.read(path)).rope_scaling is None
    path = make(tmp_path, vocab, config, change=with_factors(factors**2))
    with pytest.raises(UserError, match='rope_freqs.weight is no scaling of Llama 3'):
        gguf.load_config(gguf.read(path))


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('llama.expert_count', 8, 'mixtures of experts are not supported'),
        ('llama.attention.sliding_window', 32, 'sliding_window=32; only full attention'),
        ('llama.rope.dimension_count', 16, 'dimension_count=16 of heads of 32; only whole heads'),
        ('llama.attention.head_count_kv', [2, 4], 'head_count_kv differs from layer to layer'),
        ('llama.rope.scaling.type', 'linear', 'rope_scaling type linear is not supported'),
        ('llama.embedding_length', None, 'field hidden_size is missing'),
        ('split.count', 3, 'one of 3 parts; join them'),
        ('tokenizer.ggml.pre', 'banana', 'tokenizer.ggml.pre=banana is not known; known are default, gpt-2, smollm'),
        ('tokenizer.ggml.model', 'bert', 'tokenizer.ggml.model=bert is not supported'),
        ('tokenizer.ggml.eos_token_id', None, None),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_nothing_is_written(tmp_path, vocab, key, value, message):
    def change(metadata, tensors):
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value

    path = make(tmp_path, vocab, change=change)
    if message is None:  # the chat mark still ends a turn
        convert.from_gguf(gguf.read(path), tmp_path / 'out')
        assert load_tokenizer(tmp_path / 'out').eos_ids == (2, 0)
        return
    with pytest.raises(UserError, match=f'^{re.escape(str(path))}.*{re.escape(message)}') as caught:
        convert.from_gguf(gguf.read(path), tmp_path / 'out')
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


def test_another_architecture_is_refused_by_name(tmp_path, vocab):
    writer = library.GGUFWriter(tmp_path / 'model.gguf', 'mamba')
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(UserError, match='architecture mamba is not supported; supported are llama, qwen2, qwen3'):
        gguf.load_config(gguf.read(tmp_path / 'model.gguf'))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.pop('blk.1.ffn_up.weight'), 'blk.1.ffn_up.weight is missing'),
        (
            lambda t: t.update({'blk.0.ffn_up_exps.weight': t['output_norm.weight']}),
            'ffn_up_exps.weight is not part of',
        ),
        (
            lambda t: t.update({'output_norm.weight': (np.zeros(9, 'f4'), Kind.F32)}),
            'is [9], the header makes it [256]',
        ),
        (lambda t: t.update({'output_norm.weight': (np.zeros(256, np.int32), Kind.I32)}), 'stored as I32'),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, vocab, change, message):
    path = make(tmp_path, vocab, change=lambda metadata, tensors: change(tensors))
    with pytest.raises(UserError, match=re.escape(message)):
        convert.from_gguf(gguf.read(path), tmp_path / 'out')


@pytest.mark.parametrize('keep', [0, 3, 10, 5000, 100_001, -1])
def test_a_broken_file_is_one_line(tmp_path, vocab, keep):
    path = make(tmp_path, vocab)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match='is not a whole GGUF file .*; download it again') as caught:
        gguf.read(path)
    assert '\n' not in str(caught.value)


def test_a_file_that_is_missing_a_pointer_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(UserError, match='is no file; give a GGUF file'):
        gguf.read(tmp_path / 'model.gguf')
    (tmp_path / 'model.gguf').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n')
    with pytest.raises(UserError, match='is a pointer of Git LFS'):
        gguf.read(tmp_path / 'model.gguf')
    (tmp_path / 'model.gguf').write_bytes(b'PK\x03\x04' + bytes(5000))
    with pytest.raises(UserError, match='is not a whole GGUF file'):
        gguf.read(tmp_path / 'model.gguf')


def test_nothing_is_overwritten(tmp_path, vocab):
    file = gguf.read(make(tmp_path, vocab))
    convert.from_gguf(file, tmp_path / 'out')
    with pytest.raises(UserError, match='already exists and is never overwritten'):
        convert.from_gguf(file, tmp_path / 'out')


WATCH = """
import re, sys
from retool_jax.model import convert, gguf
file = gguf.read(sys.argv[1])
memory = lambda field: int(re.search(field + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts again
before = memory('VmRSS')
convert.from_gguf(file, sys.argv[2], 'float32')
print(memory('VmHWM') - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='/proc/self/clear_refs cannot be written')
def test_converting_holds_no_more_than_a_part_of_a_tensor(tmp_path, vocab):
    sizes = dict(hidden_size=2048, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, head_dim=128)
    config = gguf_files.wide('llama', vocab_size=60_000, **sizes)
    gguf_files.write(tmp_path / 'model.gguf', config, vocab, (Kind.Q4_K, Kind.Q8_0))
    assert 4 * config.parameter_count() > 1.5e9
    child = subprocess.run(
        [sys.executable, '-c', WATCH, str(tmp_path / 'model.gguf'), str(tmp_path / 'out')],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    # A part in f32, what the library needs to make it (three times as much), its bytes; beside it the tokenizer.
    assert int(child.stdout) <= 5 * 4 * gguf.BLOCK + (64 << 20)


@pytest.mark.slow
def test_the_binary_takes_two_names(tmp_path, vocab):
    path = make(tmp_path, vocab, kinds=QUANTS)
    run = lambda *arguments: subprocess.run(
        [sys.executable, 'launch/convert.py', *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    child = run(path, tmp_path / 'out')
    assert (child.returncode, child.stderr.splitlines()[-1]) == (0, f'{tmp_path / "out"}: written')
    assert hf.load(tmp_path / 'out', load_config(tmp_path / 'out'))
    assert json.loads((tmp_path / 'out/tokenizer_config.json').read_text())['chat_template'] == gguf_files.CHATML
    child = run(path)
    assert (child.returncode, child.stderr) == (2, 'error: --target is missing; see --help\n')
    child = run(path, tmp_path / 'other', 'more')
    assert (child.returncode, child.stderr) == (
        2,
        "error: unexpected argument 'more'; flags are written --name=value\n",
    )
    child = run('--to=orbax', path, tmp_path / 'other')
    assert child.returncode == 2 and 'becomes a Hugging Face directory first' in child.stderr


PEERS = {  # transformers reads qwen3 with heads of 128 alone, and drops biases of llama
    'llama_smollm': (gguf_files.wide('llama', tie_word_embeddings=True), ('smollm',), QUANTS),
    'llama_bpe': (gguf_files.wide('llama', num_key_value_heads=1), ('llama-bpe',), FLOATS),
    'llama_spm': (gguf_files.wide('llama'), (), (Kind.F32, Kind.Q8_0)),
    'qwen2': (gguf_files.wide('qwen2'), ('qwen2',), QUANTS),
    'qwen2_r1': (gguf_files.wide('qwen2', num_key_value_heads=4), ('deepseek-r1-qwen',), FLOATS),
    'qwen3': (gguf_files.wide('qwen3', head_dim=128), ('qwen2',), QUANTS),
    'qwen3_gpt2': (gguf_files.wide('qwen3', head_dim=128, tie_word_embeddings=True), ('gpt-2',), (Kind.Q6_K,)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        *PEERS,
        pytest.param(
            'given', marks=pytest.mark.skipif('RETOOL_GGUF' not in os.environ, reason='RETOOL_GGUF names no file')
        ),
    ],
)
def test_logits_and_ids_are_those_of_transformers_own_reading_of_the_file(tmp_path, name):
    path = tmp_path / 'model.gguf'
    if name == 'given':
        path.symlink_to(os.environ['RETOOL_GGUF'])
    else:
        config, pre, kinds = PEERS[name]
        gguf_files.write(path, config, gguf_files.byte_level(*pre) if pre else gguf_files.sentence_pieces(), kinds)
    convert.from_gguf(gguf.read(path), tmp_path / 'out', 'float32')
    texts = make_strings(10_000)
    (tmp_path / 'strings.json').write_text(json.dumps(texts))
    parity_test.run_peer(path, tmp_path / 'out', tmp_path / 'strings.json', script='read_gguf.py')
    parity_test.check(tmp_path / 'out')
    theirs = json.loads((tmp_path / 'out' / 'ids.json').read_text())
    written = tokenizers.Tokenizer.from_file(str(tmp_path / 'out' / 'tokenizer.json'))
    found = [encoding.ids for encoding in written.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, a, b in zip(texts, found, theirs) if a != b] == []
    ours = load_tokenizer(tmp_path / 'out')
    for text, ids in zip(texts, theirs):
        mine = ours.encode(text, specials=True)
        if name != 'llama_spm':
            assert mine == ids, text
        elif '▁' not in text:  # which SentencePiece takes for a space, and we for itself
            assert mine == ids or ours.encode(' ' + text, specials=True) == ids, text  # the space that it puts before
