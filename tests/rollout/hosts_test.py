"""Rollouts of two processes with four devices each: apart and in lockstep, with tools that answer at other times."""

import os
import pickle
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from retool_jax.core import mesh as meshes
from retool_jax.core.cli import ROOT
from retool_jax.rollout import hosts
from tests.rollout.engine_test import requests


def run(count: int, work: str, directory) -> list:
    """The worker in so many processes: what each wrote."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
    env = os.environ | {'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={8 // count}'}
    if count > 1:
        env |= {'RETOOL_PROCESSES': str(count), 'RETOOL_COORDINATOR': f'127.0.0.1:{port}'}
    children = [subprocess.Popen([sys.executable, '-m', 'tests.rollout.worker', work, str(directory)], cwd=ROOT,
                                 env=env | {'RETOOL_PROCESS': str(i)}, stderr=subprocess.PIPE, text=True)
                for i in range(count)]
    try:
        errors = [child.communicate(timeout=1200)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, '\n'.join(errors)[-4000:]
    return [pickle.loads((directory / f'{work}_{i}.pkl').read_bytes()) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize('work', ['apart', 'together'])
def test_two_processes_make_the_episodes_of_one(work, tmp_path):
    ((expected, calls),) = run(1, 'one', tmp_path)
    (first, first_calls), (second, second_calls) = run(2, work, tmp_path)
    assert first == second  # every process holds all episodes
    assert first_calls + second_calls == sum(bool(c.code) for e in first for c in e.calls)
    assert min(first_calls, second_calls) > calls // 8  # both ran tools
    assert [(e.problem.id, e.sample) for e in first] == [(r.problem.id, r.sample) for r in requests()]
    # Another mesh rounds otherwise, which may flip a token and with it the rest of its episode.
    same = [a.tokens == b.tokens for a, b in zip(expected, first)]
    assert sum(same) >= len(same) - 3
    for a, b in zip(expected, first):
        if a.tokens == b.tokens:
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize('count', [1, 2, 3, 8])
def test_parts_are_whole_problems_in_order(count):
    asked = requests()
    parts = [hosts.part(asked, i, count) for i in range(count)]
    assert [r for part in parts for r in part] == asked
    assert max(map(len, parts)) <= 3 * -(-7 // count)
    ids = [{r.problem.id for r in part} for part in parts]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 7


def test_a_process_alone_gathers_what_it_gave_and_answers_itself():
    assert hosts.gather({'a': [1, 'x' * 9000]}) == [{'a': [1, 'x' * 9000]}]
    link = hosts.Lockstep()
    assert all(link.owns(row) for row in range(5)) and link.share({3: 'answer'}) == {3: 'answer'}


def test_weights_of_a_global_mesh_become_a_local_ones_without_a_copy():
    mesh = meshes.make_mesh({'data': 1, 'fsdp': -1, 'tensor': 2})
    local = hosts.local_mesh(mesh)
    assert dict(local.shape) == {'data': 1, 'fsdp': 1, 'tensor': 2}
    x = jax.device_put(np.arange(12.0).reshape(3, 4), jax.NamedSharding(mesh, jax.P(None, 'tensor')))
    found = hosts.localise({'x': x}, {'x': jax.NamedSharding(local, jax.P(None, 'tensor'))})['x']
    np.testing.assert_array_equal(np.asarray(found), np.asarray(x))
    pointers = {s.device: s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
    assert all(pointers[s.device] == s.data.unsafe_buffer_pointer() for s in found.addressable_shards)
