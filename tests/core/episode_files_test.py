"""Episode files give back what was written, and stop where the run was cut back to."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pytest

from retool_jax.core import episode_files
from retool_jax.core.episode_files import EpisodeSettings
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode, Problem, Reward, Stop, ToolCall, Verdict
from retool_jax.tasks import arithmetic
from retool_jax.text.tokenizer import train_bpe
from tests.report import synthesis


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors='replace')


def text_of(path) -> str:
    with episode_files.open_text(path) as file:
        return file.read()


def put(path, text: str) -> None:
    """Writes another text into a part's file, in the form that its name says."""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == '.gz' else text.encode())


def make_plain(directory, name: str):
    """Turns a part into the two files that earlier versions wrote, and returns the first."""
    path = episode_files.text_file(directory, name)
    plain = path.with_name(f'{name}.jsonl')
    plain.write_text(text_of(path))
    path.unlink()
    with np.load(directory / f'{name}.npz') as stored:
        arrays = dict(stored)
    np.savez(directory / f'{name}.npz', **arrays)
    return plain


def arrays_of(path):
    return path.with_name('a.npz')


def size(directory) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


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
    assert path == tmp_path / 'episodes' / 'step_00005.jsonl.gz'
    back = episode_files.read(tmp_path / 'episodes', 'step_00005')
    assert back == written
    assert [type(e.stop) for e in back[:2]] == [Stop, Stop] and back[0].calls[0].verdict is Verdict.ERROR
    assert all(type(t) is int for t in back[0].tokens) and all(type(a) is bool for a in back[0].acted)


def test_the_jsonl_reads_without_the_numbers(tmp_path):
    path = episode_files.write(tmp_path, 'a', [make(4)], decode)
    header, line = map(json.loads, text_of(path).splitlines())
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
        'step_00000.jsonl.gz', 'step_00000.npz', 'step_00001.jsonl.gz', 'step_00001.npz',
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


@pytest.mark.parametrize('plain', [False, True])
def test_damaged_files_are_named(tmp_path, plain):
    path = episode_files.write(tmp_path, 'a', [make(1), make(1, 1)], decode)
    path = make_plain(tmp_path, 'a') if plain else path
    whole = text_of(path)
    put(path, whole[: whole.rindex('\n', 0, -1) + 1])
    with pytest.raises(ValueError, match=r'a\.jsonl(\.gz)?: 1 episodes of 2: the file was cut short'):
        episode_files.read(tmp_path, 'a')
    put(path, whole[:-20])
    with pytest.raises(ValueError, match=r'a\.jsonl(\.gz)?:3: not a line of episodes'):
        episode_files.read(tmp_path, 'a')
    put(path, whole.replace('"schema": 1', '"schema": 9'))
    with pytest.raises(ValueError, match='schema 9; this version reads 1'):
        episode_files.read(tmp_path, 'a')
    put(path, whole)
    episode_files.write(tmp_path, 'b', [make(1)], decode)
    (tmp_path / 'b.npz').replace(tmp_path / 'a.npz')
    with pytest.raises(ValueError, match=r'a\.npz: does not belong to a\.jsonl(\.gz)?'):
        episode_files.read(tmp_path, 'a')


@pytest.mark.parametrize(
    'spoil',
    [
        lambda path: put(path, ''),
        lambda path: put(path, '[]\n'),
        lambda path: put(path, '{"schema": 1}\n'),
        lambda path: put(path, text_of(path).replace('"problem"', '"poem"')),
        lambda path: put(path, text_of(path).replace('"stop": "', '"stop": "un')),
        lambda path: path.write_bytes(b'junk'),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b''),
        lambda path: arrays_of(path).write_bytes(b'junk'),
        lambda path: arrays_of(path).write_bytes(b''),
        lambda path: arrays_of(path).write_bytes(arrays_of(path).read_bytes()[:-40]),
    ],
)
def test_files_that_are_something_else_are_one_line(tmp_path, spoil):
    spoil(episode_files.write(tmp_path, 'a', [make(1)], decode))
    with pytest.raises(UserError, match=r'a\.jsonl'):
        episode_files.read(tmp_path, 'a')


def test_what_earlier_versions_wrote_is_a_part_like_any_other(tmp_path):
    for step in range(3):
        episode_files.write(tmp_path, f'step_{step:05d}', [make(step), make(step, 1)], decode)
    plain = make_plain(tmp_path, 'step_00001')
    assert json.loads(plain.read_text().splitlines()[0])['episodes'] == 2
    assert episode_files.names(tmp_path) == ['step_00000', 'step_00001', 'step_00002']
    assert episode_files.read(tmp_path, 'step_00001') == [make(1), make(1, 1)]
    make_plain(tmp_path, 'step_00002')
    episode_files.rewind(tmp_path, 1)
    assert episode_files.names(tmp_path) == ['step_00000', 'step_00001']
    episode_files.write(tmp_path, 'step_00001', [make(1)], decode)
    assert episode_files.read(tmp_path, 'step_00001') == [make(1)] and not plain.exists()
    make_plain(tmp_path, 'step_00001')
    episode_files.remove(tmp_path, {'step_00000'})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['step_00000.jsonl.gz', 'step_00000.npz']


def test_equal_episodes_are_equal_files(tmp_path):
    first, second = (episode_files.write(tmp_path / name, 'a', [make(1)], decode) for name in ('x', 'y'))
    assert first.read_bytes() == second.read_bytes() and arrays_of(first).read_bytes() == arrays_of(second).read_bytes()


def test_episodes_take_a_third_of_what_they_did(tmp_path):
    """Of the embedded task's own traces; a sampler's logprobs are f32, which no compression makes much smaller."""
    tokenizer = train_bpe([p.question for p in arithmetic.problems('train', 300, seed=1)], 400, tmp_path / 'model')
    made = synthesis.episodes('train', 32, 4, 0, 0.8, True, seed=0, tokenizer=tokenizer)
    for episode in made:
        episode.logprobs = np.asarray(episode.logprobs, np.float32).tolist()
    episode_files.write(tmp_path / 'episodes', 'a', made, tokenizer.decode)
    assert episode_files.read(tmp_path / 'episodes') == made
    compressed = size(tmp_path / 'episodes')
    make_plain(tmp_path / 'episodes', 'a')
    assert episode_files.read(tmp_path / 'episodes') == made
    assert compressed <= size(tmp_path / 'episodes') / 3


@pytest.mark.parametrize('plain', [False, True])
def test_a_part_under_two_names_is_one_set_of_bytes_that_outlives_each_of_them(tmp_path, plain):
    episodes, alarms = tmp_path / 'episodes', tmp_path / 'alarms'
    assert not episode_files.link(episodes, 'step_00003', alarms, 'faults_00003') and not alarms.exists()
    path = episode_files.write(episodes, 'step_00003', [make(3)], decode)
    path = make_plain(episodes, 'step_00003') if plain else path
    assert episode_files.link(episodes, 'step_00003', alarms, 'faults_00003')
    assert os.path.samefile(path, episode_files.text_file(alarms, 'faults_00003'))
    assert os.path.samefile(episodes / 'step_00003.npz', alarms / 'faults_00003.npz')
    episode_files.rewind(episodes, 2)  # the run goes on from an earlier step
    assert episode_files.names(episodes) == [] and episode_files.read(alarms, 'faults_00003') == [make(3)]
    episode_files.write(episodes, 'step_00003', [make(3, 1)], decode)
    assert episode_files.read(alarms, 'faults_00003') == [make(3)]
    assert episode_files.link(episodes, 'step_00003', alarms, 'faults_00003')
    assert episode_files.names(alarms) == ['faults_00003'] and episode_files.read(alarms) == [make(3, 1)]


def test_storage_without_hard_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    episode_files.write(tmp_path / 'a', 'x', [make(1)], decode)
    assert episode_files.link(tmp_path / 'a', 'x', tmp_path / 'b', 'y')
    assert episode_files.read(tmp_path / 'b', 'y') == [make(1)]
    assert sorted(path.name for path in (tmp_path / 'b').iterdir()) == ['y.jsonl.gz', 'y.npz']


@pytest.mark.parametrize(('keep', 'kept'), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6, 7]), (9, [0, 7]), (0, [])])
def test_episodes_of_every_so_many_steps_are_kept(keep, kept):
    settings = EpisodeSettings(keep=keep)
    assert [step for step in range(8) if settings.keeps(step, 8)] == kept


def test_a_number_of_steps_below_zero_is_refused():
    with pytest.raises(ValueError, match='keep=-1 must lie in'):
        EpisodeSettings(keep=-1)
