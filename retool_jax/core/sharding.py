"""Meshes and logical axes: words on weights and activations, mapped to mesh axes by rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from retool_jax.core.errors import UserError

type AnyMesh = Mesh | jax.sharding.AbstractMesh

AXES = ('data', 'fsdp', 'tensor')
LOGICAL = ('batch', 'seq', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'vocab', 'layers', 'rank')

# Training: weights split over both axes, activations over the batch; between layers, where they are kept
# for the backward pass, over the row's length too (a 32B's 64 layers of 18,432 tokens: 3 GiB a chip, not 11).
TRAIN_RULES: dict[str, tuple[str, ...]] = {
    'batch': ('data', 'fsdp'), 'embed': ('fsdp',), 'heads': ('tensor',), 'kv_heads': ('tensor',),
    'mlp': ('tensor',), 'vocab': ('tensor',), 'seq': ('tensor',), 'head_dim': (), 'layers': (), 'rank': (),
}  # fmt: skip
# What a training matmul reads: weights whole over fsdp.
GATHERED_RULES: dict[str, tuple[str, ...]] = TRAIN_RULES | {'embed': ()}
# Sampling: weights split over tensor alone, so that no step gathers them.
SAMPLE_RULES: dict[str, tuple[str, ...]] = TRAIN_RULES | {'embed': (), 'seq': ()}


def fill(shape: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Sizes of `AXES` for so many devices; at most one may be -1, which takes what is left.

    Raises: UserError when the sizes do not multiply to the number of devices.
    """
    sizes = [int(shape[axis]) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if any(size < 1 for size in sizes) or math.prod(sizes) != count:
        asked = ' × '.join(f'{axis}={shape[axis]}' for axis in AXES)
        raise UserError(f'mesh: {asked} does not divide {count} device(s); set one axis to -1 to take what is left')
    return tuple(sizes)


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `AXES` whose sizes `fill` completes, `lay_out` over `shape`'s slices (without them: 1)."""
    devices = list(jax.devices() if devices is None else devices)
    laid = lay_out(fill(shape, len(devices)), devices, shape.get('slices', 1))
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def lay_out(sizes: Sequence[int], devices: Sequence[jax.Device], slices: int) -> np.ndarray:
    """Devices as an array of `sizes`, its axes along the torus of a slice, the first one from slice to slice.

    slices: groups of devices that have a torus of their own, by their `slice_index`; 0: as many as there are.

    Raises: UserError where the devices are of another number of slices, or the first axis is no multiple of them.
    """
    found = len({getattr(device, 'slice_index', 0) for device in devices})
    slices = slices or found
    if slices != found and (slices > 1 or devices[0].platform == 'tpu'):  # 1: the hosts of GPUs may be told apart too
        raise UserError(f'mesh.slices={slices}: the devices are of {found} slice(s); 0 takes as many as there are')
    check_slices(sizes, slices)
    # jax.make_mesh refuses a mesh axis that is a part of an axis of the torus: tensor=4 on v6e:8x8.
    split = dict(allow_split_physical_axes=True)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    inside = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, **split)


def check_slices(sizes: Sequence[int], slices: int) -> None:
    """Raises a UserError where an axis over so many slices does not divide by them."""
    if sizes[0] % slices:
        raise UserError(f'mesh.data={sizes[0]} runs over {slices} slices; set it to a multiple of {slices}')


def spec(axes: Sequence[str | None], rules: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the words `axes`.

    Raises: ValueError for a word outside `LOGICAL`, or two dimensions on one mesh axis.
    """
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for word in axes:
        if word is not None and word not in LOGICAL:
            raise ValueError(f'logical axis {word!r} is unknown; the words are {", ".join(LOGICAL)}')
        names = rules[word] if word is not None else ()
        if used & set(names):
            raise ValueError(f'logical axes {tuple(axes)} put two dimensions on mesh axis {names}')
        used |= set(names)
        entries.append(names or None)
    return PartitionSpec(*entries)


def shardings(mesh: Mesh, axes_tree, rules: Mapping[str, tuple[str, ...]]):
    """Maps a tree of word tuples to a tree of NamedShardings."""
    is_axes = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda axes: NamedSharding(mesh, spec(axes, rules)), axes_tree, is_leaf=is_axes)


def constrain(x: jax.Array, *axes: str | None, rules: Mapping[str, tuple[str, ...]] = TRAIN_RULES) -> jax.Array:
    """`with_sharding_constraint` by words; without a mesh in scope (`jax.set_mesh`), and within a shard_map, it does
    nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules))


def gather(weight: jax.Array, dtype, *axes: str) -> jax.Array:
    """A weight as a training matmul reads it: in `dtype`, whole over fsdp; its gradient is summed and split again.

    It is stated here because the partitioner otherwise turns each product into a ring of partial products that
    reads and writes the activations once for every device of fsdp.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape['fsdp'] == 1:
        return weight.astype(dtype)
    ways = lambda word: math.prod(mesh.shape[axis] for axis in TRAIN_RULES[word])
    words = [word if size % ways(word) == 0 else None for word, size in zip(axes, weight.shape, strict=True)]
    return constrain(constrain(weight.astype(dtype), *words), *words, rules=GATHERED_RULES)
