"""A plan's arithmetic: published sizes, residency, roofline, and what it says where something does not fit."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import pytest

from retool_jax.plan import chips, facts, guess, memory, models, page, roofline
from retool_jax.plan.facts import Facts
from retool_jax.plan.programs import Program, Run, per_device
from retool_jax.plan.roofline import Assumptions, Sizes
from retool_jax.train.residency import ON_DEVICE
from tests.plan.runs import make_run

PUBLISHED = {  # parameters, from the models' pages
    'qwen2_5_0_5b': 494_032_768, 'qwen2_5_1_5b': 1_543_714_304, 'qwen2_5_7b': 7_615_616_512,
    'qwen2_5_14b': 14_770_033_664, 'qwen2_5_32b': 32_763_876_352, 'qwen3_0_6b': 596_049_920,
    'smollm2_135m': 134_515_008, 'smollm2_1_7b': 1_711_376_384, 'llama3_1_8b': 8_030_261_248,
    'r1_distill_llama_8b': 8_030_261_248,
    'qwen3_4b': 4_022_468_096, 'qwen3_8b': 8_190_735_360, 'qwen3_32b': 32_762_123_264,
}  # fmt: skip
A = Assumptions(tokens=100)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes_give_the_published_number_of_parameters(name):
    assert models.sizes(None, name).parameter_count() == PUBLISHED[name]


def test_a_name_without_published_sizes_is_refused():
    with pytest.raises(ValueError, match="model.name='qwen9' has no published sizes here; give model.path"):
        models.sizes(None, 'qwen9')


GROUPS = ('--config.advantage.kind=grpo', '--config.advantage.whiten=False', '--config.loss.value_coef=0.5')


@functools.cache
def estimated() -> tuple[Run, list[Facts]]:
    run = make_run('--config.ppo.critic=backbone', '--config.ppo.offload=True', '--config.mesh.tensor=2')
    return run, [guess.estimate(run, program) for program in run.programs()]


def test_every_program_of_a_step_is_there_and_split_by_critic():
    _, found = estimated()
    assert sorted(f.name for f in found) == sorted(['sync layer', 'sync ends', 'apply', 'score policy', 'update policy',
                                                    'score critic', 'update critic', 'extend', 'decode'])  # fmt: skip
    assert [p.name for p in make_run().programs()] == [
        'sync layer', 'sync ends', 'apply', 'score policy and critic', 'update policy and critic', 'extend', 'decode',
    ]  # fmt: skip
    assert all(f.estimated for f in found)


def test_buffers_are_a_chips_share_of_the_weights():
    run, _ = estimated()
    sizes, weights = memory.buffers(run), run.model.parameter_count() * 4
    assert weights / 8 <= sizes['policy'] < weights / 8 * 1.1  # norms are not split over every axis
    assert sizes['optimizer'] == pytest.approx(2 * (sizes['policy'] + sizes['critic']), rel=1e-3)
    assert sizes['gradients'] == sizes['policy'] + sizes['critic']
    head = 4 * run.model.vocab_size * run.model.hidden_size
    assert weights / 2 <= sizes['sampling weights'] <= (weights + head) / 2 * 1.1  # the tied head is a copy of its own
    s, m = run.sampler.settings, run.model
    assert sizes['KV cache'] == 2 * 4 * m.num_hidden_layers * s.rows * s.slots * m.num_key_value_heads * m.head_dim / 2


@pytest.mark.parametrize(('kind', 'least', 'most'), [('adamw', 8, 8), ('adamw_bf16', 4, 4), ('adafactor', 0, 1.2)])
def test_an_optimizer_holds_so_many_bytes_a_weight(kind, least, most):
    # tiny: a fifth of its weights are in matrices too small to be factored, which begins at 128.
    run = make_run(f'--config.optimizer.kind={kind}', '--config.ppo.critic=none', *GROUPS, topology='h100:1')
    weights = run.model.parameter_count()
    assert least * weights <= memory.buffers(run)['optimizer'] <= most * weights + 100


def test_gradients_in_16_bits_are_half_as_large():
    low = ('--config.forward.dtype=bfloat16', '--config.forward.gradient_dtype=bfloat16')
    whole, half = (memory.buffers(make_run(*keys, topology='h100:1'))['gradients'] for keys in ((), low))
    assert 0.5 * whole <= half < 0.51 * whole


def test_a_phase_holds_what_the_residency_table_says():
    run, found = estimated()
    phases = {p.name: p for p in memory.phases(run, found)}
    assert set(phases) == set(ON_DEVICE) == set(memory.PHASES)
    assert set(phases['sync'].resident) == {'policy', 'sampling weights'}
    assert set(phases['rollout'].resident) == {'sampling weights', 'KV cache', 'rows'}
    assert set(phases['score'].resident) == {'policy', 'critic', 'batch'}
    assert set(phases['update'].resident) == {'policy', 'critic', 'optimizer', 'gradients', 'batch'}
    whole = dataclasses.replace(run.sizes, offload=False)
    run, held = make_run('--config.ppo.critic=backbone', '--config.mesh.tensor=2'), found
    assert run.sizes == whole
    assert {'policy', 'critic', 'optimizer'} <= set({p.name: p for p in memory.phases(run, held)}['rollout'].resident)
    worst = max((f for f in found if f.phase == 'update'), key=lambda f: f.temporaries)
    assert phases['update'].worst == worst.name and phases['update'].temporaries == worst.temporaries


def test_the_cache_that_fits_fills_the_memory_to_its_limit():
    run, found = estimated()
    phase = memory.phases(run, found)[1]
    hbm = int(phase.total * 3)
    tokens, now = memory.tokens_that_fit(run, phase, hbm), run.sampler.settings.rows * run.sampler.settings.slots
    # A call that reads less than all slots takes them out: here half of them at the most.
    assert run.copies == run.copied(128) == phase.resident['KV cache'] / 2
    copied = run.copies if phase.worst == 'decode' else 0
    rest = phase.total - phase.resident['KV cache'] - copied
    held = tokens * (phase.resident['KV cache'] + run.copies) / now
    assert rest + held == pytest.approx(memory.LIMIT * hbm, rel=1e-4)
    assert memory.tokens_that_fit(run, phase, rest // 2) == 0


def test_a_program_is_as_slow_as_its_slowest_resource():
    chip = chips.Chip('x', 'tpu', 2**30, 100.0, 1000.0, 10.0, 4)
    fact = Facts('update policy', 'update', 0, 0, flops=1500.0, moved=80.0, sent={'all-gather': 8.0}, compile_s=0)
    found = roofline.seconds(fact, chip, A)
    assert (found.compute, found.memory, found.links) == (2.0, 1.0, 1.0)
    assert (found.total, found.bound) == (2.0, 'compute')
    assert roofline.seconds(dataclasses.replace(fact, sent={'all-reduce': 24.0}), chip, A).bound == 'links'
    fact = dataclasses.replace(fact, exchanges=1000)
    assert roofline.seconds(fact, chip, A) == found  # they overlap, but in decode steps
    decode = roofline.seconds(dataclasses.replace(fact, name='decode'), chip, A)
    assert (decode.waits, decode.total, decode.bound) == (1000 * 1e-5, 2.0 + 1000 * 1e-5, 'compute')


def test_a_step_runs_each_program_as_often_as_its_episodes_need():
    sizes = Sizes(
        episodes=64,
        minibatches=2,
        epochs=3,
        micro_rows=4,
        row_width=200,
        row_segments=8,
        layers=48,
        policy_scores=2,
    )
    a = Assumptions(tokens=100, packing=1.0)
    assert sizes.micro_batches(a) == 8  # 32 rows in two mini-batches of 4 micro-batches
    expected = {'sync layer': 48, 'sync ends': 1, 'apply': 6, 'score policy': 16, 'score critic': 8,
                'update critic': 24}  # fmt: skip
    assert {name: sizes.runs(name, a) for name in expected} == expected


def test_model_flops_are_six_per_weight_and_token_and_causal_attention():
    model = models.sizes(None, 'qwen2_5_32b')
    per_token = roofline.model_flops(model, 1, 1)
    assert per_token == pytest.approx(6 * (model.parameter_count() - 152064 * 5120), rel=1e-3)
    attention = roofline.model_flops(model, 1, 16384) - 16384 * per_token
    assert attention == pytest.approx(3 * 4 * 64 * 5120 * 16384**2 / 2, rel=1e-3)


def test_the_page_says_the_same_in_numbers_and_in_words():
    run, found = estimated()
    plan = json.loads(json.dumps(page.make(run, found, Assumptions(tokens=100))))
    assert plan['fits'] and plan['estimated'] and plan['chips'] == 8 and plan['engines'] == 4
    assert plan['step']['seconds'] == pytest.approx(sum(p['runs'] * p['seconds']['total'] for p in plan['programs']))
    assert plan['run']['chip_hours'] == pytest.approx(plan['step']['chip_hours'] * run.sizes.steps)
    text = page.text(plan)
    for word in ('ESTIMATE', 'KV slots × context', 'all-gather', 'decode', '71.5%', 'matmul 0.75'):
        assert word in text
    busy = plan['rollout']['busy']
    assert 'log-normal, sigma 0.6, mean 100, cut at 200 tokens; of 4 engines the slowest 4 side by side' in text
    assert f'{busy:.0%} of their row-steps busy' in text and 0 < busy < 1
    assert 'does not fit' not in text


def test_of_partial_rollouts_the_page_says_what_as_many_episodes_take():
    keys = ('--config.ppo.quanta=1', '--config.loss.correction=token')
    run = make_run('--config.ppo.critic=backbone', '--config.mesh.tensor=2', *keys)
    plan = json.loads(json.dumps(page.make(run, [guess.estimate(run, program) for program in run.programs()], A)))
    step, rollout = plan['step'], plan['rollout']
    assert 0 < step['episodes'] < step['asked'] == 256 and step['episodes'] == round(rollout['ended'])
    assert step['seconds_asked'] == pytest.approx(step['seconds'] * 256 / rollout['ended'])
    text = page.text(plan)
    assert f'({step["episodes"]} of 256 episodes end in it, 256 take ' in text and 'for 1 decode calls each' in text


def test_the_page_says_how_much_of_the_work_counts():
    def share(remat: str) -> float:
        run = make_run('--config.ppo.critic=backbone', '--config.mesh.tensor=2', f'--config.forward.remat={remat}')
        plan = page.make(run, [guess.estimate(run, program) for program in run.programs()], A)
        reason = plan['mfu']['reasons'][0]
        assert reason.startswith(f'with forward.remat={remat} ')
        return int(reason.split('%')[0].split()[-1]) / 100

    assert share('full') < 0.8 < share('none') <= 1


def test_what_does_not_fit_is_said_with_what_to_change():
    run, found = estimated()
    big = [dataclasses.replace(f, temporaries=2**37) if f.name == 'decode' else f for f in found]
    plan = page.make(run, big, A)
    sync, rollout, score, update = plan['phases']
    assert sync['fits'] and not plan['fits'] and not rollout['fits'] and score['fits'] and update['fits']
    assert 'rollout does not fit' in page.text(plan) and 'mesh.tensor=4' in rollout['remedies'][0]
    big = [dataclasses.replace(f, temporaries=2**37) if f.name == 'update policy' else f for f in found]
    assert 'forward.remat=full' in page.make(run, big, A)['phases'][-1]['remedies']
    big = [dataclasses.replace(f, temporaries=2**37) if f.name == 'sync ends' else f for f in found]
    assert page.make(run, big, A)['phases'][0]['remedies'] == ['mesh.tensor=4 (weights over more chips)']


def test_a_program_that_the_compiler_refused_does_not_fit_whatever_it_seemed_to_need():
    run, found = estimated()
    small = [dataclasses.replace(f, refused='no room') if f.name == 'extend' else f for f in found]
    plan = page.make(run, small, A)
    rollout = plan['phases'][1]
    assert rollout['refused'] == ('extend',) and rollout['share'] < memory.LIMIT
    assert not rollout['fits'] and rollout['remedies'] and not plan['fits']


def test_temporaries_are_what_is_allocated_beside_the_arguments():
    told = types.SimpleNamespace(
        total_allocation_bytes=100,
        argument_size_in_bytes=30,
        output_size_in_bytes=20,
        alias_size_in_bytes=15,
        temp_size_in_bytes=90,
        generated_code_size_in_bytes=1,
    )
    assert facts.beside_arguments(told, held=False) == 71 and facts.beside_arguments(told, held=True) == 66
    del told.total_allocation_bytes  # an older jaxlib
    assert facts.beside_arguments(told, held=False) == 96


def toy(name: str, function) -> Program:
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return Program(name, 'update', jax.jit(function), {'x': x}, devices=1)


def test_programs_compile_side_by_side_and_are_given_in_order():
    heard = []
    found = facts.compile_all([toy('product', lambda x: x @ x), toy('sum', lambda x: x.sum())], heard.append)
    assert [f.name for f in found] == ['product', 'sum'] and sorted(heard) == ['product', 'sum']
    assert found[0].flops == 2 * 64**3 and found[0].arguments == 64 * 64 * 4 and not found[0].sent

    def wrong(x):
        raise ValueError('a size that does not divide')

    with pytest.raises(ValueError, match='does not divide'):
        facts.compile_all([toy('sum', lambda x: x.sum()), toy('wrong', wrong)], heard.append)


def test_a_compilers_refusal_tells_how_much_it_wanted():
    text = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded by 7.75G.'
    assert facts.needed(text) == int(23.5 * 2**30) and facts.needed('something else') == 0


@pytest.mark.parametrize('name', ['v5q:2x2', 'v5e', 'v5e:2y2', 'h100:', ''])
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match='expected KIND:SHAPE like v5p:4x4x4'):
        chips.open_slice(name)


def test_the_policys_update_is_its_weights_four_times_and_its_temporaries():
    run, found = estimated()
    fact = next(f for f in found if f.name == 'update policy')
    held = 4 * per_device(run.params['policy']) + fact.temporaries
    assert memory.policy_update(run, found) == pytest.approx(held, rel=1e-5)  # and two counters


def test_adapters_are_counted_beside_frozen_weights_that_lie_there_in_every_phase():
    flags = ('--config.lora.rank=8', '--config.loss.kl_coef=0.1', '--config.ppo.critic=backbone')
    run, full = make_run(*flags, '--config.forward.dtype=bfloat16', '--config.mesh.tensor=2'), estimated()[0]
    sizes, plain = memory.buffers(run), memory.buffers(full)
    assert 0.5 * plain['policy'] <= sizes['frozen weights'] < 0.51 * plain['policy']  # in 16 bits, but for norms
    assert sizes['policy'] < 0.3 * plain['policy'] and sizes['sampling weights'] == plain['sampling weights']
    assert sizes['critic'] == pytest.approx(sizes['policy'], rel=0.05)
    assert sizes['optimizer'] == pytest.approx(2 * (sizes['policy'] + sizes['critic']), rel=0.05)
    assert sizes['gradients'] == sizes['policy'] + sizes['critic'] and 'reference' not in sizes
    found = {f.name: f for f in (guess.estimate(run, program) for program in run.programs())}
    assert all('frozen weights' in phase.resident for phase in memory.phases(run, list(found.values())))
    whole = {f.name: f for f in estimated()[1]}
    assert found.keys() == whole.keys()
    # No gradient of any weight is computed: of three matmuls two are left, and the adapters' own.
    assert 0.6 < found['update policy'].flops / whole['update policy'].flops < 0.9
    assert found['decode'].flops == whole['decode'].flops
    plan = page.make(run, list(found.values()), A)
    held = 4 * sizes['policy'] + sizes['frozen weights'] + found['update policy'].temporaries
    assert plan['policy_update']['bytes'] == held + 2 * 4  # Adam's and the schedule's counts
