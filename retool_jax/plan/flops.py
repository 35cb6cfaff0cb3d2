"""Matmul work of a traced function: every scan by its length, every device of a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable

from jax.extend import core

# Matmuls of cuDNN's attention: scores and mixed values; backwards scores again and four gradients.
CUDNN = {'dot_product_attention_fwd_wrapper': 2, 'dot_product_attention_bwd_wrapper': 5}


def count(jaxpr, trips: int = 1) -> float:
    """Multiply-adds × 2 of all matmuls, of all devices together.

    trips: iterations of while loops, which have no length. A branch counts as its
    costliest side, a kernel (`pallas_call`) as grid × body; where the last two sizes of the grid are equal, they
    are blocks of queries and keys of causal attention, and those above the diagonal are left out.
    """
    return _walk(jaxpr, trips, _matmul_flops)


def traffic(jaxpr, trips: int = 1) -> float:
    """Bytes of the operands and results of all matmuls, and of cuDNN's attention, of all devices together."""
    return _walk(
        jaxpr,
        trips,
        lambda eqn: sum(float(math.prod(v.aval.shape)) * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars)),
    )


def _matmul_flops(eqn) -> float:
    if eqn.primitive.name in CUDNN:  # causal: half of the square
        b, t, n, h = eqn.invars[0].aval.shape
        return CUDNN[eqn.primitive.name] * 2.0 * b * n * h * t * t / 2
    (contract, _), _ = eqn.params['dimension_numbers']
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contract)


def _walk(jaxpr, trips: int, cost: Callable) -> float:
    """`cost` of every matmul, times how often it runs."""
    total = 0.0
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == 'dot_general' or name in CUDNN:
            total += cost(eqn)
        elif name == 'scan':
            total += params['length'] * _walk(params['jaxpr'], trips, cost)
        elif name == 'while':
            total += trips * (_walk(params['body_jaxpr'], trips, cost) + _walk(params['cond_jaxpr'], trips, cost))
        elif name == 'cond':
            total += max(_walk(branch, trips, cost) for branch in params['branches'])
        elif name == 'shard_map':  # the body is one device's
            total += math.prod(params['mesh'].shape.values()) * _walk(params['jaxpr'], trips, cost)
        elif name == 'pallas_call':
            grid = params['grid_mapping'].grid
            done = math.prod(grid)
            if len(grid) > 2 and grid[-1] == grid[-2]:
                done *= (grid[-1] + 1) / (2 * grid[-1])
            total += done * _walk(params['jaxpr'], trips, cost)
        else:
            total += sum(_walk(inner, trips, cost) for inner in _inner(params))
    return total


def _inner(params: dict):
    for value in params.values():
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from (v for v in value if isinstance(v, core.Jaxpr | core.ClosedJaxpr))
