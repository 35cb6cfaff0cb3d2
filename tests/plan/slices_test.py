"""Several slices in a plan: the data axis runs over them, and gradients are summed over the slower network."""

from __future__ import annotations

import json

import pytest

from retool_jax.core import cli, settings
from retool_jax.core.errors import UserError
from retool_jax.plan import chips, dcn, guess, models, page, roofline
from retool_jax.plan.facts import BETWEEN_SLICES
from retool_jax.plan.programs import Run, per_device
from retool_jax.plan.roofline import Assumptions
from retool_jax.stages.config import Reinforcement

A = Assumptions(tokens=100)


def make_run(data: int, slices: int, *overrides: str) -> Run:
    keys = ['--config=configs/ppo.py:tiny', f'--config.mesh.data={data}', '--config.ppo.critic=backbone', *overrides]
    stage = settings.build(Reinforcement, cli.parse_config(['plan', *keys]))
    return Run(stage, models.sizes(None, 'tiny'), chips.open_slice('h100:4', slices))


def estimated(run: Run) -> list:
    return [dcn.add(run, guess.estimate(run, program)) for program in run.programs()]


def test_slices_hold_as_much_and_exchange_gradients_alone():
    one, two = make_run(1, 1), make_run(2, 2, '--config.forward.micro_rows=32')  # rows of a chip: as many
    assert two.slice.count == 8 and dict(two.mesh.shape) == {'data': 2, 'fsdp': 4, 'tensor': 1}
    assert per_device(two.params) == per_device(one.params) and per_device(two.gradients) == per_device(one.gradients)
    found = {f.name: f for f in estimated(two)}
    for name, alone in {f.name: f for f in estimated(one)}.items():
        kind, _, part = name.partition(' ')
        between = found[name].sent.get(BETWEEN_SLICES, 0.0)
        # A ring of two: each chip sends what it has of the gradients once.
        assert between == (per_device(one.gradients[part]) if kind == 'update' else 0.0)
        assert BETWEEN_SLICES not in alone.sent
        if kind in ('update', 'score'):
            assert found[name].sent_bytes == alone.sent_bytes
            extra = roofline.seconds(found[name], one.slice.chip, A).links
            extra -= roofline.seconds(alone, one.slice.chip, A).links
            assert extra == pytest.approx(between / (50e9 * A.links))


def test_the_page_names_the_slices_and_their_exchange():
    run = make_run(3, 3, '--config.forward.micro_rows=24')
    plan = json.loads(json.dumps(page.make(run, estimated(run), A)))
    assert plan['chips'] == 12 and plan['topology'] == '3 × h100:4'
    update = next(p for p in plan['programs'] if p['name'] == 'update policy')
    assert update['sent'][BETWEEN_SLICES] == pytest.approx(4 / 3 * per_device(run.gradients['policy']))
    text = page.text(plan)
    assert text.startswith('3 × h100:4: 12 × h100') and BETWEEN_SLICES in text


@pytest.mark.parametrize(('data', 'slices'), [(1, 2), (2, 4)])
def test_a_data_axis_that_does_not_divide_over_the_slices_is_refused_with_one_line(data, slices):
    with pytest.raises(UserError, match=rf'^mesh\.data={data} runs over {slices} slices; set it to a multiple of'):
        make_run(data, slices)
