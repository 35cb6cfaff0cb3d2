"""A small run's own programs through the TPU compiler: phases, exchanged bytes, exit status and remedy are real."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import cli, settings, sharding
from retool_jax.model import decoder
from retool_jax.model.config import TINY, to_hf
from retool_jax.plan import chips, facts, hlo
from retool_jax.plan.programs import Program, Run
from retool_jax.rollout import shards, sync
from retool_jax.rollout.sampler import Sampler
from retool_jax.stages.config import Reinforcement

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {'sync layer', 'sync ends', 'apply', 'score policy', 'update policy', 'score critic', 'update critic',
            'extend', 'decode'}  # fmt: skip
# Whole vectors of 128 everywhere: nothing is padded, and bytes of shapes are bytes of memory.
MODEL = dataclasses.replace(
    TINY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=False,
)
WEIGHTS = 4 * MODEL.parameter_count()  # bytes in f32
TENSOR = FSDP = 2
ROWS, QUOTA = 64, 16  # of the tiny sampler
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chips.compiler() is None, reason='needs the TPU compiler: bash launch/baselines.sh plan'),
]


@pytest.fixture(scope='module')
def plan(tmp_path_factory):
    """Runs launch/plan.py for two by two v5e: exit status and numbers."""
    folder = tmp_path_factory.mktemp('model')
    (folder / 'config.json').write_text(json.dumps(to_hf(MODEL)))

    def run(*overrides: str) -> tuple[int, dict]:
        command = [
            sys.executable,
            'launch/plan.py',
            '--config=configs/ppo.py:tiny',
            '--topology=v5e:2x2',
            '--json',
            f'--config.model.path={folder}',
            '--config.mesh.tensor=2',
            '--config.ppo.critic=backbone',
            '--config.ppo.offload=True',
            f'--config.sampler.rows={ROWS}',
            *overrides,
        ]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {'XLA_FLAGS': ''}
        )
        assert done.returncode in (0, 1), done.stderr[-3000:]
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope='module')
def fitting(plan) -> dict:
    status, found = plan()
    assert status == 0
    return found


def test_every_program_is_compiled_and_every_phase_holds_its_largest(fitting):
    programs = {p['name']: p for p in fitting['programs']}
    assert set(programs) == PROGRAMS and not fitting['estimated'] and fitting['fits'] and fitting['cpu_s'] > 1
    for phase in fitting['phases']:
        mine = [p for p in programs.values() if p['phase'] == phase['name']]
        assert phase['temporaries'] == max(p['temporaries'] for p in mine) > 0
        assert phase['total'] == sum(phase['resident'].values()) + phase['temporaries']
    resident = fitting['phases'][-1]['resident']  # what the compiler takes as arguments is what the table holds
    for name in ('policy', 'critic'):
        assert programs[f'update {name}']['arguments'] == pytest.approx(2 * resident[name], rel=0.15)
    assert programs['sync layer']['temporaries'] < resident['policy'] / MODEL.num_hidden_layers  # one layer, not all
    assert programs['apply']['arguments'] == pytest.approx(
        sum(resident[key] for key in ('policy', 'critic', 'optimizer', 'gradients')), rel=0.15
    )


def test_what_is_exchanged_is_what_the_layout_asks_for(fitting):
    sent = {p['name']: p['sent'] for p in fitting['programs']}
    total = {name: sum(kinds.values()) for name, kinds in sent.items()}
    share = WEIGHTS / TENSOR * (FSDP - 1) / FSDP  # what a chip lacks of its tensor part of the weights
    gathered = sum(p['runs'] * p['sent']['all-gather'] for p in fitting['programs'] if p['name'].startswith('sync'))
    assert share * 0.9 < gathered < share * 1.2
    assert total['apply'] < 1e5  # norms of gradients: numbers, no arrays
    assert share * 0.9 < total['score policy'] < total['update policy'] * 0.7
    sums = 2 * MODEL.num_hidden_layers * ROWS * QUOTA * MODEL.hidden_size * 4  # two a layer and token, in f32
    assert sums * 0.9 < sent['decode']['all-reduce'] * TENSOR / (2 * (TENSOR - 1)) < sums * 2


def test_a_cache_that_does_not_fit_is_said_with_a_number_of_rows_that_does(plan):
    status, found = plan('--config.sampler.rows=40000')  # 20 GiB of keys and values on chips of 16
    sync, rollout, score, update = found['phases']
    assert status == 1 and not found['fits'] and not rollout['fits']
    assert sync['fits'] and score['fits'] and update['fits']
    assert 'decode' in rollout['refused'] and rollout['share'] > 0.9
    remedy = rollout['remedies'][0]
    assert remedy.startswith('sampler.rows=')
    status, found = plan(f'--config.{remedy.split()[0]}')
    assert status == 0 and 0.3 < found['phases'][1]['share'] <= 0.9


def test_weights_in_8_bits_go_into_the_matmuls_as_they_lie():
    """No instruction of a decode call, whose fusions widen on chip, makes or carries a matrix in 16 bits."""
    model = dataclasses.replace(MODEL, num_hidden_layers=1, intermediate_size=1536, vocab_size=1024)
    keys = ('--config.mesh.tensor=2', '--config.sampler.dtype=bfloat16', '--config.sampler.cache_dtype=bfloat16')

    def carried(form: str) -> dict[str, int]:
        command = ['plan', '--config=configs/ppo.py:tiny', *keys, f'--config.sampler.weights={form}']
        run = Run(settings.build(Reinforcement, cli.parse_config(command)), model, chips.open_slice('v5e:2x2'))
        decode = next(program for program in run.programs() if program.name == 'decode')
        with facts.uncached():
            text = decode.function.trace(**decode.arguments).lower().compile().as_text()
        module = hlo.Module(text, decode.trips)
        lines = [i for name, _ in module.runs() for i in module.computations[name].values()]
        # gate_proj and up_proj on one of two chips
        return {kind: sum(f'{kind}[256,768]' in i.shape for i in lines) for kind in ('f32', 'bf16', 's8')}

    plain, narrow = carried('float'), carried('int8')
    assert plain['bf16'] > 0 and narrow['s8'] > 0 and narrow['bf16'] == narrow['f32'] == plain['s8'] == 0


def decode_program(sampler: Sampler, bound: int) -> Program:
    """The decode call of engines side by side, whose rows `Run` plans one engine at a time."""
    s, mesh = sampler.settings, sampler.mesh
    home, whole = shards.shardings(MODEL, s.cache_dtype, mesh)
    laid = lambda shapes, homes: jax.tree.map(
        lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, homes
    )
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
    weights = jax.eval_shape(
        lambda p: decoder.to_sampling(MODEL, p, jnp.dtype(s.dtype)), decoder.abstract_params(MODEL)
    )
    arguments = {
        'params': laid(weights, sync.shardings(MODEL, mesh, sharding.SAMPLE_RULES)),
        'table': ints(*sampler.table.shape),
        'stops': ints(*sampler.stops.shape),
        'state': laid(jax.eval_shape(sampler._empty), home),
        'row_R': None,
        'steps': ints(),
        'bound': bound,
        'truncate': False,
    }
    return Program('decode', 'rollout', sampler._decode, arguments, mesh.size, trips=s.quota, shortest=bound)


@pytest.mark.parametrize(('topology', 'engines'), [('v5e:2x2', 1), ('v5e:2x2', 2), ('v5p:2x2x1', 1)])  # two cores
def test_rows_are_read_by_their_lengths_where_they_lie(topology, engines):
    """By JAX's kernel, each chip its own heads, and without a copy of the cache, which is there all the time."""
    keys = ('sampler.dtype=bfloat16', 'sampler.cache_dtype=bfloat16', 'sampler.slots=1024')
    command = ['plan', '--config=configs/ppo.py:tiny', *(f'--config.{key}' for key in keys)]
    settled = settings.build(Reinforcement, cli.parse_config(command)).sampler
    mesh = sharding.make_mesh(
        {'data': engines, 'fsdp': 1, 'tensor': 2}, chips.first(chips.open_slice(topology), 2 * engines)
    )
    table, found = np.zeros((1, MODEL.vocab_size), np.int32), {}
    for fused, bound in ((True, 1024), (False, 512)):
        sampler = Sampler(MODEL, settled, table, table[:, 0], (0,), mesh)
        sampler.fused = fused
        found[fused] = facts.compile_all([decode_program(sampler, bound)], lambda name: None)[0]
    kernel, plain = found[True], found[False]
    cache = 2 * MODEL.num_hidden_layers * settled.rows * 1024 * 128 * 2  # of a chip: one of two KV heads, in 16 bits
    assert (kernel.tile, plain.tile) == (512, 0)
    assert kernel.temporaries < min(cache / 10, plain.temporaries)
    assert kernel.slot_moved == cache / 1024 * QUOTA
    assert 0 < kernel.at(0).moved < 0.1 * kernel.moved
    assert kernel.slot_flops == QUOTA * MODEL.num_hidden_layers * settled.rows * 4 * 128 * 128
