"""The door, through a real child process: what the user sees and the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from absl import flags

from retool_jax.core import cli, streams

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(arg='tiny'):
    if arg not in ('tiny', 'large'):
        raise ValueError(f'unknown ARG {arg!r}; one of tiny, large')
    config = ConfigDict(dict(steps=3, problems=config_dict.placeholder(str),
                             ppo=dict(clip=0.2, gamma=1.0, whiten=True, sizes=(1, 2))))
    if arg == 'large':
        config.steps = 1000
    return config
"""

BINARY = """
'''Tries the door.'''
import dataclasses, os, sys, time
from absl import flags
from retool_jax.core import cli, streams
from retool_jax.core.errors import UserError
from retool_jax.core.records import Episode

ACTS = ['show', 'bug', 'words', 'int', 'mistake', 'missing', 'wait', 'collect', 'pipe']
FLAG = flags.DEFINE_enum('act', 'show', ACTS, 'what to do')

@dataclasses.dataclass(frozen=True)
class PPO:
    clip: float  # of the ratio
    gamma: float
    whiten: bool
    sizes: tuple[int, ...]

@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int  # of the whole run
    problems: str | None
    ppo: PPO

def main(stage):
    if FLAG.value == 'bug':
        raise KeyError('a fault of ours')
    if FLAG.value == 'int':
        int('x')
    if FLAG.value == 'words':
        Episode(None, 0, 0).append([1], acted=True)
    if FLAG.value == 'mistake':
        raise UserError('ppo.clip=0.2: choose\\na larger one')
    if FLAG.value == 'missing':
        open('no/such/file')
    if FLAG.value == 'collect':
        class Held:
            def __del__(self):
                print('ready', flush=True)
                time.sleep(1)
        Held()
        time.sleep(60)
    if FLAG.value == 'pipe':
        read, write = os.pipe()
        os.close(read)
        os.write(write, b'x')
    if FLAG.value == 'wait':
        print('ready', flush=True)
        time.sleep(60)
    print(stage.steps, stage.problems, stage.ppo.clip, stage.ppo.whiten, stage.ppo.sizes)

if __name__ == '__main__':
    cli.run(main, f'{__name__}:Stage', default_config='DEFAULT')
"""


@pytest.fixture
def door(tmp_path):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'some.py').write_text(CONFIG)
    (tmp_path / 'binary.py').write_text(BINARY.replace('DEFAULT', str(tmp_path / 'configs' / 'some.py')))
    env = {**os.environ, 'PYTHONPATH': str(cli.ROOT)}

    def start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        command = [sys.executable, 'binary.py', *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=stdout, stderr=stderr)

    def call(*arguments):
        child = start(*arguments)
        out, err = child.communicate(timeout=60)
        return child.returncode, out, err

    call.start = start
    return call


@pytest.fixture
def unread():
    """The end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


def refused(door, *arguments):
    code, out, err = door(*arguments)
    assert (code, out) == (2, '')
    assert err.startswith('error: ') and err.count('\n') == 1, err
    return err


def test_overrides_reach_main_with_their_types(door):
    code, out, err = door(
        '--config=configs/some.py:large', '--config.ppo.clip=1', '--config.problems=a=b.jsonl',
        '--noconfig.ppo.whiten', '--config.ppo.sizes=(3,)',
    )  # fmt: skip
    assert (code, out, err) == (0, '1000 a=b.jsonl 1.0 False (3,)\n', '')


def test_the_default_config_is_used_where_none_is_named(door):
    assert door('--config.steps=7')[:2] == (0, '7 None 0.2 True (1, 2)\n')


def test_overrides_may_precede_the_config_and_use_spaces(door):
    assert door('--config.steps', '5', '--config', 'configs/some.py')[1].startswith('5 None')


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--config=configs/sone.py'], ['config file not found', 'configs/sone.py']),
        (['--config=configs/some.py:huge'], ["unknown ARG 'huge'", 'tiny, large']),
        (['--config.ppo.clipp=1'], ["unknown config key 'ppo.clipp'", 'did you mean ppo.clip?']),
        (['--config.gamma=1'], ["unknown config key 'gamma'", 'did you mean ppo.gamma?']),
        (['--config.pppo.clip=1'], ['did you mean ppo.clip?']),
        (['--config.ppo={}'], ['ppo is a block', 'clip, gamma']),
        (['--config.steps=many'], ['--config.steps=many', 'expected an int']),
        (['--config.steps=1.5'], ['--config.steps=1.5', 'expected an int']),
        (['--config.ppo.clip=high'], ['--config.ppo.clip=high', 'expected a float']),
        (['--config.ppo.whiten=maybe'], ['--config.ppo.whiten=maybe', 'expected a bool']),
        (['--config.steps'], ['config.steps']),
        (['--configg=1'], ['configg', 'config']),
        (['--act=dance'], ['act=dance', 'show']),
        (['stray'], ["unexpected argument 'stray'"]),
        (['--act=mistake'], ['ppo.clip=0.2: choose a larger one']),
        (['--act=missing'], ["'no/such/file'", 'No such file']),
    ],
)  # fmt: skip
def test_what_the_user_did_wrong_is_one_line_and_exit_2(door, arguments, words):
    line = refused(door, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize('act', ['bug', 'int', 'words'])
def test_a_fault_of_ours_keeps_its_traceback(door, act):
    code, _, err = door(f'--act={act}')
    assert code == 1 and 'Traceback' in err and 'binary.py' in err


@pytest.mark.parametrize('act', ['wait', 'collect'])  # collect: where exceptions are swallowed
@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_process_says_so_in_one_line(door, number, status, act):
    child = door.start(f'--act={act}')
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == status and err.count('\n') == 1 and err.strip()


@pytest.mark.parametrize('arguments', [['--help'], ['--act=show'], ['--help', '--config=configs/some.py']])
def test_a_binary_ends_quietly_where_nobody_reads_what_it_prints(door, unread, arguments):
    child = door.start(*arguments, stdout=unread)
    assert child.communicate(timeout=60)[1] == ''
    assert child.returncode == streams.UNREAD


def test_a_mistake_that_nobody_reads_ends_quietly_too(door, unread):
    child = door.start('--config.steps=many', stderr=unread)
    assert child.communicate(timeout=60)[0] == ''
    assert child.returncode == streams.UNREAD


def test_a_broken_pipe_of_another_kind_is_a_fault_of_ours(door):
    code, _, err = door('--act=pipe')
    assert code == 1 and 'BrokenPipeError: ' in err


def test_a_fault_of_ours_is_told_though_nobody_reads_the_output(door, unread):
    child = door.start('--act=bug', stdout=unread)
    assert 'KeyError: ' in child.communicate(timeout=60)[1]
    assert child.returncode == 1


@pytest.mark.parametrize('module', ['retool_jax.sandbox.doctor', 'retool_jax.report'])
def test_binaries_without_a_configuration_end_quietly_too(unread, module):
    command = [sys.executable, '-m', module, '--help']
    env = {**os.environ, 'PYTHONUNBUFFERED': ''}  # argparse swallows what a write raises, and has none with a buffer
    child = subprocess.run(command, cwd=cli.ROOT, env=env, stdout=unread, stderr=subprocess.PIPE)
    assert (child.returncode, child.stderr) == (streams.UNREAD, b'')


def test_help_lists_every_key_with_its_default(door):
    code, out, _ = door('--help', '--config=configs/some.py:large')
    assert code == 0
    for text in (
        'Tries the door.',
        '--act=show',
        '--config.steps=1000  (int)\n      of the whole run\n',
        '--config.ppo.clip=0.2  (float)\n      of the ratio\n',
        '--config.problems=None  (str | None)\n',
    ):
        assert text in out


def test_help_without_a_configuration_explains_every_key_that_the_binary_reads(door):
    code, out, _ = door('--help')
    assert code == 0
    for text in ('--config=PATH:ARG', '--config.steps=…  (int)\n      of the whole run\n', '--config.ppo.sizes=…'):
        assert text in out


def test_configs_are_found_from_any_directory_and_may_import_their_neighbours(tmp_path, monkeypatch):
    repository = tmp_path / 'repository'
    (repository / 'configs').mkdir(parents=True)
    (repository / 'configs' / 'ppo.py').write_text(
        textwrap.dedent("""
        from ml_collections import ConfigDict
        def get_config():
            return ConfigDict(dict(steps=1))
        """)
    )
    monkeypatch.setattr(cli, 'ROOT', repository)
    monkeypatch.chdir(tmp_path)
    assert cli.parse_config(['x', '--config=configs/ppo.py', '--config.steps=4']).steps == 4
    assert cli.parse_config(['x', '--config=configs/ppo.py']).steps == 1
    with pytest.raises(cli.UserError, match='takes no ARG'):
        cli.parse_config(['x', '--config=configs/ppo.py:tiny'])
    with pytest.raises(cli.UserError, match=r'did you mean configs/ppo.py\?'):
        cli.parse_config(['x', '--config=configs/poo.py'])
    with pytest.raises(cli.UserError, match='--config is missing.*configs/ppo.py'):
        cli.parse_config(['x'])


@pytest.mark.parametrize('arguments', [['a', 'b'], ['--source=a', 'b'], ['b', '--source=a'], ['a', '--target=b']])
def test_arguments_without_a_name_stand_for_the_flags_that_a_binary_names(monkeypatch, arguments):
    own = flags.FlagValues()
    for name in ('source', 'target'):
        flags.DEFINE_string(name, None, 'A path.', flag_values=own)
    monkeypatch.setattr(cli.flags, 'FLAGS', own)
    cli.parse_flags(['binary', *arguments], bare=('source', 'target'))
    assert (own.source, own.target) == ('a', 'b')
    own.unparse_flags()
    with pytest.raises(cli.UserError, match="unexpected argument 'more'; flags are written --name=value"):
        cli.parse_flags(['binary', *arguments, 'more'], bare=('source', 'target'))


def test_a_library_of_an_extra_is_named_with_the_extra():
    missing = ModuleNotFoundError("No module named 'httpx'", name='httpx')
    assert (
        cli.explain(missing) == 'httpx is not installed; it comes with the extra `server`: '
        "pip install 'retool_jax[server]'"
    )
    assert cli.explain(ModuleNotFoundError("No module named 'numpy'", name='numpy')) is None


def test_the_line_to_paste_names_the_console_script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/usr/local/bin/retool-ppo', '--config=configs/ppo.py:tiny', '--config.x=a b'])
    assert cli.command() == "retool-ppo --config=configs/ppo.py:tiny '--config.x=a b'"


def test_an_installed_package_has_its_configurations_inside(tmp_path, monkeypatch):
    inside = tmp_path / 'site-packages' / 'retool_jax' / '_configs'
    (tmp_path / 'elsewhere').mkdir()
    inside.mkdir(parents=True)
    (inside / 'ppo.py').write_text(
        'from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict(dict(steps=1))\n'
    )
    monkeypatch.setattr(cli, 'ROOT', tmp_path / 'site-packages')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert cli.load_config('configs/ppo.py').steps == 1
    (tmp_path / 'elsewhere' / 'configs').mkdir()
    (tmp_path / 'elsewhere' / 'configs' / 'ppo.py').write_text((inside / 'ppo.py').read_text().replace('=1', '=2'))
    assert cli.load_config('configs/ppo.py').steps == 2
