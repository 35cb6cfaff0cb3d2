"""Public signatures say their shapes, and the shapes are true."""

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

from tests.algo import slow
from tests.algo.settings_test import loss_settings

MODULES = ('advantages', 'aggregation', 'correction', 'groups', 'losses', 'segments')


def public(module: str):
    """Functions of a module, by name."""
    module = importlib.import_module(f'retool_jax.algo.{module}')
    functions = inspect.getmembers(module, inspect.isfunction)
    return {n: f for n, f in functions if f.__module__ == module.__name__ and not n.startswith('_')}


FUNCTIONS = {f'{m}.{name}': f for m in MODULES for name, f in public(m).items()}


def checked(name: str):
    """The function with its annotations resolved and enforced, arrays of numpy and JAX alike."""
    function = FUNCTIONS[name]
    names = {x: getattr(jaxtyping, x) for x in ('Bool', 'Float', 'Int', 'Num')}
    names['Array'] = jax.Array | np.ndarray
    hints = typing.get_type_hints(function, localns=names)
    copy = type(function)(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, hints
    return jaxtyped(copy, typechecker=beartype)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_every_public_function_is_documented_and_annotated_throughout(name):
    function = FUNCTIONS[name]
    assert inspect.getdoc(function).splitlines()[0].endswith(('.', ':', ','))
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    checked(name)  # every name in the annotations resolves


def test_the_shapes_of_a_packed_batch_pass_and_wrong_ones_are_caught():
    x = slow.arrangements(slow.tales(0))['packed']
    row = (x.acted, x.segment_ids)
    n = x.update.shape[1]
    checked('advantages.gae')(x.reward, x.old_value, x.acted, 0.9, 0.8, x.segment_ids)
    checked('advantages.reward_on_last_acted')(x.score, *row)
    checked('advantages.whiten')(x.value, x.acted)
    checked('advantages.explained_variance')(x.value, x.returns, x.acted)
    checked('groups.group_advantages')('grpo', x.score.ravel(), x.group.ravel(), x.baseline.ravel(), 3)
    checked('groups.episode_masks')(x.baseline, x.update, x.update, drop_void=True, mask_truncated=True)
    checked('segments.in_update')(x.acted, x.update, x.segment_ids)
    checked('segments.sequence_mean')(x.value, *row, n)
    total = checked('aggregation.denominator')('token-mean', *row, n)
    checked('aggregation.aggregate')(x.value, *row, n, 'token-mean', total)
    settings = loss_settings(kl_coef=0.1)
    checked('losses.policy_loss')(settings, x.logprob, x.old, x.advantage, *row, n)
    checked('losses.value_loss')(x.value, x.old_value, x.returns, x.acted, 0.2)
    checked('losses.kl')('k3', x.logprob, x.reference, x.acted)
    checked('correction.correction')(settings, x.old, x.sampler, *row, n)
    loss, _ = checked('losses.actor_loss')(
        settings,
        logprob_BT=x.logprob,
        entropy_BT=x.entropy,
        old_logprob_BT=x.old,
        sampler_logprob_BT=x.sampler,
        advantage_BT=x.advantage,
        mask_BT=x.acted,
        segment_ids_BT=x.segment_ids,
        num_segments=n,
        denominator=total,
        reference_logprob_BT=x.reference,
    )
    assert loss.shape == ()
    for wrong in (x.old_value[:, 1:], x.old_value[0], x.acted):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked('advantages.gae')(x.reward, wrong, x.acted, 0.9, 0.8, x.segment_ids)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked('losses.kl')('k3', x.logprob, jnp.zeros((2, 2)), x.acted)
