"""A run's folder belongs to the configuration that made it."""

import dataclasses
import json

import fsspec
import pytest
from ml_collections import ConfigDict

from retool_jax.core import mirror
from retool_jax.core.errors import UserError
from retool_jax.model.lora import LoRASettings
from retool_jax.stages import folder
from retool_jax.stages.config import RunSettings
from tests import buckets


def make_config(directory, **changes):
    return ConfigDict({'run': {'dir': str(directory), 'seed': 0}, 'ppo': {'steps': 3, 'samples': 4}} | changes)


def claim(config, free=()):
    with folder.claimed(config, free) as directory:
        return directory


def put_result(directory, name):
    (directory / name).mkdir()
    (directory / name / 'something').write_text('kept')


@pytest.fixture(scope='module')
def bucket():
    with buckets.served():
        yield f'gs://{buckets.BUCKET}'


def test_a_new_or_empty_folder_is_claimed_with_its_parents(tmp_path):
    for place in (tmp_path / 'a' / 'b', tmp_path):
        config = make_config(place / 'run')
        (tmp_path / 'run').mkdir(exist_ok=True)
        assert claim(config) == place / 'run'
        assert json.loads((place / 'run' / 'config.json').read_text()) == config.to_dict()
        assert [file.name for file in (place / 'run').iterdir()] == ['config.json']


def test_the_same_configuration_goes_on_with_what_is_there(tmp_path):
    directory = claim(make_config(tmp_path / 'run'))
    (directory / 'metrics.jsonl').write_text('{}\n')
    assert claim(make_config(tmp_path / 'run')) == directory
    assert (directory / 'metrics.jsonl').read_text() == '{}\n'


def test_a_folder_may_be_moved(tmp_path):
    claim(make_config(tmp_path / 'old')).rename(tmp_path / 'new')
    directory = claim(make_config(tmp_path / 'new'))
    assert json.loads((directory / 'config.json').read_text())['run']['dir'] == str(directory)


def test_a_run_without_results_gives_way_to_another_configuration(tmp_path):
    directory = claim(make_config(tmp_path / 'run'))
    claim(make_config(directory, ppo={'steps': 9, 'samples': 4}))
    assert json.loads((directory / 'config.json').read_text())['ppo']['steps'] == 9


@pytest.mark.parametrize('result', folder.RESULTS)
def test_another_configuration_is_refused_by_the_keys_that_differ(tmp_path, result):
    directory = claim(make_config(tmp_path / 'run'))
    put_result(directory, result)
    before = (directory / 'config.json').read_bytes()
    other = make_config(directory, ppo={'steps': 5, 'samples': 4}, limit=1)
    with pytest.raises(UserError, match=r'ppo.steps: 3, now 5; limit: .*absent.*, now 1') as refused:
        claim(other)
    assert 'samples' not in str(refused.value) and 'run.dir' in str(refused.value)
    assert (directory / 'config.json').read_bytes() == before
    with pytest.raises(UserError, match='limit'):
        claim(other, free=['ppo'])


def test_free_keys_may_differ_and_the_new_values_are_kept(tmp_path):
    directory = claim(make_config(tmp_path / 'run'))
    (directory / 'metrics.jsonl').write_text('{}\n')
    for free in (['ppo.steps'], ['ppo']):
        steps = 5 + len(free[0])
        directory = claim(make_config(tmp_path / 'run', ppo={'steps': steps, 'samples': 4}), free)
        assert json.loads((directory / 'config.json').read_text())['ppo']['steps'] == steps


def test_empty_folders_of_a_run_that_was_stopped_at_once_are_in_nobodys_way(tmp_path):
    (tmp_path / 'run/checkpoints').mkdir(parents=True)
    assert (claim(make_config(tmp_path / 'run')) / 'config.json').is_file()


def test_a_folder_of_other_files_is_refused_untouched(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='holds other files; choose a new or empty folder'):
        claim(make_config(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ['notes.txt']


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / 'run').write_text('mine')
    with pytest.raises(UserError, match='is a file; choose a new or empty folder'):
        claim(make_config(tmp_path / 'run'))
    assert (tmp_path / 'run').read_text() == 'mine'


@pytest.mark.parametrize('text', ['', '{"run": {"se'])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match='config.json is damaged; choose another folder'):
        claim(make_config(tmp_path))
    assert (tmp_path / 'config.json').read_text() == text


@pytest.mark.parametrize('there', [False, True])
@pytest.mark.parametrize('error', [UserError, KeyboardInterrupt, OSError])
def test_a_run_that_ends_before_its_first_result_leaves_no_trace(tmp_path, error, there):
    if there:
        (tmp_path / 'run').mkdir()
    with pytest.raises(error), folder.claimed(make_config(tmp_path / 'run')) as directory:
        (directory / 'model').mkdir()
        (directory / 'metrics.jsonl').touch()
        raise error('too early')
    assert (tmp_path / 'run').exists() == there and not list(tmp_path.glob('run/*'))


def test_results_stay_whatever_ends_the_run(tmp_path):
    with pytest.raises(UserError), folder.claimed(make_config(tmp_path / 'run')) as directory:
        put_result(directory, 'episodes')
        raise UserError('late')
    with pytest.raises(UserError), folder.claimed(make_config(tmp_path / 'run')):
        raise UserError('at once, the second time')
    assert (tmp_path / 'run/episodes/something').exists() and (tmp_path / 'run/config.json').exists()


def test_results_of_stages_below_a_folder_stay_as_well(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder.claimed(make_config(tmp_path / 'run')) as directory:
        with folder.claimed(make_config(directory / 'tool' / 'ppo')) as below:
            put_result(below, 'checkpoints')
        raise KeyboardInterrupt
    assert (tmp_path / 'run/tool/ppo/checkpoints/something').exists() and (tmp_path / 'run/config.json').exists()


def test_what_others_keep_in_a_folder_stays_when_it_is_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='other files'), folder.claimed(make_config(tmp_path)):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ['notes.txt']


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    folder.write(tmp_path / 'summary.json', {'correct': 1})
    monkeypatch.setattr(type(tmp_path), 'replace', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed before the new one takes its name
        folder.write(tmp_path / 'summary.json', {'correct': 2})
    assert json.loads((tmp_path / 'summary.json').read_text()) == {'correct': 1}


def test_a_run_is_held_to_the_data_that_it_began_with(tmp_path):
    directory = claim(make_config(tmp_path / 'run'))
    begun, other = {'x.jsonl': {'count': 6, 'sha256': 'a'}}, {'x.jsonl': {'count': 5, 'sha256': 'b'}}
    folder.bind(directory, other)
    folder.bind(directory, begun)  # nothing depends on them yet
    put_result(directory, 'checkpoints')
    folder.bind(directory, begun)
    with pytest.raises(UserError, match=r"^x\.jsonl is not what the run in '.*run' began with \(6 entries then, 5 now"):
        folder.bind(directory, other)
    assert json.loads((directory / folder.DATA).read_text()) == begun


def test_a_folder_of_an_earlier_version_goes_on_without_the_keys_that_are_gone(tmp_path):
    directory = claim(make_config(tmp_path / 'run', backend='local', turns={'tools': True, 'max_turns': 3}))
    put_result(directory, 'episodes')
    claim(make_config(directory, turns={'max_turns': 3}))
    with pytest.raises(UserError, match='turns.max_turns: 3, now 4'):
        claim(make_config(directory, turns={'max_turns': 4}))


@dataclasses.dataclass(frozen=True)
class Scored:
    """A stage with a backend, as an evaluation is."""

    run: RunSettings
    backend: str


@pytest.mark.parametrize('earlier', [{}, {'backend': 'local'}])
def test_an_evaluation_of_an_earlier_version_goes_on_with_the_engine_and_with_no_other_model(earlier, tmp_path):
    directory = tmp_path / 'run'
    directory.mkdir()
    (directory / 'config.json').write_text(json.dumps({'run': {'dir': str(directory), 'seed': 0}} | earlier))
    put_result(directory, 'episodes')
    stage = lambda backend: Scored(RunSettings(dir=str(directory), seed=0), backend)
    with folder.claimed(stage('engine')):
        pass
    with (
        pytest.raises(UserError, match="backend: 'engine', now 'endpoint'"),
        folder.claimed(stage('endpoint')),
    ):
        pass


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A stage that may train adapters."""

    run: RunSettings
    lora: LoRASettings


def test_a_folder_of_an_earlier_version_goes_on_with_all_weights_and_not_with_adapters(tmp_path):
    directory = tmp_path / 'run'
    directory.mkdir()
    (directory / 'config.json').write_text(json.dumps({'run': {'dir': str(directory), 'seed': 0}}))
    put_result(directory, 'episodes')
    stage = lambda rank: Adapted(
        RunSettings(dir=str(directory), seed=0), LoRASettings(rank=rank, alpha=32.0, targets=('q_proj',))
    )
    with pytest.raises(UserError, match='lora.rank: 0, now 8'), folder.claimed(stage(8)):
        pass
    with folder.claimed(stage(0)):
        pass
    assert json.loads((directory / 'config.json').read_text())['lora']['rank'] == 0


def test_a_folder_of_an_earlier_version_goes_on_with_weights_as_they_were(tmp_path):
    directory = claim(make_config(tmp_path / 'run', sampler={'rows': 64}))
    put_result(directory, 'episodes')
    with pytest.raises(UserError, match=r"sampler.weights: '\(absent\)', now 'int8'"):
        claim(make_config(directory, sampler={'rows': 64, 'weights': 'int8'}))
    claim(make_config(directory, sampler={'rows': 64, 'weights': 'float'}))


def test_a_folder_of_an_earlier_version_goes_on_where_a_key_has_another_name_by_now(tmp_path):
    directory = claim(make_config(tmp_path / 'run', sampler={'group': 8, 'rows': 64}))
    put_result(directory, 'episodes')
    with pytest.raises(UserError, match='sampler.feed_rows: 8, now 4'):
        claim(make_config(directory, sampler={'feed_rows': 4, 'rows': 64}))
    claim(make_config(directory, sampler={'feed_rows': 8, 'rows': 64}))
    assert json.loads((directory / 'config.json').read_text())['sampler'] == {'feed_rows': 8, 'rows': 64}


def test_a_folder_of_a_store_is_claimed_gone_on_with_and_refused_to_another_configuration(bucket, tmp_path):
    address = f'{bucket}/{tmp_path.name}'
    with folder.claimed(make_config(address)) as directory:
        assert directory.name == tmp_path.name
        assert set(buckets.files(address)) == {'config.json', 'owner.json'}
        (directory / 'metrics.jsonl').write_text('{}\n')
    assert not directory.exists()
    left = buckets.files(address)
    assert set(left) == {'config.json', 'metrics.jsonl'}
    line = f"run.dir='{address}' holds a run of another configuration .ppo.steps: 3, now 9"
    with pytest.raises(UserError, match=line):
        claim(make_config(address, ppo={'steps': 9, 'samples': 4}))
    assert buckets.files(address) == left
    with folder.claimed(make_config(address)) as directory:
        assert (directory / 'metrics.jsonl').read_text() == '{}\n'
    assert buckets.files(address) == left


def test_in_a_store_a_run_that_fails_before_its_first_result_leaves_no_trace(bucket, tmp_path):
    address = f'{bucket}/{tmp_path.name}'
    with pytest.raises(KeyError), folder.claimed(make_config(address)) as directory:
        (directory / 'model').write_text('')
        mirror.publish(directory)
        raise KeyError
    assert buckets.files(address) == {}


def test_in_a_store_a_folder_of_other_files_is_refused_as_it_is(bucket, tmp_path):
    address = f'{bucket}/{tmp_path.name}'
    fsspec.url_to_fs(address)[0].pipe_file(f'{address}/papers/a.pdf', b'1')
    with pytest.raises(UserError, match=f"run.dir='{address}' holds other files; choose a new or empty folder"):
        claim(make_config(address))
    assert buckets.files(address) == {'papers/a.pdf': b'1'}
