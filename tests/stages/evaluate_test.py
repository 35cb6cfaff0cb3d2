"""An evaluation run: what is finished is kept, and a stopped one ends with what an unbroken one would have."""

import contextlib
import signal

import jax
import pytest

from retool_jax.core import episode_files
from retool_jax.core.records import Problem, Stop
from retool_jax.model import decoder
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.stages import evaluate
from retool_jax.tasks import summary
from retool_jax.tasks.grader import Grader
from retool_jax.text.template import make_template
from tests.tasks.summary_test import make
from tests.train import small


class Stopping(Engine):
    """An engine that is interrupted after some episodes, and remembers what it was asked for."""

    after: int | None = None

    def stream(self, params, version, requests, *args, **kwargs):
        self.asked = [(r.problem.id, r.sample) for r in requests]
        for count, made in enumerate(super().stream(params, version, requests, *args, **kwargs)):
            if count == self.after:
                signal.raise_signal(signal.SIGINT)
            yield made


@pytest.fixture(scope='module')
def parts():
    sampler = small.make_sampler(rows=2)
    with Grader() as grader:
        yield sampler, sampler.sync(decoder.init(small.SPEAKER, jax.random.key(0))), grader


def run(parts, directory, problems, after=None):
    """(episodes, what was asked of the engine, what was counted)"""
    sampler, params, grader = parts
    engine, counted = small.make_engine(sampler, Stopping), []
    engine.after, engine.asked = after, []
    with contextlib.closing(Journal(directory / 'journal.jsonl')) as journal:
        made = evaluate.run_kept(
            engine,
            params,
            problems,
            2,
            directory / 'episodes',
            'val_set',
            make_template('tiny'),
            small.TOKENIZER,
            grader,
            journal,
            lambda n=1: counted.append(n),
        )
    return made, engine.asked, sum(counted)


def test_a_stopped_evaluation_ends_as_the_unbroken_one(parts, tmp_path):
    problems = small.make_problems(6)
    long = Problem('long', 'Q' * 200, '7', 'test', '')  # beyond the budget: counted, not dropped
    problems.insert(2, long)
    whole, asked, counted = run(parts, tmp_path / 'whole', problems)
    every = [(p.id, sample) for p in problems for sample in range(2)]
    assert asked == every == [(e.problem.id, e.sample) for e in whole] and counted == 14
    assert all(e.reward is not None for e in whole) and sum(len(e.calls) for e in whole) > 3
    assert [e.stop for e in whole if e.problem == long] == [Stop.LENGTH] * 2
    assert episode_files.names(tmp_path / 'whole/episodes') == ['val_set']
    assert run(parts, tmp_path / 'whole', problems) == (whole, [], 14)

    stopped = tmp_path / 'stopped'
    for after in (3, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            run(parts, stopped, problems, after)
    kept = episode_files.read(stopped / 'episodes' / evaluate.UNFINISHED)
    assert 5 < len(kept) < 14 and all(e.reward is not None for e in kept)
    made, asked, counted = run(parts, stopped, problems)
    assert made == whole and counted == 14
    assert len(asked) == 14 - len(kept) and not {(e.problem.id, e.sample) for e in kept} & set(asked)
    assert summary.summarise(made) == summary.summarise(whole)
    for name in ('val_set.jsonl.gz', 'val_set.npz'):
        assert (stopped / 'episodes' / name).read_bytes() == (tmp_path / 'whole/episodes' / name).read_bytes()
    assert not (stopped / 'episodes' / evaluate.UNFINISHED).exists()
    assert (stopped / 'journal.jsonl').read_bytes() == b''


@pytest.mark.parametrize('finished', [True, False])
def test_kept_episodes_of_other_problems_are_refused(parts, tmp_path, finished):
    with contextlib.nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path, small.make_problems(2), None if finished else 2)
    changed = [Problem('p0', 'another question', '7', 'test', ''), *small.make_problems(2)[1:]]
    with pytest.raises(ValueError, match='holds other problems than those asked for'):
        run(parts, tmp_path, changed)


def test_seconds_of_calls_are_quantiles(parts, tmp_path):
    made, _, _ = run(parts, tmp_path, small.make_problems(3))
    assert evaluate.times(made).keys() == {'tools/seconds_p50', 'tools/seconds_p99'} and evaluate.times([]) == {}


def test_the_scores_are_shown_with_their_intervals(capsys):
    evaluate.show('set', summary.summarise([make('a', True), make('b', False, stop=Stop.LENGTH)]))
    shown = capsys.readouterr().out
    assert all(
        word in shown
        for word in (
            '2 problems × 1 samples',
            'avg@1',
            '50.0 %',
            '0.0 % – 100.0 %',
            'LENGTH',
            'exact string',
            'lenient rule',
            '1 eos, 1 length',
        )
    )
    assert [line.split() for line in shown.splitlines() if line.startswith('a ')] == [
        ['a', '100', '100', '100', '100', '0', '0', '3', '1', '1']
    ]


def test_many_problems_are_left_to_the_files(capsys):
    evaluate.show('set', summary.summarise([make(f'p{i}', True) for i in range(evaluate.LISTED + 1)]))
    assert 'The 51 problems stand in summary.json' in capsys.readouterr().out
