"""Episode files give back what was written, and stop where the run was cut back to."""

from __future__ import annotations

import json

import numpy as np
import pytest

from retool_jax.core import episode_files
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Problem, Reward, Stop, ToolCall, Verdict


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors='replace')


def make(step: int, sample: int = 0) -> Episode:
    problem = Problem(f'p/{step}', 'What is 2⁷ mod 5?', '3', 'arithmetic/new_operands', 'powmod')
    episode = Episode(problem, sample, step)
    episode.append(b'prompt', acted=False)
    episode.prompt_length = 6
    code = b'<code>print(2**7 % 5)</code>'
    episode.append(code, acted=True, logprobs=np.linspace(-3, -1e-7, len(code), dtype=np.float32), version=step)
    episode.calls.append(ToolCall(0, 'print(2**7 % 5)\n', Verdict.ERROR, '3\n', 'é\ud800', '3', 34, 0.0125))
    episode.append(b'<interpreter>\n3\n</interpreter>', acted=False)
    episode.append(b'<answer>\\boxed{3}', acted=True, logprobs=[-0.1] * 17, version=step + 1)
    episode.turns, episode.stop, episode.void = 2, Stop.ANSWER, sample == 1
    episode.reward = Reward(1.0, True, True, True, '3')
    return episode


def test_episodes_come_back_exactly(tmp_path):
    bare = Episode(Problem('q', '', '', '', ''), 3, 4)  # nothing sampled yet, nothing graded
    written = [make(4), make(5, sample=1), bare]
    path = episode_files.write(tmp_path / 'episodes', 'step_00005', written, decode)
    assert path == tmp_path / 'episodes' / 'step_00005.jsonl'
    back = episode_files.read(tmp_path / 'episodes', 'step_00005')
    assert back == written
    assert [type(e.stop) for e in back[:2]] == [Stop, Stop] and back[0].calls[0].verdict is Verdict.ERROR
    assert all(type(t) is int for t in back[0].tokens) and all(type(a) is bool for a in back[0].acted)


def test_the_jsonl_reads_without_the_numbers(tmp_path):
    path = episode_files.write(tmp_path, 'a', [make(4)], decode)
    header, line = map(json.loads, path.read_text().splitlines())
    assert header == {'schema': episode_files.SCHEMA, 'step': 4, 'episodes': 1}
    assert [(s['kind'], s['text']) for s in line['segments']] == [
        ('prompt', 'prompt'), ('model', '<code>print(2**7 % 5)</code>'),
        ('tool', '<interpreter>\n3\n</interpreter>'), ('model', '<answer>\\boxed{3}'),
    ]  # fmt: skip
    assert sum(s['tokens'] for s in line['segments']) == len(make(4).tokens)
    assert line['calls'][0]['verdict'] == 'error' and line['stop'] == 'answer' and line['reward']['value'] == 1.0


def test_all_parts_are_read_in_order_and_a_part_may_be_empty_or_replaced(tmp_path):
    episode_files.write(tmp_path, 'step_00002', [make(2)], decode)
    episode_files.write(tmp_path, 'step_00001', [make(1)], decode)
    episode_files.write(tmp_path, 'step_00003', [], decode)
    episode_files.write(tmp_path, 'step_00002', [make(2), make(2, 1)], decode)
    assert episode_files.names(tmp_path) == ['step_00001', 'step_00002', 'step_00003']
    assert episode_files.read(tmp_path) == [make(1), make(2), make(2, 1)]


def test_a_resumed_run_cuts_its_episodes_back(tmp_path):
    for step in range(4):
        episode_files.write(tmp_path, f'step_{step:05d}', [make(step)], decode)
    (tmp_path / '.step_00004.npz.new').write_bytes(b'half')  # killed while writing
    (tmp_path / 'step_00004.npz').write_bytes(b'no text came after it')
    episode_files.rewind(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'step_00000.jsonl', 'step_00000.npz', 'step_00001.jsonl', 'step_00001.npz',
    ]  # fmt: skip
    episode_files.rewind(tmp_path / 'missing', 1)
    assert episode_files.read(tmp_path) == [make(0), make(1)]


def test_what_fails_half_way_leaves_no_part(tmp_path):
    def break_down(ids):
        raise RuntimeError('no text')

    uneven = make(2)
    uneven.versions.pop()
    with pytest.raises(ValueError, match='p/2: tokens, acted, logprobs and versions differ'):
        episode_files.write(tmp_path, 'a', [uneven], decode)
    with pytest.raises(RuntimeError):
        episode_files.write(tmp_path, 'a', [make(1)], break_down)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tmp_path):
    path = episode_files.write(tmp_path, 'a', [make(1), make(1, 1)], decode)
    whole = path.read_text()
    path.write_text(whole[: whole.rindex('\n', 0, -1) + 1])
    with pytest.raises(ValueError, match=r'a\.jsonl: 1 episodes of 2: the file was cut short'):
        episode_files.read(tmp_path, 'a')
    path.write_text(whole[:-20])
    with pytest.raises(ValueError, match=r'a\.jsonl:3: not a line of episodes'):
        episode_files.read(tmp_path, 'a')
    path.write_text(whole.replace('"schema": 1', '"schema": 9'))
    with pytest.raises(ValueError, match='schema 9; this version reads 1'):
        episode_files.read(tmp_path, 'a')
    path.write_text(whole)
    episode_files.write(tmp_path, 'b', [make(1)], decode)
    (tmp_path / 'b.npz').replace(tmp_path / 'a.npz')
    with pytest.raises(ValueError, match=r'a\.npz: does not belong to a\.jsonl'):
        episode_files.read(tmp_path, 'a')


@pytest.mark.parametrize(
    'spoil',
    [
        lambda path: path.write_text(''),
        lambda path: path.write_text('[]\n'),
        lambda path: path.write_text('{"schema": 1}\n'),
        lambda path: path.write_text(path.read_text().replace('"problem"', '"poem"')),
        lambda path: path.write_text(path.read_text().replace('"stop": "', '"stop": "un')),
        lambda path: path.with_suffix('.npz').write_bytes(b'junk'),
        lambda path: path.with_suffix('.npz').write_bytes(b''),
        lambda path: path.with_suffix('.npz').write_bytes(path.with_suffix('.npz').read_bytes()[:-40]),
    ],
)
def test_files_that_are_something_else_are_one_line(tmp_path, spoil):
    path = episode_files.write(tmp_path, 'a', [make(1)], decode)
    spoil(path)
    with pytest.raises(UserError, match=r'a\.jsonl'):
        episode_files.read(tmp_path, 'a')
