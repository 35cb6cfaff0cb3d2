"""Matmul work of a traced function: every scan by its length, every device of a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.extend import core

from retool_jax.model import decoding

# Matmuls of cuDNN's attention: scores and mixed values; backwards scores again and four gradients.
CUDNN = {'dot_product_attention_fwd_wrapper': 2, 'dot_product_attention_bwd_wrapper': 5}
DECODING = {decoding.TRITON: 2, decoding.PAGED: 1}  # kernels, and which operand the keys are; before it, the queries
SPLASH = 'splash'  # begins the names of JAX's kernels of splash attention, forwards and backwards


def count(jaxpr, trips: int = 1) -> float:
    """Multiply-adds × 2 of all matmuls, of all devices together.

    trips: iterations of while loops, which have no length. A branch counts as its costliest side, a kernel
    (`pallas_call`) as grid × body; of splash attention's grids, which are causal here, the blocks above the diagonal
    are left out. A kernel of decoding counts as if every slot that it is given held a token.
    """
    return _walk(jaxpr, trips, _matmul_flops)


def traffic(jaxpr, trips: int = 1) -> float:
    """Bytes of the operands and results of all matmuls, of cuDNN's attention and of decoding's kernels, and twice those
    of what is gathered, of all devices together. What is widened from 8 bits for a matmul is read in 8 bits."""
    return _walk(jaxpr, trips, _bytes)


@dataclasses.dataclass(frozen=True)
class ByLength:
    """What decoding's kernels do, which read only the slots of a row that hold tokens, where all of them do."""

    tile: int  # slots that are read together; 0: there is no such kernel
    flops: float
    moved: float  # bytes of keys and values


def by_length(jaxpr, trips: int = 1) -> ByLength:
    """Of a traced function, of all devices together."""
    tiles = [0]

    def of_kernel(eqn, measure) -> float:
        if _name(eqn) not in DECODING:
            return 0.0
        tiles.append(decoding.TILE if _name(eqn) == decoding.TRITON else _cache(eqn).shape[2])
        return measure(eqn)

    twice = lambda eqn: 2.0 * math.prod(_cache(eqn).shape) * _cache(eqn).dtype.itemsize
    flops = _walk(jaxpr, trips, lambda eqn, _: of_kernel(eqn, lambda eqn: _matmul_flops(eqn, None)))
    return ByLength(max(tiles), flops, _walk(jaxpr, trips, lambda eqn, _: of_kernel(eqn, twice)))


def _cache(eqn):
    """The keys that a kernel of decoding is given: [B, K, S, H], or pages of them, [1, B·K·S ÷ page, page, H]."""
    return eqn.invars[DECODING[_name(eqn)]].aval


def _name(eqn) -> str:
    """Of a primitive; of a kernel, and of a function that is traced apart, its own."""
    return eqn.params['name'] or '' if eqn.primitive.name in ('pallas_call', 'jit') else eqn.primitive.name


def _bytes(eqn, narrow: dict) -> float:
    """narrow: what lies there in 8 bits, by the id of the variable that holds it in more."""
    size = lambda v: float(math.prod(v.aval.shape)) * getattr(v.aval.dtype, 'itemsize', 0)
    if eqn.primitive.name == 'gather':  # read where it lay, written side by side
        return 2 * size(eqn.outvars[0])
    return sum(size(narrow.get(id(v), v)) for v in (*eqn.invars, *eqn.outvars))


def _matmul_flops(eqn, _) -> float:
    name = _name(eqn)
    if name == 'gather':
        return 0.0
    if name in CUDNN:  # causal: half of the square
        b, t, n, h = eqn.invars[0].aval.shape
        return CUDNN[name] * 2.0 * b * n * h * t * t / 2
    if name in DECODING:  # scores and mixed values
        group = eqn.invars[DECODING[name] - 1].aval.shape[-2]
        return 2 * 2.0 * math.prod(_cache(eqn).shape) * decoding.padded(group, name)
    (contract, _), _ = eqn.params['dimension_numbers']
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contract)


def _walk(jaxpr, trips: int, cost: Callable) -> float:
    """`cost` of every matmul, gather and fused attention, times how often it runs."""
    total, narrow = 0.0, {}
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ('dot_general', 'gather') or name in CUDNN or _name(eqn) in DECODING:
            total += cost(eqn, narrow)
        elif name == 'convert_element_type' and eqn.invars[0].aval.dtype == jnp.int8:
            narrow[id(eqn.outvars[0])] = eqn.invars[0]
        elif name == 'scan':
            total += params['length'] * _walk(params['jaxpr'], trips, cost)
        elif name == 'while':
            total += trips * (_walk(params['body_jaxpr'], trips, cost) + _walk(params['cond_jaxpr'], trips, cost))
        elif name == 'cond':
            total += max(_walk(branch, trips, cost) for branch in params['branches'])
        elif name == 'shard_map':  # the body is one device's, along those axes
            axes = params['newly_manual_axes' if 'newly_manual_axes' in params else 'manual_axes']  # from JAX 0.12 on
            ways = math.prod(params['mesh'].shape[axis] for axis in axes)
            total += ways * _walk(params['jaxpr'], trips, cost)
        elif name == 'pallas_call':
            grid = params['grid_mapping'].grid
            total += math.prod(grid) * _share(_name(eqn), grid) * _walk(params['jaxpr'], trips, cost)
        else:
            total += sum(_walk(inner, trips, cost) for inner in _inner(params))
    return total


def _share(name: str, grid: tuple[int, ...]) -> float:
    """Share of a kernel's grid that computes anything.

    The last axis of splash attention's grids counts blocks, of keys in (heads, queries, keys) and of queries in (keys,
    heads, queries), the gradient of keys and values; elsewhere in the grid are as many of the others.
    """
    blocks = grid[-1] if grid else 1
    causal = name.startswith(SPLASH) and grid.count(blocks) > 1
    return (blocks + 1) / (2 * blocks) if causal else 1.0


def _inner(params: dict):
    for value in params.values():
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from (v for v in value if isinstance(v, core.Jaxpr | core.ClosedJaxpr))
