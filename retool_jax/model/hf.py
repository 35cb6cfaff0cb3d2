"""Hugging Face checkpoints: one table of names, streamed in and out a tensor at a time.

Each device's part is cut straight out of the mapped file (tensor_files.py says where a tensor lies in it), so that
loading holds one tensor beside the parameters, and a broken file is named before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from retool_jax.core import storage
from retool_jax.core.checks import NO_STORE
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.model import decoder
from retool_jax.model.config import ModelConfig, load_config, to_hf
from retool_jax.model.layers import merge
from retool_jax.model.tensor_files import INDEX, SINGLE, Tensor, read_headers, read_rows

# Our path: its name in the checkpoint ({} is the layer), and how many leading axes of ours are inputs.
# A checkpoint holds a matrix as [outputs, inputs], each flattened; None: the same shape in both.
TABLE: dict[str, tuple[str, int | None]] = {
    'embed_tokens.weight': ('model.embed_tokens.weight', None),
    'layers.input_layernorm.weight': ('model.layers.{}.input_layernorm.weight', None),
    'layers.self_attn.q_proj.weight': ('model.layers.{}.self_attn.q_proj.weight', 1),
    'layers.self_attn.q_proj.bias': ('model.layers.{}.self_attn.q_proj.bias', 0),
    'layers.self_attn.k_proj.weight': ('model.layers.{}.self_attn.k_proj.weight', 1),
    'layers.self_attn.k_proj.bias': ('model.layers.{}.self_attn.k_proj.bias', 0),
    'layers.self_attn.v_proj.weight': ('model.layers.{}.self_attn.v_proj.weight', 1),
    'layers.self_attn.v_proj.bias': ('model.layers.{}.self_attn.v_proj.bias', 0),
    'layers.self_attn.o_proj.weight': ('model.layers.{}.self_attn.o_proj.weight', 2),
    'layers.self_attn.o_proj.bias': ('model.layers.{}.self_attn.o_proj.bias', 0),
    'layers.self_attn.q_norm.weight': ('model.layers.{}.self_attn.q_norm.weight', None),
    'layers.self_attn.k_norm.weight': ('model.layers.{}.self_attn.k_norm.weight', None),
    'layers.post_attention_layernorm.weight': ('model.layers.{}.post_attention_layernorm.weight', None),
    'layers.mlp.gate_proj.weight': ('model.layers.{}.mlp.gate_proj.weight', 1),
    'layers.mlp.gate_proj.bias': ('model.layers.{}.mlp.gate_proj.bias', 0),
    'layers.mlp.up_proj.weight': ('model.layers.{}.mlp.up_proj.weight', 1),
    'layers.mlp.up_proj.bias': ('model.layers.{}.mlp.up_proj.bias', 0),
    'layers.mlp.down_proj.weight': ('model.layers.{}.mlp.down_proj.weight', 1),
    'layers.mlp.down_proj.bias': ('model.layers.{}.mlp.down_proj.bias', 0),
    'norm.weight': ('model.norm.weight', None),
    'lm_head.weight': ('lm_head.weight', 1),
}
DTYPES = {'BF16': jnp.bfloat16, 'F16': np.float16, 'F32': np.float32}
KINDS = {jnp.dtype(dtype).name: kind for kind, dtype in DTYPES.items()}
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'tokenizer.model', 'vocab.json', 'merges.txt',
                   'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja', 'generation_config.json',
)  # fmt: skip
BLOCK = 64 << 20  # bytes copied out of a mapped file before its pages are let go
# Facts of a run, not of the weights: a run may read the same weights with another context.
FREE_FIELDS = ('rope_scaling', 'max_position_embeddings', 'initializer_range')

Progress = Callable[[int, int], None]  # tensors done, of how many


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight of ours and the tensors of the checkpoint that hold it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # of one layer
    names: tuple[str, ...]  # one a layer, or one
    inputs: int | None

    @property
    def stacked(self) -> bool:
        return self.path[0] == 'layers'

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of ours in the checkpoint's order."""
        inputs = self.inputs or 0
        return (*range(inputs, len(self.shape)), *range(inputs))

    @property
    def theirs(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        if self.inputs is None:
            return self.shape
        outputs, inputs = math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])
        return (outputs, inputs) if self.inputs else (outputs,)


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every weight of the training layout, in the order of the checkpoint's layers."""
    found = []
    for path, abstract in jax.tree_util.tree_flatten_with_path(decoder.abstract_params(config))[0]:
        words = tuple(entry.key for entry in path)
        name, inputs = TABLE['.'.join(words)]
        count = config.num_hidden_layers if words[0] == 'layers' else 0
        found.append(
            Leaf(
                words,
                abstract.shape[1:] if count else abstract.shape,
                tuple(name.format(i) for i in range(count)) if count else (name,),
                inputs,
            )
        )
    return found


def load(
    directory: str | os.PathLike,
    config: ModelConfig,
    shardings=None,
    dtype=jnp.float32,
    progress: Progress | None = None,
    gains=None,
) -> Params:
    """Reads a Hugging Face directory into the training layout, straight onto the devices.

    shardings: a tree like the parameters (`core.sharding.shardings`), None for the default device. Every
    process reads its own parts alone. gains: the dtype of norms where it is another. Peak host memory: the largest
    tensor + 64 MiB.

    Raises: UserError naming a missing or truncated file, a field of config.json that differs, or
    the tensors that are missing, extra or of another shape.
    """
    files, directory = storage.model_files('model.path', os.fspath(directory)), storage.path(directory)
    _compare_configs(load_config(files), config, directory)
    with storage.told('model.path', str(directory)):
        tensors = read_headers(directory)
    wanted = leaves(config)
    _compare_tensors(tensors, wanted, config, directory)
    homes = (
        {}
        if shardings is None
        else {tuple(e.key for e in path): s for path, s in jax.tree_util.tree_flatten_with_path(shardings)[0]}
    )
    tick = _counter(progress, sum(len(leaf.names) for leaf in wanted))
    params: Params = {}
    for leaf in wanted:
        node = params
        for word in leaf.path[:-1]:
            node = node.setdefault(word, {})
        own = gains if gains is not None and decoder.is_gain(leaf.path) else dtype
        node[leaf.path[-1]] = _load_leaf(leaf, tensors, homes.get(leaf.path), jnp.dtype(own), tick)
    return params


def _load_leaf(leaf: Leaf, tensors: dict[str, Tensor], sharding, dtype: np.dtype, tick: Callable[[], None]):
    inverse = tuple(np.argsort(leaf.order))
    ours = lambda x: x.transpose(inverse).astype(dtype)  # on the device: a host transposes ten times slower
    part_sharding = _reordered(sharding, leaf)
    fetch = lambda name: _put(tensors[name], [leaf.shape[axis] for axis in leaf.order], part_sharding, dtype)
    home = {} if sharding is None else {'out_shardings': sharding}
    if not leaf.stacked:
        array = jax.block_until_ready(jax.jit(ours, **home)(fetch(leaf.names[0])))
        tick()
        return array
    shape = (len(leaf.names), *leaf.shape)
    array = jax.jit(lambda: jnp.zeros(shape, dtype), **home)()
    insert = jax.jit(
        lambda whole, part, i: jax.lax.dynamic_update_index_in_dim(whole, ours(part), i, 0), donate_argnums=0, **home
    )
    for i, name in enumerate(leaf.names):
        array = jax.block_until_ready(insert(array, fetch(name), jnp.int32(i)))  # one tensor in flight
        tick()
    return array


def _reordered(sharding, leaf: Leaf):
    """The sharding of one layer with its axes in the checkpoint's order."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = [*sharding.spec, *[None] * (len(leaf.shape) + leaf.stacked - len(sharding.spec))]
    entries = entries[1:] if leaf.stacked else entries
    return NamedSharding(sharding.mesh, PartitionSpec(*(entries[axis] for axis in leaf.order)))


def _put(tensor: Tensor, shape: list[int], sharding, dtype: np.dtype) -> jax.Array:
    """A tensor of a file as a device array, of the narrower of both dtypes."""
    stored = jnp.dtype(DTYPES[tensor.dtype])
    dtype = min(stored, dtype, key=lambda d: d.itemsize)
    where = None if sharding is None else sharding.addressable_devices_indices_map(tuple(shape))
    spans = [(0, shape[0])] if where is None else [index[0].indices(shape[0])[:2] for index in where.values()]
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    view, let_go = read_rows(tensor, stored, shape, first, last)
    parts = {}

    def cut(index: tuple[slice, ...]) -> np.ndarray:
        if index not in parts:  # replicas share one
            start, stop, _ = index[0].indices(shape[0])
            source = view[(slice(start - first, stop - first), *index[1:])]
            parts[index] = part = np.empty(source.shape, dtype)
            rows = max(1, BLOCK // (view.strides[0] or 1))
            for start in range(0, len(source), rows):
                part[start : start + rows] = source[start : start + rows]
                let_go()
        return parts[index]

    if where is None:
        return jax.device_put(cut((slice(None),) * len(shape)))
    arrays = [jax.device_put(cut(index), device) for device, index in where.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, arrays)


def _compare_configs(found: ModelConfig, config: ModelConfig, directory: Path) -> None:
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(found, field.name), getattr(config, field.name)
        if theirs != ours and field.name not in FREE_FIELDS:
            raise UserError(
                f'model.path: {directory / "config.json"} has {field.name}={theirs}, this run is set up for {ours}'
            )


def _compare_tensors(tensors: dict[str, Tensor], wanted: list[Leaf], config: ModelConfig, directory: Path) -> None:
    shapes = {name: leaf.theirs for leaf in wanted for name in leaf.names}
    extra = {name for name in tensors if name not in shapes and not name.endswith('.rotary_emb.inv_freq')}
    if config.tie_word_embeddings:
        extra.discard('lm_head.weight')  # some exports store the tied matrix twice
    wrong = [f'{name} is missing' for name in shapes if name not in tensors]
    wrong += [f'{name} is not part of this architecture' for name in sorted(extra)]
    for name, tensor in ((name, tensors[name]) for name in shapes if name in tensors):
        if tensor.shape != shapes[name]:
            wrong.append(f'{name} is {list(tensor.shape)}, config.json makes it {list(shapes[name])}')
        elif tensor.dtype not in DTYPES:
            wrong.append(f'{name} is stored as {tensor.dtype}; supported are {", ".join(DTYPES)}')
    if wrong:
        more = f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''
        raise UserError(f'model.path: weights of {directory} do not fit: {"; ".join(wrong[:3])}{more}')


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    dtype=jnp.bfloat16,
    tokenizer_dir: str | os.PathLike | None = None,
    *,
    file_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes the training layout as a directory that transformers loads, adapters merged; called by every process.

    It appears under its name when it is complete. tokenizer_dir: where the tokenizer's files and the
    ids of its special tokens are copied from. Files hold at most `file_bytes`, or one tensor.

    Raises: UserError where something is in the way, or there is no tokenizer.
    """
    write(
        directory,
        config,
        lambda leaf, i: [fetch_tensor(params, leaf, i, dtype)],
        dtype,
        tokenizer_dir,
        file_bytes=file_bytes,
        progress=progress,
    )


def write(
    directory: str | os.PathLike,
    config: ModelConfig,
    fetch: Callable[[Leaf, int | None], Iterable[np.ndarray]],
    dtype,
    tokenizer_dir: str | os.PathLike | None = None,
    *,
    file_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """`save` from any source: `fetch(leaf, layer)` gives a tensor as the checkpoint has it, in `dtype`, in one or
    more parts along its first axis.

    Raises:
      UserError: another dtype than DTYPES, a directory that holds something, or no tokenizer where one is asked for.
    """
    directory, name = Path(directory).absolute(), jnp.dtype(dtype).name
    if name not in KINDS:
        raise UserError(f'dtype {name} is not supported; choose {", ".join(KINDS)}')
    refuse_existing(directory)
    tokenizer_files, special = _tokenizer(tokenizer_dir)
    # In the checkpoint's own order, layer by layer, so that a file holds whole layers.
    wanted = leaves(config)
    order = [(leaf, None) for leaf in wanted if leaf.path[0] == 'embed_tokens']
    order += [(leaf, i) for i in range(config.num_hidden_layers) for leaf in wanted if leaf.stacked]
    order += [(leaf, None) for leaf in wanted if leaf.path[0] not in ('embed_tokens', 'layers')]
    parts = _split(order, jnp.dtype(dtype).itemsize, file_bytes)
    writes, tick = jax.process_index() == 0, _counter(progress, len(order))
    partial = directory.with_name(directory.name + '.partial')
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = SINGLE if len(parts) == 1 else f'model-{number:05}-of-{len(parts):05}.safetensors'
        weight_map |= {leaf.names[i or 0]: file for leaf, i in part}
        write_file(partial / file if writes else os.devnull, part, fetch, dtype, tick)
    if not writes:
        return
    if len(parts) > 1:
        total = sum(math.prod(leaf.shape) for leaf, _ in order) * jnp.dtype(dtype).itemsize
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
    raw = to_hf(config) | special | {'torch_dtype': name}
    (partial / 'config.json').write_text(json.dumps(raw, indent=2))
    for source in tokenizer_files:
        shutil.copyfile(source, partial / source.name)
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)


def write_file(
    path: str | os.PathLike,
    part: list[tuple[Leaf, int | None]],
    fetch: Callable[[Leaf, int | None], Iterable[np.ndarray]],
    dtype,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """One safetensors file of the tensors of `part`, each a leaf and its layer, as `fetch` gives them to `write`."""
    with open(path, 'wb') as file:
        file.write(_header(part, jnp.dtype(dtype)))
        for leaf, i in part:
            for host in fetch(leaf, i):
                file.write(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
            tick()


def refuse_existing(directory: str | os.PathLike) -> None:
    """Raises UserError where writing would touch what is there."""
    if storage.is_store(directory):
        raise UserError(f'{directory} {NO_STORE}')
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'{path} already exists and is never overwritten; give another directory')


def _tokenizer(directory: str | os.PathLike | None) -> tuple[list[Path], dict]:
    """The tokenizer's files, and the special ids of the config.json beside them."""
    if directory is None:
        return [], {}
    directory = Path(directory)
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not {'tokenizer.json', 'tokenizer.model', 'vocab.json'} & {file.name for file in files}:
        raise UserError(f'{directory} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)')
    config = directory / 'config.json'
    raw = json.loads(config.read_text()) if config.is_file() else {}
    return files, {key: raw[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id') if key in raw}


def _split(order: list, itemsize: int, file_bytes: int) -> list[list]:
    files, used = [[]], 0
    for leaf, i in order:
        size = math.prod(leaf.shape) * itemsize
        if files[-1] and used + size > file_bytes:
            files, used = [*files, []], 0
        files[-1].append((leaf, i))
        used += size
    return files


def _header(part: list, dtype: np.dtype) -> bytes:
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for leaf, i in part:
        stop = offset + math.prod(leaf.shape) * dtype.itemsize
        header[leaf.names[i or 0]] = {'dtype': KINDS[dtype.name], 'shape': leaf.theirs, 'data_offsets': [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # the data start aligned
    return struct.pack('<Q', len(text)) + text


def fetch_tensor(params: Params, leaf: Leaf, i: int | None, dtype) -> np.ndarray:
    """One tensor of the checkpoint on the host of every process."""
    module = functools.reduce(lambda node, word: node[word], leaf.path[:-1], params)
    layer = jnp.int32(i or 0) if leaf.stacked else None
    part = _take(module, leaf.path[-1], layer, leaf.order, leaf.theirs, jnp.dtype(dtype))
    return np.asarray(part if part.is_fully_addressable else multihost_utils.process_allgather(part, tiled=True))


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _take(module: Params, name: str, layer, order: tuple[int, ...], shape: tuple[int, ...], dtype):
    cut = lambda x: x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    part = merge(jax.tree.map(cut, module))[name]
    return part.transpose(order).reshape(shape).astype(dtype)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    steps: Iterator[int] = iter(range(1, total + 1))
    return lambda: progress(next(steps), total) if progress else None
