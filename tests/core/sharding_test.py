"""How devices of several slices come to lie in a mesh; those of TPUs are made up, with their places in the torus."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What JAX's meshes ask of a chip."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    platform: str = 'tpu'
    device_kind: str = 'TPU v5'
    core_on_chip: int = 0


def slices(count: int, *torus: int) -> list[Tpu]:
    """So many slices of v5p, in JAX's order: x goes fastest."""
    places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(torus)))]
    return [
        Tpu(s * len(places) + i, place, s, (s * len(places) + i) // 4)
        for s in range(count)
        for i, place in enumerate(places)
    ]


def tensor_groups(laid: np.ndarray) -> set[tuple[int, ...]]:
    """Slices that each group of the last two axes lies in."""
    return {tuple(sorted({chip.slice_index for chip in part.ravel()})) for part in laid}


@pytest.mark.parametrize('asked', [2, 0])
@pytest.mark.parametrize('data', [2, 4])
def test_the_data_axis_runs_over_the_slices_and_the_others_stay_in_one(asked, data):
    chips = slices(2, 2, 2, 4)
    laid = sharding.lay_out((data, 16 // data, 2), chips, asked)
    assert laid.shape == (data, 16 // data, 2) and {chip.id for chip in laid.ravel()} == set(range(32))
    assert tensor_groups(laid) == {(0,), (1,)}
    assert [part[0, 0].slice_index for part in laid] == sorted([0, 1] * (data // 2))
    # Every slice is laid out as one alone is.
    alone = sharding.lay_out((data // 2, 16 // data, 2), slices(1, 2, 2, 4), 1)
    for part in np.split(laid, 2):
        assert [chip.coords for chip in part.ravel()] == [chip.coords for chip in alone.ravel()]


def test_slices_in_any_order_are_told_apart_by_their_number():
    chips = slices(3, 2, 2, 1)
    np.random.default_rng(0).shuffle(chips)
    assert tensor_groups(sharding.lay_out((3, 2, 2), chips, 3)) == {(0,), (1,), (2,)}


@pytest.mark.parametrize(
    ('sizes', 'asked', 'words'),
    [
        ((1, 8, 4), 2, 'mesh.data=1 runs over 2 slices; set it to a multiple of 2'),
        ((1, 8, 4), 0, 'mesh.data=1 runs over 2 slices; set it to a multiple of 2'),
        ((2, 4, 4), 4, 'mesh.slices=4: the devices are of 2 slice(s); 0 takes as many as there are'),
        ((2, 4, 4), 1, 'mesh.slices=1: the devices are of 2 slice(s); 0 takes as many as there are'),
    ],
)
def test_slices_that_do_not_fit_are_refused_with_one_line(sizes, asked, words):
    with pytest.raises(UserError) as refused:
        sharding.lay_out(sizes, slices(2, 2, 2, 4), asked)
    assert str(refused.value) == words


def test_devices_without_slices_are_one():
    shape = {'data': 2, 'fsdp': -1, 'tensor': 2}
    for asked in ({}, {'slices': 1}, {'slices': 0}):
        mesh = sharding.make_mesh(shape | asked)
        assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
        assert mesh.devices.ravel().tolist() == jax.devices()
    with pytest.raises(UserError, match=r'^mesh\.slices=2: the devices are of 1 slice'):
        sharding.make_mesh(shape | {'slices': 2})
