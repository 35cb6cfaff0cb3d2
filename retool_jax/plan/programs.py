"""The programs of a PPO run as they are compiled for a slice: the trainer's own, on shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from retool_jax.core import sharding
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Batch, Scores, TrainState
from retool_jax.model import attention, decoder, kernels, lora
from retool_jax.model.config import ModelConfig
from retool_jax.plan import chips
from retool_jax.plan.chips import Slice
from retool_jax.rollout import hosts, shards
from retool_jax.rollout.sampler import Chunks, Sampler
from retool_jax.rollout.sync import Sync, shardings
from retool_jax.stages import parts
from retool_jax.stages.config import Reinforcement
from retool_jax.text import tags
from retool_jax.train.state import add_critic, backbones, init_state, lowered

Shapes = Any  # a tree of ShapeDtypeStructs with shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes it is called with."""

    name: str
    phase: str  # of an RL step (plan.memory.PHASES)
    function: Callable  # jax.jit's
    arguments: dict[str, Shapes]  # by keyword, static ones included
    devices: int  # that share its work
    trips: int = 1  # iterations of a loop whose length the compiler does not know
    held: bool = False  # its results are buffers that its phase counts (plan.memory), not temporaries
    shortest: int = 0  # slots of a row that it reads at least, where it has an argument `bound`, the most
    copies: int = 0  # bytes that its temporaries hold more with some other bound than that of `arguments`

    def reads(self) -> list[tuple[dict[str, Shapes], int]]:
        """(arguments, slots of a row that it reads) of the longest reads and, where there are others, of the shortest;
        0 slots where it reads no cache."""
        longest = self.arguments.get('bound', 0)
        found = [(self.arguments, longest)]
        if self.shortest < longest:
            found.append((self.arguments | {'bound': self.shortest}, self.shortest))
        return found


class Run:
    """Everything of a run that has a shape: model, sizes, meshes, learner, sampler, buffers."""

    def __init__(self, stage: Reinforcement, model: ModelConfig, slice: Slice, process_chips: int = 0):
        """process_chips: devices of one process; 0: all of a host.

        Raises: UserError naming the key, or what does not divide.
        """
        self.model, self.slice, self.sizes, self.turns = model, slice, stage.ppo, stage.turns
        self.tools = stage.model.tools
        self.mesh = make_mesh(dataclasses.asdict(stage.mesh) | {'slices': slice.slices}, slice, slice.count)
        forward = stage.forward
        chip = slice.chip
        kind = attention.resolve(forward.attention, forward.row_width, chip.platform, chip.capability, forward.dtype)
        if kind == 'cudnn':
            kernels.check_packed(forward.row_segments, chip.capability, chip.name)
        forward = dataclasses.replace(forward, attention=kind)
        self.loss = stage.loss
        self.learner = parts.make_learner(dataclasses.replace(stage, forward=forward), model, self.mesh)
        # An engine is as many devices as hold the sampling weights, the tensor axis. Those of a process, or of as few
        # processes as have whole ones, run side by side in one program (rollout/hosts.py).
        tensor = self.mesh.shape['tensor']
        own = min(process_chips or slice.chip.host, slice.count)
        if process_chips and slice.count % own:
            raise UserError(f'--process_chips={process_chips} does not divide the {slice.count} chips of {slice.name}')
        together = hosts.needed(own, tensor)
        self.lockstep, self.engines = together > 1, slice.count // tensor
        self.abreast = min(own * together // tensor, self.engines)
        self.sampler_mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': tensor}, slice, tensor)
        sampler = stage.sampler
        table = np.zeros((sum(map(len, tags.TAGS)) + 1, model.vocab_size), np.int32)
        self.sampler = Sampler(model, sampler, table, table[:, 0], (0,), self.sampler_mesh)
        # Every device at once, before engines take their parts.
        self.sync = Sync(model, sampler.dtype, self.mesh, weights=sampler.weights)

        axes, trained = decoder.logical_axes(model), decoder.abstract_params(model)
        rules = decoder.fit_rules(model, self.mesh, sharding.TRAIN_RULES)
        self.frozen = None
        if stage.lora.rank:
            held = jax.eval_shape(lambda p: decoder.cast(p, jnp.dtype(forward.dtype)), trained)
            self.frozen = _put(held, sharding.shardings(self.mesh, axes, rules))
            axes, trained = lora.logical_axes(model, stage.lora), lora.abstract(model, stage.lora)
        whole = {
            'policy': axes,
            'critic': {'head': {'weight': ('embed', None), 'bias': (None,)}, 'backbone': axes},
        }
        shapes = jax.eval_shape(lambda p: add_critic(model, p, self.sizes.critic), trained)
        words = _like(shapes, whole)
        self.params = _put(shapes, sharding.shardings(self.mesh, words, rules))
        self.state = self._train_state()
        low = jax.eval_shape(lambda p: lowered(p, forward.gradient_dtype), self.params)
        self.gradients = jax.tree.map(lambda x, p: _shape(x, p.sharding), low, self.params)
        self.sampling_params = _put(
            jax.eval_shape(
                lambda p: decoder.to_sampling(model, p, jnp.dtype(sampler.dtype), sampler.weights),
                decoder.abstract_params(model),
            ),
            shardings(model, self.sampler_mesh, sharding.SAMPLE_RULES, sampler.weights),
        )

    def _train_state(self) -> TrainState:
        """Parameters and moments; a moment lies as its parameter does."""
        shapes = jax.eval_shape(lambda p: init_state(p, self.learner.optimizer), self.params)
        known = {_words(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(self.params)}
        whole = jax.NamedSharding(self.mesh, jax.P())

        def one(path, leaf):
            words = _words(path)
            tails = (words[i:] for i in range(len(words)))
            match = next((known[t] for t in tails if t in known and known[t].shape == leaf.shape), None)
            return _shape(leaf, whole if match is None else match.sharding)

        return jax.tree_util.tree_map_with_path(one, shapes)

    @functools.cached_property
    def sample_state(self) -> Shapes:
        """The state of an engine's rows: KV cache and logits; the rest is small."""
        state, _ = shards.shardings(self.model, self.sampler.settings.cache_dtype, self.sampler_mesh)
        return _put(jax.eval_shape(self.sampler._empty), state)

    @functools.cached_property
    def micro(self) -> tuple[Batch, Scores]:
        """A micro-batch with its scores."""
        f = self.learner.forward
        bt = lambda dtype: jax.ShapeDtypeStruct((f.micro_rows, f.row_width), dtype, sharding=self.learner.rows)
        bn = lambda dtype: jax.ShapeDtypeStruct((f.micro_rows, f.row_segments), dtype, sharding=self.learner.rows)
        batch = Batch(
            tokens_BT=bt(jnp.int32),
            segment_ids_BT=bt(jnp.int32),
            positions_BT=bt(jnp.int32),
            acted_BT=bt(bool),
            sampler_logprob_BT=bt(jnp.float32),
            reward_BN=bn(jnp.float32),
            group_BN=bn(jnp.int32),
            baseline_BN=bn(bool),
            update_BN=bn(bool),
        )
        return batch, Scores(*(bt(jnp.float32) for _ in dataclasses.fields(Scores)))

    def programs(self) -> Iterator[Program]:
        """Every program that costs time or memory, the smallest first."""
        micro, scores = self.micro
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.NamedSharding(self.mesh, jax.P()))
        learner, size = self.learner, self.mesh.size
        policy = self.params['policy']
        if self.frozen is not None:
            policy = lora.join(self.frozen, policy)
        yield Program(
            'sync layer',
            'sync',
            self.sync.layer,
            {'layers': policy['layers'], 'i': jax.ShapeDtypeStruct((), jnp.int32, sharding=number.sharding)},
            size,
            held=True,
        )
        yield Program('sync ends', 'sync', self.sync.ends, {'params': policy}, size, held=True)
        applied = {'state': self.state, 'gradients': self.gradients}
        yield Program('apply', 'update', learner.applier(self.state), applied, size)
        for params in backbones(self.params):
            name = name_of(params)
            read = {'params': params, 'micro': micro, 'frozen': self.frozen}
            yield Program(f'score {name}', 'score', learner._score, read, size)
            yield Program(
                f'update {name}',
                'update',
                learner._ppo,
                read
                | {
                    'gradients': {part: self.gradients[part] for part in params},
                    'scores': scores,
                    'denominators': (number, number),
                    'fresh': jax.ShapeDtypeStruct((), bool, sharding=number.sharding),
                },
                size,
            )
        yield from self._rollout_programs()

    @functools.cached_property
    def in_place(self) -> bool:
        """Whether a kernel reads the cache where it lies when rows decode."""
        with kernels.traced_anywhere(self.slice.chip.capability):
            return not self.sampler.chooses and self.sampler.kernel(self.sample_state.cache) is not None

    def copied(self, bound: int) -> int:
        """Bytes on one chip that a decode call takes out of the cache before its first step (rollout/rows.py): `bound`
        slots of its rows, nothing where those are all slots of all rows or are read in place."""
        s, cache = self.sampler.settings, self.sample_state.cache
        if self.in_place or (bound == s.slots and not self.sampler.chooses):
            return 0
        return per_device((cache.k, cache.v)) * self.sampler.decode_rows * bound // (s.rows * s.slots)

    @functools.cached_property
    def copies(self) -> int:
        """The most of those that a call reading all slots has not: of the longest bound but `slots`."""
        bounds = self.sampler.bounds()
        return self.copied(bounds[-2]) if len(bounds) > 1 and not self.sampler.chooses else 0

    def _rollout_programs(self) -> Iterator[Program]:
        s, v = self.sampler.settings, self.model.vocab_size
        shortest = self.sampler.bounds()[0]
        whole = jax.NamedSharding(self.sampler_mesh, jax.P())
        ints = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
        chunks = Chunks(
            row_R=ints(s.feed_rows),
            tokens_RC=ints(s.feed_rows, s.chunk),
            count_R=ints(s.feed_rows),
            live_R=ints(s.feed_rows, dtype=bool),
            allowance_R=ints(s.feed_rows),
            tag_R=ints(s.feed_rows),
        )
        size = self.sampler_mesh.size
        yield Program(
            'extend',
            'rollout',
            self.sampler._extend,
            {'params': self.sampling_params, 'state': self.sample_state, 'chunks': chunks, 'bound': s.slots},
            size,
            shortest=shortest,
        )
        states = self.sampler.table.shape[0]
        yield Program(
            'decode',
            'rollout',
            self.sampler._decode,
            {
                'params': self.sampling_params,
                'table': ints(states, v),
                'stops': ints(states),
                'state': self.sample_state,
                'row_R': ints(s.decode_rows) if self.sampler.chooses else None,
                'steps': ints(),
                'bound': s.slots,
                'truncate': False,
            },
            size,
            trips=s.quota,
            shortest=s.slots if self.in_place else shortest,
            copies=self.copies,
        )


def name_of(params: Mapping[str, Shapes]) -> str:
    """'policy', 'critic', or both where they share a trunk."""
    return ' and '.join(name for name in ('policy', 'critic') if name in params)


def make_mesh(shape: Mapping[str, int], slice: Slice, count: int) -> jax.sharding.Mesh | jax.sharding.AbstractMesh:
    """A mesh over the first `count` devices of a slice; an abstract one where the slice has no devices."""
    if slice.devices is not None:
        return sharding.make_mesh(shape, chips.first(slice, count))
    sizes = sharding.fill(shape, count)
    sharding.check_slices(sizes, shape.get('slices', 1))
    return jax.sharding.AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def per_device(tree: Shapes) -> int:
    """Bytes of a tree on one device."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _itemsize(dtype) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def _shape(leaf, home) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)


def _put(shapes: Shapes, shardings) -> Shapes:
    return jax.tree.map(_shape, shapes, shardings)


def _like(tree, words: dict) -> dict:
    """The entries of `words` that `tree` has."""
    return {name: _like(node, words[name]) if isinstance(node, dict) else words[name] for name, node in tree.items()}


def _words(path) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
