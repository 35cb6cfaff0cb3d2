"""Where the tensors of a directory of safetensors files lie; their numbers stay on disk.

The format: 8 bytes with the length of a JSON header, the header, raw data. A broken file is named here, before
anything is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

from retool_jax.core import pointers
from retool_jax.core.errors import UserError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, in which file."""

    file: Path
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
    size = file.stat().st_size
    with file.open('rb') as f:
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
