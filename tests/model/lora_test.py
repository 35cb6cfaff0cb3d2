"""Adapters beside frozen weights: what peft computes, what merging makes of them, and in which files they go out."""

from __future__ import annotations

import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.model import decoder, hf, lora
from retool_jax.model.config import load_config
from retool_jax.model.layers import PROJECTIONS
from retool_jax.model.lora import LoRASettings
from retool_jax.rollout.sync import Sync
from tests.model.parity_test import FIXTURES, assert_close, cached_logits, full_logits, run_peer
from tests.model.sizes import make_config, make_params, make_tokens

CONFIG = make_config('llama', attention_bias=True, mlp_bias=True)
LORA = LoRASettings(rank=3, alpha=4.5, targets=PROJECTIONS)
BASE = 'qwen2_grouped'  # the fixture that peft's adapter is of


def make_adapters(config=CONFIG, settings=LORA, seed: int = 0, size: float = 0.1):
    """Adapters of which no B is zero."""
    rng = np.random.default_rng(seed)
    make = lambda leaf: jnp.asarray(rng.normal(0, size, leaf.shape), jnp.float32)
    return jax.tree.map(make, lora.abstract(config, settings))


def read_tensors(file) -> dict[str, np.ndarray]:
    """The f32 tensors of a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, said in header.items():
        if name != '__metadata__':
            assert said['dtype'] == 'F32'
            start, stop = (8 + length + offset for offset in said['data_offsets'])
            found[name] = np.frombuffer(data[start:stop], np.float32).reshape(said['shape'])
    return found


def read_adapters(directory, config, settings):
    """peft's tensors in our layout."""
    tensors, adapters = read_tensors(directory / 'adapter_model.safetensors'), {}
    for leaf in lora.leaves(config, settings):
        inverse = np.argsort(leaf.order)
        ours = lambda x, leaf=leaf, inverse=inverse: x.reshape([leaf.shape[a] for a in leaf.order]).transpose(inverse)
        node = adapters
        for word in leaf.path[:-1]:
            node = node.setdefault(word, {})
        node[leaf.path[-1]] = jnp.stack([jnp.asarray(ours(tensors[name])) for name in leaf.names])
    return adapters


@pytest.fixture(scope='module')
def of_peft():
    """Configuration, frozen weights, settings and adapters of the fixture."""
    config, said = (
        load_config(FIXTURES / BASE),
        json.loads((FIXTURES / BASE / 'adapter/adapter_config.json').read_text()),
    )
    settings = LoRASettings(rank=said['r'], alpha=said['lora_alpha'], targets=tuple(said['target_modules']))
    adapters = read_adapters(FIXTURES / BASE / 'adapter', config, settings)
    return config, hf.load(FIXTURES / BASE, config), settings, adapters


def test_logits_are_those_of_peft_beside_the_weights_and_merged_into_them(of_peft):
    config, frozen, settings, adapters = of_peft
    golden = np.load(FIXTURES / BASE / 'adapter' / 'golden.npz')
    weights = lora.over(frozen, adapters, settings.scale)
    assert_close(full_logits(config, weights, golden['tokens'], golden['lengths']), golden)
    assert_close(cached_logits(config, weights, golden['tokens'], golden['lengths']), golden)  # the sampling layout
    with pytest.raises(AssertionError):
        assert_close(full_logits(config, frozen, golden['tokens'], golden['lengths']), golden)


def test_an_adapter_is_written_as_peft_wrote_it(of_peft, tmp_path):
    config, _, settings, adapters = of_peft
    lora.save(tmp_path / 'adapter', config, settings, adapters, 'base')
    ours, theirs = (
        read_tensors(f / 'adapter_model.safetensors') for f in (tmp_path / 'adapter', FIXTURES / BASE / 'adapter')
    )
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * config.num_hidden_layers
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    said, wanted = (
        json.loads((f / 'adapter_config.json').read_text()) for f in (tmp_path / 'adapter', FIXTURES / BASE / 'adapter')
    )
    assert said.keys() <= wanted.keys() and said['base_model_name_or_path'] == 'base'
    for key in said.keys() - {'base_model_name_or_path', 'target_modules'}:
        assert said[key] == wanted[key], key
    assert set(said['target_modules']) == set(wanted['target_modules'])
    with pytest.raises(ValueError, match='already exists and is never overwritten'):
        lora.save(tmp_path / 'adapter', config, settings, adapters, 'base')


@pytest.mark.slow
@pytest.mark.parametrize('case', ['qwen2_grouped', 'qwen3_tied', 'llama_biased'])
def test_peft_loads_what_is_written_with_the_same_logits(case, tmp_path):
    config = load_config(FIXTURES / case)
    settings = LoRASettings(rank=2, alpha=3.0, targets=('q_proj', 'o_proj', 'down_proj'))
    adapters = make_adapters(config, settings, size=0.5)
    lora.save(tmp_path / 'adapter', config, settings, adapters, str(FIXTURES / case))
    run_peer(FIXTURES / case, '--adapter', tmp_path / 'adapter')
    golden = np.load(tmp_path / 'adapter' / 'golden.npz')
    weights = lora.over(hf.load(FIXTURES / case, config), adapters, settings.scale)
    assert_close(full_logits(config, weights, golden['tokens'], golden['lengths']), golden)


def test_a_merged_export_has_the_logits_of_the_run(tmp_path):
    weights = lora.over(make_params(CONFIG), make_adapters(), LORA.scale)
    hf.save(tmp_path / 'merged', CONFIG, weights, 'float32')
    merged, tokens, lengths = hf.load(tmp_path / 'merged', CONFIG), make_tokens(CONFIG, 2, 12), np.array([12, 9])
    assert jax.tree.structure(merged) == jax.tree.structure(make_params(CONFIG))
    found, wanted = (full_logits(CONFIG, tree, tokens, lengths) for tree in (merged, weights))
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(full_logits(CONFIG, make_params(CONFIG), tokens, lengths) - wanted).max() > 0.1


def test_first_adapters_change_nothing_and_follow_their_key():
    make = functools.partial(lora.init, CONFIG, LORA)
    adapters = make(jax.random.key(0))
    frozen = make_params(CONFIG)
    tokens, lengths = make_tokens(CONFIG, 1, 8), np.array([8])
    weights = lora.over(frozen, adapters, LORA.scale)
    np.testing.assert_array_equal(
        full_logits(CONFIG, weights, tokens, lengths), full_logits(CONFIG, frozen, tokens, lengths)
    )
    a = lambda tree: np.asarray(tree['layers']['mlp']['down_proj']['lora_A']['weight'])
    assert a(adapters).shape == (2, 48, 3) and abs(a(adapters).std() * (3 * 48) ** 0.5 - 1) < 0.15
    assert np.array_equal(a(adapters), a(make(jax.random.key(0)))) and not np.array_equal(
        a(adapters)[0], a(adapters)[1]
    )
    assert not np.array_equal(a(adapters), a(make(jax.random.key(1))))
    assert lora.over(frozen, {}, 1.0) == frozen and lora.over(None, frozen, 1.0) is frozen


def test_only_the_projections_that_are_named_are_adapted_and_none_without_a_rank():
    some = LoRASettings(rank=2, alpha=1.0, targets=('down_proj', 'q_proj'))
    layers = lora.abstract(CONFIG, some)['layers']
    assert {name for part in layers.values() for name in part} == {'q_proj', 'down_proj'}
    assert lora.logical_axes(CONFIG, some)['layers']['self_attn']['q_proj'] == {
        'lora_A': {'weight': ('layers', 'embed', 'rank')},
        'lora_B': {'weight': ('layers', 'rank', 'heads', 'head_dim')},
    }
    with pytest.raises(ValueError, match=r'targets=\(\) leaves nothing to train with lora.rank=2'):
        LoRASettings(rank=2, alpha=1.0, targets=())
    with pytest.raises(ValueError, match=r"targets\[0\]='lm_head' is unknown; choose one of q_proj"):
        LoRASettings(rank=2, alpha=1.0, targets=('lm_head',))


def test_weights_of_16_bits_are_merged_in_32_and_rounded_once():
    frozen = decoder.cast(make_params(CONFIG), jnp.bfloat16)
    weights = lora.over(frozen, make_adapters(size=0.02), LORA.scale)
    sync = Sync(CONFIG, 'bfloat16')
    found, plain = sync(weights)['layers'][1], sync(frozen)['layers'][1]
    q = weights['layers']['self_attn']['q_proj']
    a, b, w = (np.asarray(x['weight'][1], np.float64) for x in (q['lora_A'], q['lora_B'], q))
    exact = w + np.tensordot(a, b, 1)
    q = found['self_attn']['q_proj']['weight']
    assert q.dtype == jnp.bfloat16 and found['input_layernorm']['weight'].dtype == jnp.float32
    error = np.abs(np.asarray(q, np.float64) - exact)
    assert (error <= np.abs(exact) * 2**-8).all()  # half a unit in the last place
    assert not np.array_equal(q, plain['self_attn']['q_proj']['weight'])
    np.testing.assert_array_equal(found['self_attn']['q_proj']['bias'], plain['self_attn']['q_proj']['bias'])


def test_a_mesh_merges_as_one_device_does():
    config = make_config('qwen2', num_attention_heads=8, head_dim=8, intermediate_size=64)
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 4})
    rules = decoder.fit_rules(config, mesh, sharding.TRAIN_RULES)
    frozen, adapters = make_params(config), make_adapters(config)
    expected = Sync(config, 'float32')(lora.over(frozen, adapters, 2.0))
    place = lambda tree, axes: jax.device_put(tree, sharding.shardings(mesh, axes, rules))
    spread = lora.over(
        place(frozen, decoder.logical_axes(config)), place(adapters, lora.logical_axes(config, LORA)), 2.0
    )
    found = Sync(config, 'float32', mesh)(spread)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)
