"""The numbers of whole episodes in arrays, and what goes between processes in parts, those arrays as they lie.

A token's id, author, logprob and version are 98 bytes in Python's lists, 13 in arrays. Lists grow, so an episode has
them while it is written.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retool_jax.core.records import Episode

DTYPES = {'tokens': np.int32, 'acted': np.bool_, 'logprobs': np.float64, 'versions': np.int32}
ALIGNED = 16  # bytes, where a part of a message begins


class Column(Sequence):
    """Numbers [N] that read like a list of Python's; numpy takes the array itself, without a copy."""

    __slots__ = ('array',)

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index):
        return self.array[index].tolist()

    def __iter__(self) -> Iterator:
        return iter(self.array.tolist())

    def __eq__(self, other) -> bool:
        if isinstance(other, Column):
            return np.array_equal(self.array, other.array)
        return self.array.tolist() == other if isinstance(other, list) else NotImplemented

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.array, dtype=dtype, copy=copy)

    def __reduce__(self):
        return Column, (self.array,)

    def __repr__(self) -> str:
        return f'Column({self.array!r})'


def settle(episode: Episode) -> None:
    """Turns the lists of an episode that nobody writes on into columns; those that are columns stay."""
    for name, dtype in DTYPES.items():
        if not isinstance(values := getattr(episode, name), Column):
            array = np.asarray(values, dtype)
            setattr(episode, name, Column(narrow(array) if name == 'logprobs' else array))


def narrow(x: np.ndarray) -> np.ndarray:
    """`x` in f32 where that holds the same numbers: a sampler computes logprobs in f32."""
    found = x.astype(np.float32, copy=False)
    return found if found is x or np.array_equal(found, x, equal_nan=True) else x


def split(item: Any) -> list[memoryview]:
    """Any item in parts, which end to end are a message that `join` reads; its arrays are parts as they lie, uncopied.

    The message: int64 number of parts and bytes of each, what pickle makes of the item, its arrays; each filled up to
    a multiple of ALIGNED.
    """
    arrays: list[memoryview] = []
    rest = pickle.dumps(item, protocol=5, buffer_callback=lambda array: arrays.append(array.raw()))
    parts = [memoryview(rest), *arrays]
    sizes = np.array([len(parts), *(part.nbytes for part in parts)], np.int64)
    found = []
    for part in (memoryview(sizes).cast('B'), *parts):
        found += [part, memoryview(bytes(-part.nbytes % ALIGNED))]
    return found


def join(message: memoryview) -> Any:
    """The item of a message; its arrays lie in the message's own memory."""
    count = int(np.frombuffer(message, np.int64, 1)[0])
    sizes = np.frombuffer(message, np.int64, count, offset=8).tolist()
    parts, start = [], 8 * (count + 1)
    for size in sizes:
        start += -start % ALIGNED
        parts.append(message[start : start + size])
        start += size
    return pickle.loads(parts[0], buffers=parts[1:])
