"""Weights from the trainer to the sampler: the training layout becomes the sampling layout, a layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from retool_jax.core import sharding
from retool_jax.core.pytrees import Params
from retool_jax.model import decoder
from retool_jax.model.config import ModelConfig


class Sync:
    """Called with weights in the training layout, returns them in the sampling layout and in `dtype`, or matrices in
    8 bits where `weights` says so (model.config.WEIGHTS).

    A program per layer, not one for all: that gathers every layer before it puts the first into place, and holds
    the sampling weights twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        mesh: jax.sharding.Mesh | None = None,
        rules: Mapping[str, tuple[str, ...]] = sharding.SAMPLE_RULES,
        weights: str = 'float',
    ):
        """mesh, rules: where the result lies, and how; without a mesh it stays where the weights are."""
        self.layers = range(config.num_hidden_layers)
        layer = ends = None
        if mesh is not None:
            ends = shardings(config, mesh, rules, weights)
            layer = ends.pop('layers')[0]
        form = dict(dtype=jnp.dtype(dtype), weights=weights)
        self.layer = jax.jit(functools.partial(decoder.sampling_layer, **form), out_shardings=layer)
        self.ends = jax.jit(functools.partial(decoder.sampling_ends, **form), out_shardings=ends)

    def __call__(self, params: Params) -> Params:
        return self.ends(params) | {'layers': [self.layer(params['layers'], i) for i in self.layers]}


def shardings(
    config: ModelConfig, mesh: jax.sharding.Mesh, rules: Mapping[str, tuple[str, ...]], weights: str = 'float'
) -> Params:
    """Where each of the sampling weights lies on `mesh`.

    Raises: UserError where a size of the model does not divide over the mesh.
    """
    return sharding.shardings(mesh, decoder.sampling_axes(config, weights), decoder.fit_rules(config, mesh, rules))
