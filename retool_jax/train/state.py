"""Optimizer and training state: f32 master weights, AdamW, one state for the policy and its critic."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from retool_jax.core.checks import MANY, above, below, check, one_of, within
from retool_jax.core.pytrees import Params, TrainState
from retool_jax.model.config import ModelConfig

SCHEDULES = ('constant', 'cosine', 'linear', 'wsd')
CRITICS = ('none', 'head', 'backbone')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a schedule."""

    lr: float  # the largest learning rate. P 1e-6 in RL; R 2e-6 for the critic, 1e-5 in SFT
    # After warm-up: 'constant'; 'cosine' or 'linear' down to 0; 'wsd', constant, in the last quarter linear to 0.
    # R constant in RL, cosine in SFT
    schedule: str
    warmup_steps: int  # optimizer steps of linear warm-up from 0. R 0 in RL, a tenth of the steps in SFT
    b1: float  # decay of AdamW's first moment. R 0.9
    b2: float  # decay of AdamW's second moment. R 0.999 in RL, 0.95 in SFT
    weight_decay: float  # of matrices; biases and the gains of norms are not decayed. R 0.01
    grad_clip: float  # largest global norm of a part's gradient, policy and critic apart. R 1

    def __post_init__(self):
        check(
            self,
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
    """AdamW for the tree {'policy', 'critic'}, each part clipped, scheduled and counted on its own.

    Gradients may lack a part, which then keeps parameters, moments and count: so the policy is held for the first
    `critic_warmup_steps` optimizer steps, and its schedule takes its course over the others.
    """
    parts = {'policy': _adamw(policy, steps - critic_warmup_steps)}
    if critic is not None:
        parts['critic'] = _adamw(critic, steps)

    def update(gradients, state, params):
        found = {name: parts[name].update(part, state[name], params[name]) for name, part in gradients.items()}
        return {name: changes for name, (changes, _) in found.items()}, state | {
            name: own for name, (_, own) in found.items()
        }

    return optax.GradientTransformation(
        lambda params: {name: parts[name].init(part) for name, part in params.items()}, update
    )


def _adamw(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    Biases and the gains of norms are not decayed: towards 0 a gain switches its layer off. PyTorch's AdamW, and with
    it verl and TRL, decays every parameter unless it is given groups.
    """
    schedule = make_schedule(settings, steps)
    matrices = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, x: path[-1].key == 'weight' and 'norm' not in jax.tree_util.keystr(path), params
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.grad_clip),
        optax.adamw(schedule, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay, mask=matrices),
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


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state at step 0; counters lie on every device of the parameters' mesh."""
    moments = jax.tree.map(lambda x: _everywhere(x, params) if x.ndim == 0 else x, optimizer.init(params))
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
