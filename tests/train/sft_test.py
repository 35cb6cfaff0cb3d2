"""Supervised fine-tuning: what a step is given, resuming, and that it learns."""

import collections

import numpy as np
import pytest

from retool_jax.train import sft
from retool_jax.train.sft import SFTSettings
from tests.train import small

SETTINGS = SFTSettings(steps=12, batch_tokens=60)


@pytest.fixture(scope='module')
def episodes():
    return small.make_episodes(10, seed=3)


def make(episodes, seed=0, start=0, **changes):
    settings = SFTSettings(**(dict(steps=12, batch_tokens=60) | changes))
    return list(sft.batches(episodes, settings, small.make_forward(), seed, start))


def texts(batch):
    """The episodes of a batch, as tuples of ids."""
    rows = zip(batch.tokens_BT, batch.segment_ids_BT)
    return [tuple(row[ids == n].tolist()) for row, ids in rows for n in range(1, ids.max() + 1)]


def same(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)


@pytest.mark.parametrize('start', [1, 5, 11, 12])
def test_a_resumed_run_sees_what_the_whole_one_would(episodes, start):
    whole, rest = make(episodes), make(episodes, start=start)
    assert len(whole) == 12 and len(rest) == 12 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest))


def test_a_longer_run_begins_as_a_shorter_one_and_another_seed_differs(episodes):
    assert all(same(a, b) for a, b in zip(make(episodes), make(episodes, steps=20)))
    assert not all(same(a, b) for a, b in zip(make(episodes), make(episodes, seed=1)))


def test_every_epoch_holds_each_episode_once_in_a_new_order(episodes):
    seen = [text for batch in make(episodes) for text in sorted(texts(batch))]
    assert len(seen) > 30
    asked = {tuple(e.tokens) for e in episodes}
    counts = collections.Counter(seen)
    assert set(counts) == asked and max(counts.values()) - min(counts.values()) <= 1
    steps = [frozenset(texts(batch)) for batch in make(episodes)]
    assert len(set(steps)) > len(steps) // 2


def test_a_step_fills_its_tokens_and_never_exceeds_them(episodes):
    batches = make(episodes)
    tokens = [int((b.segment_ids_BT > 0).sum()) for b in batches]
    longest = max(len(e.tokens) for e in episodes)
    assert all(60 - longest < n <= 60 for n in tokens)
    assert all(b.tokens_BT.shape[1] == 48 and len(b.tokens_BT) % 2 == 0 for b in batches)


def test_an_episode_longer_than_a_step_is_a_step_of_its_own(episodes):
    batches = make(episodes, batch_tokens=1)
    assert [len(texts(b)) for b in batches] == [1] * 12


@pytest.mark.slow
def test_the_loss_falls_until_a_few_answers_are_known_by_heart():
    rng, logged = np.random.default_rng(0), []
    episodes = [small.make_episode(rng, f'p{i}', 4, 12) for i in range(4)]
    learner = small.make_learner(rl=False)
    state = small.make_state(learner.optimizer, 'none')
    before = learner.sft_loss(state.params, make(episodes)[0])
    state = sft.train(learner, state, episodes, SFTSettings(steps=60, batch_tokens=64), 0,
                      lambda step, metrics: logged.append((step, metrics['sft/loss'])))
    assert [step for step, _ in logged] == list(range(60)) and int(state.step) == 60
    assert before > 3 and logged[-1][1] < 0.1 * logged[0][1]


def test_a_resumed_training_ends_at_the_same_weights(episodes):
    learner, seen = small.make_learner(rl=False), []
    log = lambda step, metrics: seen.append((step, metrics['sft/loss']))
    run = lambda state, steps: sft.train(learner, state, episodes, SFTSettings(steps=steps, batch_tokens=60), 0, log)
    whole = run(small.make_state(learner.optimizer, 'none'), 5)
    steps, seen[:] = list(seen), []
    half = run(small.make_state(learner.optimizer, 'none'), 2)
    assert small.distance(half.params, whole.params) > 1e-3
    resumed = run(half, 5)
    assert small.distance(resumed.params, whole.params) == 0 and seen == steps
    assert run(resumed, 5) is resumed and seen == steps  # nothing is left to do


def test_states_are_saved_when_the_steps_before_are_logged(episodes):
    learner, seen = small.make_learner(rl=False), []
    state = small.make_state(learner.optimizer, 'none')
    sft.train(learner, state, episodes, SFTSettings(steps=5, batch_tokens=60), 0,
              lambda step, metrics: seen.append(('log', step)),
              lambda done, state: seen.append(('save', done, int(state.step))), save_every=2)
    assert seen == [('log', 0), ('log', 1), ('save', 2, 2), ('log', 2), ('log', 3), ('save', 4, 4), ('log', 4),
                    ('save', 5, 5)]
