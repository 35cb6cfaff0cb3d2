"""LoRA (arXiv 2106.09685): small matrices A and B beside frozen weights, W + (alpha ÷ rank)·A·B, and they alone learn.

Adapters are a tree of their own, laid out as the weights are: layers.self_attn.q_proj.lora_A.weight and so on, f32.
`over` puts it beside the frozen weights into one tree, which whatever reads weights takes: the forward pass multiplies
by A and B (layers.Projection), the sampler and exports get them added to W (layers.merge), a layer at a time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from retool_jax.core.checks import above, check, one_of, within
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.model import decoder, hf
from retool_jax.model.config import ModelConfig
from retool_jax.model.layers import PROJECTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Training a few weights beside frozen ones, which lie in the devices' memory in forward.dtype, without moments."""

    rank: int  # width of the adapters, 0 to 65,536; 0: none, and every weight is trained. H 0
    alpha: float  # an adapter counts alpha ÷ rank times, above 0; best rates are then much alike at all ranks. H 32
    # the projections of a layer that have adapters: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj. H
    # all: adapters beside attention alone learn less
    targets: tuple[str, ...]

    def __post_init__(self):
        check(self, rank=within(0, 2**16), alpha=above(0, 1e6), targets=one_of(PROJECTIONS))
        if self.rank and not self.targets:
            raise UserError(f'targets=() leaves nothing to train with lora.rank={self.rank}; name projections')

    @property
    def scale(self) -> float:
        """What stands before A·B."""
        return self.alpha / self.rank if self.rank else 1.0


def describe(lora: LoRASettings) -> dict:
    """What a checkpoint's meta says of its adapters; nothing where it has none."""
    return {'lora': dataclasses.asdict(lora)} if lora.rank else {}


def init(config: ModelConfig, lora: LoRASettings, key: jax.Array) -> Params:
    """First adapters: A random, B zero, so that they change nothing yet."""
    return only(decoder.init(config, key, lora.rank, lora.targets))


def logical_axes(config: ModelConfig, lora: LoRASettings) -> dict:
    """The words of every adapter's dimensions."""
    return only(decoder.logical_axes(config, lora.rank, lora.targets))


def abstract(config: ModelConfig, lora: LoRASettings) -> Params:
    """Shapes and dtypes of the adapters."""
    return only(decoder.abstract_params(config, lora.rank, lora.targets))


def only(params: Params) -> Params:
    """The adapters in a tree of weights."""
    found = {}
    for name, node in params.items():
        if isinstance(node, dict):
            own = node if name.startswith('lora_') else only(node)
            found |= {name: own} if own else {}
    return found


def over(frozen: Params | None, trained: Params, scale: float) -> Params:
    """A model's weights: `trained` themselves, or adapters, every B times `scale`, beside `frozen` weights.

    No adapters ({}) leave the frozen model as it is. Nothing but B is copied.
    """
    if frozen is None:
        return trained
    inside = lambda path: any(entry.key == 'lora_B' for entry in path)
    scaled = jax.tree_util.tree_map_with_path(lambda path, x: x * scale if inside(path) else x, trained)
    return join(frozen, scaled)


def join(frozen: Params, adapters: Params) -> Params:
    """Both trees in one."""
    joined = dict(frozen)
    for name, node in adapters.items():
        joined[name] = join(frozen[name], node) if name in frozen else node
    return joined


def save(directory: str | os.PathLike, config: ModelConfig, lora: LoRASettings, adapters: Params, base: str) -> None:
    """Writes adapters as a directory that peft loads, in f32; called by every process.

    base: the model that they stand on, as peft shall find it. It appears under its name when it is complete.

    Raises: UserError where something is in the way.
    """
    directory = Path(directory).absolute()
    hf.refuse_existing(directory)
    order = [(leaf, i) for leaf in leaves(config, lora) for i in range(config.num_hidden_layers)]
    writes, partial = jax.process_index() == 0, directory.with_name(directory.name + '.partial')
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    fetch = lambda leaf, i: [hf.fetch_tensor(adapters, leaf, i, jnp.float32)]
    hf.write_file(partial / 'adapter_model.safetensors' if writes else os.devnull, order, fetch, jnp.float32)
    if not writes:
        return
    said = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'r': lora.rank,
        'lora_alpha': lora.alpha,
        'target_modules': list(lora.targets),
        'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
    }
    (partial / 'adapter_config.json').write_text(json.dumps(said, indent=2))
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)


def leaves(config: ModelConfig, lora: LoRASettings) -> list[hf.Leaf]:
    """Every adapter with the names that peft gives its tensors: 'base_model.model.' and 'lora_A' around a weight's."""
    weights, found = {leaf.path: leaf for leaf in hf.leaves(config)}, []
    for path, shape in jax.tree_util.tree_flatten_with_path(abstract(config, lora))[0]:
        *module, part, word = (entry.key for entry in path)
        own = weights[*module, word]
        names = tuple(f'base_model.model.{name.removesuffix(word)}{part}.{word}' for name in own.names)
        inputs = own.inputs if part == 'lora_A' else 1
        found.append(hf.Leaf((*module, part, word), shape.shape[1:], names, inputs))
    return found
