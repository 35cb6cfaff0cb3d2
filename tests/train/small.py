"""A model that compiles in a second, hand-made episodes, and a learner that keeps its last gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core import sharding
from retool_jax.core.records import Episode, Problem, Reward, Stop
from retool_jax.rollout import turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.text import tags
from retool_jax.train.learner import Learner
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.state import add_critic, init_state
from tests.fakes import FakePool, byte_tokenizer
from tests.model.sizes import make_config, make_params

CONFIG = make_config('qwen2')  # untied, 96 ids
LR = 1e-2
# Unrolled and in one chunk a learner compiles in half the time.
FORWARD = dict(
    dtype='float32',
    gradient_dtype='float32',
    attention='dense',
    remat='none',
    unroll=2,
    logprob_chunk=48,
    vocab_chunk=96,
    micro_rows=2,
    row_width=48,
    row_segments=3,
)
LOSS = dict(
    kind='ppo',
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=10.0,
    aggregation='token-mean',
    aggregation_constant=None,
    entropy_coef=0.01,
    kl_coef=0.0,
    kl_kind='k3',
    kl_in='loss',
    value_coef=0.5,
    value_clip=None,
    correction='token',
    correction_cap=2.0,
    correction_low=0.5,
    correction_high=2.0,
)

# Random models spell no tag, so single letters stand for them: calls and answers are frequent.
TOKENIZER = byte_tokenizer()
SPEAKER = make_config('qwen2', vocab_size=264, initializer_range=0.2)
TABLE = tags.build_table(TOKENIZER.token_bytes, 264, {'a': tags.CODE, 'e': tags.CODE, 'o': tags.CODE, 'z': tags.ANSWER})
TURNS = turns.TurnSettings(
    tools=True, max_tokens=128, max_turn_tokens=30, max_turns=3, max_calls=2, on_cap='answer', on_answer='end'
)


def make_forward(**changes) -> ForwardSettings:
    return ForwardSettings(**(FORWARD | changes))


def make_loss(**changes) -> LossSettings:
    return LossSettings(**(LOSS | changes))


def make_advantage(**changes) -> AdvantageSettings:
    return AdvantageSettings(**(dict(kind='gae', gamma=1.0, lam=0.95, whiten=True) | changes))


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])


def recording(optimizer: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """AdamW (or another) after a stage that keeps the gradient it was given in its state."""
    return optax.chain(optax.trace(decay=0.0), optimizer or optax.adamw(LR, weight_decay=0.01))


def gradient(state):
    """What `recording` kept."""
    return jax.device_get(state.opt_state[0].trace)


def make_tree(critic: str = 'head', seed: int = 0):
    """Parameters of CONFIG with a critic whose head is not zero, so that its gradient reaches below it."""
    tree = add_critic(CONFIG, make_params(CONFIG, seed), critic)
    if critic != 'none':
        tree['critic']['head']['weight'] += 0.1 * jax.random.normal(jax.random.key(seed), (CONFIG.hidden_size, 1))
    return tree


def make_state(optimizer, critic: str = 'head'):
    return init_state(jax.tree.map(jnp.copy, make_tree(critic)), optimizer)


def make_learner(optimizer=None, *, rl: bool = True, forward=None, loss=None, advantage=None) -> Learner:
    return Learner(
        CONFIG,
        forward or make_forward(),
        optimizer or recording(),
        one_device(),
        loss=(loss or make_loss()) if rl else None,
        advantage=(advantage or make_advantage()) if rl else None,
    )


def make_episode(
    rng: np.random.Generator,
    problem: str,
    *lengths: int,
    sample: int = 0,
    reward: float | None = None,
    vocab: int = 90,
    **fields,
) -> Episode:
    """Random tokens: a prompt, then runs of the policy and of tools in turn, of these lengths."""
    episode = Episode(Problem(problem, 'Q?', '1', 'test', ''), sample=sample, step=0, stop=Stop.EOS, turns=1)
    for i, n in enumerate(lengths):
        acted = i % 2 == 1
        episode.append(rng.integers(0, vocab, n).tolist(), acted, rng.uniform(-6, -3, n) if acted else None)
    episode.prompt_length = lengths[0]
    value = float(rng.choice([-1.0, 1.0])) if reward is None else reward
    episode.reward = Reward(value, value > 0, value > 0, value > 0, '1' if value > 0 else '2')
    for name, found in fields.items():
        setattr(episode, name, found)
    return episode


def make_episodes(count: int = 8, seed: int = 0, samples: int = 2) -> list[Episode]:
    """Episodes of unequal length; every other one ends in tool output."""
    rng = np.random.default_rng(seed)
    lengths = lambda i: rng.integers(2, 7, 4 + i % 2).tolist()
    return [make_episode(rng, f'p{i // samples}', *lengths(i), sample=i % samples) for i in range(count)]


def places(batch, rows: tuple[int, int] | None = None):
    """(row, episode's number in it, where its tokens stand there) of each episode of a batch or of some of its rows."""
    for r in range(*(rows or (0, len(batch.tokens_BT)))):
        ids = batch.segment_ids_BT[r]
        for n in range(batch.reward_BN.shape[1]):
            own = np.flatnonzero(ids == n + 1)
            if own.size:
                before = ids == batch.prefix_ids_BT[r, own[0]] if batch.prefix_ids_BT is not None else ids == n + 1
                yield r, n, np.union1d(np.flatnonzero(before), own)


def distance(a, b) -> float:
    """‖a − b‖ / ‖b‖ over a tree."""
    size = lambda tree: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
    return float(size(jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)) / size(b))


def make_sampler(rows: int = 4) -> Sampler:
    sizes = SamplerSettings(
        rows=rows,
        slots=128,
        chunk=32,
        feed_rows=2,
        quota=8,
        decode_rows=0,
        min_bound=128,
        dtype='float32',
        weights='float',
        cache_dtype='float32',
    )
    return Sampler(SPEAKER, sizes, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)


def make_engine(sampler: Sampler, kind=Engine) -> Engine:
    """Every snippet prints how long it is."""
    rules = turns.Rules(TURNS, TOKENIZER, TABLE, lambda result: result.stdout)
    plain = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
    return kind(sampler, rules, plain, FakePool(lambda code: f'{len(code)}'), seed=1, purpose=1)


def make_problems(count: int) -> list[Problem]:
    return [Problem(f'p{i}', f'Q{i}?', '7', 'test', '') for i in range(count)]


def assert_same_step(found, expected):
    """(gradients, parameters, metrics, …) of one step on two meshes are equal up to the order of additions."""
    for part in ('policy', 'critic'):
        # Whitened advantages cancel in the policy's sum, so its rounding is 100 × the critic's: up to 1.3e-5 was seen.
        assert distance(found[0][part], expected[0][part]) < {'policy': 5e-5, 'critic': 1e-5}[part]
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected[0][part]))
    change = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])))])
    assert change.mean() < 0.05 * LR and change.max() < 2 * LR
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
