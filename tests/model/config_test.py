"""config.json in and out: real sizes are read, what is not supported is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from retool_jax.model import decoder, layers
from retool_jax.model.config import Llama3Scaling, YarnScaling, from_hf, load_config, to_hf
from tests.model.sizes import make_config

BASE = {'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'use_sliding_window': False, 'rope_theta': 1000000.0}


def raw(kind: str, vocab, width, mlp, layers, heads, kv_heads, **more) -> dict:
    return (
        BASE
        | {
            'architectures': [f'{kind}ForCausalLM'],
            'model_type': kind.lower(),
            'vocab_size': vocab,
            'hidden_size': width,
            'intermediate_size': mlp,
            'num_hidden_layers': layers,
            'num_attention_heads': heads,
            'num_key_value_heads': kv_heads,
        }
        | more
    )


# Published sizes with their published numbers of parameters, in units of 10⁹.
PUBLISHED = {
    'Qwen2.5-0.5B': (raw('Qwen2', 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 0.494),
    'Qwen2.5-7B': (raw('Qwen2', 152064, 3584, 18944, 28, 28, 4), 7.616),
    'Qwen2.5-32B': (raw('Qwen2', 152064, 5120, 27648, 64, 40, 8), 32.76),
    'Qwen2.5-72B': (raw('Qwen2', 152064, 8192, 29568, 80, 64, 8), 72.71),
    'DeepSeek-R1-Distill-Qwen-1.5B': (raw('Qwen2', 151936, 1536, 8960, 28, 12, 2, use_mrope=False), 1.777),
    'Qwen3-0.6B': (
        raw('Qwen3', 151936, 1024, 3072, 28, 16, 8, head_dim=128, attention_bias=False, tie_word_embeddings=True),
        0.596,
    ),
    'SmolLM2-135M': (raw('Llama', 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, rope_theta=100000), 0.1345),
    'Llama-2-7B': (raw('Llama', 32000, 4096, 11008, 32, 32, 32, pretraining_tp=1), 6.738),
    'Llama-3.2-1B': (raw('Llama', 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True), 1.236),
    'DeepSeek-R1-Distill-Llama-8B': (
        raw('Llama', 128256, 4096, 14336, 32, 32, 8, attention_bias=False, mlp_bias=False),
        8.030,
    ),
    'Qwen3-32B': (raw('Qwen3', 151936, 5120, 25600, 64, 64, 8, head_dim=128, attention_bias=False), 32.76),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_have_their_published_number_of_parameters(name):
    source, billions = PUBLISHED[name]
    config = from_hf(source)
    assert config.parameter_count() / 1e9 == pytest.approx(billions, rel=2e-3)
    shapes = jax.tree.leaves(decoder.abstract_params(config))
    assert sum(math.prod(s.shape) for s in shapes) == config.parameter_count()


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'rope_scaling': YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.1)},
        {'tie_word_embeddings': True},
        {
            'rope_scaling': Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            )
        },
    ],
)
@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'qwen3'])
def test_a_config_survives_the_way_out_and_back(kind, change):
    config = make_config(kind, **change)
    assert from_hf(to_hf(config)) == config


def test_both_spellings_of_yarn_are_read():
    old = raw(
        'Qwen2',
        100,
        32,
        48,
        2,
        4,
        2,
        max_position_embeddings=131072,
        rope_scaling={'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768},
    )
    new = {k: v for k, v in old.items() if k not in ('rope_scaling', 'rope_theta')} | {
        'rope_parameters': {
            'rope_type': 'yarn',
            'factor': 4.0,
            'original_max_position_embeddings': 32768,
            'rope_theta': 1000000.0,
        }
    }
    config = from_hf(old)
    assert config == from_hf(new)
    assert config.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    'kind, biases',
    [('llama', {'attention_bias': True}), ('llama', {'mlp_bias': True}), ('qwen3', {'attention_bias': True})],
)
def test_optional_biases_survive_the_way_out_and_back(kind, biases):
    config = make_config(kind, **biases)
    raw = to_hf(config)
    assert {key: raw.get(key) for key in biases} == biases and from_hf(raw) == config


LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
}


def test_llama3_scaling_slows_what_turns_seldom_as_transformers_does():
    transformers = pytest.importorskip('transformers')
    source = raw(
        'Llama', 100, 64, 48, 2, 2, 2, rope_theta=500000.0, max_position_embeddings=131072, rope_scaling=LLAMA3
    )
    config = from_hf(source)
    assert dataclasses.asdict(config.rope_scaling) == {k: v for k, v in LLAMA3.items() if k != 'rope_type'}
    assert transformers.LlamaConfig(**copy.deepcopy(source)).rope_parameters == LLAMA3 | {'rope_theta': 500000.0}
    plain, factor = layers.inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    found, same = layers.inverse_frequencies(config)
    ratio = plain / found
    assert (factor, same, found.dtype) == (1.0, 1.0, np.float32)
    # Turns in 8,192 positions: above 4 nothing changes, below 1 all is slowed 32 times.
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1.0)
    np.testing.assert_allclose(ratio[turns < 1], 32.0, rtol=1e-6)
    between = ratio[(turns >= 1) & (turns <= 4)]
    assert len(between) > 0 and ((between > 1) & (between < 32)).all()


GOOD = raw('Qwen2', 100, 32, 48, 2, 4, 2)
SHARED = Path(__file__).parents[3] / 'shared/cases/turn2/model_configs.jsonl'
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8192}
FIVE = {'rope_theta': 5e6}


@pytest.mark.parametrize(
    'change, theta, factor',
    [
        ({}, 1e6, None),
        ({'rope_scaling': FIVE | {'rope_type': 'default'}}, 5e6, None),
        ({'rope_scaling': FIVE}, 5e6, None),
        ({'rope_scaling': YARN}, 1e6, 4.0),
        ({'rope_scaling': YARN | FIVE}, 5e6, 4.0),
        ({'rope_scaling': YARN | FIVE, 'rope_theta': None}, 5e6, 4.0),
        ({'rope_parameters': FIVE}, 5e6, None),
        ({'rope_parameters': YARN | FIVE, 'rope_theta': None}, 5e6, 4.0),
        ({'rope_parameters': FIVE, 'rope_scaling': YARN | {'rope_theta': 7e6}}, 7e6, 4.0),
        ({'rope_parameters': YARN | FIVE, 'rope_scaling': None}, 5e6, 4.0),
        ({'rope_parameters': {'full_attention': YARN | FIVE}, 'layer_types': ['full_attention'] * 2}, 5e6, 4.0),
        ({'rope_theta': None}, 1e4, None),
    ],
)
def test_the_base_frequency_is_found_where_transformers_finds_it(change, theta, factor):
    transformers = pytest.importorskip('transformers')
    config = from_hf(GOOD | change)
    assert (config.rope_theta, config.rope_scaling and config.rope_scaling.factor) == (theta, factor)
    given = {key: value for key, value in copy.deepcopy(GOOD | change).items() if value is not None}
    rope = transformers.Qwen2Config(**given).rope_parameters
    rope = rope.get('full_attention', rope)
    assert (rope['rope_theta'], rope.get('factor')) == (theta, factor)


@pytest.mark.skipif(not SHARED.is_file(), reason='the configurations that people met are not there')
def test_configurations_that_people_met_are_read_as_transformers_reads_them():
    for line in SHARED.read_text().splitlines():
        case = json.loads(line)
        config = from_hf(case['config'])
        assert config.rope_theta == case['rope_theta'], case['name']
        assert (config.rope_scaling and config.rope_scaling.factor) == case['yarn_factor'], case['name']


def test_the_context_is_what_the_weights_or_yarn_reach():
    reach = lambda **change: from_hf(GOOD | change).context
    assert reach(max_position_embeddings=4096) == 4096
    assert reach(max_position_embeddings=8192, rope_scaling=YARN) == 32768
    assert reach(max_position_embeddings=131072, rope_scaling=YARN) == 131072
    llama3 = {
        'rope_type': 'llama3',
        'factor': 32.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192,
    }
    assert reach(max_position_embeddings=131072, rope_scaling=llama3) == 131072


@pytest.mark.parametrize(
    'change, message',
    [
        ({'architectures': ['MistralForCausalLM']}, 'architecture MistralForCausalLM is not supported'),
        ({'architectures': ['Qwen3MoeForCausalLM']}, 'architecture Qwen3MoeForCausalLM is not supported'),
        ({'architectures': None, 'model_type': 'gemma3'}, 'architecture gemma3 is not supported'),
        ({'hidden_act': 'gelu'}, 'hidden_act gelu is not supported'),
        ({'use_sliding_window': True}, 'use_sliding_window is true'),
        ({'attention_bias': False}, 'attention_bias False is not supported for Qwen2ForCausalLM'),
        ({'mlp_bias': True}, 'mlp_bias True is not supported for Qwen2ForCausalLM'),
        ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types holds sliding_attention'),
        ({'partial_rotary_factor': 0.5}, 'rope_scaling partial_rotary_factor=0.5 is not supported'),
        ({'rope_scaling': 'yarn'}, "rope_scaling='yarn' is not supported"),
        ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'rope_scaling type linear is not supported'),
        ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 'rope_scaling type dynamic is not supported'),
        ({'rope_scaling': LLAMA3 | {'high_freq_factor': None}}, 'rope_scaling high_freq_factor=0.0; type llama3 needs'),
        ({'rope_scaling': LLAMA3 | {'high_freq_factor': 1.0}}, 'low_freq_factor=1.0 is not below high_freq_factor=1.0'),
        ({'rope_scaling': {'type': 'yarn', 'factor': 2.0, 'mscale': 0.7}}, 'rope_scaling mscale=0.7 is not supported'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=f'^model/config.json: .*{message}'):
        from_hf(GOOD | change, 'model/config.json')


def test_a_missing_field_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match='field hidden_size is missing'):
        from_hf({k: v for k, v in GOOD.items() if k != 'hidden_size'})
    with pytest.raises(ValueError, match='holds no config.json; give a Hugging Face model directory'):
        load_config(tmp_path)
    (tmp_path / 'config.json').write_text('[]')
    with pytest.raises(ValueError, match='config.json holds no object with fields'):
        load_config(tmp_path)
    (tmp_path / 'config.json').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n')
    with pytest.raises(ValueError, match=r'config\.json is a pointer of Git LFS'):
        load_config(tmp_path)
