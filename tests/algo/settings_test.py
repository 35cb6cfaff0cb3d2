"""Settings refuse what cannot be meant, in one line that names field, value and remedy."""

import pytest

from retool_jax.algo.settings import LOSS_CHOICES, AdvantageSettings, LossSettings


def loss_settings(**changes) -> LossSettings:
    """Plain PPO, changed."""
    plain = dict(
        kind='ppo',
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation='token-mean',
        aggregation_constant=None,
        entropy_coef=0.0,
        kl_coef=0.0,
        kl_kind='k3',
        kl_in='loss',
        value_coef=1.0,
        value_clip=None,
        correction='none',
        correction_cap=2.0,
        correction_low=0.5,
        correction_high=2.0,
    )
    return LossSettings(**(plain | changes))


def refuses(make, **changes) -> str:
    with pytest.raises(ValueError) as error:
        make(**changes)
    line = str(error.value)
    assert '\n' not in line
    return line


@pytest.mark.parametrize('name, choices', LOSS_CHOICES.items())
def test_an_unknown_choice_is_refused_with_the_known_ones(name, choices):
    line = refuses(loss_settings, **{name: 'typo'})
    assert f"{name}='typo'" in line and all(choice in line for choice in choices)


@pytest.mark.parametrize(
    'name, value',
    [
        ('clip_low', -0.1), ('clip_low', 1.1), ('clip_high', -0.1), ('dual_clip', 1.0), ('kl_coef', -1.0),
        ('value_coef', -1.0), ('value_clip', 0.0), ('correction_cap', 0.5), ('correction_low', 1.5),
        ('correction_low', -0.1), ('correction_high', 0.9), ('clip_high', float('nan')),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_name_and_value(name, value):
    assert f'{name}={value} must' in refuses(loss_settings, **{name: value})


@pytest.mark.parametrize('constant', [None, 0.0, -4.0])
def test_token_sums_need_their_constant(constant):
    line = refuses(loss_settings, aggregation='seq-mean-token-sum', aggregation_constant=constant)
    assert line.startswith(f'aggregation_constant={constant} must ')


@pytest.mark.parametrize('aggregation', ['token-mean', 'seq-mean-token-sum'])
def test_gspo_is_a_mean_over_sequences(aggregation):
    line = refuses(loss_settings, kind='gspo', aggregation=aggregation, aggregation_constant=8.0)
    assert 'set loss.aggregation=seq-mean-token-mean' in line


def advantage_settings(**changes) -> AdvantageSettings:
    return AdvantageSettings(**(dict(kind='gae', gamma=1.0, lam=0.95, whiten=True) | changes))


@pytest.mark.parametrize('name, value', [('gamma', 1.5), ('gamma', -0.1), ('lam', 2.0)])
def test_discounts_lie_between_zero_and_one(name, value):
    assert f'{name}={value} must lie in [0, 1]' in refuses(advantage_settings, **{name: value})


def test_unknown_and_contradictory_advantages_are_refused():
    assert 'reinforce_pp_baseline' in refuses(advantage_settings, kind='typo')
    for kind in ('reinforce_pp', 'reinforce_pp_baseline'):
        assert 'set advantage.whiten=True' in refuses(advantage_settings, kind=kind, whiten=False)
    assert advantage_settings(kind='grpo', whiten=False).needs_groups
    assert advantage_settings().needs_values
