"""The bench of rollout: its turns, its barrier, its floor; and the binary ends in one JSON line."""

import json
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from retool_jax.bench import rollout, rollout_tools, timing
from retool_jax.bench.rollout import Shape
from retool_jax.core.cli import ROOT
from retool_jax.core.records import Stop
from retool_jax.model import decoder

SMALL = {
    'layers': 1,
    'width': 32,
    'mlp': 48,
    'heads': 2,
    'kv_heads': 1,
    'vocab': 64,
    'slots': 320,
    'short_slots': 288,
    'prompt': 16,
    'new': 16,
    'rows': (2,),
    'tunix_rows': 2,
    'quota': 8,
    'chunk': 16,
    'tool_s': 0.02,
    'tool_rows': (4,),
    'long': 288,
    'calls': 2,
}


def test_sides_are_measured_in_turns_and_compared_by_medians():
    order = []
    answers = {'a': iter([9.0, 1.0, 2.0, 30.0]), 'b': iter([9.0, 5.0, 4.0, 3.0])}

    def side(name):
        return lambda i: order.append((name, i)) or next(answers[name])

    assert timing.in_turns({'a': side('a'), 'b': side('b')}, 3) == {'a': 2.0, 'b': 4.0}
    assert order == [(name, i) for i in range(4) for name in 'ab']


def test_a_barrier_answers_when_all_rows_in_flight_have_asked():
    tool = rollout_tools.Barrier(0.0, rows=2, episodes=3)
    first = tool.submit(rollout_tools.CALL)
    assert not first.done()
    second = tool.submit(rollout_tools.LAST)
    assert first.result(5) is second.result(5) is rollout_tools.ANSWERED
    third = tool.submit(rollout_tools.CALL)
    tool.finished(None)  # two are left, one of them writes
    assert not third.done()
    tool.finished(None)
    assert third.result(5) is rollout_tools.ANSWERED


def test_an_episode_of_the_bench_calls_its_tools_and_ends():
    shape = Shape(**SMALL)
    config = rollout.model_config(shape)
    case = rollout_tools.Case(config, shape, 4, 2, mean=8.0)
    ended, tool = [], rollout_tools.Tool(0.01)
    tool.finished = ended.append
    before = threading.active_count()
    weights = case.sampler.sync(decoder.init(config, jax.random.key(0)))
    rate = case.run(weights, tool, 40, 1)
    assert rate > 0 and len(ended) == 40 and 0 < case.answers <= sum(len(e.calls) for e in ended)
    assert threading.active_count() <= before + 1
    for e in ended:
        turns = [ids for acted, ids in e.segments() if acted]
        assert len(turns) == len(e.calls) + (e.stop != Stop.LENGTH)
        assert [len(ids) for acted, ids in e.segments() if not acted] == [16] + [rollout_tools.FED] * len(e.calls)
    assert len({len(e.calls) for e in ended}) > 1 and np.mean([len(e.calls) for e in ended]) < 2 * shape.calls
    assert np.mean([len(t) for e in ended for _, t in e.segments()[1::2]]) < 40  # a turn is about `mean` long


def test_behind_a_barrier_the_same_episodes_are_written_and_no_slot_is_given_away_within_a_turn():
    shape = Shape(**SMALL)
    config = rollout.model_config(shape)
    case = rollout_tools.Case(config, shape, 4, 2, mean=8.0)
    weights = case.sampler.sync(decoder.init(config, jax.random.key(0)))
    free, held = {}, {}
    instant = rollout_tools.Tool(0.0)
    instant.finished = lambda e: free.update({e.problem.id: e})
    case.run(weights, instant, 9, 1)
    tool, rounds = rollout_tools.Barrier(0.0, 4, 9), []
    release = tool.finished

    def finished(episode):
        held[episode.problem.id] = episode
        rounds.append(len(tool.waiting))
        release(episode)

    tool.finished = finished
    case.run(weights, tool, 9, 1)
    assert {k: (e.tokens, e.stop) for k, e in held.items()} == {k: (e.tokens, e.stop) for k, e in free.items()}
    assert all(len(e.calls) == len(free[k].calls) for k, e in held.items())
    assert not any(rounds)  # whoever ends does so right after a barrier, when nobody waits yet


def test_the_floor_multiplies_every_weight_and_reads_the_live_cache():
    shape = Shape(**SMALL)
    config = rollout.model_config(shape)
    program = rollout.floor_program(config, shape, 2)
    params = decoder.to_sampling(config, decoder.init(config, jax.random.key(0)))
    before = np.asarray(program(params))
    assert before.shape == (2, 32) and np.isfinite(before).all()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = [getattr(k, 'key', k) for k in path]
        if names[-1] != 'weight' or any('norm' in str(n) or 'embed' in str(n) for n in names):
            continue
        changed = jax.tree_util.tree_map_with_path(lambda p, x, at=path: x * 50 if p == at else x, params)
        assert (np.asarray(program(changed)) != before).any(), names


@pytest.mark.slow
def test_long_and_short_caches_and_a_late_tool_are_measured():
    shape, said = Shape(**SMALL), []
    found = rollout.measure(shape, 1, ['cache'], said.append)
    ratios = ('decode_long_over_short', 'extend_long_over_short', 'decode_one_long_over_none', 'prefill_over_resume')
    assert all(found[name] > 0 for name in ratios)
    assert json.loads(said[-1])['decode_long_over_short'] == pytest.approx(found['decode_long_over_short'], abs=1e-4)


@pytest.mark.slow
def test_the_binary_ends_in_one_line_of_json_with_the_peers_beside_it():
    done = subprocess.run(
        [sys.executable, ROOT / 'launch/bench_rollout.py', f'--shape={SMALL}', '--repeats=1'],
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ratios = [
        'share_of_floor_2',
        'int8_over_engine_2',
        'tools_over_instant',
        'tools_over_barrier_4',
        'decode_long_over_short',
        'extend_long_over_short',
        'prefill_over_resume',
    ]
    for name, (environment, _) in rollout.PEERS.items():
        if (ROOT / '.baselines' / environment / 'bin' / 'python').exists():
            ratios.append({'transformers': 'over_transformers_2', 'tunix': 'over_tunix'}[name])
            assert found[f'{name}_version']
    assert all(found[name] > 0 for name in ratios)
    for name in ('tools_over_instant', 'tools_over_barrier_4'):
        assert found[name] == pytest.approx(np.median(found[f'{name}_rounds']), abs=0.01)
        assert len(found[f'{name}_rounds']) == rollout_tools.NOISY and found[f'{name}_of_medians'] > 0
    assert found.get('new_budget_compilations', 0) == 0


def test_a_part_that_is_not_measured_is_named():
    done = subprocess.run(
        [sys.executable, ROOT / 'launch/bench_rollout.py', '--parts=sandbox'], text=True, capture_output=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stderr.strip() == 'error: --parts=sandbox: choose of peers, tools, cache'
