"""Where the tensors of a directory of safetensors files lie; their numbers stay on disk, or in a store.

The format: 8 bytes with the length of a JSON header, the header, raw data. A broken file is named here, before
anything is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from retool_jax.core import pointers, storage
from retool_jax.core.errors import UserError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, in which file."""

    file: Path  # or of a store (storage.path)
    offset: int
    dtype: str
    shape: tuple[int, ...]


def read_headers(directory: Path) -> dict[str, Tensor]:
    """{name: where it lies} of every tensor of a directory.

    Raises:
      UserError: naming a file that is missing, truncated or of another format.
    """
    if (directory / SINGLE).is_file():
        return _read_header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise UserError(
            f'model.path: {directory} holds neither {SINGLE} nor {INDEX}; download the weights '
            '(other formats must be converted to safetensors)'
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(_read_index(directory / INDEX).values())):
        if not (directory / name).is_file():
            raise UserError(f'model.path: {directory / name} is missing, {INDEX} lists it; download it again')
        tensors |= _read_header(directory / name)
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    """{tensor: file} of an index."""
    pointers.refuse(file)
    try:
        found = json.loads(file.read_text())['weight_map']
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'model.path: {file} holds no weight_map from tensors to files; download it again') from None
    return found


def _read_header(file: Path) -> dict[str, Tensor]:
    pointers.refuse(file)
    with file.open('rb') as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        length = struct.unpack('<Q', f.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise UserError(
                f'model.path: {file} is truncated: {size} bytes, fewer than its header needs; download it again'
            )
        try:
            header = json.loads(f.read(length))
            header.pop('__metadata__', None)
            spans = {name: entry['data_offsets'] for name, entry in header.items()}
            end = 8 + length + max((stop for _, stop in spans.values()), default=0)
            tensors = {
                name: Tensor(file, 8 + length + spans[name][0], entry['dtype'], tuple(entry['shape']))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'model.path: {file} is not a safetensors file; download it again') from None
    if size < end:
        raise UserError(f'model.path: {file} is truncated: {size} bytes of {end}; download it again')
    return tensors


def read_rows(
    tensor: Tensor, dtype: np.dtype, shape: Sequence[int], first: int, last: int
) -> tuple[np.ndarray, Callable[[], None]]:
    """Rows `first` … `last` − 1 of a tensor that is stored in `dtype`, seen as of this shape: [last − first, …].

    Of a file it is mapped, and the function let goes of the pages that were read; of a store those bytes are read.
    """
    row = math.prod(shape[1:])
    if not isinstance(tensor.file, Path):
        start, size = tensor.offset + first * row * dtype.itemsize, (last - first) * row * dtype.itemsize
        return storage.read_range(tensor.file, start, size).view(dtype).reshape(last - first, *shape[1:]), lambda: None
    with open(tensor.file, 'rb') as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flat = np.frombuffer(mapped, dtype, math.prod(tensor.shape), tensor.offset)
    return flat.reshape(shape)[first:last], lambda: mapped.madvise(mmap.MADV_DONTNEED)
