"""Episodes of a step: which groups are taken, how samples are numbered, what shaping does, what is counted."""

import collections
import copy
import dataclasses
import signal
import types

import numpy as np
import pytest

from retool_jax.core import episode_files, signals
from retool_jax.core.records import Fault, Problem, Reward, Stop, ToolCall, Verdict
from retool_jax.core.signals import Terminated
from retool_jax.rollout.requests import Request
from retool_jax.rollout.stats import RolloutStats
from retool_jax.text.template import make_template
from retool_jax.train import grading, sources
from retool_jax.train.sources import RolloutSettings
from tests.train import small

SETTINGS = RolloutSettings(
    problems_per_step=2, samples=2, dynamic_rounds=3, drop_void=False, overlong_buffer=0, quanta=0
)
CUT = dataclasses.replace(SETTINGS, dynamic_rounds=0, quanta=1)


class ScriptedEngine:
    """Every problem's answer says how its samples end: '+' right, '-' wrong, 'f' a fault of the sandbox.

    Its family says how many quanta the last sample takes; the others take one. It is told to stop when it has finished
    `stop_after` episodes.
    """

    link, stop_after = None, -1

    def __init__(self):
        self.rules = types.SimpleNamespace(settings=types.SimpleNamespace(max_tokens=100))
        self.stats = self.own = RolloutStats(sampled_tokens=10, total_s=2.0, live_steps=3, row_steps=4)
        self.asked = []

    def run(self, weights, version, requests, step, journal=None, quanta=None, finished=None):
        self.asked.append([r.problem.id for r in requests])
        made = []
        for r in requests:
            if self.stop_after == 0:
                raise signals.stop(signal.SIGTERM)
            rng = np.random.default_rng([int(r.problem.id[1:]), r.sample])
            e = r.begun or dataclasses.replace(
                small.make_episode(rng, r.problem.id, 3, sample=r.sample, step=step), problem=r.problem, reward=None
            )
            e.append([1, 2], acted=True, logprobs=[-1.0, -1.0], version=version)
            takes = int(r.problem.family or 1) if r.sample % 2 else 1
            if quanta is None or e.acted_count == 2 * takes:
                e.stop = Stop.FAULT if outcome(r) == 'f' else Stop.EOS
            else:
                e.stop = None
            made.append(e)
            if e.stop is not None:
                finished(e)
                self.stop_after -= 1
        return made


def outcome(made):
    return made.problem.answer[made.sample % len(made.problem.answer)]


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    def grade(episodes, grader, tokenizer):
        for e in episodes:
            right = outcome(e) != '-'
            e.reward = Reward(1.0 if right else -1.0, right, right, right, '')

    monkeypatch.setattr(grading, 'grade', grade)


def make_source(answers, settings, aside=None):
    """'+-3' is a problem whose last sample takes three quanta."""
    engine = ScriptedEngine()
    stream = [Problem(f'p{i}', 'Q?', answer[:2], 'test', answer[2:]) for i, answer in enumerate(answers)]
    return sources.sampled(engine, settings, stream, make_template('tiny'), small.TOKENIZER, None, aside=aside), engine


def collect(answers, settings=SETTINGS, cursor=0):
    source, engine = make_source(answers, settings)
    return source(None, 5, cursor), engine


def ids(found):
    return [(e.problem.id, e.sample) for e in found.episodes]


def test_without_rounds_every_group_is_taken():
    found, engine = collect(['++', '--', '+-'], dataclasses.replace(SETTINGS, dynamic_rounds=0))
    assert ids(found) == [('p0', 0), ('p0', 1), ('p1', 0), ('p1', 1)] and found.cursor == 2
    assert len(engine.asked) == 1 and 'rollout/rounds' not in found.metrics
    assert found.metrics['rollout/tokens_per_s'] == 5 and found.metrics['rollout/slot_occupancy'] == 0.75


def test_groups_of_equal_rewards_are_replaced_in_the_order_of_the_stream():
    found, engine = collect(['++', '+-', '--', '-+', '+-', '+-'])
    assert ids(found) == [('p1', 0), ('p1', 1), ('p3', 0), ('p3', 1)]
    assert found.cursor == 4 and len(engine.asked) == 2
    assert found.metrics['rollout/rounds'] == 2 and found.metrics['rollout/groups_taken'] == 2
    assert found.metrics['time/rollout_s'] == 4 and found.metrics['rollout/tokens_per_s'] == 5
    assert [(line['rollout_s'], line['sampled_tokens']) for line in found.hosts] == [(4.0, 20)]  # both rounds


def test_what_was_sampled_beyond_the_last_group_taken_is_asked_for_again():
    found, _ = collect(['+-', '++', '+-', '+-', '-+'])
    assert [problem for problem, _ in ids(found)] == ['p0', 'p0', 'p2', 'p2'] and found.cursor == 3
    following, _ = collect(['+-', '++', '+-', '+-', '-+'], cursor=found.cursor)
    assert [problem for problem, _ in ids(following)] == ['p3', 'p3', 'p4', 'p4'] and following.cursor == 5


def test_rounds_end_and_what_was_found_is_trained_on():
    found, engine = collect(['++', '+-', '--', '++', '--', '++', '+-'])
    assert [problem for problem, _ in ids(found)] == ['p1', 'p1'] and found.cursor == 6 and len(engine.asked) == 3
    none, _ = collect(['++'] * 6)
    assert ids(none) == [('p0', 0), ('p0', 1), ('p1', 0), ('p1', 1)] and none.metrics['rollout/groups_taken'] == 0


def test_unfinished_groups_are_carried_into_the_next_step_and_topped_up():
    source, engine = make_source(['+-3', '++', '--2', '++', '+-'], CUT)
    first = source(None, 0, 0)
    assert ids(first) == [('p1', 0), ('p1', 1)] and first.cursor == 2
    assert [(e.problem.id, e.stop, e.reward) for e in first.carried] == [('p0', Stop.EOS, None), ('p0', None, None)]
    assert first.metrics['partial/carried'] == 1 and first.metrics['partial/age_max'] == 0
    kept = copy.deepcopy(first.carried)

    second = source(None, 1, first.cursor, first.carried)
    assert first.carried == kept  # a checkpoint of the step before may still be written
    assert engine.asked[1] == ['p0', 'p2', 'p2']  # the one that was cut, and the place of the group that was taken
    # Neither was whole: the same step goes around again, with the same weights.
    assert engine.asked[2] == ['p0', 'p2'] and ids(second) == [('p0', 0), ('p0', 1), ('p2', 0), ('p2', 1)]
    assert second.cursor == 3 and not second.carried
    cut = second.episodes[1]
    assert cut.step == 0 and cut.versions[-6:] == [0, 0, 1, 1, 1, 1] and cut.reward.value == -1.0
    assert second.metrics['partial/age_max'] == 1 and second.metrics['partial/age_mean'] == 0.5
    assert second.metrics['partial/stale_tokens'] == pytest.approx(4 / 14)


def test_what_a_step_holds_of_a_problem_depends_on_no_order_of_the_steps_before():
    source, _ = make_source(['+-4', '+-', '-+', '++'], CUT)
    found, cursor, carried = [], 0, ()
    for step in range(3):
        made = source(None, step, cursor, carried)
        cursor, carried = made.cursor, made.carried
        found.append(sorted({e.problem.id for e in made.episodes}))
    assert found == [['p1'], ['p2'], ['p3']] and [e.problem.id for e in carried] == ['p0', 'p0']
    assert carried[1].versions[-6:] == [0, 0, 1, 1, 2, 2]


def test_groups_of_equal_rewards_are_replaced_while_others_are_carried():
    settings = dataclasses.replace(CUT, dynamic_rounds=2)
    source, engine = make_source(['+-3', '++', '+-', '++', '-+'], settings)
    first = source(None, 0, 0)
    assert ids(first) == [('p2', 0), ('p2', 1)] and engine.asked == [['p0', 'p0', 'p1', 'p1'], ['p0', 'p2', 'p2']]
    assert first.cursor == 3 and [e.problem.id for e in first.carried] == ['p0', 'p0']
    second = source(None, 1, first.cursor, first.carried)
    assert ids(second) == [('p0', 0), ('p0', 1), ('p4', 0), ('p4', 1)] and second.cursor == 5


def test_faults_of_the_sandbox_and_dropped_episodes_make_no_group_differ():
    found, _ = collect(['f-', '+-', '+-', '++'])
    assert [problem for problem, _ in ids(found)] == ['p1', 'p1', 'p2', 'p2']
    group = [e for e in found.episodes if e.problem.id == 'p1']
    assert sources.differs(group, drop_void=False) and sources.differs(group, drop_void=True)
    group[1].void = True  # what leaves the baseline is compared with nobody
    assert sources.differs(group, drop_void=False) and not sources.differs(group, drop_void=True)


def test_wrong_answers_that_calls_lift_apart_make_no_group_differ():
    group = small.make_episodes(2)
    for e, value in zip(group, (-1.0, -0.8)):  # reward.style=verl, no call and two
        e.reward = Reward(value, False, False, False, '')
    assert not sources.differs(group, drop_void=False)
    group[1].reward = Reward(1.0, True, True, True, '')
    assert sources.differs(group, drop_void=False)


def test_a_problem_asked_for_twice_has_samples_of_its_own():
    problem, other = (Problem(name, 'Q?', '1', 'test', '') for name in 'ab')
    seen = collections.Counter()
    asked = lambda *problems: [Request(p, sample, ()) for p in problems for sample in range(2)]
    first = sources.number(asked(problem, other, problem), seen)
    later = sources.number(asked(problem), seen)
    assert [(r.problem.id, r.sample) for r in first + later] == [
        ('a', 0),
        ('a', 1),
        ('b', 0),
        ('b', 1),
        ('a', 2),
        ('a', 3),
        ('a', 4),
        ('a', 5),
    ]


def test_dynamic_sampling_of_single_samples_is_refused():
    with pytest.raises(ValueError, match='dynamic_rounds=3 compares the samples of a problem, of which there is'):
        dataclasses.replace(SETTINGS, samples=1)


def test_kept_episodes_come_back_part_by_part(tmp_path):
    made = small.make_episodes(4)
    for step in range(2):
        for e in made:
            e.step = step
        episode_files.write(tmp_path, f'train_{step:05d}', made[2 * step : 2 * step + 2], lambda ids: '')
    episode_files.write(tmp_path, 'val_00000', made[:1], lambda ids: '')
    source = sources.dumped(str(tmp_path), 96)
    for step, expected in ((0, made[:2]), (1, made[2:]), (2, made[:2])):
        found = source(None, step, 7)
        assert found.cursor == 7 and [e.tokens for e in found.episodes] == [e.tokens for e in expected]
        assert [e.reward for e in found.episodes] == [e.reward for e in expected]


def test_kept_episodes_that_cannot_be_trained_on_are_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no training episodes; give the episodes/ of a run'):
        sources.dumped(str(tmp_path), 96)
    made = small.make_episodes(2)
    episode_files.write(tmp_path, 'train_00000', made, lambda ids: '')
    with pytest.raises(ValueError, match='holds ids beyond the model'):
        sources.dumped(str(tmp_path), 5)(None, 0, 0)
    longest = max(len(e.tokens) for e in made)
    sources.dumped(str(tmp_path), 96, longest)(None, 0, 0)
    with pytest.raises(ValueError, match=rf"problem '.*' has {longest} tokens, .* forward.row_width={longest - 1}"):
        sources.dumped(str(tmp_path), 96, longest - 1)(None, 0, 0)
    made[1].reward = None
    episode_files.write(tmp_path, 'train_00000', made, lambda ids: '')
    with pytest.raises(ValueError, match='without a reward'):
        sources.dumped(str(tmp_path), 96)(None, 0, 0)


def test_the_overlong_penalty_falls_over_the_buffer_and_spares_verdicts():
    rng = np.random.default_rng(0)
    lengths = {10: 0.0, 15: 0.0, 17: -0.4, 20: -1.0}  # of 30 tokens, 10 of them the prompt's
    episodes = [small.make_episode(rng, 'p', 10, n, reward=1.0) for n in lengths]
    sources.shape_overlong(episodes, 0, 30)
    assert [e.reward.value for e in episodes] == [1.0] * 4
    sources.shape_overlong(episodes, 5, 30)
    assert [e.reward.value for e in episodes] == pytest.approx([1 + x for x in lengths.values()])
    assert all(e.reward.correct for e in episodes)


def test_what_tools_printed_leaves_the_policy_less_room_before_the_overlong_penalty():
    rng = np.random.default_rng(0)
    # A budget of 60: a prompt of 10, 20 tokens of the policy's, 25 of a tool's; 25 are the policy's in all.
    lengths = {0: 0.0, 1: -0.2, 3: -0.6, 5: -1.0}
    episodes = [
        small.make_episode(rng, 'p', 10, 20, 25, n, reward=1.0)
        if n
        else small.make_episode(rng, 'p', 10, 20, 25, reward=1.0)
        for n in lengths
    ]
    sources.shape_overlong(episodes, 5, 60)
    assert [e.reward.value for e in episodes] == pytest.approx([1 + x for x in lengths.values()])


@pytest.mark.parametrize(
    'lengths',
    [
        (10, 20, 25, 5),  # full
        (10, 20, 10),  # a tool's output did not fit
        (10, 12),  # the turn had a budget of its own
        (60,),
    ],
)  # a prompt that leaves nothing
def test_an_episode_that_was_cut_always_gets_the_whole_overlong_penalty(lengths):
    rng = np.random.default_rng(0)
    cut = small.make_episode(rng, 'p', *lengths, reward=-1.0, stop=Stop.LENGTH)
    whole = small.make_episode(rng, 'p', 10, 12, reward=-1.0, stop=Stop.TURNS)
    sources.shape_overlong([cut, whole], 5, 60)
    assert (cut.reward.value, whole.reward.value) == (-2.0, -1.0)


def test_prompts_that_leave_less_than_the_buffer_do_not_end_the_run():
    rng = np.random.default_rng(0)
    episodes = [small.make_episode(rng, 'p', 26, 2, reward=1.0), small.make_episode(rng, 'p', 33, reward=-1.0)]
    sources.shape_overlong(episodes, 8, 30)
    assert [e.reward.value for e in episodes] == [0.5, -1.0]


def test_faults_are_told_by_kind():
    rng = np.random.default_rng(0)
    made = lambda fault: ToolCall(0, '1', Verdict.SANDBOX_ERROR if fault else Verdict.OK, '', '', '', 0, 1.0, fault)
    kinds = [None, Fault.WORKER, Fault.FULL, Fault.WORKER]
    found = sources.describe([small.make_episode(rng, 'a', 3, 4, calls=[made(kind)]) for kind in kinds])
    assert {name: share for name, share in found.items() if name.startswith('tools/fault_')} == {
        'tools/fault_frequency': 0.75,
        'tools/fault_worker': 0.5,
        'tools/fault_full': 0.25,
    }


def test_metrics_of_hand_made_episodes_are_what_counting_gives():
    rng = np.random.default_rng(0)
    made = lambda verdict, wall, code='1': ToolCall(0, code, verdict, '', '', '', 0, wall)
    episodes = [
        small.make_episode(rng, 'a', 3, 4, 2, 6, reward=1.0, turns=2, calls=[made(Verdict.OK, 1.0)]),
        small.make_episode(
            rng,
            'b',
            3,
            2,
            reward=-1.0,
            stop=Stop.LENGTH,
            void=True,
            calls=[made(Verdict.TIMEOUT, 3.0), made(Verdict.FORMAT, 0.0, ''), made(Verdict.ERROR, 2.0)],
        ),
        small.make_episode(rng, 'c', 3, 3, reward=-1.0),
    ]
    expected = {
        'rewards/mean': -1 / 3,
        'rewards/correct': 1 / 3,
        'response_length/mean': 5.0,
        'response_length/clip_ratio': 1 / 3,
        'num_turns/mean': 4 / 3,
        'void_turn_ratio': 1 / 3,
        'tools/calls': 4 / 3,
        'tools/code_ratio': 2 / 3,
        'tools/failure_frequency': 0.75,
        'grader/timeout_frequency': 0.0,
        'tools/timeout_frequency': 0.25,
        'tools/fault_frequency': 0.0,
        'tools/seconds_p50': 2.0,
        'tools/seconds_p99': 2.98,
    }  # of the three that ran
    assert sources.describe(episodes) == pytest.approx(expected)
    silent = sources.describe(episodes[2:])
    assert not any(value for name, value in silent.items() if name.startswith('tools/'))


@pytest.mark.parametrize('settings', [SETTINGS, dataclasses.replace(CUT, quanta=2)])
def test_a_stopped_step_goes_on_with_what_was_finished(tmp_path, settings):
    answers = ['++', '+-', '--', '-+', '+-', '+-']
    whole, engine = collect(answers, settings)
    total = sum(map(len, engine.asked))
    for count in (1, 0, 2, 2):  # episodes that each life finishes, in the first round and in the second
        source, engine = make_source(answers, settings, tmp_path)
        engine.stop_after = count
        if total > count:
            with pytest.raises(Terminated):
                source(None, 5, 0)
            total -= count
    source, engine = make_source(answers, settings, tmp_path)
    assert (found := source(None, 5, 0)).episodes == whole.episodes and found.cursor == whole.cursor
    assert sum(map(len, engine.asked)) == total
    sources.forget_aside(tmp_path, 5)
    assert episode_files.names(tmp_path)
    sources.forget_aside(tmp_path, 6)
    assert not episode_files.names(tmp_path)
