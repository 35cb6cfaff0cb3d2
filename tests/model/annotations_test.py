"""Public functions over arrays say their shapes, and the shapes are true."""

from __future__ import annotations

import importlib
import inspect
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from retool_jax.model import decoder, kv_cache
from tests.model.sizes import make_config, make_params, make_tokens

MODULES = ('attention', 'decoder', 'kernels', 'layers', 'logprobs')
CONFIG = make_config('qwen2')


def over_arrays(module: str):
    """Public functions of a module that annotate an array, by name."""
    module = importlib.import_module(f'retool_jax.model.{module}')
    return {
        name: f
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__
        and not name.startswith('_')
        and any('[Array' in str(a) for a in f.__annotations__.values())
    }


FUNCTIONS = {f'{m}.{name}': f for m in MODULES for name, f in over_arrays(m).items()}


def checked(name: str):
    """The function with its annotations resolved and enforced, arrays of numpy and JAX alike."""
    function = FUNCTIONS[name]
    names = {x: getattr(jaxtyping, x) for x in ('Bool', 'Float', 'Int')} | {'Array': jax.Array | np.ndarray}
    hints = typing.get_type_hints(function, localns=names)
    copy = type(function)(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, hints
    return jaxtyped(copy, typechecker=beartype)


def test_every_function_that_computes_is_among_them():
    assert set(FUNCTIONS) >= {
        'attention.dense',
        'attention.blocked',
        'attention.cached',
        'kernels.splash',
        'kernels.cudnn',
        'layers.rope_table',
        'layers.rotate',
        'logprobs.token_logprobs',
        'logprobs.score',
        'decoder.forward',
        'decoder.extend',
        'decoder.unembed',
    }


@pytest.mark.parametrize('name', FUNCTIONS)
def test_each_is_documented_and_annotated_throughout(name):
    function = FUNCTIONS[name]
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty or p.name == 'dtype' for p in signature.parameters.values())
    checked(name)  # every name in the annotations resolves


def test_true_shapes_pass():
    params = jax.eval_shape(lambda: make_params(CONFIG))
    tokens = make_tokens(CONFIG, 2, 8)
    place = np.tile(np.arange(8, dtype=np.int32), (2, 1))

    def full(params):
        hidden = checked('decoder.forward')(CONFIG, params, tokens, place, np.ones_like(tokens), attend='dense')
        return checked('logprobs.token_logprobs')(params, hidden, tokens, chunk=4, vocab_chunk=40)

    def cached(params):
        cache = kv_cache.empty(CONFIG, 2, 16)
        hidden, cache = checked('decoder.extend')(
            CONFIG, decoder.to_sampling(CONFIG, params), cache, tokens, np.full(2, 8, np.int32), 16
        )
        return checked('decoder.unembed')(params, hidden)

    assert jax.eval_shape(full, params)[0].shape == (2, 8)
    assert jax.eval_shape(cached, params).shape == (2, 8, CONFIG.vocab_size)
    x = jax.ShapeDtypeStruct((2, 512, 4, 16), jnp.float32)
    for name in ('attention.dense', 'attention.blocked'):
        out = jax.eval_shape(checked(name), x, x, x, jax.ShapeDtypeStruct((2, 512), jnp.int32))
        assert out.shape == x.shape


def test_false_shapes_are_caught():
    x, ids = jnp.zeros((2, 8, 4, 16)), jnp.ones((2, 8), jnp.int32)
    for wrong in (x[:, 1:], x[0], x.astype(jnp.int32)):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked('attention.dense')(x, wrong, x, ids)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked('logprobs.score')(jnp.zeros((2, 8, 5)), ids[:, 1:])
