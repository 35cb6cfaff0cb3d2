"""Hugging Face directories to orbax checkpoints and back, adapters to peft, and out of GGUF files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from retool_jax.core import console
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.errors import UserError
from retool_jax.model import config as model_config
from retool_jax.model import decoder, gguf, hf, lora
from retool_jax.text import vocabulary


def run(
    way: str,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    step: int | None = None,
    part: str = 'params.policy',
    dtype=None,
) -> None:
    """One conversion, with a progress bar.

    way: 'orbax' (`to_orbax`), 'hf' (`to_hf`, which `like`, `step` and `part` are for), 'peft' (`to_peft`, with the same
    three) or 'gguf' (`from_gguf`).
    dtype: None is float32, bfloat16, or what holds a GGUF file's numbers exactly.

    Raises:
      UserError: those of the three, and of the configurations that they read.
    """
    if way == 'peft':
        to_peft(source, target, like, step=step, part=part)
        return
    file = gguf.read(source) if way == 'gguf' else None
    config = gguf.load_config(file) if file else model_config.load_config(like if way == 'hf' else source)
    with console.progress(f'{source} → {target}', sum(len(leaf.names) for leaf in hf.leaves(config))) as advance:
        progress = lambda done, total: advance()
        if way == 'gguf':
            from_gguf(file, target, dtype, progress)
        elif way == 'orbax':
            to_orbax(source, target, dtype or jnp.float32, progress)
        else:
            to_hf(source, target, like, step=step, part=part, dtype=dtype or jnp.bfloat16, progress=progress)


def to_orbax(
    source: str | os.PathLike, target: str | os.PathLike, dtype=jnp.float32, progress: hf.Progress | None = None
) -> None:
    """Stores the weights of a Hugging Face directory as step 0 below `target`, at params.policy.

    Raises: UserError where `target` holds something, and those of `hf.load`.
    """
    hf.refuse_existing(target)  # before anything is read
    config = model_config.load_config(source)
    params = hf.load(source, config, dtype=dtype, progress=progress)
    with Checkpoints(target, keep_last=1) as checkpoints:
        checkpoints.save(0, {'params': {'policy': params}}, {'config': model_config.to_hf(config)}, wait=True)


def to_hf(
    source: str | os.PathLike,
    target: str | os.PathLike,
    like: str | os.PathLike,
    *,
    step: int | None = None,
    part: str = 'params.policy',
    dtype=jnp.bfloat16,
    progress: hf.Progress | None = None,
) -> None:
    """Exports the policy of a checkpoint; config.json and tokenizer are those of the directory `like`, and so are the
    weights into which a checkpoint's adapters are merged.

    step: None is the newest. part: the dotted place of the weights in the checkpoint; nothing else of
    it is read. Raises: UserError naming what is missing, extra or of another shape.
    """
    hf.refuse_existing(target)  # before anything is read
    config, (place, adapters) = model_config.load_config(like), _find(source, step)
    if adapters is None:
        params = _read(place, part.split('.'), decoder.abstract_params(config))
    else:
        trained = _read(place, part.split('.'), lora.abstract(config, adapters))
        params = lora.over(hf.load(like, config), trained, adapters.scale)
    hf.save(target, config, params, dtype, tokenizer_dir=like, progress=progress)


def to_peft(
    source: str | os.PathLike,
    target: str | os.PathLike,
    like: str | os.PathLike,
    *,
    step: int | None = None,
    part: str = 'params.policy',
) -> None:
    """Exports the adapters of a checkpoint as a directory that peft loads; `like` holds the weights below them.

    step, part: as in `to_hf`. Raises: UserError naming what is missing, extra or of another shape.
    """
    hf.refuse_existing(target)
    config, (place, adapters) = model_config.load_config(like), _find(source, step)
    if adapters is None:
        raise UserError(f'{place}: all weights were trained (lora.rank=0), there are no adapters; use --to=hf')
    trained = _read(place, part.split('.'), lora.abstract(config, adapters))
    lora.save(target, config, adapters, trained, os.fspath(like))


def from_gguf(file: gguf.File, target: str | os.PathLike, dtype=None, progress: hf.Progress | None = None) -> None:
    """Writes a GGUF file as a Hugging Face directory: weights in `dtype`, configuration, tokenizer and chat template.

    dtype: None is bfloat16 for matrices stored as such, else float32, in which every number of the file is exact.
    Memory: 64 MiB of numbers, and the header. Raises: UserError naming what is missing or not supported, before
    anything is written.
    """
    hf.refuse_existing(target)
    config = gguf.load_config(file)
    if dtype is None:
        matrices = {tensor.kind.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
        dtype = jnp.bfloat16 if matrices == {'BF16'} else jnp.float32
    fetch = gguf.fetcher(file, config, dtype)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(file.metadata, Path(folder), str(file.path))
        hf.write(target, config, fetch, dtype, folder, progress=progress)


def _find(source: str | os.PathLike, step: int | None) -> tuple[Path, lora.LoRASettings | None]:
    """The folder of a step, and what its adapters are; None where all weights were trained."""
    if not Path(source).is_dir():
        raise UserError(f'checkpoint {str(source)!r} is no directory')
    with Checkpoints(source, keep_last=1) as checkpoints:
        steps = checkpoints.steps()
        if not steps or step not in (None, *steps):
            raise UserError(
                f'{source}: no checkpoint of step {"any" if step is None else step}; '
                f'there are: {", ".join(map(str, steps)) or "none"}'
            )
        step = steps[-1] if step is None else step
        said = checkpoints.meta(step).get('lora')
    adapters = lora.LoRASettings(**said | {'targets': tuple(said['targets'])}) if said else None
    return Path(source).absolute() / str(step), adapters


def _read(directory: Path, part: list[str], wanted):
    """One subtree of a checkpoint on the default device, in the dtypes it was stored with."""
    from orbax.checkpoint import v1 as ocp

    stored = ocp.checkpointables_metadata(directory).metadata['state']
    for depth, word in enumerate(part):
        if not isinstance(stored, dict) or word not in stored:
            there = ', '.join(sorted(stored)) if isinstance(stored, dict) else 'an array'
            raise UserError(f'{directory}: {".".join(part[: depth + 1])} is not in this checkpoint; there is {there}')
        stored = stored[word]
    flat = lambda tree: {
        '.'.join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    has, needs = flat(stored), flat(wanted)
    wrong = [f'{name} is missing' for name in needs if name not in has]
    wrong += [f'{name} is not part of this architecture' for name in has if name not in needs]
    wrong += [
        f'{name} is {list(has[name].shape)}, config.json makes it {list(needs[name].shape)}'
        for name in needs
        if name in has and has[name].shape != needs[name].shape
    ]
    if wrong:
        more = f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''
        raise UserError(f'{directory}: {".".join(part)} does not fit: {"; ".join(wrong[:3])}{more}')
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), stored)
    for word in reversed(part):
        abstract = {word: abstract}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        found = ocp.load_checkpointables(directory, {'state': abstract})['state']
    for word in part:
        found = found[word]
    return found
