"""Supervised fine-tuning: what a step is given, resuming, and that it learns."""

import collections
import dataclasses
import signal

import numpy as np
import pytest

from retool_jax.train import sft
from retool_jax.train.sft import SFTSettings
from tests.train import small

SETTINGS = SFTSettings(steps=12, epochs=0, batch_tokens=60, evaluation_share=0.0)


@pytest.fixture(scope='module')
def episodes():
    return small.make_episodes(10, seed=3)


def make(episodes, seed=0, start=0, **changes):
    return list(sft.batches(episodes, dataclasses.replace(SETTINGS, **changes), small.make_forward(), seed, start))


def texts(batch):
    """The episodes of a batch, as tuples of ids."""
    return [tuple(batch.tokens_BT[r, place].tolist()) for r, _, place in small.places(batch)]


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
    state = sft.train(
        learner,
        state,
        episodes,
        dataclasses.replace(SETTINGS, steps=60, batch_tokens=64),
        0,
        lambda step, metrics: logged.append((step, metrics['sft/loss'])),
    )
    assert [step for step, _ in logged] == list(range(60)) and int(state.step) == 60
    assert before > 3 and logged[-1][1] < 0.1 * logged[0][1]


def test_a_resumed_training_ends_at_the_same_weights(episodes):
    learner, seen = small.make_learner(rl=False), []
    log = lambda step, metrics: seen.append((step, metrics['sft/loss']))
    run = lambda state, steps: sft.train(learner, state, episodes, dataclasses.replace(SETTINGS, steps=steps), 0, log)
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
    sft.train(
        learner,
        state,
        episodes,
        dataclasses.replace(SETTINGS, steps=5),
        0,
        lambda step, metrics: seen.append(('log', step)),
        lambda done, state, metrics: seen.append(('save', done, int(state.step))),
        save_every=2,
    )
    assert seen == [('log', 0), ('log', 1), ('save', 2, 2), ('log', 2), ('log', 3), ('save', 4, 4), ('log', 4),
                    ('save', 5, 5)]  # fmt: skip


def test_passes_decide_the_steps_and_the_last_one_ends_the_last_pass(episodes):
    for epochs in (1, 3):
        settings = sft.settle(dataclasses.replace(SETTINGS, epochs=epochs), episodes, 0)
        counts = collections.Counter(text for batch in make(episodes, steps=settings.steps) for text in texts(batch))
        fewer = collections.Counter(text for batch in make(episodes, steps=settings.steps - 1) for text in texts(batch))
        assert min(counts.values()) == epochs and len(counts) == len(episodes)
        assert len(fewer) < len(episodes) or min(fewer.values()) < epochs
    assert sft.settle(SETTINGS, episodes, 0) is SETTINGS


def test_a_share_of_the_problems_is_held_out_whatever_else_there_is():
    rng = np.random.default_rng(0)
    traces = [small.make_episode(rng, f'p{i // 2}', 3, 4) for i in range(4000)]
    for i, trace in enumerate(traces):
        trace.problem = dataclasses.replace(trace.problem, question=f'How much is {i // 2}?')
    trained, apart = sft.hold_out(traces, 0.1)
    assert len(trained) + len(apart) == 4000 and 300 < len(apart) < 500
    assert not {e.problem.question for e in trained} & {e.problem.question for e in apart}
    some = [e for e in traces if rng.random() < 0.5]
    assert sft.hold_out(some[::-1], 0.1)[1] == [e for e in some[::-1] if any(e is out for out in apart)]
    assert sft.hold_out(traces, 0.0) == (traces, [])
    with pytest.raises(ValueError, match='evaluation_share=1.0 must lie in'):
        dataclasses.replace(SETTINGS, evaluation_share=1.0)


class Counting:
    """A learner whose states are numbers of steps and whose held-out loss is least after four."""

    forward = small.make_forward()

    def sft_step(self, state, batch):
        return Steps(state.step + 1), {'sft/loss': np.float32(state.step)}

    def sft_loss(self, params, batch):
        return abs(params - 4.0)


@dataclasses.dataclass
class Steps:
    step: int

    @property
    def params(self):
        return self.step


def test_the_held_out_loss_is_measured_before_every_save_and_logged_with_its_step(episodes):
    logged, saved = {}, {}
    sft.train(
        Counting(),
        Steps(0),
        episodes[:8],
        dataclasses.replace(SETTINGS, steps=5),
        0,
        lambda step, metrics: logged.setdefault(step, metrics),
        lambda done, state, metrics: saved.setdefault(done, (state.step, metrics)),
        2,
        episodes[8:],
    )
    assert {step: m.get(sft.HELD_OUT) for step, m in logged.items()} == {0: None, 1: 2.0, 2: None, 3: 0.0, 4: 1.0}
    assert saved == {done: (done, logged[done - 1]) for done in (2, 4, 5)}


def test_the_clock_saves_besides_and_measures_nothing(episodes):
    saved = {}
    sft.train(
        Counting(),
        Steps(0),
        episodes[:8],
        dataclasses.replace(SETTINGS, steps=5),
        0,
        lambda step, metrics: None,
        lambda done, state, metrics: saved.setdefault(done, (state.step, metrics.get(sft.HELD_OUT))),
        4,
        episodes[8:],
        save_every_s=1e-9,
    )
    assert saved == {1: (1, None), 2: (2, None), 3: (3, None), 4: (4, 0.0), 5: (5, 1.0)}


@pytest.mark.parametrize('held_out', [0, 2])
@pytest.mark.parametrize('during', ['step', 'log', 'measure'])
@pytest.mark.parametrize('at', [2, 3])  # after 4 steps a save is due
def test_a_signal_saves_the_last_step_unless_it_is_still_to_be_measured(episodes, monkeypatch, held_out, during, at):
    logged, saved = [], []

    def strike(what, step):
        if (what, step) == (during, at):
            signal.raise_signal(signal.SIGINT)

    class Struck(Counting):
        def sft_step(self, state, batch):
            strike('step', state.step)
            return super().sft_step(state, batch)

        def sft_loss(self, params, batch):
            strike('measure', params - 1)
            return super().sft_loss(params, batch)

    def log(step, metrics):
        logged.append((step, metrics.get(sft.HELD_OUT)))
        strike('log', step)

    def train(state):
        return sft.train(
            Struck(),
            state,
            episodes[:8],
            dataclasses.replace(SETTINGS, steps=7),
            0,
            log,
            lambda done, state, metrics: saved.append((done, state.step)),
            4,
            episodes[8 : 8 + held_out],
        )

    if during == 'measure' and (at == 2 or not held_out):
        train(Steps(0))  # nothing is measured there
        return
    with pytest.raises(KeyboardInterrupt):
        train(Steps(0))
    assert [step for step, _ in logged] == list(range(len(logged)))
    done, state = saved[-1] if saved else (0, 0)
    assert done == state and len(logged) >= done >= (0 if held_out else 1)
    assert not saved or done == len(logged)
    during = None  # the same command goes on
    del logged[done:]
    assert train(Steps(done)).step == 7
    assert logged == [(step, None if not held_out or step not in (3, 6) else float(abs(step - 3))) for step in range(7)]
