"""The update: the same step however a mini-batch is cut or packed, and only from what the policy wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core.pytrees import TrainState
from retool_jax.model import decoder
from retool_jax.train.learner import mean_metrics
from retool_jax.train.pack import join, pack
from retool_jax.train.state import OptimizerSettings, make_optimizer
from tests.train import small

EPISODES = small.make_episodes(8)
GROUPS = [int(e.problem.id[1:]) for e in EPISODES]


def make_batch(episodes=EPISODES, rows=4, segments=3, **kwargs):
    """The whole batch, filled up with empty rows, and how many rows are not."""
    packed = pack(episodes, width=48, rows=rows, segments=segments, **({'groups': GROUPS} | kwargs))
    batch, ((_, stop),) = join([packed])
    return batch, stop


def step(learner, batch, stop, critic='head'):
    """Gradient, parameters and metrics of one PPO step from the fixed weights."""
    state = small.make_state(learner.optimizer, critic)
    scores = learner.score(state.params, learner.put(batch), stop, None, num_groups=4)
    state, metrics = learner.ppo_step(state, learner.put(batch), scores, (0, stop))
    return small.gradient(state), jax.device_get(state.params), jax.device_get(metrics)


def sft_step(learner, batch):
    state, metrics = learner.sft_step(small.make_state(learner.optimizer, 'none'), batch)
    return small.gradient(state), jax.device_get(state.params), jax.device_get(metrics)


def assert_same_step(found, expected):
    """The tolerances of one computation in another order; a gradient near 0 may flip a sign of AdamW."""
    assert small.distance(found[0], expected[0]) < 1e-5
    change = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])))])
    assert change.mean() < 0.05 * small.LR and change.max() < 2 * small.LR
    for name, value in expected[2].items():
        np.testing.assert_allclose(found[2][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope='module')
def learner():
    return small.make_learner()


@pytest.mark.slow
def test_any_cut_of_a_mini_batch_gives_the_same_step(learner):
    cut = lambda rows: step(small.make_learner(forward=small.make_forward(micro_rows=rows)), *make_batch())
    whole = cut(4)
    assert small.distance(whole[1], small.make_tree()) > 0
    for found in (step(learner, *make_batch()), cut(1)):
        assert_same_step(found, whole)


def test_neither_the_order_of_rows_nor_empty_ones_change_the_step(learner):
    batch, stop = make_batch(rows=2)
    whole = step(learner, batch, stop)
    order = np.random.default_rng(0).permutation(stop)
    assert (order != np.arange(stop)).any()
    mixed = np.concatenate([order, np.arange(stop, len(batch.tokens_BT))])
    assert_same_step(step(learner, jax.tree.map(lambda x: x[mixed], batch), stop), whole)
    padded = make_batch(rows=8)
    assert padded[1] > stop
    assert_same_step(step(learner, *padded), whole)


def test_any_cut_gives_the_same_supervised_step():
    batch, _ = make_batch()
    cut = lambda rows: sft_step(small.make_learner(rl=False, forward=small.make_forward(micro_rows=rows)), batch)
    assert_same_step(cut(2), cut(4))


@pytest.mark.slow
def test_several_episodes_per_row_give_the_step_of_one_per_row():
    packed, alone = make_batch(segments=3), make_batch(segments=1)
    assert packed[1] < alone[1] == len(EPISODES)
    loss = small.make_loss(aggregation='seq-mean-token-mean')
    run = lambda batch, n, rows: step(
        small.make_learner(forward=small.make_forward(row_segments=n, micro_rows=rows), loss=loss), *batch
    )
    assert_same_step(run(packed, 3, 2), run(alone, 1, 4))


def of_one_prompt(episodes, samples=2):
    """The same with the prompt of each group's first sample for all of them."""
    for first in range(0, len(episodes), samples):
        prompt = episodes[first].tokens[: episodes[first].prompt_length]
        for e in episodes[first : first + samples]:
            rest = slice(e.prompt_length, None)
            e.tokens, e.acted = prompt + e.tokens[rest], [False] * len(prompt) + e.acted[rest]
            e.logprobs, e.prompt_length = [0.0] * len(prompt) + e.logprobs[rest], len(prompt)
    return episodes


@pytest.mark.parametrize('advantage, loss', [({}, {}), ({'kind': 'grpo'}, {'aggregation': 'seq-mean-token-mean'})])
def test_a_prompt_that_lies_once_in_a_row_gives_the_step_of_one_for_each_sample(advantage, loss):
    episodes = of_one_prompt(small.make_episodes(8))
    shared, alone = (make_batch(episodes, rows=2, share=share) for share in (True, False))
    assert (shared[0].segment_ids_BT > 3).any() and (shared[0].tokens_BT != alone[0].tokens_BT).any()
    learner = small.make_learner(advantage=small.make_advantage(**advantage), loss=small.make_loss(**loss))
    assert_same_step(step(learner, *shared), step(learner, *alone))


def test_an_instruction_that_lies_once_in_a_row_gives_the_same_supervised_step():
    episodes = of_one_prompt(small.make_episodes(8), samples=8)
    shared, alone = (make_batch(episodes, rows=2, share=share)[0] for share in (True, False))
    learner = small.make_learner(rl=False)
    assert (shared.segment_ids_BT > 3).any()
    assert_same_step(sft_step(learner, shared), sft_step(learner, alone))


def test_the_first_mini_batch_has_ratio_one_and_the_second_has_not(learner):
    packed = [pack(part, width=48, rows=2, segments=3, groups=GROUPS[:4]) for part in (EPISODES[:4], EPISODES[4:])]
    batch, (first, second) = join(packed)
    batch = learner.put(batch)
    state = small.make_state(learner.optimizer)
    scores = learner.score(state.params, batch, second[1], None, num_groups=4)
    state, found = learner.ppo_step(state, batch, scores, first)
    assert abs(found['actor/ppo_kl']) < 1e-6 and abs(found['actor/ratio_max'] - 1) < 1e-5
    assert found['actor/pg_clipfrac'] == 0 and found['critic/vf_clipfrac'] == 0
    _, found = learner.ppo_step(state, batch, scores, second)
    assert abs(found['actor/ppo_kl']) > 1e-3 and found['actor/pg_clipfrac'] > 0


@pytest.mark.parametrize(('critic', 'kind'), [('none', 'grpo'), ('backbone', 'gae')])
def test_the_first_mini_batch_takes_the_same_step_by_the_logprobs_of_its_own_pass(critic, kind):
    packed = [pack(part, width=48, rows=2, segments=3, groups=GROUPS[:4]) for part in (EPISODES[:4], EPISODES[4:])]
    batch, (first, second) = join(packed)
    learner = small.make_learner(advantage=small.make_advantage(kind=kind), loss=small.make_loss(correction='token'))
    batch = learner.put(batch)

    def steps(fresh):
        state = small.make_state(learner.optimizer, critic)
        scores = learner.score(state.params, batch, second[1], None, num_groups=4, fresh=first[1] if fresh else 0)
        state, one = learner.ppo_step(state, batch, scores, first, fresh=fresh)
        state, two = learner.ppo_step(state, batch, scores, second)
        return scores, state.params, one, two

    (left_out, params, *found), (scores, expected, *wanted) = steps(True), steps(False)
    for name in ('logprob_BT', 'entropy_BT'):
        some, all_of_them = np.array(getattr(left_out, name)), np.array(getattr(scores, name))
        assert all_of_them[: first[1]].any() and not some[: first[1]].any()
        np.testing.assert_array_equal(some[first[1] :], all_of_them[first[1] :])
    for name in ('value_BT', 'advantage_BT', 'return_BT'):
        np.testing.assert_array_equal(getattr(left_out, name), getattr(scores, name))
    assert small.distance(params, expected) < 1e-5
    assert found[0]['actor/ppo_kl'] == 0 and found[0]['actor/ratio_max'] == 1 and found[1]['actor/ppo_kl'] != 0
    for some, other in zip(found, wanted):
        for name in some:
            np.testing.assert_allclose(some[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_scores_are_those_of_each_episode_alone(learner):
    batch, stop = make_batch()
    tree = small.make_tree()
    scores = learner.score(tree, learner.put(batch), stop, None, num_groups=4)
    place = [(r, n) for r in range(stop) for n in range(1, 4) if (batch.segment_ids_BT[r] == n).any()]
    assert len(place) == len(EPISODES)
    for r, n in place:
        here = batch.segment_ids_BT[r] == n
        tokens = batch.tokens_BT[r, here][None]
        hidden = decoder.forward(
            small.CONFIG, tree['policy'], tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
        )[0]
        logprobs = jax.nn.log_softmax(hidden @ tree['policy']['lm_head']['weight'])
        before = hidden[:-1] @ tree['critic']['head']['weight'] + tree['critic']['head']['bias']
        expected = logprobs[jnp.arange(tokens.shape[1] - 1), tokens[0, 1:]]
        acted = batch.acted_BT[r, here][1:]  # what the policy did not write is not scored
        np.testing.assert_allclose(scores.logprob_BT[r, here][1:], np.where(acted, expected, 0.0), atol=1e-4)
        np.testing.assert_allclose(scores.value_BT[r, here][1:], before[:, 0], atol=1e-4)


def test_what_stands_beside_the_policys_tokens_changes_nothing(learner):
    batch, stop = make_batch()
    known = step(learner, batch, stop)
    other = dataclasses.replace(
        batch,
        sampler_logprob_BT=np.where(batch.acted_BT, batch.sampler_logprob_BT, np.nan),
        reward_BN=np.where(batch.group_BN >= 0, batch.reward_BN, 1e6).astype(np.float32),
    )
    assert np.isnan(other.sampler_logprob_BT).any() and (other.reward_BN == 1e6).any()
    jax.tree.map(np.testing.assert_array_equal, step(learner, other, stop), known)
    heard = dataclasses.replace(batch, sampler_logprob_BT=batch.sampler_logprob_BT + batch.acted_BT)
    assert small.distance(step(learner, heard, stop)[0], known[0]) > 1e-3


def test_an_episode_outside_the_update_leaves_the_step_as_if_it_were_absent(learner):
    keep = [i != 3 for i in range(len(EPISODES))]
    masked = step(learner, *make_batch(update=keep, baseline=keep))
    absent = step(
        learner,
        *make_batch([e for e in EPISODES if e is not EPISODES[3]], groups=[g for g, k in zip(GROUPS, keep) if k]),
    )
    assert_same_step(masked, absent)
    assert small.distance(masked[0], step(learner, *make_batch())[0]) > 1e-3


@pytest.mark.parametrize('supervised', [True, False])
def test_a_tools_token_matters_only_as_context_of_what_the_policy_writes(learner, supervised):
    rng, mark = np.random.default_rng(5), 95  # an id found nowhere else
    embedding = lambda found: found[0]['policy']['embed_tokens']['weight'][mark]
    own = lambda batch: sft_step(small.make_learner(rl=False), batch[0]) if supervised else step(learner, *batch)

    def marked(*lengths, run):
        episode = small.make_episode(rng, 'p0', *lengths)
        episode.tokens[sum(lengths[:run])] = mark
        return make_batch([episode, *EPISODES[:3]])

    between, last = marked(4, 5, 3, 4, run=2), marked(4, 5, 3, run=2)
    assert not between[0].acted_BT[between[0].tokens_BT == mark].any()
    assert np.abs(embedding(own(between))).max() > 1e-6
    assert not embedding(own(last)).any()


def test_rows_without_a_token_of_the_policy_have_no_gradient(learner):
    episodes = [small.make_episode(np.random.default_rng(0), 'p0', n) for n in (9, 20)]
    gradients, _, metrics = step(learner, *make_batch(episodes, groups=[0, 0]))
    assert not any(x.any() for x in jax.tree.leaves(gradients)) and metrics['actor/grad_norm'] == 0


@pytest.mark.parametrize('critic', ['head', pytest.param('backbone', marks=pytest.mark.slow)])
def test_only_a_head_on_the_trunk_turns_the_policy_by_the_value_loss(learner, critic):
    batch, stop = make_batch()
    learner = learner if critic == 'head' else small.make_learner()  # of another tree

    def found(shift):
        state = small.make_state(learner.optimizer, critic)
        scores = learner.score(state.params, learner.put(batch), stop, None, num_groups=4)
        scores = dataclasses.replace(scores, return_BT=scores.return_BT + shift)  # what values are trained towards
        return small.gradient(learner.ppo_step(state, learner.put(batch), scores, (0, stop))[0])

    shifted, plain = found(1.0), found(0.0)
    assert small.distance(shifted['critic'], plain['critic']) > 1e-2
    moved = small.distance(shifted['policy'], plain['policy'])
    assert moved > 1e-3 if critic == 'head' else moved < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('critic', ['head', 'backbone'])
def test_a_held_policy_takes_no_step_and_no_moments_and_its_first_step_is_that_of_a_fresh_one(critic):
    adam = OptimizerSettings(
        kind='adamw',
        lr=small.LR,
        schedule='constant',
        warmup_steps=0,
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
        grad_clip=1.0,
    )
    learner = small.make_learner(make_optimizer(adam, 6, adam, critic_warmup_steps=2))
    batch, stop = make_batch()
    batch, first = learner.put(batch), small.make_state(learner.optimizer, critic)
    whole, kept = jax.device_get((first.params, first.opt_state)), small.make_tree(critic)
    scores = learner.score(first.params, batch, stop, None, num_groups=4)
    state, metrics = first, {}
    for _ in range(2):
        state, metrics = learner.ppo_step(state, batch, scores, (0, stop), held=True)
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(state.params['policy'], whole[0]['policy'])
    equal(state.opt_state['policy'], whole[1]['policy'])
    assert int(state.step) == 2 and all(
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(state.params['critic']['head']), jax.tree.leaves(whole[0]['critic']['head']))
    )
    assert metrics['actor/ppo_kl'] == 0 and metrics['actor/ratio_max'] == 1 and metrics['actor/grad_norm'] == 0
    assert metrics['actor/entropy'] > 0 and metrics['mismatch/logprob_abs_max'] > 0 and metrics['critic/vf_loss'] > 0
    # With the critic as it was, the policy's next step is the first of a run that held nothing.
    restart = TrainState(
        step=state.step, params={'policy': state.params['policy'], 'critic': kept['critic']}, opt_state=state.opt_state
    )
    after, told = learner.ppo_step(restart, batch, scores, (0, stop))
    fresh, expected = learner.ppo_step(small.make_state(learner.optimizer, critic), batch, scores, (0, stop))
    equal(after.params['policy'], jax.device_get(fresh.params['policy']))
    assert set(metrics) == set(told) == set(expected) and told['actor/grad_norm'] > 0


def test_a_held_policy_is_not_differentiated(learner):
    batch, stop = make_batch()
    batch, tree = learner.put(batch), small.make_tree()
    scores = learner.score(tree, batch, stop, None, num_groups=4)
    micro, scored = next(learner._micro((batch, scores), 0, stop))
    rest = dict(params=tree, micro=micro, scores=scored, denominators=learner._denominators(batch, 0, stop))
    flops = lambda program, **more: program.lower(**rest, **more).compile().cost_analysis()['flops']
    held = flops(learner._held, gradients={'critic': tree['critic']})
    assert held < 0.4 * flops(
        learner._ppo, gradients=tree, fresh=np.bool_(False)
    )  # the trunk forwards, without the vocabulary


def test_the_mean_loss_without_a_step_is_that_of_the_step():
    learner, (batch, _) = small.make_learner(rl=False), make_batch()
    params = small.make_tree('none')
    expected = float(sft_step(learner, batch)[2]['sft/loss'])
    assert learner.sft_loss(params, batch) == pytest.approx(expected, rel=1e-5)
    logprob, _, _ = learner._score(params, learner.put(batch))
    assert expected == pytest.approx(-float(np.asarray(logprob)[batch.acted_BT].mean()), rel=1e-5)


def test_what_cannot_be_computed_is_refused_by_its_key():
    with pytest.raises(ValueError, match='attention=cudnn has no float32 kernel; set forward.dtype=bfloat16'):
        small.make_forward(attention='cudnn')
    small.make_learner(forward=small.make_forward(attention='cudnn', dtype='bfloat16', row_segments=1))
    learner = small.make_learner(loss=small.make_loss(kl_coef=0.1))
    batch, stop = make_batch()
    with pytest.raises(ValueError, match='loss.kl_coef is 0.1 but there is no reference'):
        learner.score(small.make_tree(), learner.put(batch), stop, None, num_groups=4)


def test_metrics_of_several_steps_are_means_and_maxima():
    assert mean_metrics(
        0, [{'a': np.float32(1), 'b_max': np.float32(1)}, {'a': np.float32(3), 'b_max': np.float32(5)}]
    ) == {'a': 2.0, 'b_max': 5.0}
    assert mean_metrics(0, []) == {}


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step():
    with pytest.raises(ValueError, match='step 7: sft/loss is nan'):
        mean_metrics(7, [{'sft/loss': np.float32('nan'), 'actor/grad_norm': np.float32(1)}])
