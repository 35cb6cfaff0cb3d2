"""Optimizer and training state: f32 master weights, AdamW or Adafactor, one state for the policy and its critic."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from retool_jax.core.checks import MANY, above, below, check, one_of, within
from retool_jax.core.pytrees import Params, TrainState
from retool_jax.model import decoder
from retool_jax.model.config import ModelConfig

SCHEDULES = ('constant', 'cosine', 'linear', 'wsd')
KINDS = ('adamw', 'adamw_bf16', 'adafactor')
CRITICS = ('none', 'head', 'backbone')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """A schedule and what it drives."""

    # 'adamw', whose two moments take 8 bytes a weight; 'adamw_bf16', both moments in bf16: 4 bytes; 'adafactor', the
    # second moment as its rows' and columns' means, and no first one: next to nothing. R adamw
    kind: str
    lr: float  # the largest learning rate. P 1e-6 in RL; R 2e-6 for the critic, 1e-5 in SFT
    # After warm-up: 'constant'; 'cosine' or 'linear' down to 0; 'wsd', constant, in the last quarter linear to 0.
    # R constant in RL, cosine in SFT
    schedule: str
    warmup_steps: int  # optimizer steps of linear warm-up from 0. R 0 in RL, a tenth of the steps in SFT
    b1: float  # decay of the first moment, which adafactor has not. R 0.9
    b2: float  # decay of the second moment; adafactor's is 1 − step^−0.8. R 0.999 in RL, 0.95 in SFT
    weight_decay: float  # of matrices; biases and the gains of norms are not decayed. R 0.01
    grad_clip: float  # largest global norm of a part's gradient, policy and critic apart. R 1

    def __post_init__(self):
        check(
            self,
            kind=one_of(KINDS),
            lr=within(0, 1e3),
            schedule=one_of(SCHEDULES),
            warmup_steps=within(0, MANY),
            b1=below(0, 1),
            b2=below(0, 1),
            weight_decay=within(0, 1e3),
            grad_clip=above(0, 1e9),
        )


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate over `steps` optimizer steps."""
    s = settings
    rest = max(steps - s.warmup_steps, 1)
    after = {
        'constant': lambda: optax.constant_schedule(s.lr),
        'cosine': lambda: optax.cosine_decay_schedule(s.lr, rest),
        'linear': lambda: optax.linear_schedule(s.lr, 0.0, rest),
        'wsd': lambda: optax.linear_schedule(s.lr, 0.0, rest // 4, transition_begin=rest - rest // 4),
    }
    warmup = optax.linear_schedule(0.0, s.lr, max(s.warmup_steps, 1))
    return optax.join_schedules([warmup, after[s.schedule]()], [s.warmup_steps])


def make_optimizer(
    policy: OptimizerSettings, steps: int, critic: OptimizerSettings | None = None, critic_warmup_steps: int = 0
) -> optax.GradientTransformation:
    """The optimizer of the tree {'policy', 'critic'}, each part clipped, scheduled and counted on its own.

    Gradients may lack a part, which then keeps parameters, moments and count: so the policy is held for the first
    `critic_warmup_steps` optimizer steps, and its schedule takes its course over the others.
    """
    parts = {'policy': _one(policy, steps - critic_warmup_steps)}
    if critic is not None:
        parts['critic'] = _one(critic, steps)

    def update(gradients, state, params):
        found = {name: parts[name].update(part, state[name], params[name]) for name, part in gradients.items()}
        return {name: changes for name, (changes, _) in found.items()}, state | {
            name: own for name, (_, own) in found.items()
        }

    return optax.GradientTransformation(
        lambda params: {name: parts[name].init(part) for name, part in params.items()}, update
    )


def _one(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then the optimizer of that kind.

    Biases and the gains of norms are not decayed: towards 0 a gain switches its layer off. PyTorch's AdamW, and with
    it verl and TRL, decays every parameter unless it is given groups.
    """
    schedule = make_schedule(settings, steps)
    matrices = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, x: path[-1].key == 'weight' and 'norm' not in jax.tree_util.keystr(path), params
    )
    clip = optax.clip_by_global_norm(settings.grad_clip)
    if settings.kind == 'adamw':
        decay = settings.weight_decay
        return optax.chain(clip, optax.adamw(schedule, settings.b1, settings.b2, weight_decay=decay, mask=matrices))
    if settings.kind == 'adamw_bf16':
        scale = scale_by_adam_bf16(settings.b1, settings.b2)
    else:  # arXiv 1804.04235, §8: decay 1 − t^−0.8, updates clipped at a root mean square of 1
        scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    decay = optax.add_decayed_weights(settings.weight_decay, matrices)
    return optax.chain(clip, scale, decay, optax.scale_by_learning_rate(schedule))


def scale_by_adam_bf16(b1: float, b2: float) -> optax.GradientTransformation:
    """optax.scale_by_adam with both moments in bf16, rounded up or down by chance, so that they are right in the mean.

    Rounded to the nearest, a second moment would stand still: a step of b2 = 0.999 changes it by a thousandth, and
    bf16 has steps of a 128th.
    """
    adam = optax.scale_by_adam(b1, b2)

    def rounded(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        key = jax.random.fold_in(jax.random.key(0), state.count)
        leaves, tree = jax.tree.flatten((state.mu, state.nu))
        found = [round_by_chance(x, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
        mu, nu = jax.tree.unflatten(tree, found)
        return state._replace(mu=mu, nu=nu)

    def update(gradients, state, params=None):
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        updates, state = adam.update(gradients, state._replace(mu=wide(state.mu), nu=wide(state.nu)), params)
        return updates, rounded(state)

    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    def init(params):
        state = adam.init(params)
        return state._replace(mu=low(state.mu), nu=low(state.nu))

    return optax.GradientTransformation(init, update)


def round_by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
    """f32 → bf16, up or down with probabilities by which the mean is x: 16 random bits are added below bf16's last."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def lowered(params: Params, dtype: str) -> Params:
    """Trained weights as gradients are taken of them: in `dtype` but for the gains of norms and a critic's head."""
    kept = lambda words: decoder.is_gain(words) or 'head' in words
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if kept([entry.key for entry in path]) else x.astype(dtype), params
    )


def init_value_head(config: ModelConfig) -> Params:
    """A zero linear head: the first value estimates are 0, in the middle of ±1 rewards."""
    return {'weight': jnp.zeros((config.hidden_size, 1), jnp.float32), 'bias': jnp.zeros((1,), jnp.float32)}


def add_critic(config: ModelConfig, policy: Params, kind: str) -> Params:
    """The trained tree: {'policy', 'critic'}; the critic is a 'head' on the policy's trunk, its own
    'backbone' that starts from the policy's weights, or 'none'. A policy of adapters has a critic of adapters, over the
    same frozen weights.

    Raises:
      ValueError: no such kind.
    """
    if kind == 'none':
        return {'policy': policy}
    if kind not in CRITICS:
        raise ValueError(f'critic {kind!r} is unknown; choose one of {", ".join(CRITICS)}')
    critic = {'head': _everywhere(init_value_head(config), policy)}
    if kind == 'backbone':
        trunk = [name for name in ('embed_tokens', 'layers', 'norm') if name in policy]
        critic['backbone'] = {name: jax.tree.map(jnp.copy, policy[name]) for name in trunk}
    return {'policy': policy, 'critic': critic}


def backbones(params: Params) -> list[Params]:
    """{'policy', 'critic'} cut between models that share no weights, each scored and differentiated by itself: the
    activations and collectives of one at a time. A critic that is a head on the policy stays with it."""
    if 'backbone' in params.get('critic', {}):
        return [{name: weights} for name, weights in params.items()]
    return [params]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state at step 0; counters lie on every device of the parameters' mesh."""
    # A moment lies as its weight does; counters and factored moments, which are small, lie everywhere.
    lies = lambda x: isinstance(getattr(x, 'sharding', None), NamedSharding)
    moments = jax.tree.map(lambda x: x if lies(x) else _everywhere(x, params), optimizer.init(params))
    return TrainState(step=_everywhere(jnp.int32(0), params), params=params, opt_state=moments)


def _everywhere(tree, params: Params):
    """`tree`, the same in every process, whole on each device of the mesh that `params` lie on."""
    home = getattr(jax.tree.leaves(params)[0], 'sharding', None)
    if not isinstance(home, NamedSharding):  # one device, or shapes alone
        return tree
    whole = NamedSharding(home.mesh, PartitionSpec())

    def spread(x):
        held = np.asarray(x)
        return jax.make_array_from_callback(held.shape, whole, held.__getitem__)

    return jax.tree.map(lambda x: x if x.sharding == whole else spread(x), tree)
