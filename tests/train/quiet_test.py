"""What a step need not compute: groups of equal rewards, and old logprobs where it is one update."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from retool_jax.core.errors import UserError
from retool_jax.train import ppo
from retool_jax.train.ppo import Progress
from retool_jax.train.residency import Residency
from tests.train import small
from tests.train.ppo_test import SETTINGS, WHOLE, unpacked

GRPO = dataclasses.replace(SETTINGS, critic='none', samples=3, problems_per_step=4, minibatches=1)


def episodes():
    """Four groups of three: all right, mixed, all wrong, and one of which a single answer counts."""
    rng = np.random.default_rng(3)
    rewards = [[1.0] * 3, [1.0, -1.0, -1.0], [-1.0] * 3, [1.0, 1.0, 1.0]]
    made = [
        small.make_episode(rng, f'p{p}', *rng.integers(3, 7, 4).tolist(), sample=s, reward=reward)
        for p, group in enumerate(rewards)
        for s, reward in enumerate(group)
    ]
    made[9].void = made[10].void = True
    return made


def make_learner(kind='grpo', **loss):
    return small.make_learner(
        loss=small.make_loss(**{'entropy_coef': 0.0, 'correction': 'none'} | loss),
        advantage=small.make_advantage(kind=kind, whiten=False),
    )


def take(learner, made, **changes):
    """Gradient and metrics of one RL step."""
    settings = dataclasses.replace(GRPO, **changes)
    progress = Progress(small.make_state(learner.optimizer, 'none'))
    pending = ppo.update(learner, progress, settings, made, 0, 0, Residency(False))
    return small.gradient(progress.state), pending.metrics | jax.device_get(pending.found[-1])


@pytest.mark.parametrize('minibatches', [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'rloo'])
@pytest.mark.parametrize('aggregation', ['token-mean', pytest.param('seq-mean-token-mean', marks=pytest.mark.slow)])
def test_leaving_them_out_is_the_same_step(kind, aggregation, minibatches, monkeypatch):
    learner = make_learner(kind, aggregation=aggregation)
    assert learner.quiet_groups
    found, metrics = take(learner, episodes(), minibatches=minibatches, drop_void=True)
    monkeypatch.setattr(type(learner), 'quiet_groups', False)
    whole, _ = take(learner, episodes(), minibatches=minibatches, drop_void=True)
    assert small.distance(found, whole) < 1e-5
    assert metrics['actor/left_out'] == 6 / 12


def test_rows_of_equal_groups_lie_behind_the_others_and_are_counted(monkeypatch):
    made = episodes()
    batch, rows, quiet = ppo.make_batch(
        made, dataclasses.replace(GRPO, minibatches=2), small.make_forward(), 0, 0, True
    )
    of = lambda part: {ids for ids in unpacked(batch, part)} if part else set()
    passed, counted = [of(part) for part in rows], [of(part) for part in quiet]
    ids = lambda chosen: {tuple(e.tokens) for e in chosen}
    assert set().union(*passed) == ids(made[3:6]) and set().union(*counted) == ids(made[:3] + made[6:])
    assert all(part[0] >= rows[-1][1] for part in quiet if part)
    calls = []
    learner = make_learner()
    cut = learner._cut
    monkeypatch.setattr(learner, '_cut', lambda tree, row: calls.append(int(row)) or cut(tree, row))
    take(learner, made)
    assert len(calls) == 1  # three episodes are two rows, one micro-batch: differentiated, and not scored before


def test_a_step_without_a_group_that_differs_moves_nothing():
    made = [e for e in episodes() if e.problem.id in ('p0', 'p2')]
    found, metrics = take(make_learner(), made)
    assert all(not np.any(x) for x in jax.tree.leaves(found)) and metrics['actor/left_out'] == 1


@pytest.mark.parametrize(
    ('advantage', 'loss'),
    [
        ({'kind': 'gae', 'whiten': False}, {}),
        ({'kind': 'grpo', 'whiten': True}, {}),
        ({'kind': 'grpo', 'whiten': False}, {'entropy_coef': 0.01}),
        ({'kind': 'grpo', 'whiten': False}, {'kl_coef': 0.1}),
    ],
)
def test_where_equal_groups_have_a_gradient_none_is_left_out(advantage, loss):
    learner = small.make_learner(
        loss=small.make_loss(**{'entropy_coef': 0.0} | loss), advantage=small.make_advantage(**advantage)
    )
    assert not learner.quiet_groups


def test_the_samplers_logprobs_serve_where_a_step_is_one_update():
    learner, made = make_learner(), episodes()
    whole, expected = take(learner, made)
    batch, rows, _ = ppo.make_batch(made, GRPO, small.make_forward(), 0, 0, True)
    scores = learner.score(small.make_tree('none'), learner.put(batch), rows[-1][1], None, num_groups=4)
    for r, _, place in small.places(batch, (0, rows[-1][1])):  # a sampler that computes what the trainer does
        episode = next(e for e in made if e.tokens == batch.tokens_BT[r, place].tolist())
        episode.logprobs = np.asarray(scores.logprob_BT)[r, place].tolist()
    found, metrics = take(learner, made, rescore=False)
    assert small.distance(found, whole) < 1e-5
    np.testing.assert_allclose(metrics['actor/pg_loss'], expected['actor/pg_loss'], atol=1e-6)
    assert abs(metrics['actor/ppo_kl']) < 1e-6


@pytest.mark.parametrize(
    ('sizes', 'loss', 'words'),
    [
        ({'minibatches': 2}, {}, 'set ppo.minibatches=1, or ppo.rescore=True'),
        ({'epochs': 2}, {}, 'set ppo.epochs=1'),
        ({'quanta': 4}, {}, 'set ppo.quanta=0'),
        ({}, {'correction': 'token'}, 'set loss.correction=none'),
        ({}, {'kl_coef': 0.1}, 'set loss.kl_coef=0'),
    ],
)
def test_they_do_not_where_something_else_is_asked_of_them(sizes, loss, words):
    trusting = dataclasses.replace(GRPO, rescore=False)
    advantage = small.make_advantage(kind='grpo')
    ppo.check(trusting, advantage, small.make_loss(correction='none'), WHOLE)
    with pytest.raises(UserError, match=words):
        ppo.check(
            dataclasses.replace(trusting, **sizes), advantage, small.make_loss(**{'correction': 'none'} | loss), WHOLE
        )
