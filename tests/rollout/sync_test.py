"""Weights in 8 bits as the sampler has them: what it records is that model's, and no call makes a wider copy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core.pytrees import Int8Weight
from retool_jax.model import decoder, int8
from retool_jax.model.layers import change_matrices
from retool_jax.model.logprobs import token_logprobs
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.sync import Sync
from retool_jax.text import template
from retool_jax.train.pack import pack
from tests.rollout.engine_test import CONFIG, SIZES, TABLE, TOKENIZER, make_engine, requests, same

NARROW = dataclasses.replace(SIZES, weights='int8')


@pytest.fixture(autouse=True)
def every_turn_is_a_snippet(monkeypatch):
    monkeypatch.setattr(template, 'extract_snippet', lambda text: template.Snippet(text, 0))


def make_sampler(config, sizes):
    return Sampler(config, sizes, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)


def rounded(params):
    """The training layout with the numbers that 8 bits stand for; its head is then tied to nothing."""
    there_and_back = lambda w, inputs: (q := int8.quantise(w, inputs)).values * q.scale
    layers = change_matrices(params['layers'], lambda w, inputs: jax.vmap(lambda w: there_and_back(w, inputs))(w))
    return params | {'layers': layers, 'lm_head': {'weight': there_and_back(decoder.head_weight(params), 1)}}


def test_recorded_logprobs_are_those_of_the_model_in_8_bits_and_replays_are_equal():
    sampler, params = make_sampler(CONFIG, NARROW), decoder.init(CONFIG, jax.random.key(0))
    weights, asked = sampler.sync(params), requests(problems=4)
    episodes = make_engine(sampler).run(weights, 0, asked, step=4)
    batch = pack(episodes, width=160, rows=1, segments=4)

    def gap(params):
        hidden = decoder.forward(CONFIG, params, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        logprob, _ = token_logprobs(params, hidden, batch.tokens_BT, chunk=160)
        return np.abs(np.asarray(logprob) - batch.sampler_logprob_BT)[batch.acted_BT]

    assert gap(rounded(params)).max() < 1e-4
    assert 1e-3 < gap(params).mean() < 0.3 and gap(params).max() > 0.01  # large weights: what loss.correction weighs
    again = make_engine(sampler, latency_s=lambda code: len(code) % 3 / 50).run(weights, 0, asked[::-1], step=4)
    assert all(same(a, b) for a, b in zip(episodes, again[::-1]))


def test_a_decode_call_holds_no_wider_copy_of_the_weights():
    """By XLA's own account: a matrix at a time may be widened, on a CPU, and never all of them before the loop."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=3, hidden_size=128, intermediate_size=512)

    def temporaries(form: str) -> int:
        sampler = make_sampler(config, dataclasses.replace(SIZES, weights=form))
        weights = jax.eval_shape(Sync(config, 'float32', weights=form), decoder.abstract_params(config))
        call = sampler._decode.lower(
            params=weights,
            table=sampler.table,
            stops=sampler.stops,
            state=jax.eval_shape(sampler.empty),
            row_R=None,
            steps=np.int32(8),
            bound=256,
            truncate=False,
        )
        return call.compile().memory_analysis().temp_size_in_bytes

    layer = decoder.abstract_params(config)['layers']
    one = sum(x.size for x in jax.tree.leaves(layer)) // config.num_hidden_layers
    assert temporaries('int8') - temporaries('float') < 4 * one


def test_the_copy_of_a_layer_takes_the_memory_of_a_layer():
    """Beside its results: its slice of the training layout, and what is rounded of it."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=3, hidden_size=128, intermediate_size=512)
    sync, params = Sync(config, 'float32', weights='int8'), decoder.abstract_params(config)
    memory = sync.layer.lower(params['layers'], jax.ShapeDtypeStruct((), jnp.int32)).compile().memory_analysis()
    one = 4 * sum(x.size for x in jax.tree.leaves(params['layers'])) // config.num_hidden_layers
    assert memory.temp_size_in_bytes < 1.5 * one
    found = jax.eval_shape(sync.layer, params['layers'], 0)
    assert memory.output_size_in_bytes < 0.3 * one
    assert all(isinstance(part[name]['weight'], Int8Weight) for part, name in (
        (found['self_attn'], 'o_proj'), (found['mlp'], 'gate_proj')
    ))  # fmt: skip
