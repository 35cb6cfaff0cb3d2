"""PPO over episodes: how a batch is dealt and masked, what is reported, and real steps of a small model."""

import copy
import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core.errors import UserError
from retool_jax.core.records import Stop
from retool_jax.model import decoder
from retool_jax.rollout.settings import SamplingSettings
from retool_jax.tasks.grader import Grader
from retool_jax.text import template
from retool_jax.train import ppo, sources
from retool_jax.train.learner import Learner
from retool_jax.train.pack import pack
from retool_jax.train.ppo import PPOSettings, Progress
from retool_jax.train.residency import Residency
from retool_jax.train.state import OptimizerSettings, add_critic, init_state, make_optimizer
from tests.train import small

SETTINGS = PPOSettings(
    steps=2,
    problems_per_step=3,
    samples=2,
    minibatches=2,
    epochs=1,
    critic='head',
    critic_warmup_steps=0,
    drop_void=False,
    mask_truncated=False,
    overlong_buffer=0,
    dynamic_rounds=0,
    quanta=0,
    offload=False,
    rescore=True,
)
WHOLE = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
FORWARD = small.make_forward()
# The contract with other tools.
NAMES = {'rewards/mean', 'actor/pg_clipfrac', 'actor/ppo_kl', 'actor/entropy', 'actor/grad_norm', 'critic/vf_loss',
         'critic/explained_var', 'response_length/mean', 'response_length/clip_ratio', 'num_turns/mean', 'tools/calls',
         'tools/failure_frequency', 'tools/timeout_frequency', 'tools/seconds_p50', 'tools/seconds_p99',
         'mismatch/logprob_abs_max', 'mismatch/kl', 'void_turn_ratio', 'time/rollout_s', 'time/tools_blocked_s',
         'time/update_s'}  # fmt: skip


def deal(episodes, seed=0, step=0, **changes):
    return ppo.make_batch(episodes, dataclasses.replace(SETTINGS, **changes), FORWARD, seed, step)[:2]


def unpacked(batch, rows=None):
    """What the batch says of each episode: ids → (group, reward, baseline, update)."""
    found = []
    for r, n, place in small.places(batch, rows):
        ids = tuple(batch.tokens_BT[r, place].tolist())
        reward, flags = float(batch.reward_BN[r, n]), (bool(batch.baseline_BN[r, n]), bool(batch.update_BN[r, n]))
        found.append((ids, (int(batch.group_BN[r, n]), reward, *flags)))
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize('minibatches', [1, 2, 3])
def test_every_episode_is_dealt_to_one_mini_batch(minibatches):
    episodes = small.make_episodes(11)
    batch, parts = deal(episodes, minibatches=minibatches)
    assert len(parts) == minibatches and parts[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert all((stop - start) % FORWARD.micro_rows == 0 for start, stop in parts)
    dealt = [unpacked(batch, part) for part in parts]
    sizes = sorted(map(len, dealt))
    assert sum(sizes) == 11 and sizes[-1] - sizes[0] <= 1
    assert set().union(*dealt) == {tuple(e.tokens) for e in episodes}
    assert not unpacked(batch, (parts[-1][1], len(batch.tokens_BT)))


def test_every_process_deals_alike_and_every_step_anew():
    episodes = small.make_episodes(11)
    mixed = lambda batch: batch.tokens_BT.tolist()
    first = deal(episodes)
    again = deal(copy.deepcopy(episodes))
    jax.tree.map(np.testing.assert_array_equal, first[0], again[0])
    assert first[1] == again[1]
    assert mixed(deal(episodes, step=1)[0]) != mixed(first[0]) != mixed(deal(episodes, seed=1)[0])


def test_samples_of_a_problem_share_a_group_below_the_number_of_problems():
    episodes = small.make_episodes(12, samples=4)
    found = unpacked(deal(episodes, samples=4)[0])
    groups = {}
    for e in episodes:
        group, reward, baseline, update = found[tuple(e.tokens)]
        assert groups.setdefault(e.problem.id, group) == group and reward == e.reward.value and baseline and update
    assert sorted(groups.values()) == [0, 1, 2]


def test_a_problem_that_a_step_holds_twice_is_two_groups():
    rng = np.random.default_rng(0)
    episodes = [small.make_episode(rng, 'p', 3, 4 + i, sample=i) for i in range(4)]
    found = unpacked(deal(episodes)[0])
    assert [found[tuple(e.tokens)][0] for e in episodes] == [0, 0, 1, 1]


def test_a_problem_carried_over_and_asked_for_again_is_two_groups():
    rng = np.random.default_rng(0)
    episodes = [small.make_episode(rng, 'p', 3, 4 + i, sample=i % 2) for i in range(4)]
    episodes[2].step = episodes[3].step = 1
    found = unpacked(deal(episodes)[0])
    assert [found[tuple(e.tokens)][0] for e in episodes] == [0, 0, 1, 1]


def test_a_step_of_fewer_episodes_than_mini_batches_takes_none_that_is_empty():
    batch, parts = deal(small.make_episodes(2), minibatches=4)
    assert [len(unpacked(batch, part)) for part in parts] == [1, 1]


def test_more_groups_than_a_step_has_are_refused():
    learner, progress = types.SimpleNamespace(forward=FORWARD, quiet_groups=False), Progress(None)
    with pytest.raises(ValueError, match='step 7 holds 6 groups of ppo.samples=2, more than ppo.problems_per_step=3'):
        ppo.update(learner, progress, SETTINGS, small.make_episodes(11), 0, 7, Residency(False))


@pytest.mark.parametrize(
    ('passes', 'changes', 'loss', 'step'),
    [
        (0, {'minibatches': 1}, {}, 0),
        (1, {'minibatches': 2}, {}, 0),  # the policy's of the second mini-batch
        (3, {'minibatches': 2, 'critic': 'backbone'}, {}, 3),  # and the critic's of both
        (4, {'minibatches': 2, 'critic': 'backbone', 'critic_warmup_steps': 4}, {}, 3),
        (1, {'minibatches': 1, 'critic': 'head'}, {}, 0),
        (1, {'minibatches': 1, 'epochs': 2}, {}, 0),
        (2, {'minibatches': 1}, {'kl_coef': 0.1, 'kl_in': 'reward'}, 0),
        (1, {'minibatches': 1}, {'kl_coef': 0.1, 'kl_in': 'loss'}, 0),
    ],
)
def test_nothing_is_scored_that_the_differentiated_pass_computes(passes, changes, loss, step, monkeypatch):
    settings = dataclasses.replace(SETTINGS, **{'critic': 'none', 'epochs': 1} | changes)
    kind = 'grpo' if settings.critic == 'none' else 'gae'
    learner = small.make_learner(
        loss=small.make_loss(**loss),
        advantage=small.make_advantage(kind=kind),
        forward=small.make_forward(row_width=192, micro_rows=1, row_segments=12),
    )
    count, score = [], learner._score
    monkeypatch.setattr(learner, '_score', lambda **given: count.append(1) or score(**given))
    monkeypatch.setattr(learner, 'ppo_step', lambda state, *given, **more: (state, {}))
    state = small.make_state(learner.optimizer, settings.critic)
    reference = state.params['policy'] if loss else None
    ppo.update(learner, Progress(state), settings, small.make_episodes(6), 0, step, Residency(False, reference))
    assert len(count) == passes  # a mini-batch is one row


@pytest.mark.parametrize(('kind', 'critic'), [('gae', 'none'), ('grpo', 'head'), ('rloo', 'backbone')])
def test_a_critic_that_nothing_reads_and_values_that_nobody_estimates_are_refused(kind, critic):
    sizes = dataclasses.replace(SETTINGS, critic=critic)
    with pytest.raises(UserError, match=f"ppo.critic='{critic}' contradicts advantage.kind='{kind}'"):
        ppo.check(sizes, small.make_advantage(kind=kind), small.make_loss(), WHOLE)
    ppo.check(dataclasses.replace(SETTINGS, critic='head'), small.make_advantage(), small.make_loss(), WHOLE)


@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'rloo', 'reinforce_pp_baseline'])
def test_groups_of_one_sample_are_refused_where_samples_are_compared(kind):
    advantage, alone = small.make_advantage(kind=kind), dataclasses.replace(SETTINGS, critic='none', samples=1)
    with pytest.raises(UserError, match=f"advantage.kind='{kind}' compares .* ppo.samples=1: .* set ppo.samples=2"):
        ppo.check(alone, advantage, small.make_loss(), WHOLE)
    ppo.check(dataclasses.replace(alone, samples=2), advantage, small.make_loss(), WHOLE)
    ppo.check(alone, small.make_advantage(kind='reinforce_pp'), small.make_loss(), WHOLE)  # compares nobody
    ppo.check(dataclasses.replace(SETTINGS, samples=1), small.make_advantage(), small.make_loss(), WHOLE)


def test_tokens_of_older_weights_are_refused_where_nothing_weighs_them():
    carried = dataclasses.replace(SETTINGS, quanta=4)
    with pytest.raises(UserError, match='ppo.quanta=4 trains on tokens of older weights, .* set loss.correction=token'):
        ppo.check(carried, small.make_advantage(), small.make_loss(correction='none'), WHOLE)
    ppo.check(carried, small.make_advantage(), small.make_loss(correction='sequence'), WHOLE)
    ppo.check(SETTINGS, small.make_advantage(), small.make_loss(correction='none'), WHOLE)


def test_tokens_of_weights_in_8_bits_are_refused_where_nothing_weighs_them():
    check = lambda sizes, kind: ppo.check(
        sizes, small.make_advantage(kind='grpo'), small.make_loss(correction=kind), WHOLE, 'int8'
    )
    sizes = dataclasses.replace(SETTINGS, critic='none', samples=2)
    with pytest.raises(UserError, match="sampler.weights='int8' .* set loss.correction=token or sequence"):
        check(sizes, 'none')
    check(sizes, 'token')
    check(dataclasses.replace(sizes, quanta=4), 'sequence')  # age and 8 bits are one ratio
    check(dataclasses.replace(sizes, minibatches=1, rescore=False), 'none')  # the loss's own ratio weighs them


def test_a_warm_up_of_no_critic_is_refused():
    with pytest.raises(UserError, match="critic_warmup_steps=20 .* ppo.critic='none' .* set ppo.critic_warmup_steps=0"):
        dataclasses.replace(SETTINGS, critic='none', critic_warmup_steps=20)


@pytest.mark.parametrize(
    ('drop_void', 'mask_truncated', 'expected'),
    [
        (False, False, {'plain': (True, True), 'void': (True, True), 'long': (True, True)}),
        (True, False, {'plain': (True, True), 'void': (False, False), 'long': (True, True)}),
        (False, True, {'plain': (True, True), 'void': (True, True), 'long': (True, False)}),
    ],
)
def test_void_truncated_and_faulty_episodes_are_masked_as_the_settings_say(drop_void, mask_truncated, expected):
    plain, void, long, fault = small.make_episodes(4)
    void.void, long.stop, fault.stop = True, Stop.LENGTH, Stop.FAULT
    found = unpacked(deal([plain, void, long, fault], drop_void=drop_void, mask_truncated=mask_truncated)[0])
    of = lambda episode: found[tuple(episode.tokens)][2:]
    assert {'plain': of(plain), 'void': of(void), 'long': of(long)} == expected
    assert of(fault) == (False, False)  # the sandbox's failure is never the policy's


@pytest.fixture(scope='module')
def runs():
    """Two real steps, and their second one again from the state after the first: every episode fails."""
    adam = OptimizerSettings(
        kind='adamw', lr=1e-2, schedule='constant', warmup_steps=0, b1=0.9, b2=0.99, weight_decay=0.0, grad_clip=1.0
    )
    optimizer = make_optimizer(adam, 4, adam)
    forward = small.make_forward(row_width=128, logprob_chunk=128, vocab_chunk=264, micro_rows=4)
    learner = Learner(
        small.SPEAKER,
        forward,
        optimizer,
        small.one_device(),
        loss=small.make_loss(),
        advantage=small.make_advantage(whiten=False),
    )
    begin = init_state(add_critic(small.SPEAKER, decoder.init(small.SPEAKER, jax.random.key(0)), 'head'), optimizer)
    copied = lambda tree: jax.tree.map(jnp.copy, tree)
    sampler, states, results = small.make_sampler(), [copied(begin)], []

    def run(progress, offload=False):
        def report(result):
            results.append(result)
            states.append(copied(progress.state))

        with Grader() as grader:
            source = sources.sampled(
                small.make_engine(sampler),
                SETTINGS,
                small.make_problems(6),
                template.make_template('tiny'),
                small.TOKENIZER,
                grader,
            )
            ppo.train(
                learner,
                progress,
                dataclasses.replace(SETTINGS, offload=offload),
                sync=sampler.sync,
                collect=source,
                seed=0,
                report=report,
                due=lambda done: True,
            )

    with pytest.MonkeyPatch.context() as patch:  # a random model writes no tags: all it says before a stop is code
        patch.setattr(template, 'extract_snippet', lambda text: template.Snippet(text, 0))
        run(Progress(begin))
        run(Progress(copied(states[1]), done=1, cursor=3), offload=True)
    return learner, states, results


def test_a_step_reports_its_episodes_and_every_metric_of_the_contract(runs):
    _, states, results = runs
    assert [r.step for r in results] == [0, 1, 1] and [int(s.step) for s in states] == [0, 2, 4, 4]
    for result in results:
        assert not NAMES - set(result.metrics) and all(np.isfinite(x) for x in result.metrics.values())
        assert [(e.problem.id, e.sample) for e in result.episodes] == [
            (f'p{3 * result.step + i}', sample) for i in range(3) for sample in range(2)
        ]
        assert all(
            v == (result.step if acted else -1) for e in result.episodes for v, acted in zip(e.versions, e.acted)
        )
    assert results[0].metrics['tools/code_ratio'] > 0 and results[0].metrics['rewards/mean'] == -1


def test_the_trainer_scores_what_the_sampler_wrote_alike(runs):
    for result in runs[2]:
        assert 0 < result.metrics['mismatch/logprob_abs_max'] <= 1e-4


def test_the_policy_moves_away_from_what_failed(runs):
    learner, states, results = runs
    episodes = pack(results[0].episodes, width=128, rows=4, segments=3)
    loss = [learner.sft_loss(state.params, episodes) for state in states[:2]]
    assert loss[1] > loss[0] + 0.01
    assert not np.any(states[0].params['critic']['head']['weight'])
    assert np.any(states[1].params['critic']['head']['weight'])


def test_nothing_in_an_update_waits_for_the_device(runs, monkeypatch):
    learner, states, results = runs
    progress = Progress(jax.tree.map(jnp.copy, states[1]))
    fetched = []
    kind = type(progress.state.step)
    value = kind._value
    monkeypatch.setattr(kind, '_value', property(lambda self: fetched.append(self.shape) or value.fget(self)))
    pending = ppo.update(learner, progress, SETTINGS, results[1].episodes, 0, 1, Residency(False))
    assert fetched == []
    result = pending.fetch(False, False)
    assert fetched  # so it would have been noticed
    assert result.metrics['actor/pg_loss'] == results[1].metrics['actor/pg_loss']
    assert result.metrics['time/update_s'] > 0


def test_a_resumed_run_goes_on_as_the_whole_one_also_with_buffers_moved_to_the_host(runs):
    _, states, (_, whole, resumed) = runs
    assert resumed.episodes == whole.episodes
    assert small.distance(states[3].params, states[2].params) == 0
