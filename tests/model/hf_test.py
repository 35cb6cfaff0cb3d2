"""Hugging Face checkpoints in and out: bit-equal, streamed, and every fault named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from retool_jax.core import sharding, storage
from retool_jax.model import decoder, hf
from retool_jax.model.config import YarnScaling, load_config
from retool_jax.model.tensor_files import INDEX, SINGLE
from tests import buckets
from tests.model.sizes import make_config, make_params

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    'qwen2_untied': make_config('qwen2'),
    'qwen2_tied': make_config('qwen2', tie_word_embeddings=True),
    'qwen3_tied': make_config('qwen3', tie_word_embeddings=True, num_key_value_heads=1),
    'llama_biased': make_config('llama', attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    'qwen3_untied': make_config('qwen3', num_attention_heads=6, num_key_value_heads=3, head_dim=8),
}
LARGE = 5_000_000_000  # bytes of a file: all tensors in one
QUICK = {
    ('qwen2_untied', 'float32', LARGE),
    ('qwen2_tied', 'bfloat16', 20_000),
    ('qwen3_tied', 'float32', 20_000),
    ('qwen3_untied', 'bfloat16', LARGE),
    ('llama_biased', 'bfloat16', 20_000),
}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    'name, dtype, file_bytes',
    [
        pytest.param(name, dtype, file_bytes, marks=() if (name, dtype, file_bytes) in QUICK else pytest.mark.slow)
        for name in CONFIGS
        for dtype in ('float32', 'bfloat16')
        for file_bytes in (LARGE, 20_000)
    ],
)
def test_a_round_trip_is_bit_equal_in_one_file_and_in_many(tmp_path, name, dtype, file_bytes):
    config = CONFIGS[name]
    params = jax.tree.map(lambda x: x.astype(dtype), make_params(config))
    hf.save(tmp_path / 'model', config, params, dtype, file_bytes=file_bytes)
    assert (tmp_path / 'model' / INDEX).is_file() == (file_bytes == 20_000)
    assert load_config(tmp_path / 'model') == config
    assert_same(hf.load(tmp_path / 'model', config, dtype=dtype), params)
    if dtype == 'bfloat16':  # into f32 master weights and back: nothing is lost either
        master = hf.load(tmp_path / 'model', config)
        assert {x.dtype for x in jax.tree.leaves(master)} == {jnp.dtype('float32')}
        hf.save(tmp_path / 'again', config, master, dtype, file_bytes=file_bytes)
        for file in (tmp_path / 'model').glob('*.safetensors'):
            assert file.read_bytes() == (tmp_path / 'again' / file.name).read_bytes()


def test_the_library_of_the_format_reads_what_is_written_and_writes_what_is_read(tmp_path):
    config = CONFIGS['qwen3_untied']
    params = make_params(config)
    hf.save(tmp_path / 'model', config, params, 'float32')
    tensors = safetensors.numpy.load_file(tmp_path / 'model' / SINGLE)
    q_HF = tensors['model.layers.1.self_attn.q_proj.weight']  # [N·H, D]
    q_DNH = np.asarray(params['layers']['self_attn']['q_proj']['weight'][1])
    np.testing.assert_array_equal(q_HF, q_DNH.reshape(config.hidden_size, -1).T)
    o_HF = tensors['model.layers.0.self_attn.o_proj.weight']  # [D, N·H]
    o_NHD = np.asarray(params['layers']['self_attn']['o_proj']['weight'][0])
    np.testing.assert_array_equal(o_HF, o_NHD.reshape(-1, config.hidden_size).T)
    np.testing.assert_array_equal(tensors['lm_head.weight'], np.asarray(params['lm_head']['weight']).T)
    # Another order of tensors and odd metadata, as other writers leave them.
    safetensors.numpy.save_file(dict(reversed(tensors.items())), tmp_path / 'model' / SINGLE, {'by': 'x' * 13})
    assert_same(hf.load(tmp_path / 'model', config), params)


def test_weights_arrive_on_their_mesh_sharded(tmp_path):
    config = CONFIGS['qwen2_untied']
    params = make_params(config)
    hf.save(tmp_path / 'model', config, params, 'float32')
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    shardings = sharding.shardings(mesh, decoder.logical_axes(config), sharding.TRAIN_RULES)
    loaded = hf.load(tmp_path / 'model', config, shardings)
    assert_same(loaded, params)
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings)):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    gate = loaded['layers']['mlp']['gate_proj']['weight']
    assert gate.addressable_shards[0].data.nbytes * 4 == gate.nbytes
    hf.save(tmp_path / 'again', config, loaded, 'float32')
    assert (tmp_path / 'again' / SINGLE).read_bytes() == (tmp_path / 'model' / SINGLE).read_bytes()


def test_weights_in_a_bucket_are_read_by_ranges(tmp_path, monkeypatch):
    config = CONFIGS['qwen2_untied']
    params = make_params(config)
    hf.save(tmp_path / 'model', config, params, 'float32', file_bytes=20_000)
    size = sum(file.stat().st_size for file in (tmp_path / 'model').glob('*.safetensors'))
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    shardings = sharding.shardings(mesh, decoder.logical_axes(config), sharding.TRAIN_RULES)
    ranges, read = [], storage.read_range
    monkeypatch.setattr(storage, 'read_range', lambda *given: ranges.append(given) or read(*given))
    with buckets.served():
        address = f'gs://{buckets.BUCKET}/model'
        fsspec.url_to_fs(address)[0].put(f'{tmp_path / "model"}/', f'{address}/', recursive=True)
        assert not list(storage.model_files('model.path', address).glob('*.safetensors'))
        for homes in (None, shardings):
            ranges.clear()
            assert_same(hf.load(address, config, homes), params)
            assert size - 20_000 < sum(given[2] for given in ranges) < size  # all but the headers


def test_progress_counts_every_tensor(tmp_path):
    config, seen = CONFIGS['qwen2_tied'], []
    hf.save(tmp_path / 'model', config, make_params(config), progress=lambda done, total: seen.append((done, total)))
    total = 2 * 12 + 2  # 12 tensors a layer, the embedding, the last norm
    assert seen == [(i + 1, total) for i in range(total)]
    seen.clear()
    hf.load(tmp_path / 'model', config, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, total) for i in range(total)]


@pytest.fixture
def saved(tmp_path):
    config = CONFIGS['qwen2_untied']
    hf.save(tmp_path / 'model', config, make_params(config), 'float32', file_bytes=20_000)
    return config, tmp_path / 'model'


def rewrite(directory: Path, change) -> None:
    """Applies `change` to all tensors and stores them in one file."""
    tensors = {}
    for file in directory.glob('*.safetensors'):
        tensors |= safetensors.numpy.load_file(file)
        file.unlink()
    (directory / INDEX).unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE)


def fails(config, directory: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        hf.load(directory, config)
    assert '\n' not in str(caught.value)


def test_a_missing_tensor_is_named(saved):
    rewrite(saved[1], lambda t: t.pop('model.layers.1.mlp.up_proj.weight'))
    fails(*saved, 'model.layers.1.mlp.up_proj.weight is missing')


def test_an_extra_tensor_is_named(saved):
    rewrite(saved[1], lambda t: t.update({'model.layers.2.mlp.up_proj.weight': np.zeros(3, np.float32)}))
    fails(*saved, 'model.layers.2.mlp.up_proj.weight is not part of this architecture')


def test_a_misshapen_tensor_is_named_with_both_shapes(saved):
    rewrite(saved[1], lambda t: t.update({'model.layers.0.self_attn.k_proj.weight': np.zeros((32, 16), np.float32)}))
    fails(*saved, 'model.layers.0.self_attn.k_proj.weight is [32, 16], config.json makes it [32, 32]')


def test_a_tensor_of_whole_numbers_is_refused(saved):
    rewrite(saved[1], lambda t: t.update({'model.norm.weight': np.zeros(32, np.int8)}))
    fails(*saved, 'model.norm.weight is stored as I8; supported are BF16, F16, F32')


def test_rotary_tables_of_old_exports_and_a_second_copy_of_a_tied_head_are_left_alone(tmp_path):
    config = CONFIGS['qwen2_tied']
    params = make_params(config)
    hf.save(tmp_path / 'model', config, params, 'float32', file_bytes=20_000)
    rewrite(
        tmp_path / 'model',
        lambda t: t.update(
            {
                'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(8, np.float32),
                'lm_head.weight': t['model.embed_tokens.weight'].copy(),
            }
        ),
    )
    assert_same(hf.load(tmp_path / 'model', config), params)


def test_missing_weights_are_named(saved):
    config, directory = saved
    second = sorted(directory.glob('model-00002-of-*'))[0]
    second.unlink()
    fails(config, directory, f'{second} is missing, model.safetensors.index.json lists it')
    (directory / INDEX).unlink()
    fails(config, directory, 'holds neither model.safetensors nor model.safetensors.index.json')
    fails(config, directory / 'nowhere', 'holds no config.json')


@pytest.mark.parametrize('keep', [3, 100, -1])
def test_a_truncated_file_is_named_before_anything_is_allocated(saved, keep):
    config, directory = saved
    last = sorted(directory.glob('*.safetensors'))[-1]
    last.write_bytes(last.read_bytes()[:keep])
    fails(config, directory, f'{last} is truncated')


def test_a_file_of_another_kind_is_refused(saved):
    config, directory = saved
    first = sorted(directory.glob('*.safetensors'))[0]
    first.write_bytes((64).to_bytes(8, 'little') + b'<html>' * 200)
    fails(config, directory, f'{first} is not a safetensors file')


@pytest.mark.parametrize('name', [INDEX, 'model-00001-of-*', 'config.json'])
def test_a_pointer_of_git_lfs_is_named(saved, name):
    config, directory = saved
    (file,) = directory.glob(name)
    file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n')
    fails(config, directory, f'{file} is a pointer of Git LFS')


@pytest.mark.parametrize(
    'content',
    [
        '',
        '{}',
        '[]',
        'null',
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        '{"metadata": {"total_size": 1}}',
    ],
)
def test_an_index_without_a_map_of_weights_is_named(saved, content):
    config, directory = saved
    (directory / INDEX).write_text(content)
    fails(config, directory, f'{directory / INDEX} holds no weight_map')


@pytest.mark.parametrize(
    'header', ['[]', '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": [0]}}', '{"a": {"data_offsets": [0, 4]}}']
)
def test_a_header_of_another_form_is_named(saved, header):
    config, directory = saved
    first = sorted(directory.glob('*.safetensors'))[0]
    first.write_bytes(len(header).to_bytes(8, 'little') + header.encode())
    fails(config, directory, f'{first} is not a safetensors file')


@pytest.mark.parametrize('field, value', [('rope_theta', 5e5), ('num_hidden_layers', 3), ('model_type', 'qwen3')])
def test_another_architecture_is_refused_by_the_field_that_differs(saved, field, value):
    config, directory = saved
    fails(dataclasses.replace(config, **{field: value}), directory, f'config.json has {field}=')


def test_a_longer_context_than_the_checkpoints_is_a_choice_of_the_run(saved):
    config, directory = saved
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=256)
    longer = dataclasses.replace(config, rope_scaling=yarn, max_position_embeddings=1024)
    assert_same(hf.load(directory, longer), hf.load(directory, config))


def test_nothing_is_overwritten_and_a_save_that_died_leaves_no_model(saved):
    config, directory = saved
    before = sorted((p.name, p.read_bytes()) for p in directory.iterdir())
    with pytest.raises(ValueError, match='already exists and is never overwritten'):
        hf.save(directory, config, make_params(config))
    assert sorted((p.name, p.read_bytes()) for p in directory.iterdir()) == before

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save(directory.parent / 'other', config, make_params(config), progress=stop)
    assert not (directory.parent / 'other').exists()
    hf.save(directory.parent / 'other', config, make_params(config))
    assert not (directory.parent / 'other.partial').exists()


def test_the_tokenizer_goes_along(saved, tmp_path):
    config, source = saved[0], tmp_path / 'source'
    source.mkdir()
    (source / 'tokenizer.json').write_text('{"a": 1}')
    (source / 'generation_config.json').write_text('{}')
    (source / 'notes.txt').write_text('no')
    (source / 'config.json').write_text('{"eos_token_id": [7, 8], "hidden_size": 5}')
    hf.save(tmp_path / 'out', config, make_params(config), tokenizer_dir=source)
    names = {p.name for p in (tmp_path / 'out').iterdir()}
    assert names == {'config.json', 'model.safetensors', 'tokenizer.json', 'generation_config.json'}
    raw = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (raw['eos_token_id'], raw['hidden_size'], raw['torch_dtype']) == ([7, 8], 32, 'bfloat16')
    with pytest.raises(ValueError, match='holds no tokenizer'):
        hf.save(tmp_path / 'else', config, make_params(config), tokenizer_dir=tmp_path / 'model')


WATCH = """
import os, re, sys
import jax, jax.numpy as jnp
from retool_jax.model import hf
from retool_jax.model.config import load_config
config = load_config(sys.argv[1])
jax.block_until_ready(jnp.zeros(3) + 1)
memory = lambda field: int(re.search(field + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts again
before = memory('VmRSS')
params = hf.load(sys.argv[1], config)
print(memory('VmHWM') - before - sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='/proc/self/clear_refs cannot be written')
def test_loading_holds_no_more_than_one_tensor_beside_the_parameters(tmp_path):
    config = make_config(
        vocab_size=40_000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=12,
        head_dim=64,
        tie_word_embeddings=True,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), decoder.abstract_params(config))
    hf.save(tmp_path / 'model', config, zeros, 'float32')
    largest = 4 * config.vocab_size * config.hidden_size
    assert 4 * config.parameter_count() > 3 * largest
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
    child = subprocess.run(
        [sys.executable, '-c', WATCH, str(tmp_path / 'model')],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) <= largest + (128 << 20)
