"""How fast the update is: one PPO step of `train.learner.Learner` as a share of what plain matmuls reach.

The model's operations are counted, not the machine's: 6 per weight that multiplies and token (the output matrix once,
the embedding's look-up not), and 12·L·T·D per token for attention (the convention of PaLM, arXiv 2204.02311, which
counts the whole square). Recomputation, of layers or of logits, is not counted: it is the program's own choice. The
matmul rate is measured in the same run, before and after, and the better one is taken.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core import sharding
from retool_jax.core.pytrees import Batch, Scores
from retool_jax.model import decoder
from retool_jax.model.config import ModelConfig
from retool_jax.train.learner import Learner
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.state import OptimizerSettings, init_state, make_optimizer

ROOT = Path(__file__).parents[2]
PEER = ROOT / '.baselines' / 'torch' / 'bin' / 'python'
MATMUL = 2048  # width of the square matrices that the rate is measured with; four times as wide on accelerators


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The model and the batch; the defaults are those of docs/benchmarks.md."""

    layers: int = 6
    width: int = 512
    mlp: int = 1408
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 4096
    tokens: int = 512  # per row
    rows: int = 8
    micro_rows: int = 4
    dtype: str = 'float32'
    attention: str = 'dense'
    remat: str = 'none'
    logprob_chunk: int = 512
    vocab_chunk: int = 4096
    unroll: int = 1


def measure(shape: Shape, repeats: int, say: Callable[[str], None]) -> dict:
    """Every figure; rates in GFLOP/s, times in seconds (medians)."""
    say('matmul')
    rates = [matmul_rate(shape.dtype, repeats)]
    say('update')
    config = model_config(shape)
    forward = ForwardSettings(
        dtype=shape.dtype,
        gradient_dtype='float32',
        attention=shape.attention,
        remat=shape.remat,
        unroll=shape.unroll,
        logprob_chunk=min(shape.logprob_chunk, shape.tokens),
        vocab_chunk=shape.vocab_chunk,
        micro_rows=shape.micro_rows,
        row_width=shape.tokens,
        row_segments=1,
    )
    seconds = float(np.median(update_seconds(config, forward, make_batch(shape), repeats)))
    tokens = shape.rows * shape.tokens
    say('matmul')
    rates.append(matmul_rate(shape.dtype, repeats))
    flops = tokens * flops_per_token(config, shape.tokens)
    figures = {
        'device': jax.devices()[0].device_kind,
        **dataclasses.asdict(shape),
        'update_s': seconds,
        'tokens_per_s': tokens / seconds,
        'gflops': flops / seconds / 1e9,
        'matmul_gflops': max(rates) / 1e9,
        'share_of_matmul': flops / seconds / max(rates),
    }
    if PEER.exists():
        say('the same update in torch')
        figures |= peer(shape, repeats, flops)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}


def model_config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        model_type='qwen2',
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        tie_word_embeddings=False,
        max_position_embeddings=shape.tokens,
    )


def flops_per_token(config: ModelConfig, tokens: int) -> int:
    """Operations per token of a forward and a backward pass, as the module's docstring counts them."""
    leaves = jax.tree_util.tree_leaves_with_path(decoder.abstract_params(config))
    names = [(jax.tree_util.keystr(path), x.size) for path, x in leaves if path[-1].key == 'weight']
    skipped = ('norm',) if config.tie_word_embeddings else ('norm', 'embed_tokens')
    matrices = sum(size for name, size in names if not any(word in name for word in skipped))
    heads = config.num_attention_heads * config.head_dim
    return 6 * matrices + 12 * config.num_hidden_layers * heads * tokens


def matmul_rate(dtype: str, repeats: int) -> float:
    """FLOP/s of a square matmul that is long enough to measure."""
    n = MATMUL * (4 if jax.default_backend() != 'cpu' else 1)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in range(2))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2.0 * n**3 / best(lambda: multiply(a, b), repeats)


def best(work: Callable, repeats: int) -> float:
    """Seconds of the fastest call, after one that compiles."""
    jax.block_until_ready(work())
    return min(_clock(work) for _ in range(repeats))


def _clock(work: Callable) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def make_batch(shape: Shape) -> Batch:
    """Full rows of one random episode each; the first eighth is the prompt."""
    rng = np.random.default_rng(0)
    b, t = shape.rows, shape.tokens
    acted = np.broadcast_to(np.arange(t) >= t // 8, (b, t))
    return Batch(
        tokens_BT=rng.integers(0, shape.vocab, (b, t)).astype(np.int32),
        segment_ids_BT=np.ones((b, t), np.int32),
        positions_BT=np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)),
        acted_BT=acted,
        sampler_logprob_BT=np.where(acted, np.float32(-np.log(shape.vocab)), np.float32(0)),
        reward_BN=rng.choice([-1.0, 1.0], (b, 1)).astype(np.float32),
        group_BN=np.zeros((b, 1), np.int32),
        baseline_BN=np.ones((b, 1), bool),
        update_BN=np.ones((b, 1), bool),
    )


def update_seconds(config: ModelConfig, forward: ForwardSettings, batch: Batch, repeats: int) -> list[float]:
    """Seconds of `repeats` optimizer steps over the batch (numpy), after one that compiles.

    Raises: RuntimeError where the gradient is 0 or not finite.
    """
    mesh = sharding.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 1})
    optimizer = make_optimizer(
        OptimizerSettings(
            kind='adamw',
            lr=1e-6,
            schedule='constant',
            warmup_steps=0,
            b1=0.9,
            b2=0.999,
            weight_decay=0.01,
            grad_clip=1.0,
        ),
        repeats,
    )
    loss = LossSettings(
        kind='ppo',
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=10.0,
        aggregation='token-mean',
        aggregation_constant=None,
        entropy_coef=0.0,
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
    learner = Learner(
        config,
        forward,
        optimizer,
        mesh,
        loss=loss,
        advantage=AdvantageSettings(kind='grpo', gamma=1.0, lam=1.0, whiten=False),
    )
    rules = decoder.fit_rules(config, mesh, sharding.TRAIN_RULES)
    make = jax.jit(
        lambda key: decoder.init(config, key),
        out_shardings=sharding.shardings(mesh, decoder.logical_axes(config), rules),
    )
    state = init_state({'policy': make(jax.random.key(0))}, optimizer)
    rows, groups = len(batch.tokens_BT), int(batch.group_BN.max()) + 1
    batch = learner.put(batch)
    scores: Scores = learner.score(state.params, batch, rows, None, num_groups=groups)
    taken = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        state, metrics = learner.ppo_step(state, batch, scores, (0, rows))
        jax.block_until_ready((state, metrics))
        taken.append(time.perf_counter() - began)
    if not np.isfinite(metrics['actor/grad_norm']) or not metrics['actor/grad_norm'] > 0:
        raise RuntimeError('the measured update is no update: its gradient is 0 or not finite')
    return taken[1:]


def peer(shape: Shape, repeats: int, flops: float) -> dict:
    """The figures of bench/update_torch.py, run by the interpreter that `make baselines` made."""
    script = Path(__file__).with_name('update_torch.py')
    done = subprocess.run(
        [PEER, script, json.dumps(dataclasses.asdict(shape) | {'repeats': repeats})], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f'{script.name}: {done.stderr.strip().splitlines()[-1:]}')
    reply = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        'torch_update_s': reply['update_s'],
        'torch_gflops': flops / reply['update_s'] / 1e9,
        'torch_matmul_gflops': reply['matmul_gflops'],
        'torch_version': reply['version'],
    }
