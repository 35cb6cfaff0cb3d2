"""What an accelerator makes of decode, extend and update at Qwen2.5's shapes, with transformers beside them.

Every group of cases is a process of its own, so that its memory is free for the next one; a case that fails is a
result that says so. What is known is in `results.jsonl` at once: a run that is stopped loses nothing. The groups stand
in the order of what matters most, for the clock may end before they do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from retool_jax.plan import models

ROOT = Path(__file__).parents[2]
PEER = ROOT / '.baselines' / 'torch' / 'bin' / 'python'
PEAK = 989e12  # bf16 FLOP/s of an H100 or H200, dense, by NVIDIA's data sheet
DECODE_BAR, UPDATE_BAR = 0.6, 0.45  # of the floor's rate; of the peak


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of one process; a case may take `limit` seconds, its compilation and the process's start within."""

    cases: list[dict]
    side: str = 'jax'
    flags: str = ''  # for XLA
    limit: float = 75


def groups(toy: bool) -> list[Group]:
    """All that is measured, first things first; toy: sizes for a CPU."""
    small, big = ('tiny', 'tiny') if toy else ('qwen2_5_1_5b', 'qwen2_5_7b')
    rows = (1, 2) if toy else (1, 64, 256)
    slots, low, high, quota, calls = (64, 8, 40, 4, 1) if toy else (4096, 256, 3900, 32, 4)
    tag = lambda model: {'tiny': 'tiny', 'qwen2_5_1_5b': '1.5B', 'qwen2_5_7b': '7B'}[model]

    def decode(model: str, b: int, slots=slots, high=high, cache='bfloat16', note='', fused=True) -> dict:
        return {
            'case': f'decode {tag(model)} × {b}{note}',
            'kind': 'decode',
            'model': model,
            'rows': b,
            'slots': slots,
            'low': low,
            'high': high,
            'quota': quota,
            'calls': calls,
            'dtype': 'bfloat16',
            'cache_dtype': cache,
            'fused': fused,
        }

    def extend(start: int) -> dict:
        chunk, feed = (8, 2) if toy else (256, 8)
        return {
            'case': f'extend {tag(small)} after {start}',
            'kind': 'extend',
            'model': small,
            'rows': rows[1],
            'slots': slots,
            'start': start,
            'chunk': chunk,
            'feed_rows': feed,
            'calls': calls,
            'dtype': 'bfloat16',
            'cache_dtype': 'bfloat16',
        }

    def update(width: int, attend: str, rows: int, remat='full') -> Group:
        chunks = (width // 2, 64) if toy else (4096, 65536)
        return Group(
            [
                {
                    'case': f'update {tag(small)}, rows of {width}, {attend}' + f', remat {remat}' * (remat != 'full'),
                    'kind': 'update',
                    'model': small,
                    'width': width,
                    'rows': rows,
                    'micro_rows': 1,
                    'attend': attend,
                    'remat': remat,
                    'logprob_chunk': chunks[0],
                    'vocab_chunk': chunks[1],
                    'repeats': 1 if toy else 3,
                    'dtype': 'bfloat16',
                }
            ],
            limit=90,
        )

    def attend(width: int, kind: str) -> dict:
        return {
            'case': f'attention, row of {width}, {kind}',
            'kind': 'attend',
            'model': small,
            'width': width,
            'attend': kind,
            'repeats': 1 if toy else 5,
            'dtype': 'bfloat16',
        }

    def generate(model: str, b: int) -> dict:
        m = models.sizes(None, model)
        config = {
            name: getattr(m, name)
            for name in (
                'vocab_size',
                'hidden_size',
                'intermediate_size',
                'num_hidden_layers',
                'num_attention_heads',
                'num_key_value_heads',
                'tie_word_embeddings',
                'max_position_embeddings',
            )
        }
        return {
            'case': f'transformers {tag(model)} × {b}',
            'config': config,
            'lengths': spread(b, low, high).tolist(),
            'new': quota,
            'calls': 1,
            'dtype': 'bfloat16',
        }

    short, long = (64, 128) if toy else (4096, 16384)
    first = {'case': 'device', 'kind': 'device', 'bytes': 1 << (16 if toy else 31), 'repeats': 2 if toy else 10}
    plain = 'blocked'
    if toy:
        return [
            Group([first, *(decode(small, b) for b in rows), extend(16), attend(long, plain)]),
            update(long, plain, 2),
            Group([generate(small, b) for b in rows], 'torch'),
        ]
    return [
        Group(
            [
                first,
                decode(small, 64),
                decode(small, 64, note=', no kernel', fused=False),
                decode(small, 256),
                decode(small, 1),
                extend(0),
                extend(2500),
            ]
        ),
        update(long, 'cudnn', 2),
        update(long, 'cudnn', 2, 'dots'),
        Group([attend(long, 'cudnn'), attend(long, plain)]),
        update(short, 'cudnn', 8),
        Group(
            [
                decode(big, 64),
                decode(big, 1),
                decode(big, 256, 2048, 1850, note=', short'),
                decode(big, 256, cache='int8', note=', int8 KV'),
            ]
        ),
        Group([generate(small, b) for b in (64, 1, 256)], 'torch'),
        update(long, plain, 2),
        Group([generate(big, b) for b in (64, 1)], 'torch'),
        Group(
            [decode(small, 64, note=', loop as a graph'), decode(small, 1, note=', loop as a graph')],
            flags='--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL',
        ),
        update(short, plain, 8),
    ]


def spread(rows: int, low: int, high: int) -> np.ndarray:
    """Lengths spread evenly over low … high, in no order; of one row the middle."""
    lengths = np.linspace(low, high, rows).astype(int) if rows > 1 else np.array([(low + high) // 2])
    return np.random.default_rng(0).permutation(lengths)


def measure(out: Path, toy: bool, seconds: float, say: Callable[[str], None]) -> dict:
    """Runs the groups until `seconds` are over; each result, with its shares, goes to `out`/results.jsonl at once."""
    out.mkdir(parents=True, exist_ok=True)
    ends, results, bandwidth, matmul = time.monotonic() + seconds, {}, None, None
    plans = {} if toy else {width: predict(width) for width in (4096, 16384)}
    with open(out / 'results.jsonl', 'w', encoding='utf-8') as file, open(out / 'children.log', 'w') as log:
        for group in groups(toy):
            for found in run(group, ends, log):
                if 'copy_bytes_per_s' in found:
                    bandwidth = max(found['copy_bytes_per_s'], found['read_bytes_per_s'])
                    matmul = found['matmul_flops']
                results[found['case']] = found = derive(found, results, bandwidth, matmul)
                file.write(json.dumps(found) + '\n')
                file.flush()
                say(line(found))
    for width, child in plans.items():
        predicted = predicted_bytes(child)
        for name, found in results.items():
            if predicted and name.startswith('update') and f'rows of {width},' in name:
                found['predicted_bytes'] = predicted
    return {'toy': toy, 'peak_flops': PEAK, 'results': {name: round_figures(x) for name, x in results.items()}}


def run(group: Group, ends: float, log) -> Iterator[dict]:
    """The results of a group. A process that dies or hangs has failed in the case at hand; another takes the rest."""
    interpreter, reason = interpreter_of(group.side)
    left = list(group.cases)
    while left:
        if reason or time.monotonic() > ends - 10:
            yield from ({'case': case['case'], 'error': reason or 'the time was over'} for case in left)
            return
        child = start(group, left, interpreter, log)
        lines: queue.Queue = queue.Queue()
        threading.Thread(target=_read, args=(child, lines), daemon=True).start()
        why = ''
        try:
            while left and not why:
                limit = min(group.limit, ends - time.monotonic())
                try:
                    text = lines.get(timeout=max(limit, 0.1))
                except queue.Empty:
                    why = f'no result within {limit:.0f} s'
                    continue
                if text is None:
                    why = f'the process ended with status {child.wait()}'
                elif text.startswith('{'):  # libraries may talk
                    left.pop(0)
                    yield json.loads(text)
        finally:
            stop(child, 0 if why else 15)
        if left:
            yield {'case': left.pop(0)['case'], 'error': why}


def predict(width: int) -> subprocess.Popen:
    """launch/plan.py, which needs no accelerator, on the update that is measured."""
    keys = {
        'forward.row_width': width,
        'turns.max_tokens': width,
        'turns.max_turn_tokens': width,
        'sampler.slots': width,
    }
    return subprocess.Popen(
        [
            sys.executable,
            ROOT / 'launch/plan.py',
            '--config=configs/grpo.py:qwen2_5_1_5b',
            '--topology=h100:1',
            '--json',
            *(f'--config.{key}={value}' for key, value in keys.items()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | pythonpath(),
    )


def predicted_bytes(child: subprocess.Popen) -> int | None:
    """Weights, moments, gradients and temporaries; None where the plan's own libraries are not here."""
    try:
        text, _ = child.communicate(timeout=20)
        return json.loads(text)['policy_update']['bytes']
    except (subprocess.TimeoutExpired, ValueError):
        child.kill()
        child.wait()
        return None


def interpreter_of(side: str) -> tuple[str, str]:
    """Who runs a side, and why nobody does."""
    if side == 'jax' or all(importlib.util.find_spec(name) for name in ('torch', 'transformers')):
        return sys.executable, ''
    return str(PEER), '' if PEER.exists() else 'torch and transformers are not here: make baselines'


def start(group: Group, cases: list[dict], interpreter: str, log) -> subprocess.Popen:
    script = {
        'jax': ['-m', 'retool_jax.bench.accelerator_jax'],
        'torch': [str(Path(__file__).with_name('accelerator_torch.py'))],
    }[group.side]
    flags = f'{os.environ.get("XLA_FLAGS", "")} {group.flags}'.strip()
    # One process has the device at a time, so it may take nearly all of it at once: what grows by pieces breaks up.
    more = pythonpath() | {
        'PYTHONUNBUFFERED': '1',
        'XLA_FLAGS': flags,
        'XLA_CLIENT_MEM_FRACTION': '0.92',
        'HF_HUB_OFFLINE': '1',
        'TF_CPP_MIN_LOG_LEVEL': '2',
    }
    return subprocess.Popen(
        [interpreter, *script, json.dumps(cases)],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | more,
        cwd=ROOT,
        start_new_session=True,
    )


def pythonpath() -> dict[str, str]:
    """This package first, where it is not installed."""
    return {'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))}


def _read(child: subprocess.Popen, lines: queue.Queue) -> None:
    with child.stdout:
        for text in child.stdout:
            lines.put(text)
    lines.put(None)


def stop(child: subprocess.Popen, patience: float) -> None:
    if child.poll() is None:
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def derive(found: dict, results: dict[str, dict], bandwidth: float | None, matmul: float | None) -> dict:
    """Adds shares: of the bandwidth floor (weights and live KV, read once a step), of the matmul rate and the peak, and
    against transformers."""
    more = {}
    if 'weight_bytes' in found and bandwidth:
        more['floor_step_s'] = (found['weight_bytes'] + found['kv_bytes']) / bandwidth
        more['share_of_floor'] = more['floor_step_s'] / found['step_s']
    if 'flops' in found and matmul:
        more['share_of_matmul'], more['share_of_peak'] = found['flops'] / matmul, found['flops'] / PEAK
    ours = results.get(found['case'].replace('transformers', 'decode'))
    if found['case'].startswith('transformers') and 'step_s' in found and ours and 'step_s' in ours:
        more['ours_over_theirs'] = found['step_s'] / ours['step_s']
    return found | more


def line(found: dict) -> str:
    """One case in words."""
    if 'error' in found:
        return f'{found["case"]}: {found["error"]}'
    words = {
        'tokens_per_s': ('{:,.0f} tokens/s', 1),
        'step_s': ('{:.2f} ms a step', 1e3),
        'call_s': ('{:.2f} ms a call', 1e3),
        'both_s': ('{:.2f} ms', 1e3),
        'share_of_floor': ('{:.2f} of the floor', 1),
        'ours_over_theirs': ('{:.1f} × slower than ours', 1),
        'flops': ('{:.0f} TFLOP/s', 1e-12),
        'share_of_peak': ('{:.0%} of the peak', 1),
        'share_of_matmul': ('{:.0%} of the matmul rate', 1),
        'peak_bytes': ('peak {:.1f} GiB', 2**-30),
        'predicted_bytes': ('{:.1f} GiB planned', 2**-30),
        'copy_bytes_per_s': ('copy {:.2f} TB/s', 1e-12),
        'read_bytes_per_s': ('read {:.2f} TB/s', 1e-12),
        'matmul_flops': ('matmul {:.0f} TFLOP/s', 1e-12),
    }
    return f'{found["case"]}: ' + ', '.join(
        text.format(found[key] * unit) for key, (text, unit) in words.items() if key in found
    )


def table(summary: dict) -> str:
    """The results in lines, each with whether it reaches its bar."""
    lines = []
    for name, found in summary['results'].items():
        share, bar = ('share_of_floor', DECODE_BAR) if name.startswith('decode') else ('share_of_peak', UPDATE_BAR)
        judged = name.startswith(('decode', 'update')) and share in found
        mark = '  ' if not judged else 'ok' if found[share] >= bar else '–'
        lines.append(f'{mark:3}{line(found)}')
    return '\n'.join(lines)


def round_figures(found: dict) -> dict:
    return {key: float(f'{x:.5g}') if isinstance(x, float) else x for key, x in found.items()}
