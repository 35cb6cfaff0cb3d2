"""Every step once in every file, whatever killed the run before."""

from __future__ import annotations

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core import metrics
from retool_jax.core.metrics import Metrics


def events(directory) -> list[tuple[int, str, float]]:
    """What TensorBoard would read: (step, tag, value) of every event, files in order of their names."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((directory / 'tensorboard').iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from('<Q', data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 12 + length + 4
    return found


def test_a_line_per_step_and_the_same_in_tensorboard(tmp_path):
    with Metrics(tmp_path / 'run') as writer:
        writer.write(0, {'rewards/mean': jnp.float32(0.5), 'phase': 'sft', 'tools/calls': np.int64(3), 'ok': True})
        writer.write(2, {'rewards/mean': float('nan'), 'loss': np.array(float('inf'))})
        lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    times = [line.pop('time') for line in lines]
    assert times == sorted(times)
    assert lines == [
        {'step': 0, 'rewards/mean': 0.5, 'phase': 'sft', 'tools/calls': 3, 'ok': True},
        {'step': 2, 'rewards/mean': None, 'loss': None},
    ]
    assert events(tmp_path / 'run') == [(0, 'rewards/mean', 0.5), (0, 'tools/calls', 3.0), (0, 'ok', 1.0)]


def test_a_step_is_not_written_twice(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as writer:
        writer.write(3, {'a': 1})
        for step in (3, 2):
            with pytest.raises(ValueError, match=f'step {step} comes after step 3'):
                writer.write(step, {'a': 2})
    with Metrics(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match='after step 3'):
        writer.write(1, {'a': 1})
    assert [line['step'] for line in metrics.read(tmp_path)] == [3]


def test_a_resumed_run_cuts_back_to_its_step_everywhere(tmp_path):
    with Metrics(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {'a': step})
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 6, "ti')  # killed in the middle of a line
    with Metrics(tmp_path) as writer:
        assert writer.last == 5
        writer.rewind(3)
        assert writer.last == 3
        for step in (4, 5):
            writer.write(step, {'a': 10 * step})
    values = {line['step']: line['a'] for line in metrics.read(tmp_path)}
    assert values == {0: 0, 1: 1, 2: 2, 3: 3, 4: 40, 5: 50}
    assert [(step, value) for step, _, value in events(tmp_path)] == [(k, float(v)) for k, v in values.items()]
    with Metrics(tmp_path) as writer:
        writer.rewind(None)
        writer.write(0, {'a': 7})
    assert [(line['step'], line['a']) for line in metrics.read(tmp_path)] == [(0, 7)]
    assert events(tmp_path) == [(0, 'a', 7.0)]


def test_a_damaged_line_is_named_and_nothing_is_overwritten(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics: b'nonsense'"):
        Metrics(tmp_path)
    assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 3


def test_processes_that_do_not_write_touch_nothing(tmp_path):
    with Metrics(tmp_path / 'run', active=False) as writer:
        writer.write(0, {'a': 1})
        writer.rewind(0)
    assert not (tmp_path / 'run').exists() and metrics.read(tmp_path / 'run') == []


def test_lines_of_processes_are_appended_and_cut_back(tmp_path):
    path = tmp_path / metrics.HOSTS
    metrics.append(path, 0, [])
    assert not path.exists()  # a step that was read from a folder
    rows = [{'process': i, 'host': f'node{i}', 'rollout_s': np.float64(i), 'peak': float('nan')} for i in range(2)]
    for step in range(3):
        metrics.append(path, step, rows)
    assert metrics.read(path)[3] == {'step': 1, 'process': 1, 'host': 'node1', 'rollout_s': 1.0, 'peak': None}
    path.write_bytes(path.read_bytes()[:-9])  # killed in the middle of the last line
    assert [(line['step'], line['process']) for line in metrics.cut(path, 1)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert metrics.read(path) == metrics.cut(path, None)
    assert metrics.cut(path, -1) == [] and path.read_bytes() == b''
