"""A search: never worse than what it was given, the same twice, and its keys are what a plan says the same of."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.core import cli, settings
from retool_jax.plan import chips, models, search, search_page
from retool_jax.plan.memory import LIMIT
from retool_jax.plan.plans import Plans, between, changed
from retool_jax.plan.search import Candidate
from retool_jax.stages.config import Reinforcement

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(TIMES=(1, 2), REMATS=('full',))  # fewer candidates: each is traced


def stage_of(*overrides: str) -> Reinforcement:
    config = cli.parse_config(['plan', '--config=configs/ppo.py:tiny', *overrides])
    return settings.build(Reinforcement, config)


def plans_on(topology: str | chips.Slice) -> Plans:
    slice = chips.open_slice(topology) if isinstance(topology, str) else topology
    return Plans(models.sizes(None, 'tiny'), slice, None)


def flags_of(keys: dict) -> list[str]:
    return [f'--config.{key}={value}' for key, value in keys.items()]


@pytest.fixture(scope='module')
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(search, name, value)
        yield


@pytest.fixture(scope='module')
def searched(small) -> tuple[Reinforcement, Plans, search.Found]:
    stage, plans = stage_of('--config.ppo.problems_per_step=8'), plans_on('h100:2')
    return stage, plans, search.search(plans, stage)


@pytest.mark.slow
def test_what_is_found_is_never_worse_and_a_plan_of_its_keys_says_the_same(searched):
    stage, _, found = searched
    given = plans_on('h100:2').make(stage)
    assert found.plan['fits'] and found.plan['step']['seconds'] < given['step']['seconds']  # 64 rows of 16 episodes
    assert found.made['as given']['step'] == given['step']
    again = plans_on('h100:2').make(stage_of('--config.ppo.problems_per_step=8', *flags_of(found.keys)))
    for name in ('step', 'phases', 'mesh', 'rollout'):
        assert again[name] == found.plan[name]


@pytest.mark.slow
def test_the_same_search_finds_the_same(searched):
    stage, _, found = searched
    again = search.search(plans_on('h100:2'), stage)
    assert again.keys == found.keys and again.candidates == found.candidates
    assert [(name, plan['step']) for name, plan in again.made.items()] == [
        (name, plan['step']) for name, plan in found.made.items()
    ]


@pytest.mark.slow
def test_nothing_that_is_learned_changes(searched):
    _, _, found = searched
    may = {'mesh.tensor', 'mesh.fsdp', 'sampler.rows', 'sampler.decode_rows', 'sampler.feed_rows', 'sampler.quota',
           'forward.micro_rows', 'forward.remat', 'ppo.offload'}  # fmt: skip
    assert all(c.keys.keys() <= may for c in found.candidates)
    assert {c.tensor for c in found.candidates} == {1, 2}
    assert all(c.keys.get('forward.remat') != 'offload' for c in found.candidates)


@pytest.mark.slow
@pytest.mark.parametrize('shortest, quanta, quotas', [(0.0, 0, {64, 16}), (search.QUANTUM_S, 0, {64}), (0.0, 1, {64})])
def test_engines_of_several_processes_may_decode_fewer_steps_at_a_time(small, monkeypatch, shortest, quanta, quotas):
    """The tiny model's steps take microseconds: no call of them is long enough. ppo.quanta counts calls of as many."""
    monkeypatch.setattr(search, 'QUANTUM_S', shortest)
    keys = ('--config.mesh.tensor=2', '--config.sampler.quota=64', '--config.ppo.problems_per_step=8')
    stage = stage_of(*keys, f'--config.ppo.quanta={quanta}', '--config.loss.correction=token')
    found = search.search(Plans(models.sizes(None, 'tiny'), chips.open_slice('h100:2'), None, process_chips=1), stage)
    assert {c.keys.get('sampler.quota', 64) for c in found.candidates} == quotas


@pytest.mark.slow
def test_the_page_names_runners_up_bounds_and_the_command(searched, monkeypatch):
    stage, plans, found = searched
    monkeypatch.setattr(
        sys, 'argv', ['launch/plan.py', '--config=configs/ppo.py:tiny', '--search', '--topology=h100:2']
    )
    described = json.loads(json.dumps(search_page.describe(found, plans, stage)))
    assert described['command'].split() == [
        'python', 'launch/plan.py', '--config=configs/ppo.py:tiny', '--topology=h100:2', *flags_of(found.keys),
    ]  # fmt: skip
    assert described['table'][0]['seconds'] == found.plan['step']['seconds']
    assert 'as given' in [row['keys'] for row in described['table']] and len(described['table']) > 1
    text = search_page.text(described)
    assert 'ESTIMATE' in text and 'forward.dtype=float32' in text and text.endswith(described['command'])
    assert next(iter(described['table'][0]['bounds'])) in text


@pytest.mark.slow
def test_a_steps_causes_are_all_of_its_seconds(searched):
    _, _, found = searched
    for plan in found.made.values():
        causes = search_page.bounds(plan)
        assert sum(causes.values()) == pytest.approx(plan['step']['seconds'])
        assert list(causes.values()) == sorted(causes.values(), reverse=True)
        rollout, decode = plan['rollout'], plan['rollout']['decode']
        writing = sum(causes[name] for name in causes if name in ('decode: bandwidth', 'decode: compute'))
        assert writing == pytest.approx((decode['total'] - decode['waits']) * rollout['busy'])
        assert causes['decode: waiting for tools'] > 0


@pytest.mark.slow
def test_what_does_not_fit_is_replaced_by_what_does(small):
    card = dataclasses.replace(chips.CHIPS['h100'], hbm=2**28)
    stage = stage_of('--config.sampler.rows=4096', '--config.ppo.problems_per_step=8')
    found = search.search(plans_on(chips.Slice('h100:1', card, 1, None)), stage)
    assert not found.made['as given']['fits'] and found.plan['fits']
    assert max(phase['share'] for phase in found.plan['phases']) <= LIMIT
    none = search.search(plans_on(chips.Slice('h100:1', dataclasses.replace(card, hbm=2**20), 1, None)), stage)
    assert none.keys == {} and not none.plan['fits'] and list(none.made) == ['as given']
    assert search_page.NONE in search_page.text(
        search_page.describe(none, plans_on(chips.Slice('h100:1', card, 1, None)), stage)
    )


@pytest.mark.slow
def test_facts_of_rows_between_are_those_that_are_traced():
    def facts(rows: int) -> dict:
        plans = plans_on('h100:2')
        plans.guess(stage_of(f'--config.sampler.rows={rows}'))
        return {key[0]: fact for key, fact in plans.guessed.items()}

    few, middle, many = (facts(rows) for rows in (8, 24, 64))
    for name in ('extend', 'decode'):
        mixed = between(few[name], many[name], (24 - 8) / (64 - 8))
        for field in ('arguments', 'temporaries', 'flops', 'moved', 'slot_flops', 'slot_moved'):
            assert getattr(mixed, field) == pytest.approx(getattr(middle[name], field), rel=1e-3), (name, field)
        assert mixed.sent == pytest.approx(middle[name].sent)


def test_numbers_of_rows_are_four_an_octave():
    assert list(search.numbers(40)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert list(search.numbers(0)) == [1]


class Scripted:
    """Plans in full as a compiler might have them: seconds of rollout and memory by (mesh.tensor, sampler.rows)."""

    def __init__(self, said: dict[tuple[int, int], tuple[float, float]]):
        self.said, self.asked = said, []

    def make(self, stage: Reinforcement) -> dict:
        at = (stage.mesh.tensor, stage.sampler.rows)
        self.asked.append(at)
        seconds, share = self.said[at]
        rollout = {'name': 'rollout', 'seconds': seconds, 'share': share, 'fits': share <= LIMIT}
        return {'step': {'seconds': seconds}, 'fits': share <= LIMIT, 'phases': [rollout]}


def by_shapes(tensor: int, rows: int, seconds: float, share: float = 0.5) -> Candidate:
    keys = {'mesh.tensor': tensor, 'sampler.rows': rows}
    return Candidate(
        {key: value for key, value in keys.items() if value != {'mesh.tensor': 1, 'sampler.rows': 64}[key]},
        tensor,
        {'rollout': seconds},
        {'rollout': share},
        1.0,
    )


def settled(candidates: list[Candidate], **said) -> list[tuple[int, int]]:
    plans = Scripted({tuple(map(int, at[1:].split('_'))): value for at, value in said.items()})
    search.settle(plans, stage_of(), candidates)
    return plans.asked


def test_what_a_compiler_says_corrects_what_shapes_say_of_its_mesh():
    # All of tensor=2 takes twice what shapes say: after the first of it no other promises less than tensor=1.
    candidates = [by_shapes(1, 64, 10.0), by_shapes(2, 64, 8.0), by_shapes(2, 128, 7.0)]
    assert settled(candidates, t1_64=(10.0, 0.5), t2_128=(14.0, 0.5)) == [(1, 64), (2, 128)]
    # As given it takes twice as much: so do its other rows, of which the better is made.
    candidates = [by_shapes(1, 64, 10.0), by_shapes(1, 32, 9.0), by_shapes(2, 64, 18.5)]
    assert settled(candidates, t1_64=(20.0, 0.5), t1_32=(18.0, 0.5)) == [(1, 64), (1, 32)]


def test_where_compilation_shows_that_it_does_not_fit_the_next_that_needs_less_is_tried():
    candidates = [
        by_shapes(1, 64, 10.0), by_shapes(1, 128, 5.0, 0.8), by_shapes(1, 112, 6.0, 0.8), by_shapes(1, 96, 7.0, 0.7),
    ]  # fmt: skip
    asked = settled(candidates, t1_64=(10.0, 0.5), t1_128=(5.0, 0.95), t1_96=(7.0, 0.85))
    assert asked == [(1, 64), (1, 128), (1, 96)]


def test_so_many_plans_are_made_at_most():
    # None of them fits, and each needs a little less than the one before.
    rows = range(1, 20)
    candidates = [by_shapes(1, 64, 100.0), *(by_shapes(1, n, n, 0.8 - n / 100) for n in rows)]
    said = {f't1_{n}': (n, 0.95) for n in rows}
    assert len(settled(candidates, t1_64=(100.0, 0.5), **said)) == search.MADE


@pytest.mark.parametrize('fit, seconds, rows', [(45, 9.0, 45), (45, 11.0, 40), (500, 9.0, 256), (40, 9.0, 40)])
def test_at_last_come_all_rows_that_fit_where_the_step_takes_less(fit, seconds, rows):
    stage = stage_of('--config.ppo.problems_per_step=64')  # of 4 samples
    plan = {'kv_rows_that_fit': fit, 'engines': 1, 'step': {'seconds': 10.0}, 'fits': True}
    plans = Scripted({(1, n): (seconds, 0.89) for n in (45, 256)})
    keys, found = search._finish(plans, stage, {'sampler.rows': 40}, plan)
    assert keys == {'sampler.rows': rows} and found['step']['seconds'] == (10.0 if rows == 40 else seconds)


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, 'launch/plan.py', '--config=configs/ppo.py:tiny', *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {'XLA_FLAGS': ''}
    )


@pytest.mark.slow
def test_a_slice_that_is_none_is_one_line():
    done = launch('--topology=v5q:2x2', '--search')
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith('error: --topology=v5q:2x2: expected KIND:SHAPE') and done.stderr.count('\n') == 1


# A process of its own: the compiler is loaded once in each.
COMPILED = """
from retool_jax.plan import chips, search
from tests.plan.search_test import flags_of, plans_on, stage_of
search.TIMES, search.REMATS, search.MADE = (1,), ('full',), 2
search.numbers = lambda most: iter([8, 16])
problems = '--config.ppo.problems_per_step=8'
stage, slice = stage_of(problems), chips.open_slice('v5e:2x2')
found = search.search(plans_on(slice), stage)
given, again = found.made['as given'], plans_on(slice).make(stage_of(problems, *flags_of(found.keys)))
assert found.keys and not found.plan['estimated'] and not given['estimated']
assert found.plan['fits'] and found.plan['step']['seconds'] < given['step']['seconds']
assert again['step'] == found.plan['step'] and again['phases'] == found.plan['phases']
"""


@pytest.mark.slow
@pytest.mark.skipif(chips.compiler() is None, reason='needs the TPU compiler: bash launch/baselines.sh plan')
def test_a_winner_is_compiled_and_a_plan_of_its_keys_says_the_same():
    environment = os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_key_that_its_block_refuses_is_refused():
    with pytest.raises(ValueError, match='decode_rows=65 must be from 1 to rows=64'):
        changed(stage_of(), {'sampler.decode_rows': 65})
