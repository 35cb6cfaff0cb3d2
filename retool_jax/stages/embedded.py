"""The embedded model: tiny sizes, a tokenizer made from the embedded task's own traces, first weights."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.core.pytrees import Params
from retool_jax.model import decoder
from retool_jax.model.config import TINY, ModelConfig, to_hf
from retool_jax.tasks import arithmetic
from retool_jax.text.template import wrap_feedback, wrap_snippet
from retool_jax.text.tokenizer import train_bpe

CORPUS = 1500  # traces that the tokenizer is trained on
VOCAB_SIZE = 640  # BPE entries, special tokens among them: a word of the task is one id
# Last lines of what Python says to the mistakes in the traces.
ERRORS = (
    "NameError: name 'math' is not defined",
    "SyntaxError: '(' was never closed",
    'SyntaxError: invalid syntax',
    "TypeError: int() can't convert non-string with explicit base",
    "AttributeError: module 'math' has no attribute 'binom'",
)
PREVIOUS_HEADS, PREVIOUS_PAIRS, PREVIOUS_GAIN = 1, 3, 5.0  # heads, rotary pairs, size of the biases in `init`
EMBED_GAIN, VALUE_GAIN, MATCH_GAIN = 3.0, 0.5, 1.0  # of the embedding and the orthogonal matrices in `init`


def write_model(directory: Path) -> None:
    """Writes config.json and the tokenizer of the embedded model, always the same; there are no weights."""
    rng = random.Random('corpus')
    corpus = ['user\n', 'assistant\n', *map(wrap_feedback, ERRORS)] * (CORPUS // 10)
    for problem in arithmetic.problems('train', CORPUS, seed=0):
        corpus += [problem.question, '']
        # In the segments in which they are encoded, so that no id is learnt that crosses their ends.
        for kind, text in arithmetic.trace(problem, rng.choice(('mental', 'code', 'repair')), seed=0).parts:
            corpus[-1] += wrap_snippet(text) if kind == 'code' else text
            if kind == 'code':
                corpus += [wrap_feedback(problem.answer), '']
    directory.mkdir(parents=True, exist_ok=True)
    train_bpe(corpus, VOCAB_SIZE, directory)
    sizes = dataclasses.replace(TINY, vocab_size=VOCAB_SIZE)
    (directory / 'config.json').write_text(json.dumps(to_hf(sizes), indent=2))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random f32 parameters whose attention begins by copying.

    In every layer value and output projections are transposes of one random orthogonal matrix, and so
    are, but for noise, query and key: a head attends to tokens like its own and passes them on. One head
    of layer 0 leans towards the token before. Training leads there in any case, later: after 150 steps
    on two families an operand's digit cost 2.2 nats, chance, from plain random weights and 1.6 from these
    projections. After "Mimetic Initialization of Self-Attention
    Layers" (arXiv 2305.09828). Needs as many KV heads as heads, and heads × head_dim = D.

    Raises:
      ValueError: other heads than that.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads != kv_heads or heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f'the embedded model cannot begin by copying with {heads} heads, {kv_heads} KV heads, '
            f'head_dim {config.head_dim} and hidden_size {config.hidden_size}: heads must equal KV heads, '
            'and heads × head_dim hidden_size'
        )
    params = decoder.init(config, key)
    params['embed_tokens']['weight'] *= EMBED_GAIN
    attention = params['layers']['self_attn']
    weight = lambda name: attention[name]['weight']
    keys = jax.random.split(jax.random.fold_in(key, 1), 2 * config.num_hidden_layers)
    pairs = jax.vmap(lambda k: jax.random.orthogonal(k, config.hidden_size))(keys)
    mixed, matched = jnp.split(pairs, 2)
    for name, matrix in (('v_proj', VALUE_GAIN * mixed), ('o_proj', VALUE_GAIN * mixed.swapaxes(1, 2))):
        attention[name]['weight'] = matrix.reshape(weight(name).shape)
    for name in ('q_proj', 'k_proj'):
        attention[name]['weight'] = weight(name) + MATCH_GAIN * matched.reshape(weight(name).shape)
    # Query and key biases of layer 0 that agree most when the key stands one position back.
    pairs, half = PREVIOUS_PAIRS, config.head_dim // 2
    angle = config.rope_theta ** (-np.arange(pairs) / half)
    query, back = np.zeros((2, config.head_dim), np.float32)
    query[:pairs] = PREVIOUS_GAIN
    back[:pairs], back[half : half + pairs] = PREVIOUS_GAIN * np.cos(angle), PREVIOUS_GAIN * np.sin(angle)
    for name, bias in (('q_proj', query), ('k_proj', back)):
        attention[name]['bias'] = attention[name]['bias'].at[0, :PREVIOUS_HEADS].set(bias)
    return params
