"""Rollouts of several processes: apart, in lockstep and in teams, with tools that answer at other times."""

import pickle
import socket
import types

import jax
import numpy as np
import pytest

from retool_jax.core import processes, sharding
from retool_jax.core.errors import UserError
from retool_jax.model import decoder
from retool_jax.model.logprobs import token_logprobs
from retool_jax.rollout import hosts
from retool_jax.rollout.stats import RolloutStats
from retool_jax.stages.alarms import Watch
from retool_jax.train.pack import pack
from tests import several
from tests.rollout.engine_test import CONFIG, TURNS, requests
from tests.stages import alarms_test


def run(count: int, work: str, decode_rows: int, directory) -> list:
    """The worker in so many processes: what each wrote, four times (episodes, calls run there, episodes counted)."""
    several.run(count, ['tests.rollout.worker', work, str(decode_rows), str(directory)])
    return [pickle.loads((directory / f'{work}_{i}.pkl').read_bytes()) for i in range(count)]


def mismatch(episodes) -> float:
    """The largest difference between the sampler's logprobs and those of a full forward pass on one device."""
    params = decoder.init(CONFIG, jax.random.key(0))
    score = jax.jit(
        lambda b: token_logprobs(
            params,
            decoder.forward(CONFIG, params, b.tokens_BT, b.positions_BT, b.segment_ids_BT),
            b.tokens_BT,
            chunk=TURNS.max_tokens,
        )[0]
    )
    batch = pack(episodes, width=TURNS.max_tokens, rows=1, segments=1)
    return float(np.abs(np.where(batch.acted_BT, np.asarray(score(batch)) - batch.sampler_logprob_BT, 0.0)).max())


@pytest.mark.slow
@pytest.mark.parametrize('decode_rows', [0, 4])
@pytest.mark.parametrize('work', ['apart', 'together'])
def test_two_processes_make_the_episodes_of_one(work, decode_rows, tmp_path):
    (((expected, calls, _), *_),) = run(1, 'one', decode_rows, tmp_path)
    ours, theirs = run(2, work, decode_rows, tmp_path)
    (episodes, first_calls, counted), (_, second_calls, _) = ours[0], theirs[0]
    for mine, other in zip(ours, theirs):
        assert mine[0] == other[0]  # every process holds all episodes
        assert mismatch(mine[0]) <= 1e-4
    bits = lambda made: [(e.tokens, e.logprobs, e.acted, e.stop) for e in made[0]]
    assert bits(ours[1]) == bits(ours[0])
    for late in ours[2:]:  # the tools answered at other times, so episodes had other rows
        if work == 'apart':
            assert bits(late) == bits(ours[0])
        else:  # a sum over processes rounds by the row's place
            assert sum(a.tokens == b.tokens for a, b in zip(late[0], episodes)) >= len(episodes) - 3
    assert first_calls + second_calls == sum(bool(c.code) for e in episodes for c in e.calls)
    assert min(first_calls, second_calls) > calls // 8  # both ran tools
    assert [(e.problem.id, e.sample) for e in episodes] == [(r.problem.id, r.sample) for r in requests()]
    assert counted == len(episodes)
    # Another mesh rounds otherwise, which may flip a token and with it the rest of its episode.
    same = [a.tokens == b.tokens for a, b in zip(expected, episodes)]
    assert sum(same) >= len(same) - 3


@pytest.mark.slow
def test_two_teams_of_two_processes_make_the_episodes_of_one(tmp_path):
    (((expected, *_), *_),) = run(1, 'one', 0, tmp_path)
    found = run(4, 'teams', 0, tmp_path)
    for turn in range(4):
        for process in found:
            assert process[turn][0] == found[0][turn][0] and process[turn][2] == len(expected)
        assert mismatch(found[0][turn][0]) <= 1e-4
        ran = [process[turn][1] for process in found]
        assert sum(ran) == sum(bool(c.code) for e in found[0][turn][0] for c in e.calls)
        assert min(ran) > 0  # each ran tools of its team's rows
    episodes = found[0][0][0]
    assert [(e.problem.id, e.sample) for e in episodes] == [(r.problem.id, r.sample) for r in requests()]
    same = [a.tokens == b.tokens for a, b in zip(expected, episodes)]  # another mesh rounds otherwise
    assert sum(same) >= len(same) - 3


def made_up(devices: list[int], tensor: int):
    """What `hosts.team` sees of a mesh over so many devices of each process."""
    held = [types.SimpleNamespace(id=100 * p + i, process_index=p) for p, n in enumerate(devices) for i in range(n)]
    return types.SimpleNamespace(devices=np.array(held), shape={'tensor': tensor})


@pytest.mark.parametrize(
    ('devices', 'tensor', 'process', 'team'),
    [
        ([4, 4], 4, 1, (1,)),
        ([8], 2, 0, (0,)),
        ([4, 8], 4, 1, (1,)),
        ([4, 4, 4, 4], 8, 2, (2, 3)),
        ([1] * 8, 4, 5, (4, 5, 6, 7)),
        ([2, 2, 2], 3, 1, (0, 1, 2)),  # two engines of three processes
        ([4, 4], 8, 0, (0, 1)),
    ],
)
def test_a_team_is_as_few_processes_as_have_whole_engines(devices, tensor, process, team, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    assert hosts.team(made_up(devices, tensor)) == team


def test_processes_of_unlike_devices_that_make_no_whole_engines_are_refused():
    with pytest.raises(UserError, match='^mesh.tensor=8: processes of 4 and 8 devices have no whole engines; choose'):
        hosts.team(made_up([4, 8], 8))


@pytest.mark.parametrize('count', [1, 2, 3, 8])
def test_parts_are_whole_problems_in_order(count):
    asked = requests()
    parts = [hosts.part(asked, i, count) for i in range(count)]
    assert [r for part in parts for r in part] == asked
    assert max(map(len, parts)) <= 3 * -(-7 // count)
    ids = [{r.problem.id for r in part} for part in parts]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 7


def test_a_process_alone_gathers_what_it_gave_and_answers_itself():
    assert processes.gather({'a': [1, 'x' * 9000]}) == [{'a': [1, 'x' * 9000]}]
    link = hosts.Lockstep()
    assert all(link.owns(row) for row in range(5)) and link.share({3: 'answer'}, 15) == ({3: 'answer'}, 15)


def test_counts_of_engines_add_up_and_the_longest_time_counts():
    found = hosts.total(
        [
            RolloutStats(episodes=2, sampled_tokens=30, total_s=2.0, tool_wall_s=[0.5]),
            RolloutStats(episodes=3, sampled_tokens=10, total_s=4.0, decode_s=1.0),
        ]
    )
    assert (found.episodes, found.sampled_tokens, found.total_s, found.decode_s) == (5, 40, 4.0, 1.0)
    assert found.tool_wall_s == [0.5] and found.tokens_per_s == 10


def test_weights_of_a_global_mesh_become_a_local_ones_without_a_copy():
    mesh = sharding.make_mesh({'data': 2, 'fsdp': -1, 'tensor': 2})
    local = hosts.local_mesh(mesh)
    assert dict(local.shape) == {'data': 4, 'fsdp': 1, 'tensor': 2}
    x = jax.device_put(np.arange(12.0).reshape(3, 4), jax.NamedSharding(mesh, jax.P(None, 'tensor')))
    found = hosts.localise({'x': x}, {'x': jax.NamedSharding(local, jax.P(None, 'tensor'))})['x']
    np.testing.assert_array_equal(np.asarray(found), np.asarray(x))
    pointers = {s.device: s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    assert len(found.addressable_shards) == 8
    assert all(pointers[s.device] == s.data.unsafe_buffer_pointer() for s in found.addressable_shards)


@pytest.mark.slow
def test_an_artificial_slow_host_rings_by_its_name(tmp_path):
    ours, theirs = run(2, 'apart_slow', 0, tmp_path)
    assert ours == theirs  # all processes hold all lines
    watch = Watch(alarms_test.SETTINGS)
    heard = [watch.look({}, alarms_test.MIXED, lines) for lines in ours[2:]]
    assert [len(alarms) for alarms in heard] == [0, 0, 1]
    assert heard[2][0].name == 'straggler' and f'process 1 on {socket.gethostname()} took' in heard[2][0].text
    for lines in ours[2:]:
        assert [line['process'] for line in lines] == [0, 1]
        assert lines[0]['waiting_s'] == lines[1]['rollout_s'] - lines[0]['rollout_s'] > lines[1]['waiting_s'] == 0


def test_a_process_alone_says_what_it_did():
    link = hosts.Lockstep()
    link.share({}, 0)
    assert link.waited_s > 0
    link.waited_s = 0.5
    own = RolloutStats(sampled_tokens=30, total_s=2.0, tool_wall_s=[0.25])
    (line,) = hosts.describe(own, link)
    assert link.waited_s == 0 and hosts.describe(own, None)[0]['rollout_s'] == 2.0
    assert line.pop('host_peak_mb') > 10
    assert line == {
        'process': 0, 'host': socket.gethostname(), 'rollout_s': 1.5, 'waiting_s': 0.0, 'sampled_tokens': 30,
        'tools_p99_s': 0.25, 'device_peak_mb': None,
    }  # fmt: skip
