"""Recipes for one card and sizes for slices: every one is planned, and what has none is refused with the nearest."""

from __future__ import annotations

import dataclasses

import pytest

from configs import cards
from retool_jax.core import cli, settings
from retool_jax.plan import chips, guess, memory, models, page, plans
from retool_jax.plan.memory import LIMIT
from retool_jax.plan.programs import Run
from retool_jax.plan.roofline import Assumptions
from retool_jax.stages.config import Reinforcement

WORDS = {name: word for word, name in reversed(cards.CARDS.items())}
QUICK = ('grpo', 'qwen2_5_7b', 'h100')
GIB = 2**30


@pytest.mark.parametrize(
    'algorithm, model, card',
    [pytest.param(*r, id=f'{r[0]}:{r[1]}@{r[2]}', marks=() if r == QUICK else pytest.mark.slow) for r in cards.RECIPES],
)
def test_a_recipe_fits_its_card_and_a_day_holds_100_steps_of_256_long_episodes(algorithm, model, card):
    config = cli.load_config(f'configs/{algorithm}.py:{model}@{WORDS[card]}')
    stage = settings.build(Reinforcement, config)
    assert stage.ppo.problems_per_step * stage.ppo.samples >= 256 and stage.ppo.steps == 100
    assert stage.turns.max_tokens == stage.sampler.slots == 8192 <= stage.forward.row_width
    run = Run(stage, models.sizes(None, stage.model.name), chips.open_slice(f'{card}:1'))
    found = [guess.estimate(run, program) for program in run.programs()]
    plan = page.make(run, found, Assumptions(tokens=3072))
    assert plan['fits'] and max(phase['share'] for phase in plan['phases']) <= LIMIT, plan['phases']
    assert plan['run']['hours'] <= 24
    assert plan['attention'] == 'cudnn'
    if (algorithm, model, card) == QUICK:
        # With 64 rows it held 64.1 GiB, of rollout, on an H200, in episodes of 1,140 tokens: calls copied 2,048 slots
        # there, too, at the time.
        run = Run(dataclasses.replace(stage, sampler=dataclasses.replace(stage.sampler, rows=64)), run.model, run.slice)
        run.in_place = False
        rollout = [guess.estimate(run, program) for program in run.programs() if program.phase == 'rollout']
        phase = memory.phases(run, [f for f in found if f.phase != 'rollout'] + rollout)[1]
        assert phase.worst == 'decode'
        assert (phase.total - run.copies + run.copied(2048)) / GIB == pytest.approx(64.1, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize('model, slice', cards.SLICES, ids='@'.join)
def test_sizes_for_a_slice_fit_it_and_make_a_step_shorter_than_those_for_none(model, slice):
    kind = slice.partition(':')[0]
    if chips.CHIPS[kind].platform == 'tpu' and chips.compiler() is None:
        pytest.skip('needs the TPU compiler: bash launch/baselines.sh plan')
    made = plans.Plans(models.sizes(None, model), chips.open_slice(slice), None)
    spec = f'configs/ppo.py:{model}'
    given, found = (settings.build(Reinforcement, cli.load_config(s)) for s in (spec, f'{spec}@{slice}'))
    assert plans.changed(given, cards.SLICES[model, slice]) == dataclasses.replace(found, run=given.run)
    before, after = made.guess(given), made.guess(found)  # by shapes; compiled they are in docs/scaling.md
    assert after['fits'] and after['step']['seconds'] < before['step']['seconds']


def test_sizes_for_a_slice_go_to_every_stage_that_has_them():
    plain, found = (cli.load_config(f'configs/sft.py:qwen2_5_32b{slice}') for slice in ('', '@v5p:4x4x4'))
    values = cards.SLICES['qwen2_5_32b', 'v5p:4x4x4']
    assert (found.mesh.tensor, found.forward.remat) == (values['mesh.tensor'], values['forward.remat'])
    assert (found.optimizer, found.sft) == (plain.optimizer, plain.sft)
    assert found.run.dir == f'{plain.run.dir}_v5p_4x4x4'
    evaluate = cli.load_config('configs/evaluate.py:qwen2_5_32b@v5p:4x4x4')
    assert (evaluate.sampler.rows, evaluate.turns.max_tokens) == (values['sampler.rows'], 16384)


def test_every_card_has_published_figures():
    assert set(cards.CARDS.values()) <= chips.CHIPS.keys()
    assert {name for word, name in cards.CARDS.items() if word[0] != '1'} == set(cards.CARDS.values())
    for word, name in cards.CARDS.items():
        if word.startswith('1x'):
            assert chips.CHIPS[name].hbm / 1e9 == pytest.approx(int(word[2:-2]), rel=0.08)


def test_sft_and_evaluation_take_their_part_of_a_recipe():
    sft, plain = (cli.load_config(f'configs/sft.py:qwen2_5_7b{card}') for card in ('@1x80gb', ''))
    assert (sft.lora.rank, sft.optimizer.lr) == (32, 10 * plain.optimizer.lr)
    assert sft.run.dir == f'{plain.run.dir}_1x80gb' and sft.sft == plain.sft
    evaluate = cli.load_config('configs/evaluate.py:qwen2_5_7b@h100')
    assert (evaluate.sampler.rows, evaluate.sampler.slots, evaluate.turns.max_tokens) == (64, 8192, 8192)
    assert cli.load_config('configs/cold_start.py:qwen2_5_1_5b@rtx4090').max_tokens == 8192
    whole = cli.load_config('configs/sft.py:qwen3_4b@1x80gb')  # all weights are trained
    assert (whole.lora.rank, whole.optimizer.lr, whole.optimizer.kind) == (0, 1e-5, 'adamw')
    assert whole.forward.gradient_dtype == 'bfloat16'


@pytest.mark.parametrize(
    'spec, message',
    [
        ('grpo.py:qwen2_5_7b@1x81gb', r"card '1x81gb' is unknown \(did you mean 1x80gb\?\); choose one of 1x24gb, "),
        ('sft.py:qwen2_5_7b@', r"card '' is unknown"),
        ('grpo.py:qwen2_5_32b@h100', r'no recipe for qwen2_5_32b on h100 \(did you mean grpo:qwen2_5_7b@1x80gb\?\)'),
        ('ppo.py:qwen3_4b@1x80gb', r'no recipe for qwen3_4b on 1x80gb \(did you mean grpo:qwen3_4b@1x80gb\?\)'),
        ('evaluate.py:official_qwen2_5_7b@h100', r'no recipe for official_qwen2_5_7b on h100'),
        ('ppo.py:qwen2_5_7b@v5p:4x4x4', r'no sizes for qwen2_5_7b on v5p:4x4x4 \(did you mean '),
        ('ppo.py:qwen2_5_32b@v5p:4x4x8', r'no sizes for .* \(did you mean qwen2_5_32b@v5p:4x4x4\?\); there are '),
        ('grpo.py:qwen9@h100', r"ARG 'qwen9' is unknown"),
    ],
)
def test_what_has_no_recipe_is_refused_with_the_nearest(spec, message):
    with pytest.raises(ValueError, match=f'^--config=configs/{spec}: {message}'):
        cli.load_config(f'configs/{spec}')
