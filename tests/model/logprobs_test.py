"""Log-probabilities and entropies in pieces equal those of the whole distribution in float64."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.model.logprobs import score, token_logprobs
from retool_jax.plan import flops

B, T, D, V = 2, 12, 8, 50
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
HEAD = RNG.normal(size=(D, V)).astype(np.float32)
UNTIED, TIED = {'lm_head': {'weight': HEAD}}, {'embed_tokens': {'weight': HEAD.T}}


def reference(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    z = HIDDEN.astype(np.float64) @ HEAD.astype(np.float64) / temperature
    z -= z.max(axis=-1, keepdims=True)
    logp_BTV = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    logprob, entropy = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(1, T):
            logprob[b, t] = logp_BTV[b, t - 1, TOKENS[b, t]]
            entropy[b, t] = -(np.exp(logp_BTV[b, t - 1]) * logp_BTV[b, t - 1]).sum()
    return logprob, entropy


@pytest.mark.parametrize('temperature', [1.0, 0.6])
@pytest.mark.parametrize('chunk', [1, 4, 12, 256])
@pytest.mark.parametrize('params', [UNTIED, TIED], ids=['untied', 'tied'])
def test_pieces_of_any_length_give_the_float64_reference(params, chunk, temperature):
    run = jax.jit(functools.partial(token_logprobs, temperature=temperature, chunk=chunk))
    for found, expected in zip(run(params, HIDDEN, TOKENS), reference(temperature)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize('vocab_chunk', [13, 25, 49])
@pytest.mark.parametrize('tensor', [1, 2])
def test_pieces_of_the_vocabulary_on_any_part_of_a_mesh_give_values_and_gradients_of_the_whole(tensor, vocab_chunk):
    def loss(head, hidden, **kwargs):
        found = token_logprobs({'lm_head': {'weight': head}}, hidden, TOKENS, chunk=4, temperature=0.6, **kwargs)
        return found[0].sum() + 0.3 * found[1].sum(), found

    run = lambda **kwargs: jax.jit(jax.value_and_grad(functools.partial(loss, **kwargs), (0, 1), has_aux=True))
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': tensor}, jax.devices()[: 2 * tensor])
    place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = run(vocab_chunk=vocab_chunk)(place(HEAD, 'fsdp', 'tensor'), place(HIDDEN, 'fsdp'))
    expected = run()(HEAD, HIDDEN)
    for a, b in zip(*map(jax.tree.leaves, (found, expected))):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('tensor', [1, 2])
def test_only_wanted_tokens_have_numbers_and_gradients_and_chunks_without_any_are_not_computed(tensor):
    wanted = RNG.random((B, T)) < 0.4
    read = np.roll(wanted & (np.arange(T) > 0), -1, axis=1)  # hidden states that predict a wanted token

    def loss(head, hidden, **kwargs):
        found = token_logprobs({'lm_head': {'weight': head}}, hidden, TOKENS, chunk=1, **kwargs)
        return sum(jnp.where(wanted, x, 0.0).sum() for x in found), found

    run = lambda **kwargs: jax.jit(jax.value_and_grad(functools.partial(loss, **kwargs), (0, 1), has_aux=True))
    (_, numbers), gradients = run(vocab_chunk=13)(HEAD, HIDDEN)
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': tensor}, jax.devices()[: 2 * tensor])
    place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
    # A device has one row of two here, so that chunks hold one position each, and any that were computed would show.
    hidden = np.where(read[..., None], HIDDEN, np.nan).astype(np.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (_, found), slopes = run(vocab_chunk=13, wanted_BT=wanted)(place(HEAD, 'fsdp', 'tensor'), place(hidden, 'fsdp'))
    for a, b in zip(found, numbers):
        np.testing.assert_allclose(a, np.where(wanted, b, 0.0), atol=1e-5)
    for a, b in zip(slopes, gradients):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradients_are_those_of_log_softmax():
    def plain(head, hidden):
        logp = jax.nn.log_softmax(hidden @ head)
        entropy = -(jnp.exp(logp) * logp).sum(-1)
        taken = jnp.take_along_axis(logp[:, :-1], TOKENS[:, 1:, None], axis=-1)
        return taken.sum() + 0.3 * entropy[:, :-1].sum()

    def pieces(head, hidden):
        logprob, entropy = token_logprobs({'lm_head': {'weight': head}}, hidden, TOKENS, chunk=4)
        return logprob.sum() + 0.3 * entropy.sum()

    for a, b in zip(jax.jit(jax.grad(pieces, (0, 1)))(HEAD, HIDDEN), jax.jit(jax.grad(plain, (0, 1)))(HEAD, HIDDEN)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_each_pass_makes_its_matmuls_once_in_the_dtype_of_the_hidden_states_and_a_frozen_head_none(dtype):
    def loss(head, hidden, **kwargs):
        return token_logprobs({'lm_head': {'weight': head}}, hidden, TOKENS, chunk=4, vocab_chunk=25)[0].sum()

    trace = lambda argnums: jax.make_jaxpr(jax.grad(loss, argnums))(HEAD, HIDDEN.astype(dtype))
    one = 2 * B * T * D * 2 * 25  # two pieces of the vocabulary
    assert flops.count(trace((0, 1))) == 4 * one  # forwards, logits again, both gradients
    assert flops.count(trace(1)) == 3 * one
    operands = {v.aval.dtype for eqn in matmuls(trace((0, 1)).jaxpr) for v in eqn.invars}
    assert operands == {jnp.dtype(dtype)}


def matmuls(jaxpr):
    for eqn in jaxpr.eqns:
        yield from [eqn] if eqn.primitive.name == 'dot_general' else []
        for inner in flops._inner(eqn.params):
            yield from matmuls(getattr(inner, 'jaxpr', inner))


def test_no_array_of_all_positions_times_the_vocabulary_exists():
    loss = lambda params, hidden: sum(
        x.sum() for x in token_logprobs(params, hidden, tokens, chunk=16, vocab_chunk=512)
    )
    tokens = np.zeros((2, 512), np.int32)
    shape = jax.ShapeDtypeStruct((2, 512, D), jnp.float32)
    head = {'lm_head': {'weight': jax.ShapeDtypeStruct((D, 4096), jnp.float32)}}
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(head, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 512 * 4096 * 4 / 8
    sizes = [math.prod(map(int, dims.split(','))) for dims in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())]
    assert max(sizes) < 2 * 512 * 4096 / 8  # all rows × a piece of the vocabulary would be that much


def test_logits_of_any_size_do_not_overflow():
    logits = jnp.array([[1e30, 0.0, -1e30], [88.0, 89.0, 90.0], [-1e4, -1e4, -1e4]])
    logprob, entropy = score(logits, jnp.array([0, 2, 1]))
    np.testing.assert_allclose(logprob, [0.0, -0.40760597, -np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [0.0, 0.8323955, np.log(3)], rtol=1e-6)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match='length 12 is not a multiple of the logprob chunk 5'):
        token_logprobs(UNTIED, HIDDEN, TOKENS, chunk=5)
