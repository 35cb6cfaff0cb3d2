"""GGUF files (llama.cpp's format) in: configuration, names and numbers as a Hugging Face directory has them.

The library `gguf` reads the header, names the tensors and turns blocks of quantised numbers into f32. A tensor is
read in parts of whole rows, so that converting holds 64 MiB of numbers beside the header, whatever the model's size.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from retool_jax.core import pointers
from retool_jax.core.errors import UserError
from retool_jax.model import hf, layers
from retool_jax.model.config import ARCHITECTURES, Llama3Scaling, ModelConfig, from_hf

KINDS = {kind: name for name, kind in ARCHITECTURES.items()}  # both call the families by one name
ROPE_FACTORS = 'rope_freqs.weight'  # Llama 3's scaling, as a divisor of each pair's frequency
LLAMA3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
BLOCK = 16 << 20  # numbers dequantised at a time: 64 MiB


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, and how its numbers are stored."""

    offset: int
    nbytes: int
    kind: int  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outputs first, as in a Hugging Face checkpoint


@dataclasses.dataclass(frozen=True)
class File:
    """A GGUF file's header; the data stay on disk."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, Tensor]


def read(path: str | os.PathLike) -> File:
    """Reads the header of a GGUF file.

    Raises: UserError for a file that is missing, broken, one of several parts, or of numbers the library cannot read.
    """
    path = Path(path)
    library = _library(path)
    if not path.is_file():
        raise UserError(f'{path} is no file; give a GGUF file')
    pointers.refuse(path)
    try:
        reader = library.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, OverflowError, TypeError) as error:  # what the library meets in broken bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f'{path} is not a whole GGUF file ({reason}); download it again') from None
    if reader.byte_order == 'S':
        raise UserError(f'{path} is of the other byte order; download the little-endian file')
    if (parts := metadata.get('split.count', 1)) > 1:
        raise UserError(f'{path} is one of {parts} parts; join them with `llama-gguf-split --merge` first')
    tensors = {
        t.name: Tensor(int(t.data_offset), int(t.n_bytes), t.tensor_type, tuple(map(int, reversed(t.shape))))
        for t in reader.tensors
    }
    for name, tensor in tensors.items():
        try:
            library.dequantize(np.zeros(library.GGML_QUANT_SIZES[tensor.kind][1], np.uint8), tensor.kind)
        except NotImplementedError:
            raise UserError(
                f'{path}: {name} is stored as {tensor.kind.name}, which the library gguf does not read; '
                'take another quantisation, such as Q8_0'
            ) from None
    return File(path, metadata, tensors)


def load_config(file: File) -> ModelConfig:
    """The configuration that the header states. Raises: UserError naming what is missing or not supported."""
    kind = file.metadata.get('general.architecture')
    if kind not in KINDS:
        raise UserError(f'{file.path}: architecture {kind} is not supported; supported are {", ".join(KINDS)}')
    get = lambda key, default=None: file.metadata.get(f'{kind}.{key}', default)
    if get('expert_count'):
        raise UserError(
            f'{file.path}: {kind}.expert_count={get("expert_count")}; mixtures of experts are not supported'
        )
    if (window := get('attention.sliding_window') or 0) and window < get('context_length', 0):
        raise UserError(f'{file.path}: {kind}.attention.sliding_window={window}; only full attention is supported')
    sizes = {
        'hidden_size': 'embedding_length',
        'intermediate_size': 'feed_forward_length',
        'num_hidden_layers': 'block_count',
        'num_attention_heads': 'attention.head_count',
        'num_key_value_heads': 'attention.head_count_kv',
        'head_dim': 'attention.key_length',
        'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
        'max_position_embeddings': 'context_length',
    }
    raw = {ours: get(theirs) for ours, theirs in sizes.items() if get(theirs) is not None}
    for name, value in raw.items():
        if isinstance(value, list):
            raise UserError(f'{file.path}: {kind}.{sizes[name]} differs from layer to layer, which is not supported')
    if 'token_embd.weight' in file.tensors:
        raw['vocab_size'] = file.tensors['token_embd.weight'].shape[0]
    has = lambda name: f'blk.0.{name}.bias' in file.tensors
    config = from_hf(
        raw
        | {
            'architectures': [KINDS[kind]],
            'rope_theta': get('rope.freq_base', 10000.0),
            'rope_scaling': _scaling(get),
            'tie_word_embeddings': 'output.weight' not in file.tensors,
            'attention_bias': kind == 'qwen2' or has('attn_q'),
            'mlp_bias': has('ffn_gate'),
        },
        str(file.path),
    )
    if (rotated := get('rope.dimension_count', config.head_dim)) != config.head_dim:
        raise UserError(
            f'{file.path}: {kind}.rope.dimension_count={rotated} of heads of {config.head_dim}; '
            'only whole heads are rotated'
        )
    if ROPE_FACTORS in file.tensors:
        config = dataclasses.replace(config, rope_scaling=_llama3(file, config))
    return config


def _scaling(get: Callable) -> dict | None:
    """Hugging Face's rope_scaling of the header's rope.scaling.* keys."""
    if get('rope.scaling.type', 'none') == 'none':
        return None
    keys = {
        'rope_type': 'type',
        'factor': 'factor',
        'original_max_position_embeddings': 'original_context_length',
        'attention_factor': 'attn_factor',
        'beta_fast': 'yarn_beta_fast',
        'beta_slow': 'yarn_beta_slow',
    }
    found = {ours: get(f'rope.scaling.{theirs}') for ours, theirs in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _llama3(file: File, config: ModelConfig) -> Llama3Scaling | None:
    """The scaling whose factors the file holds: Llama 3's own numbers but for the factor, which is the largest."""
    plain = dataclasses.replace(config, rope_scaling=None)
    found = np.concatenate(list(_values(file, ROPE_FACTORS, np.float32)))
    if (found == 1).all():
        return None
    scaling = Llama3Scaling(factor=float(found.max()), **LLAMA3)
    slowed = layers.inverse_frequencies(dataclasses.replace(plain, rope_scaling=scaling))[0]
    wanted = layers.inverse_frequencies(plain)[0] / slowed
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-3):
        raise UserError(f'{file.path}: {ROPE_FACTORS} is no scaling of Llama 3 ({LLAMA3}), and no other is supported')
    return scaling


def fetcher(file: File, config: ModelConfig, dtype) -> Callable[[hf.Leaf, int | None], Iterator[np.ndarray]]:
    """What `hf.write` asks for tensors. Raises: UserError naming tensors missing, extra or of another shape."""
    library = _library(file.path)
    names = library.get_tensor_name_map(
        next(arch for arch, name in library.MODEL_ARCH_NAMES.items() if name == config.model_type),
        config.num_hidden_layers,
    )
    theirs = {name: names.get_name(name, ('.weight', '.bias')) for leaf in hf.leaves(config) for name in leaf.names}
    shapes = {theirs[name]: leaf.theirs for leaf in hf.leaves(config) for name in leaf.names}
    wrong = [f'{name} is missing' for name in shapes if name not in file.tensors]
    wrong += [
        f'{name} is not part of this architecture'
        for name in file.tensors
        if name not in shapes and name != ROPE_FACTORS
    ]
    wrong += [
        f'{name} is {list(file.tensors[name].shape)}, the header makes it {list(shape)}'
        for name, shape in shapes.items()
        if name in file.tensors and file.tensors[name].shape != shape
    ]
    if wrong:
        more = f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''
        raise UserError(f'{file.path}: tensors do not fit: {"; ".join(wrong[:3])}{more}')

    def fetch(leaf: hf.Leaf, i: int | None) -> Iterator[np.ndarray]:
        heads = {'q_proj': config.num_attention_heads, 'k_proj': config.num_key_value_heads}.get(leaf.path[-2])
        order = _halves(heads, config.head_dim) if heads and config.model_type == 'llama' else None
        return _values(file, theirs[leaf.names[i or 0]], dtype, order)

    return fetch


def _halves(heads: int, size: int) -> np.ndarray:
    """Where each row of a llama file's q or k lies: there a head's rows are the pairs (i, i + size/2) in turn."""
    return np.arange(heads * size).reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1)


def _values(file: File, name: str, dtype, order: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """A tensor's numbers in parts of whole rows; `order`: which row of the file each row is."""
    tensor, library = file.tensors[name], _library(file.path)
    rows = tensor.shape[0] if len(tensor.shape) > 1 or tensor.kind.name in ('F32', 'F16', 'BF16') else 1
    with open(file.path, 'rb') as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    stored = np.frombuffer(mapped, np.uint8, tensor.nbytes, tensor.offset).reshape(rows, -1)
    step = max(1, BLOCK * rows // int(np.prod(tensor.shape)))
    for start in range(0, rows, step):
        part = slice(start, start + step) if order is None else order[start : start + step]
        values = library.dequantize(stored[part], tensor.kind).astype(jnp.dtype(dtype))
        mapped.madvise(mmap.MADV_DONTNEED)
        yield values.reshape(-1, *tensor.shape[1:])


def _library(path: Path):
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: GGUF needs the library gguf; run: .venv/bin/pip install '.[gguf]'") from None
    return gguf
