"""A dry run takes a real step, says what it needs and leaves nothing behind."""

import pytest

from retool_jax.train import rehearsal
from tests.train import killable


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rehearsal') / 'files'
    killable.make_model(folder)
    return folder


def test_one_step_on_fake_tools_prints_its_memory_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob('*'))
    config = killable.make_config_of(folder, 'dry', **{'ppo.offload': True, 'loss.kl_coef': 0.1})
    with killable.tiny_world(folder, 'dry'):
        found = rehearsal.run(config)
    assert sorted(path for path in folder.rglob('*') if path.name != 'dry.answered') == before
    policy = found['policy, f32']
    assert found['reference policy'] == policy == found['sampling weights']  # f32 here too
    assert 2 * policy < found['optimizer state'] < 2.2 * policy  # two moments and counters, the critic's as well
    assert found['KV cache'] >= 2 * 4 * 96 * 2 * 16 * 4  # k and v: rows × slots × KV heads × head size × f32
    assert found['peak of the host process'] > 1e8
    printed = capsys.readouterr().out
    assert 'optimizer state' in printed and 'time/update_s' in printed and 'episodes' in printed


def test_fake_tools_answer_at_once():
    assert rehearsal.FakeTools().submit('print(1)').result(0).stdout == '42\n'
