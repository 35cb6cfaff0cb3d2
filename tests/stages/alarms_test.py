"""Alarms: each rings at its threshold, once while it lasts, and does what its key says."""

import dataclasses

import pytest

from retool_jax.core.records import Reward
from retool_jax.stages.alarms import Watch, WatchSettings
from tests.train import small

SETTINGS = WatchSettings(
    entropy_below=0.1,
    equal_steps=2,
    mismatch_above=0.05,
    failures_above=0.9,
    faults_above=0.5,
    straggler_above=1.5,
    straggler_steps=3,
    straggler='warn',
    timeouts_above=0.02,
    timeouts='warn',
    episode_mismatch_above=0.04,
    episode_mismatch='warn',
    entropy='warn',
    equal_rewards='warn',
    mismatch='warn',
    failures='warn',
    faults='stop',
)
CALM = {
    'actor/entropy': 1.0,
    'mismatch/kl': -0.01,
    'mismatch/episode_max': 0.04,
    'tools/failure_frequency': 0.9,
    'tools/fault_frequency': 0.5,
    'grader/timeout_frequency': 0.02,
}


def episodes(*rewards):
    made = small.make_episodes(len(rewards))
    for e, value in zip(made, rewards):
        e.reward = Reward(value, value > 0, value > 0, value > 0, '')
    return made


MIXED = episodes(1.0, -1.0)


def names(alarms):
    return [alarm.name for alarm in alarms]


def test_a_calm_step_rings_nothing():
    assert Watch(SETTINGS).look(CALM, MIXED) == []
    assert Watch(SETTINGS).look({}, MIXED) == []  # rollouts alone have no entropy


@pytest.mark.parametrize(
    ('name', 'metric', 'value', 'remedy'),
    [
        ('entropy', 'actor/entropy', 0.09, 'loss.entropy_coef'),
        ('mismatch', 'mismatch/kl', 0.06, 'sampler.dtype'),
        ('mismatch', 'mismatch/kl', -0.06, 'sampler.dtype'),
        ('failures', 'tools/failure_frequency', 0.95, 'episodes'),
        ('episode_mismatch', 'mismatch/episode_max', 0.3, 'one episode'),
        ('faults', 'tools/fault_frequency', 0.6, 'doctor'),
        ('timeouts', 'grader/timeout_frequency', 0.03, 'reward.time_limit_s'),
    ],
)
def test_each_threshold_has_its_alarm_with_the_number_and_a_remedy(name, metric, value, remedy):
    (alarm,) = Watch(SETTINGS).look(CALM | {metric: value}, MIXED)
    assert alarm.name == name and metric in alarm.text and str(abs(value)) in alarm.text and remedy in alarm.text
    assert alarm.stop == (name == 'faults')
    (stop,) = Watch(dataclasses.replace(SETTINGS, **{name: 'stop'})).look(CALM | {metric: value}, MIXED)
    assert stop.stop
    assert Watch(dataclasses.replace(SETTINGS, **{name: 'ignore'})).look(CALM | {metric: value}, MIXED) == []


def test_episodes_of_older_weights_have_a_remedy_of_their_own():
    (alarm,) = Watch(SETTINGS).look(CALM | {'mismatch/kl': 0.06, 'partial/stale_tokens': 0.4}, MIXED)
    assert alarm.name == 'mismatch' and 'raise ppo.quanta' in alarm.text and 'sampler.dtype' not in alarm.text


def test_equal_rewards_ring_after_so_many_steps_in_a_row():
    watch, equal = Watch(SETTINGS), episodes(-1.0, -1.0)
    steps = [equal, MIXED, equal, equal, equal, MIXED, equal, equal]
    assert [names(watch.look(CALM, step)) for step in steps] == [
        [],
        [],
        [],
        ['equal_rewards'],
        [],
        [],
        [],
        ['equal_rewards'],
    ]


def test_wrong_answers_that_are_shaped_apart_are_equal_all_the_same():
    shaped = episodes(-1.0, -0.8, -1.6)
    watch = Watch(SETTINGS)
    (alarm,) = watch.look(CALM, shaped) + watch.look(CALM, shaped)
    assert alarm.name == 'equal_rewards' and 'all answers of 2 steps are wrong' in alarm.text


def test_a_warning_is_given_when_it_begins_and_a_stop_always():
    low, watch = CALM | {'actor/entropy': 0.0}, Watch(SETTINGS)
    assert [names(watch.look(m, MIXED)) for m in (low, low, CALM, low)] == [['entropy'], [], [], ['entropy']]
    watch, broken = Watch(SETTINGS), CALM | {'tools/fault_frequency': 1.0}
    assert [names(watch.look(broken, MIXED)) for _ in range(2)] == [['faults'], ['faults']]


def test_unknown_actions_are_refused():
    with pytest.raises(ValueError, match="entropy='panic' is unknown; choose one of ignore, warn, stop"):
        dataclasses.replace(SETTINGS, entropy='panic')
    with pytest.raises(ValueError, match='equal_steps=0 must lie in '):
        dataclasses.replace(SETTINGS, equal_steps=0)


def lines(*seconds):
    """What so many processes did in a step, by the seconds of their rollouts."""
    return [{'process': i, 'host': f'node{i}', 'rollout_s': s} for i, s in enumerate(seconds)]


def heard(*steps, **changes):
    """The alarms of steps, each a tuple of seconds."""
    watch = Watch(dataclasses.replace(SETTINGS, **changes))
    return [watch.look(CALM, MIXED, lines(*seconds)) for seconds in steps]


def test_a_process_that_holds_up_the_others_for_three_steps_is_named_with_its_host():
    slow = (10.0, 11.0, 16.0, 10.0)
    *before, alarms, after = heard(slow, slow, slow, slow)
    assert before == [[], []] and after == [] and names(alarms) == ['straggler']
    text = alarms[0].text
    assert text.startswith('process 2 on node2 took 16.0 s') and 'median one 10.0 s' in text and '3 steps' in text
    assert not alarms[0].stop and heard(slow, slow, slow, straggler='stop')[2][0].stop
    assert heard(slow, slow, slow, straggler='ignore') == [[], [], []]


@pytest.mark.parametrize(
    'steps',
    [
        [(10.0, 11.0, 15.0)] * 4,  # not beyond the threshold of the median, 11.0
        [(10.0, 16.0)] * 2 + [(10.0, 15.0)] + [(10.0, 16.0)] * 2,  # not in a row
        [(10.0, 16.0), (16.0, 10.0)] * 3,  # not the same process: long episodes, wherever they fall
        [(16.0,)] * 4,  # alone
        [()] * 4,  # episodes of a folder
    ],
)
def test_other_steps_name_nobody(steps):
    assert heard(*steps) == [[] for _ in steps]


def test_of_two_processes_the_slower_is_compared_with_the_other():
    assert [names(alarms) for alarms in heard(*[(16.0, 10.0)] * 3)] == [[], [], ['straggler']]


def test_a_straggler_that_recovers_rings_anew():
    slow, even = (10.0, 10.0, 20.0), (10.0, 10.0, 10.0)
    assert [names(a) for a in heard(*[slow] * 3, even, *[slow] * 3)] == [
        [], [], ['straggler'], [], [], [], ['straggler'],
    ]  # fmt: skip
