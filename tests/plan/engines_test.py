"""Rollout is priced by what its calls read: each against an account by hand."""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import sharding
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Int8Weight
from retool_jax.model import decoder
from retool_jax.model.config import TINY
from retool_jax.plan import chips, engines, facts, guess, memory
from retool_jax.plan.engines import Prices
from retool_jax.plan.facts import Facts
from retool_jax.plan.lengths import Course
from retool_jax.plan.programs import Run
from retool_jax.plan.roofline import Assumptions
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.sync import Sync
from tests.plan.runs import make_run

ROWS, FEED_ROWS, CHUNK, SLOTS, QUOTA = 64, 8, 64, 256, 16  # of the tiny sampler, whose bounds are 64, 128 and 256
LAYERS, HEADS, HEAD_DIM = TINY.num_hidden_layers, TINY.num_attention_heads, TINY.head_dim
HALF = ('--config.sampler.dtype=bfloat16', '--config.sampler.cache_dtype=bfloat16')
H100 = chips.CHIPS['h100']
BANDWIDTH = 0.8 * H100.hbm_bandwidth
A = Assumptions(tokens=75)
quantised = lambda x: isinstance(x, Int8Weight)


@functools.cache
def rollout(*overrides: str, topology: str = 'h100:1') -> tuple[Run, dict[str, Facts]]:
    """A run, and what is estimated of its rollout's programs."""
    run = make_run(*overrides, topology=topology)
    return run, {p.name: guess.estimate(run, p) for p in run.programs() if p.name in ('extend', 'decode')}


def priced(run: Run, decode: Facts, extend: Facts | None = None) -> Prices:
    return Prices(run, [decode, extend or dataclasses.replace(decode, name='extend')], A)


def course(longest, live=(), busy=(), extends=(1,), reach=(1,)) -> Course:
    """Pieces of `QUOTA` steps each."""
    count = len(longest)
    return Course(
        steps_P=np.full(count, QUOTA),
        busy_P=np.array(busy or [ROWS] * count),
        live_P=np.array(live or [0] * count),
        longest_P=np.array(longest),
        tokens=0,
        extends_F=np.array(extends),
        reach_F=np.array(reach),
    )


def decode_facts(step: float, slot: float, exchanges: int = 0, tile: int = 0) -> Facts:
    """A decode call whose steps move `step` bytes and `slot` more for each slot of a row."""
    moved = QUOTA * (step + SLOTS * slot)
    return Facts(
        'decode', 'rollout', 0, 0, 1.0, moved, {}, 0.0, exchanges=QUOTA * exchanges, slots=SLOTS,
        slot_moved=QUOTA * slot, tile=tile,
    )  # fmt: skip


def test_a_decode_step_reads_up_to_the_bound_of_the_longest_row_and_a_call_copies_that():
    run = make_run('--config.model.tools=False', topology='h100:1')
    prices = priced(run, decode_facts(step=1e8, slot=1e6, exchanges=3))
    part, read = prices.decoding(course(longest=[40, 64, 65, 200, 200]), call=QUOTA)
    bounds = [64, 64, 128, 256, 256]  # of the longest row at the end of a call
    cache = 2 * LAYERS * ROWS * HEADS * HEAD_DIM * 4  # bytes of a slot of all rows, f32
    copies = 2 * cache * (64 + 64 + 128)  # read and written; where all slots are read nothing is copied
    moved = QUOTA * sum(1e8 + 1e6 * bound for bound in bounds) + copies
    waits = 5 * QUOTA * 3 * 1e-5
    assert part.runs == 5 and read == sum(bounds) / 5
    assert part.memory == pytest.approx(moved / BANDWIDTH)
    assert part.waits == pytest.approx(waits) and part.total == pytest.approx(moved / BANDWIDTH + waits)
    assert part.one()['bound'] == 'memory' and part.one()['total'] == pytest.approx(part.total / 5)


def test_a_kernel_that_reads_by_length_moves_what_rows_hold_and_one_tile_of_those_without():
    run = make_run('--config.model.tools=False', topology='h100:1')
    prices = priced(run, decode_facts(step=1e8, slot=1e6, tile=64))
    part, read = prices.decoding(course(longest=[200], live=[10 * 128], busy=[10]), call=QUOTA)
    assert read == (10 * 128 + 54 * 64) / ROWS
    assert part.memory == pytest.approx(QUOTA * (1e8 + 1e6 * read) / BANDWIDTH)


@pytest.mark.parametrize(
    ('overrides', 'steps'),
    [
        ((), 3),  # of 0.03 s in 0.1 s
        (('--config.model.tools=False',), QUOTA),
        (('--config.ppo.quanta=4', '--config.loss.correction=token'), QUOTA),
    ],
)
def test_a_decode_call_is_short_where_rows_wait_for_tools(overrides, steps):
    run = make_run(*overrides, topology='h100:1')
    one = priced(run, decode_facts(step=0.03 * BANDWIDTH, slot=0))
    assert one.steps(SLOTS, SLOTS) == steps
    part, _ = one.decoding(course(longest=[200]), call=steps)
    assert part.runs == pytest.approx(QUOTA / steps) and part.total == pytest.approx(QUOTA * 0.03)


def test_engines_of_a_process_run_side_by_side_and_larger_ones_in_lockstep():
    lie = lambda run: (run.engines, run.abreast, run.lockstep, run.sampler_mesh.size)
    rest = ('--config.forward.micro_rows=0', '--config.mesh.fsdp=2', '--config.mesh.data=-1')
    tensor = lambda size, **more: make_run(f'--config.mesh.tensor={size}', *rest, **more)
    assert lie(tensor(4, topology='h100:16')) == (4, 2, False, 4)
    assert lie(tensor(1)) == (8, 8, False, 1) and lie(tensor(1, process_chips=1)) == (8, 1, False, 1)
    assert lie(tensor(2, process_chips=1)) == (4, 1, True, 2)  # two processes step an engine
    assert lie(tensor(2, topology='h100:12', process_chips=3)) == (6, 3, True, 2)  # two of three chips step three
    with pytest.raises(UserError, match='--process_chips=3 does not divide the 8 chips of h100:8'):
        tensor(2, process_chips=3)
    small = chips.Slice('h100:4', dataclasses.replace(H100, host=2), 4, None)
    run = make_run('--config.mesh.tensor=4', topology=small)
    assert lie(run) == (1, 1, True, 4)
    assert priced(run, decode_facts(step=0.03 * BANDWIDTH, slot=0)).steps(SLOTS, SLOTS) == QUOTA


def test_a_chip_has_to_do_what_it_has_in_an_engine_alone():
    _, alone = rollout('--config.mesh.tensor=2', topology='h100:2')
    _, beside = rollout('--config.mesh.tensor=2', topology='h100:8')
    for name in ('extend', 'decode'):
        assert dataclasses.replace(beside[name], compile_s=0) == dataclasses.replace(alone[name], compile_s=0)


@pytest.mark.parametrize('cache', ['float32', 'int8'])
@pytest.mark.parametrize(('data', 'fsdp', 'tensor'), [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4), (2, 1, 4), (1, 1, 8)])
def test_a_chip_holds_what_a_device_of_the_real_engine_holds(data, fsdp, tensor, cache):
    model = dataclasses.replace(TINY, num_attention_heads=8, num_key_value_heads=4)  # in eight parts KV heads are whole
    keys = {
        'mesh.data': data,
        'mesh.fsdp': fsdp,
        'mesh.tensor': tensor,
        'sampler.cache_dtype': cache,
        'sampler.rows': 3,
    }
    run = make_run(*(f'--config.{key}={value}' for key, value in keys.items()), model=model)
    table = np.zeros((1, model.vocab_size), np.int32)
    mesh = sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor})
    sampler = Sampler(model, run.sampler.settings, table, table[:, 0], (0,), mesh)
    assert sampler.engines == run.engines == run.abreast and sampler.rows == 3 * run.engines
    state, held = sampler.empty(), collections.Counter()
    for name, tree in (('KV cache', (state.cache.k, state.cache.v)), ('all', state)):
        for leaf in jax.tree.leaves(tree):
            keyed = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            for shard in (jax.random.key_data(leaf) if keyed else leaf).addressable_shards:
                held[name, shard.device] += shard.data.nbytes
    planned = memory.buffers(run)
    for device in jax.devices():
        assert held['KV cache', device] == planned['KV cache'] > 0
        assert held['all', device] == planned['KV cache'] + planned['rows']


def test_every_call_of_extend_takes_the_bound_of_its_longest_row():
    run, found = rollout()
    prices = priced(run, found['decode'], dataclasses.replace(found['extend'], flops=1.0, moved=1e9, slot_moved=1e6))
    part = prices.extending(course(longest=[1], extends=[3, 2], reach=[70, 300]))
    assert part.runs == 5
    assert part.memory == pytest.approx((3 * (1e9 - 128 * 1e6) + 2 * 1e9) / BANDWIDTH)


def restored(width: int) -> float:
    """Bytes that a call moves back into the cache where it took out less than all slots, shared out among the slots
    between its shortest and its longest reads."""
    return 2 * QUOTA * LAYERS * ROWS * 2 * HEADS * HEAD_DIM * width / (SLOTS - 64)


def test_the_slots_that_xla_reads_are_those_of_keys_values_and_scores_up_to_the_bound():
    _, found = rollout()
    decode, extend = found['decode'], found['extend']
    assert not decode.tile and decode.slots == extend.slots == SLOTS
    keys_and_values, scores = 2 * HEADS * HEAD_DIM * 4, 2 * HEADS * 4  # written in f32 and read again
    assert decode.slot_moved + restored(4) == pytest.approx(QUOTA * LAYERS * ROWS * (keys_and_values + scores))
    assert decode.slot_flops == pytest.approx(QUOTA * LAYERS * ROWS * 4 * HEADS * HEAD_DIM)
    # What extend reads of a row it gathers first: read, written, and read by the matmul.
    assert extend.slot_moved == pytest.approx(LAYERS * FEED_ROWS * (3 * keys_and_values + CHUNK * scores))
    assert extend.slot_flops == pytest.approx(LAYERS * FEED_ROWS * CHUNK * 4 * HEADS * HEAD_DIM)


@pytest.mark.parametrize('count', [1, 2])
def test_hopper_decodes_by_a_kernel_that_reads_by_length_where_the_cache_lies(count):
    run, found = rollout(*HALF, f'--config.mesh.tensor={count}', topology=f'h100:{count}')
    decode, heads = found['decode'], HEADS // count
    assert decode.tile == 64 and not found['extend'].tile
    assert decode.slot_moved == pytest.approx(QUOTA * LAYERS * ROWS * 2 * heads * HEAD_DIM * 2)
    assert decode.slot_flops == pytest.approx(QUOTA * LAYERS * ROWS * heads * 4 * 16 * HEAD_DIM)  # one head of 16
    assert run.in_place and run.copied(64) == run.copies == 0
    older, read = rollout(*HALF, topology='a100:1')
    assert not read['decode'].tile and not older.in_place and older.copied(64) > 0


def test_a_kernel_takes_the_copies_of_those_rows_that_a_call_chooses():
    run, found = rollout(*HALF, '--config.sampler.decode_rows=16', topology='h100:1')
    decode = found['decode']
    assert decode.tile == 64 and not run.in_place and run.copied(64) > 0
    kernel = QUOTA * LAYERS * 16 * 2 * HEADS * HEAD_DIM * 2
    assert kernel < decode.slot_moved < 1.5 * kernel  # rows are taken out once a call


@pytest.mark.parametrize(('topology', 'keys'), [('h100:1', HALF), ('h100:2', ('--config.mesh.tensor=2',))])
def test_weights_in_8_bits_are_held_and_read_as_they_lie(topology, keys):
    """By the plan, against the bytes of the sampler's own weights."""
    make = lambda form: rollout(*keys, f'--config.sampler.weights={form}', topology=topology)
    (run, plain), (narrow, found) = make('float'), make('int8')
    chips = run.sampler_mesh.size
    wide, dtype = jnp.dtype(run.sampler.settings.dtype).itemsize, run.sampler.settings.dtype
    weights = jax.eval_shape(Sync(TINY, dtype, weights='int8'), decoder.abstract_params(TINY))
    matrices = [x for x in jax.tree.leaves(weights, is_leaf=quantised) if quantised(x)]
    numbers, scales = (sum(getattr(x, part).size for x in matrices) for part in ('values', 'scale'))
    assert len(matrices) == 7 * LAYERS + 1
    held = {form: memory.buffers(r)['sampling weights'] for form, r in (('float', run), ('int8', narrow))}
    split = lambda x: x.values.shape[-1] == TINY.hidden_size  # o_proj, down_proj: each chip has all their channels
    whole = sum(x.scale.size for x in matrices if split(x))
    assert held['float'] - held['int8'] == (wide - 1) * numbers / chips - 4 * (whole + (scales - whole) / chips)
    if chips == 1:
        assert held['int8'] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    for name, steps in (('decode', QUOTA), ('extend', 1)):
        assert plain[name].moved - found[name].moved == pytest.approx(steps * (wide - 1) * numbers / chips)
        assert plain[name].flops == found[name].flops and plain[name].slot_moved == found[name].slot_moved


def test_less_is_read_where_rows_are_shorter():
    _, found = rollout()
    at = found['decode'].at(64)
    assert at.slots == 64 and at.at(SLOTS) == found['decode']
    assert found['decode'].moved - at.moved == pytest.approx((SLOTS - 64) * at.slot_moved)


@functools.cache
def on_cpus(count: int, bound: int = SLOTS, *overrides: str) -> tuple[Run, Facts]:
    """The decode program, compiled for devices of this machine."""
    devices = jax.devices()[:count]
    slice = chips.Slice(f'cpu:{count}', dataclasses.replace(H100, platform='cpu'), count, devices)
    run = make_run('--config.mesh.tensor=-1', '--config.mesh.fsdp=1', *overrides, topology=slice)
    program = next(p for p in run.programs() if p.name == 'decode')
    program = dataclasses.replace(program, arguments=program.arguments | {'bound': bound}, shortest=bound, copies=0)
    return run, facts.compile_all([program], lambda name: None)[0]


def test_a_call_that_reads_less_than_all_slots_holds_a_copy_of_them():
    run, whole = on_cpus(1)
    _, half = on_cpus(1, 128)
    cache = memory.buffers(run)['KV cache']
    assert run.copied(SLOTS) == 0 and run.copied(128) == run.copies == cache / 2
    assert half.temporaries - whole.temporaries == pytest.approx(run.copied(128), rel=0.1)


def test_a_call_of_some_rows_copies_theirs_whatever_it_reads():
    run = make_run('--config.sampler.decode_rows=16', topology='h100:1')
    assert run.copied(SLOTS) == memory.buffers(run)['KV cache'] / 4 and run.copied(64) == run.copied(SLOTS) / 4
    assert run.copies == 0  # what is compiled, or estimated, holds more already
    part, _ = priced(run, decode_facts(step=1e8, slot=0)).decoding(course(longest=[40]), call=QUOTA)
    assert part.memory == pytest.approx(QUOTA * 1e8 / BANDWIDTH)


def test_the_guess_of_collectives_is_what_is_compiled():
    run, compiled = on_cpus(2)
    assert compiled.exchanges == guess._exchanges(run, 'decode') == QUOTA * (2 * LAYERS + guess.ENDS)
    assert guess._exchanges(run, 'extend') == 0 == guess._exchanges(rollout()[0], 'decode')


def test_a_step_is_the_slowest_engines_and_always_the_same():
    run, found = rollout('--config.mesh.tensor=2', topology='h100:8')
    a = engines.assume(run, None)
    assert a.tokens == 75  # 3/8 of 200
    first = engines.simulate(run, found.values(), a)
    assert first == engines.simulate(run, found.values(), a)
    about = lambda r: (r.engines, r.abreast, r.episodes, r.rows, r.calls, r.budget)
    assert about(first) == (4, 4, 256, 4 * ROWS, 3, 200)
    assert first.mean == pytest.approx(75, abs=0.5) and 64 <= first.read <= SLOTS and first.live < first.read
    assert first.steps * first.busy * first.rows == pytest.approx(256 * 75)
    apart = engines.simulate(make_run('--config.mesh.tensor=2', process_chips=2), found.values(), a)
    assert about(apart) == (4, 1, 64, ROWS, 3, 200)
    assert apart.steps * apart.busy * ROWS == pytest.approx(64 * 75, rel=0.3)  # this engine's share of the tokens
    assert first.read >= apart.read  # all read as far as the longest row of any
    alone, _ = rollout('--config.mesh.tensor=2', topology='h100:2')
    assert engines.simulate(alone, found.values(), a).seconds > 2 * first.seconds  # one engine makes all 256
    none = make_run('--config.mesh.tensor=1', '--config.ppo.problems_per_step=4', process_chips=1)
    assert engines.simulate(none, found.values(), a).episodes == 4  # more engines than problems


def test_a_step_of_partial_rollouts_is_shorter_and_ends_fewer_episodes():
    keys = ('--config.loss.correction=token', '--config.sampler.rows=16')
    run, found = rollout(*keys, topology='h100:8')
    a = engines.assume(run, None)
    whole, part = (engines.simulate(make_run(*keys, f'--config.ppo.quanta={n}'), found.values(), a) for n in (0, 4))
    assert (whole.quanta, whole.episodes, whole.ended) == (0, 256, 256)
    assert part.quanta == 4 and part.steps < whole.steps and part.busy > whole.busy
    assert 64 < part.ended < part.episodes < 256  # samples that have ended wait for those of their group
    assert part.steps * part.busy * part.rows == pytest.approx(part.ended * 75, rel=0.05)


def test_a_mean_that_the_budget_does_not_allow_is_refused():
    with pytest.raises(ValueError, match='^--tokens=6144 must lie between 1 and turns.max_tokens=200'):
        engines.assume(rollout()[0], 6144)
