"""A run's folder in a store is what it is on a disk, whenever the process dies."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import fsspec
import pytest

from retool_jax.core import episode_files, mirror
from retool_jax.core.errors import UserError
from retool_jax.core.mirror import Mirror
from retool_jax.core.records import Episode, Problem
from tests import buckets


@pytest.fixture(scope='module')
def bucket():
    """The address of an empty bucket of a server on this machine."""
    with buckets.served():
        yield f'gs://{buckets.BUCKET}'


@pytest.fixture(params=['memory', 'gs'])
def address(request, tmp_path):
    """Where a run's folder may be, of a name of its own, in each kind of store."""
    root = 'memory://bucket' if request.param == 'memory' else request.getfixturevalue('bucket')
    return f'{root}/{tmp_path.parent.name}/{tmp_path.name}'


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def write(folder: Path, **contents: str) -> None:
    """Files of a folder; __ stands for /."""
    for name, content in contents.items():
        file = folder / name.replace('__', '/')
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def write_part(folder: Path, step: int, answer: str = '1') -> None:
    episode = Episode(Problem('p', 'Q?', answer, 'test', ''), sample=0, step=step)
    episode.append([1, 2, 3], acted=False)
    episode_files.write(folder / 'episodes', f'train_{step:05d}', [episode] * 50, str)


def test_what_a_run_writes_replaces_appends_and_removes_is_in_the_store_and_comes_back(address, tmp_path):
    copy = Mirror(address, tmp_path / 'a')
    with mirror.mirrored(copy) as folder:
        write(folder, config='{}', metrics='1\n', carried__old='x', answers__b__c='y', journal='')
        mirror.publish(folder / 'carried')
        assert buckets.files(address) == content(folder)
        with open(folder / 'metrics', 'a') as file:
            file.write('2\n')
        (folder / 'carried' / 'old').unlink()
        write(folder, config='{"new": 1}', carried__new='z')
        left = content(folder)
        mirror.publish(folder)
        assert buckets.files(address) == left
        if address.startswith('gs'):
            assert str(mirror.place(folder / 'config')) == f'{address}/config'
    assert not (tmp_path / 'a').exists() and buckets.files(address) == left
    again = Mirror(address, tmp_path / 'b')
    assert content(tmp_path / 'b') == left
    with mock.patch.object(Mirror, '_put', side_effect=AssertionError):
        again.publish()  # nothing has changed
    mirror.publish(tmp_path)  # a folder of this machine alone
    assert mirror.place(tmp_path) == tmp_path


def test_half_written_files_and_those_of_orbax_and_the_owner_stay_out(address, tmp_path):
    copy = Mirror(address, tmp_path / 'a')
    write(copy.folder, **{'owner.json': '', 'checkpoints__3__x': '', 'final.partial__x': '', 'metrics.jsonl.new': ''})
    copy.publish()
    assert buckets.files(address) == {}
    fsspec.url_to_fs(address)[0].pipe({f'{address}/checkpoints/3/state/d': b'1', f'{address}/owner.json': b'1'})
    assert content(Mirror(address, tmp_path / 'b').folder) == {}


def test_of_what_nothing_reads_again_the_header_comes_back_and_a_rewind_reaches_the_store(address, tmp_path):
    copy = Mirror(address, tmp_path / 'a')
    for step in range(3):
        write_part(copy.folder, step)
    write(copy.folder, alarms__x='long', **{'final__a.safetensors': 'weights', 'final__config.json': '{}'})
    copy.publish()
    whole = buckets.files(address)
    brief = Mirror(address, tmp_path / 'b', ('episodes/*', 'alarms/*'))
    assert set(content(brief.folder)) == set(whole)
    assert (
        (brief.folder / 'final' / 'a.safetensors').read_bytes() == (brief.folder / 'alarms' / 'x').read_bytes() == b''
    )
    header = json.loads(gzip.decompress((brief.folder / 'episodes' / 'train_00001.jsonl.gz').read_bytes()))
    assert header == {'schema': 1, 'step': 1, 'episodes': 50}
    episode_files.rewind(brief.folder / 'episodes', 1)
    brief.publish()
    assert buckets.files(address) == {name: data for name, data in whole.items() if 'train_00002' not in name}


def test_killed_anywhere_in_publishing_a_part_is_whole_or_not_there_and_metrics_count_on_what_is_there(tmp_path):
    def life(address: str, folder: Path, deaths: int) -> bool:
        """A run of two lives' steps that dies at one of its operations; whether it came through."""
        copy, done = Mirror(address, folder), [0]

        def mortal(operation):
            def call(names):
                for name in names:  # one object at a time: a store knows no more
                    if done[0] == deaths:
                        raise KeyboardInterrupt
                    done[0] += 1
                    operation([name])

            return call

        copy._put, copy._remove = mortal(copy._put), mortal(copy._remove)
        for step in range(2):
            write_part(copy.folder, step, answer=f'{step} of {deaths}')
            write(copy.folder, **{'hosts.jsonl': f'{step}', 'metrics.jsonl': f'{step}'})
            copy.publish()
        write(copy.folder, **{'final__a.safetensors': 'weights', 'final__config.json': '{}'})
        episode_files.remove(copy.folder / 'episodes', ['train_00001'])
        copy.publish()
        return True

    deaths, address = 0, f'memory://killed/{tmp_path.name}'
    while True:
        alive = False
        with contextlib.suppress(KeyboardInterrupt):
            alive = life(address, tmp_path / 'a', deaths)
        back = Mirror(address, tmp_path / 'b').folder
        there = content(back)
        for name in episode_files.names(back / 'episodes'):
            assert len(episode_files.read(back / 'episodes', name)) == 50
        if 'metrics.jsonl' in there:
            assert there['hosts.jsonl'] >= there['metrics.jsonl']
            if not alive and (there['metrics.jsonl'], deaths) and 'final/config.json' not in there:
                assert f'episodes/train_0000{there["metrics.jsonl"].decode()}.jsonl.gz' in there
        assert ('final/a.safetensors' in there) == ('final/config.json' in there)
        shutil.rmtree(tmp_path / 'b')
        if alive:
            break
        deaths += 1
    assert deaths > 10


def test_a_killed_process_s_journal_joins_that_of_the_store_which_has_the_last_word(address, tmp_path):
    first = Mirror(address, tmp_path / 'a')
    write(
        first.folder, **{'config.json': '{}', 'journal.jsonl': '1\n', 'journal_1.jsonl': '1\n', 'metrics.jsonl': '1\n'}
    )
    first.publish()
    write(first.folder, **{'journal.jsonl': '2\n3', 'journal_1.jsonl': '', 'metrics.jsonl': '1\n2\n', 'stray': ''})
    second = Mirror(address, tmp_path / 'a')  # the first was killed
    assert content(second.folder) == {
        'config.json': b'{}', 'journal.jsonl': b'2\n1\n', 'journal_1.jsonl': b'1\n', 'metrics.jsonl': b'1\n'
    }  # fmt: skip
    second.publish()
    assert buckets.files(address) == content(second.folder)
    fs, root = fsspec.url_to_fs(address)
    fs.rm(root, recursive=True)
    assert content(Mirror(address, tmp_path / 'a').folder) == {}  # the folder was made anew


def test_others_publish_beside_one_and_are_seen_after_a_refresh(address, tmp_path):
    leader, other = Mirror(address, tmp_path / 'a'), Mirror(address, tmp_path / 'b')
    write(leader.folder, ours='1', episodes__a='1')
    write(other.folder, theirs='1')
    leader.publish()
    other.publish()
    leader.refresh()
    assert content(leader.folder) == buckets.files(address) == {'ours': b'1', 'theirs': b'1', 'episodes/a': b'1'}
    (leader.folder / 'theirs').unlink()
    leader.publish()
    other.publish()
    assert set(buckets.files(address)) == {'ours', 'episodes/a'}


def test_a_run_that_has_lost_its_folder_writes_nothing(address, tmp_path):
    def lost():
        raise UserError('taken over')

    copy = Mirror(address, tmp_path / 'a', guard=lost)
    copy.publish()
    write(copy.folder, metrics='1')
    with pytest.raises(UserError, match='taken over'):
        copy.publish()
    late = Mirror(address, tmp_path / 'b', guard=lambda: False)  # the run is over, and has left no trace
    write(late.folder, metrics='1')
    late.close()
    assert buckets.files(address) == {} and not late.folder.exists()


def test_processes_of_one_host_work_in_folders_of_their_own():
    folders = {mirror.working_folder('gs://b/run/', i) for i in range(2)} | {mirror.working_folder('gs://b/run', 0)}
    assert len(folders) == 2 and {folder.name for folder in folders} == {'run'}
    assert all(os.fspath(folder).startswith(os.fspath(Path(tempfile.gettempdir()))) for folder in folders)
