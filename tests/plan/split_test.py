"""Two halves of a slice, a step apart, beside all of it in turns: each number against an account of its own."""

from __future__ import annotations

import dataclasses

import pytest

from retool_jax.core import cli, settings
from retool_jax.plan import chips, models, split
from retool_jax.plan.plans import Plans
from retool_jax.plan.roofline import Assumptions
from retool_jax.stages.config import Reinforcement


def compared(topology: str | chips.Slice, *overrides: str, slices: int = 1) -> dict:
    config = cli.parse_config(['plan', '--config=configs/ppo.py:tiny', *overrides])
    slice = chips.open_slice(topology, slices) if isinstance(topology, str) else topology
    stage = settings.build(Reinforcement, config)
    return split.compare(Plans(models.sizes(None, 'tiny'), slice, None), stage)


@pytest.mark.slow
def test_a_step_is_the_longer_half_and_the_weights():
    found = compared('h100:4')
    config = cli.parse_config(['plan', '--config=configs/ppo.py:tiny'])
    stage = settings.build(Reinforcement, config)
    model = models.sizes(None, 'tiny')
    whole, half = (Plans(model, chips.open_slice(f'h100:{n}'), None).make(stage) for n in (4, 2))
    rollout, score, update = half['phases'][1:]
    assert found['turns_s'] == whole['step']['seconds']
    assert found['rollout_s'] == rollout['seconds']
    assert found['training_s'] == score['seconds'] + update['seconds']
    sent = 4 * model.parameter_count()  # f32 of the tiny sampler
    assert found['weights'] == sent
    assert found['weights_s'] == pytest.approx(sent / (2 * 0.8 * 450e9))
    longer = max(found['rollout_s'], found['training_s'])
    assert found['seconds'] == longer + found['weights_s']
    # The half that makes episodes holds nothing of training.
    trained = sum(rollout['resident'][name] for name in ('policy', 'critic', 'optimizer'))
    assert found['shares']['rollout'] == (rollout['total'] - trained) / half['chip']['hbm']
    text = split.text(found)
    assert 'ESTIMATE' in text and 'in turns on 4 chips' in text and 'the links of the host' in text
    assert 'one step old; in turns' in text


@pytest.mark.parametrize(
    ('slice', 'bandwidth', 'link'),
    [
        (chips.Slice('v5p:4x4x2', chips.CHIPS['v5p'], 32, None), 8 * 100e9, 'torus'),  # 8 links of the cut, one way
        (chips.Slice('h100:16', chips.CHIPS['h100'], 16, None), 8 * 50e9, 'between hosts'),
        (chips.Slice('2 × h100:4', chips.CHIPS['h100'], 8, None, slices=2), 4 * 50e9, 'between slices'),
    ],
)
def test_weights_go_by_what_joins_the_halves(slice, bandwidth, link):
    rate, over = split._rate(slice, Assumptions(tokens=100))
    assert link in over and rate == pytest.approx(0.8 * bandwidth)


@pytest.mark.slow
def test_adapters_alone_are_sent_where_they_alone_are_trained():
    keys = ('--config.lora.rank=8', '--config.ppo.critic=none', '--config.advantage.kind=grpo')
    assert compared('h100:2', *keys)['weights'] < compared('h100:2', *keys[1:])['weights'] / 2


@pytest.mark.parametrize(
    ('slice', 'keys', 'words'),
    [
        (chips.Slice('h100:3', chips.CHIPS['h100'], 3, None), (), 'h100:3 has no two halves'),
        (
            dataclasses.replace(chips.open_slice('h100:2', 3), name='3 × h100:2'),
            ('--config.mesh.data=3',),
            '3 × h100:2 has no two halves',
        ),
        (chips.open_slice('h100:4'), ('--config.mesh.tensor=4',), 'does not divide 2 device'),
    ],
)
def test_where_there_are_no_halves_the_page_says_why(slice, keys, words):
    found = compared(slice, *keys)
    assert words in found['refused'] and split.text(found).startswith('Split: ')
