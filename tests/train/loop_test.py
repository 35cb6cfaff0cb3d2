"""The loop of RL steps: when what is reported, and what a signal or a broken loss leaves behind."""

import dataclasses
import signal

import numpy as np
import pytest

from retool_jax.core import signals
from retool_jax.train import ppo
from retool_jax.train.ppo import Progress
from retool_jax.train.residency import Residency
from retool_jax.train.sources import Collected
from tests.train import small
from tests.train.ppo_test import SETTINGS

EPISODES = small.make_episodes(2)


@dataclasses.dataclass
class State:
    params: dict
    updates: int = 0


class Run:
    """A run whose updates only count; `log` says what happened in which order."""

    def __init__(self, monkeypatch, during=lambda what, step: None, loss=lambda step: 1.0):
        self.timed = []
        self.progress, self.log, self.during, self.loss = Progress(State({'policy': None})), [], during, loss
        monkeypatch.setattr(ppo, 'update', self.update)

    def happen(self, what, step):
        self.log.append((what, step))
        self.during(what, step)

    def collect(self, weights, step, cursor, carried=()):
        self.happen('collect', step)
        assert weights == 'weights'
        assert [e.step for e in carried] == [step - 1] * (step > 0)
        if signals.told():  # as a rollout does
            raise signals.stop(signals.told())
        return Collected(EPISODES, cursor + 3, {'time/rollout_s': 1.0}, (dataclasses.replace(EPISODES[0], step=step),))

    def update(self, learner, progress, settings, episodes, seed, step, residency):
        self.happen('update', step)
        progress.state = State(progress.state.params, step + 1)
        found = [{'actor/pg_loss': np.float32(self.loss(step))}]
        return ppo._Pending(step, episodes, found, None, {}, ppo._Clock(0.0, ()))

    def report(self, result):
        self.timed.append(result.timed)
        self.happen('stopping' if result.stopping else 'report', result.step)
        assert result.metrics['data/cursor'] == 3 * (result.step + 1) and result.metrics['time/rollout_s'] == 1

    def train(self, steps=3, due=lambda done: False, save_every_s=0.0):
        ppo.train(
            None,
            self.progress,
            dataclasses.replace(SETTINGS, steps=steps),
            sync=lambda policy: 'weights',
            collect=self.collect,
            seed=0,
            residency=Residency(False),
            report=self.report,
            due=due,
            save_every_s=save_every_s,
            spoiled=lambda step, episodes: self.log.append(('spoiled', step, len(episodes))),
        )


def test_steps_are_reported_one_late_while_the_device_works(monkeypatch):
    run = Run(monkeypatch)
    run.train()
    assert run.log == [('collect', 0), ('update', 0), ('collect', 1), ('report', 0), ('update', 1), ('collect', 2),
                       ('report', 1), ('update', 2), ('report', 2)]  # fmt: skip
    assert (run.progress.done, run.progress.cursor, run.progress.state.updates) == (3, 9, 3)
    assert run.progress.oldest == 2  # the step that asked for what is carried


def test_a_step_that_is_due_is_reported_while_the_progress_is_its_own(monkeypatch):
    seen = []
    run = Run(monkeypatch, lambda what, step: what == 'report' and seen.append((step, run.progress.done)))
    run.train(steps=4, due=lambda done: done % 2 == 0)
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert run.log.index(('report', 1)) < run.log.index(('collect', 2))


def test_a_step_after_so_many_seconds_is_reported_at_once_as_due_by_the_clock(monkeypatch):
    run = Run(monkeypatch)
    run.train(save_every_s=1e-9)
    assert run.log == [(what, step) for step in range(3) for what in ('collect', 'update', 'report')]
    assert run.timed == [True] * 3
    run = Run(monkeypatch)
    run.train(save_every_s=3600.0)
    assert run.timed == [False] * 3 and run.log[2:4] == [('collect', 1), ('report', 0)]


@pytest.mark.parametrize(
    ('what', 'done', 'tail'),
    [('collect', 1, [('collect', 1), ('stopping', 0)]), ('update', 2, [('update', 1), ('stopping', 1)])],
)
def test_a_signal_leaves_a_whole_step_that_is_reported(monkeypatch, what, done, tail):
    run = Run(monkeypatch, lambda now, step: (now, step) == (what, 1) and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.log[-2:] == tail
    assert (run.progress.done, run.progress.cursor, run.progress.state.updates) == (done, 3 * done, done)


def test_a_report_that_is_interrupted_is_not_made_again(monkeypatch):
    run = Run(monkeypatch, lambda what, step: (what, step) == ('report', 1) and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train(due=lambda done: True)
    assert run.log[-2:] == [('report', 1), ('collect', 2)] and run.progress.done == 2


def test_a_loss_that_is_not_finite_hands_over_its_episodes_and_ends_the_run(monkeypatch):
    run = Run(monkeypatch, loss=lambda step: np.nan if step == 1 else 1.0)
    with pytest.raises(ValueError, match='step 1: actor/pg_loss is nan'):
        run.train(due=lambda done: True)
    assert run.log[-1] == ('spoiled', 1, 2) and ('report', 1) not in run.log and ('collect', 2) not in run.log
