"""How fast rollout is: against transformers and google-tunix, against its own floor, and with slow tools.

All sides of a figure are measured in one run, in turns, and compared by medians. The peers run as child processes
of the interpreters that `make baselines` made and load the same weights; without them their figures are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.bench import rollout_cache, rollout_tools
from retool_jax.bench.timing import clock, compilations, in_turns
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Problem
from retool_jax.model import decoder, hf
from retool_jax.model.config import ModelConfig
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings

ROOT = Path(__file__).parents[2]
PEERS = {'transformers': ('torch', 'rollout_torch.py'), 'tunix': ('tunix', 'rollout_tunix.py')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The model and the calls; the defaults are those of docs/benchmarks.md."""

    layers: int = 6
    width: int = 256
    mlp: int = 1024
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 4096
    slots: int = 4224  # allocated per row
    short_slots: int = 320  # what the long cache is compared with
    prompt: int = 64
    new: int = 192
    rows: tuple[int, ...] = (1, 16, 64)
    tunix_rows: int = 16
    quota: int = 64
    chunk: int = 64
    tool_s: float = 1.0  # latency of a tool; an episode takes as long to write as its tools to answer
    calls: int = 1  # of tools in an episode, on average: one, and what is written is about `new` tokens
    tool_rows: tuple[int, ...] = (8, 32, 64)  # rows whose tools are slow
    long: int = 4096  # tokens before a tool's output
    dtype: str = 'float32'


def measure(shape: Shape, repeats: int, parts: Sequence[str], say: Callable[[str], None]) -> dict:
    """The figures of `parts` ('peers', 'tools', 'cache'): tokens/s, ratios, seconds."""
    config = model_config(shape)
    params = decoder.init(config, jax.random.key(0))
    lay_out = lambda form: jax.jit(lambda p: decoder.to_sampling(config, p, jnp.dtype(shape.dtype), form))(params)
    weights = lay_out('float')
    figures = {'device': jax.devices()[0].device_kind, **dataclasses.asdict(shape)}

    def keep(measured: dict) -> None:
        say(json.dumps(measured))  # a later part may fail
        figures.update(measured)

    if 'peers' in parts:
        with tempfile.TemporaryDirectory() as folder:
            hf.save(Path(folder) / 'model', config, params, jnp.dtype(shape.dtype))
            with open_peers(Path(folder) / 'model', shape.slots, say) as peers:
                keep(against_peers(config, weights, lay_out('int8'), shape, repeats, peers, say))
                if 'tunix' in peers:
                    keep(against_new_budgets(config, weights, shape, repeats, peers['tunix'], say))
    if 'tools' in parts:
        keep(rollout_tools.measure(config, weights, shape, repeats, say))
    if 'cache' in parts:
        keep(rollout_cache.measure(config, weights, shape, repeats, say))
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
        max_position_embeddings=max(shape.slots, 4096),
    )


class Peer:
    """A child process that answers one line of JSON with one line of JSON."""

    def __init__(self, interpreter: Path, script: Path, *arguments: str):
        self.child = subprocess.Popen(
            [interpreter, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.version = self._read()['version']

    def ask(self, rows: int, prompt: int, new: int) -> float:
        """Seconds of one call."""
        self.child.stdin.write(json.dumps({'rows': rows, 'prompt': prompt, 'new': new}) + '\n')
        self.child.stdin.flush()
        reply = self._read()
        if reply['tokens'] != rows * new:
            raise RuntimeError(f'{self.child.args[1].name} wrote {reply["tokens"]} tokens, not {rows * new}')
        return reply['seconds']

    def _read(self) -> dict:
        for line in self.child.stdout:
            if line.startswith('{'):  # libraries may talk
                return json.loads(line)
        raise RuntimeError(f'{self.child.args[1].name}: {self.child.stderr.read().strip()[-500:]}')

    def close(self) -> None:
        self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.child.stderr.close()


@contextlib.contextmanager
def open_peers(directory: Path, slots: int, say: Callable[[str], None]) -> Iterator[dict[str, Peer]]:
    """The peers that are installed, with the weights of `directory` loaded."""
    with contextlib.ExitStack() as stack:
        peers = {}
        for name, (environment, script) in PEERS.items():
            interpreter = ROOT / '.baselines' / environment / 'bin' / 'python'
            if not interpreter.exists():
                say(f'{name} is not here: make baselines')
                continue
            peers[name] = Peer(interpreter, Path(__file__).with_name(script), str(directory), str(slots))
            stack.callback(peers[name].close)
        yield peers


def make_engine(config: ModelConfig, shape: Shape, rows: int) -> Engine:
    """An engine whose episodes end at their budget alone."""
    sizes = SamplerSettings(
        rows=rows,
        slots=shape.slots,
        chunk=shape.chunk,
        feed_rows=min(8, rows),
        quota=shape.quota,
        decode_rows=0,
        min_bound=shape.chunk,
        dtype=shape.dtype,
        weights='float',
        cache_dtype=shape.dtype,
    )
    sampler = Sampler(config, sizes, np.zeros((1, shape.vocab), np.int32), np.zeros(1, np.int8), ())
    engine = Engine(sampler, rollout_tools.Script(shape.new, shape.slots, 0), PLAIN, None, seed=0, purpose=0)
    engine.keeps_cache = True
    return engine


PLAIN = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)


def make_requests(shape: Shape, count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    prompt = lambda: tuple(rng.integers(0, shape.vocab, shape.prompt).tolist())
    return [Request(Problem(f'{seed}/{i}', '', '', '', ''), 0, prompt()) for i in range(count)]


def run_seconds(engine: Engine, params: Params, requests: list[Request], tokens: int) -> float:
    """Seconds of one run, which must write so many tokens."""
    began = time.perf_counter()
    engine.run(params, 0, requests, step=0)
    seconds = time.perf_counter() - began
    if engine.stats.sampled_tokens != tokens:
        raise RuntimeError(f'{engine.stats.sampled_tokens} tokens were sampled, not {tokens}')
    return seconds


def against_peers(
    config: ModelConfig,
    weights: Params,
    narrow: Params,
    shape: Shape,
    repeats: int,
    peers: dict[str, Peer],
    say: Callable[[str], None],
) -> dict:
    """tokens/s at each batch size: of engine, the same with weights in 8 bits (`narrow`), floor and transformers."""
    figures = {}
    for rows in shape.rows:
        say(f'{rows} rows')
        tokens, engine = rows * shape.new, make_engine(config, shape, rows)
        floor = floor_program(config, shape, rows)
        ours = lambda params, i, e=engine, r=rows, t=tokens: run_seconds(e, params, make_requests(shape, r, i), t)
        sides = {
            'engine': functools.partial(ours, weights),
            'int8': functools.partial(ours, narrow),
            'floor': lambda i, f=floor: clock(f, weights),
        }
        if 'transformers' in peers:
            sides['transformers'] = lambda i, r=rows: peers['transformers'].ask(r, shape.prompt, shape.new)
        seconds = in_turns(sides, repeats)
        figures |= {f'{name}_tokens_per_s_{rows}': tokens / s for name, s in seconds.items()}
        figures[f'share_of_floor_{rows}'] = seconds['floor'] / seconds['engine']
        figures[f'int8_over_engine_{rows}'] = seconds['engine'] / seconds['int8']
        if 'transformers' in peers:
            figures[f'over_transformers_{rows}'] = seconds['transformers'] / seconds['engine']
    if 'transformers' in peers:
        figures['transformers_version'] = peers['transformers'].version
    return figures


def against_new_budgets(
    config: ModelConfig, weights: Params, shape: Shape, repeats: int, peer: Peer, say: Callable[[str], None]
) -> dict:
    """A new token budget on every call, as in an agent's turns; ours compiles nothing for it."""
    say('new budgets')
    engine = make_engine(config, shape, shape.tunix_rows)
    budget = lambda i: shape.new - i

    def ours(i: int) -> float:
        engine.rules = rollout_tools.Script(budget(i), shape.slots, 0)
        return run_seconds(engine, weights, make_requests(shape, shape.tunix_rows, i), shape.tunix_rows * budget(i))

    theirs = lambda i: peer.ask(shape.tunix_rows, shape.prompt, budget(i))
    compiled = compilations()
    seconds = in_turns({'engine': ours, 'tunix': theirs}, repeats, warm=compiled.clear)
    return {
        'tunix_s': seconds['tunix'],
        'engine_new_budget_s': seconds['engine'],
        'over_tunix': seconds['tunix'] / seconds['engine'],
        'new_budget_compilations': len(compiled),
        'tunix_version': peer.version,
    }


def floor_program(config: ModelConfig, shape: Shape, rows: int) -> Callable:
    """What cannot be avoided: a step's matmuls and one read of the live KV, `new` times in one loop."""
    live = shape.prompt + shape.new // 2
    kv = jnp.ones((2, config.num_hidden_layers, rows, config.num_key_value_heads, live, config.head_dim), shape.dtype)
    groups = config.num_attention_heads // config.num_key_value_heads

    @jax.jit
    def run(params: Params, kv: jax.Array) -> jax.Array:
        def step(_, x_BD):
            for layer, p in enumerate(params['layers']):
                project = lambda name, x, p=p: jnp.einsum('BD,DNH->BNH', x, p['self_attn'][name]['weight'])
                q_BNH, k_BKH, v_BKH = (project(name, x_BD) for name in ('q_proj', 'k_proj', 'v_proj'))
                q_BKGH = q_BNH.reshape(rows, -1, groups, config.head_dim)
                score = jnp.einsum('BKGH,BKSH->BKGS', q_BKGH + (k_BKH + v_BKH)[:, :, None], kv[0, layer])
                mixed = jnp.einsum('BKGS,BKSH->BKGH', score, kv[1, layer]).reshape(rows, -1, config.head_dim)
                x_BD = x_BD + jnp.einsum('BNH,NHD->BD', mixed, p['self_attn']['o_proj']['weight'])
                weight = lambda name, p=p: p['mlp'][name]['weight']
                x_BD = x_BD + (x_BD @ weight('gate_proj') * (x_BD @ weight('up_proj'))) @ weight('down_proj')
                x_BD = x_BD / jnp.abs(x_BD).max(axis=-1, keepdims=True)  # stays in range
            return x_BD + (x_BD @ params['lm_head']['weight']).max(axis=-1, keepdims=True)

        return jax.lax.fori_loop(0, shape.new, step, jnp.ones((rows, shape.width), shape.dtype))

    return lambda params: run(params, kv)
