"""Every configuration builds and every mistake through a real binary is one line, exit status 2, nothing written."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.core import cli, settings
from retool_jax.stages.config import Evaluation
from tests import namespaces
from tests.launch import launcher, mistakes

ROOT = Path(__file__).parents[2]
CONFIGS = ('rewrite', 'cold_start', 'sft', 'ppo', 'evaluate')
ARGS = ('tiny', 'qwen2_5_0_5b', 'qwen2_5_1_5b', 'qwen2_5_7b', 'qwen2_5_14b', 'qwen2_5_32b', 'r1_distill_qwen_32b',
        'qwen3_0_6b', 'qwen3_4b', 'qwen3_8b', 'qwen3_32b')  # fmt: skip


@pytest.mark.parametrize('arg', ARGS)
@pytest.mark.parametrize('name', CONFIGS)
def test_every_configuration_builds_and_says_how_it_is_run(name, arg):
    config = cli.load_config(f'configs/{name}.py:{arg}')
    assert config.run.dir == f'runs/{name}_{arg}'
    text = (ROOT / f'configs/{name}.py').read_text()
    assert f'python launch/{name}.py --config=configs/{name}.py:tiny' in text
    assert 'Hardware:' in text


@pytest.mark.parametrize(
    ('arg', 'size'),
    [('official', 'qwen2_5_32b'), ('official_tiny', 'tiny'), ('official_r1_distill_qwen_32b', 'r1_distill_qwen_32b')],
)
def test_the_authors_evaluation_is_a_preset(arg, size):
    config, plain = (cli.load_config(f'configs/evaluate.py:{name}') for name in (arg, size))
    assert config.run.dir == f'runs/evaluate_{arg}' and config.model == plain.model
    config.problems = 'aime24.jsonl'
    if size != 'tiny':
        config.model.path = 'model'
    stage = settings.build(Evaluation, config)
    turns = stage.turns
    assert turns.max_tokens == stage.sampler.slots == 2 * turns.max_turn_tokens  # two whole segments at least
    assert min(turns.max_turns, turns.max_calls) >= turns.max_tokens and turns.on_answer == 'eos'
    assert (stage.sampling.temperature, stage.feedback.style, stage.feedback.max_chars) == (1.0, 'official', 400)
    if size != 'tiny':
        assert (turns.max_turn_tokens, stage.samples, stage.sampling.top_p, stage.sandbox.cpu_s) == (16384, 32, 0.7, 5)
    with pytest.raises(ValueError, match='qwen9'):
        cli.load_config('configs/evaluate.py:official_qwen9')


@pytest.mark.parametrize('name', [*CONFIGS, 'demo'])
def test_every_key_of_every_configuration_can_be_overridden(name):
    spec = 'configs/demo.py' if name == 'demo' else f'configs/{name}.py:tiny'
    for key, kind in cli.flatten(cli.load_config(spec)).items():
        value = {bool: 'True', int: '7', float: '0.5', str: 'x', tuple: "('a',)"}[kind]
        config = cli.parse_config(['x', f'--config={spec}', f'--config.{key}={value}'])
        found = config
        for word in key.split('.'):
            found = found[word]
        assert str(found) == value or found == ('a',), key


@pytest.fixture(scope='module')
def launch():
    with launcher.start() as started:
        yield started


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    mistakes.write_files(folder)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def check_line(done, words):
    """One line that begins with `error: ` and holds all words; other lines only say what was going on."""
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and done.stderr.rstrip().endswith(lines[0]), done.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize('case', mistakes.CASES)
def test_a_mistake_is_one_line_that_names_it_and_writes_nothing(case, launch, files, tmp_path):
    (name, *arguments), words = mistakes.CASES[case]
    arguments = [a.replace('{}', str(files)) for a in arguments]
    if any(a.startswith('--config=') for a in arguments) and not any('run.dir' in a for a in arguments):
        arguments.append(f'--config.run.dir={tmp_path / "run"}')
    before = contents(files)
    devices = {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'} if 'mesh' in case else {}
    check_line(launch(name, *arguments, env=devices), words.split(' '))
    assert not (tmp_path / 'run').exists()
    assert contents(files) == before


def evaluate(files, run):
    return ('evaluate', *mistakes.EVALUATE[1:], f'--config.problems={files}/good.jsonl', f'--config.run.dir={run}')


def test_a_machine_without_nsjail_is_told_what_to_install(launch, files, tmp_path):
    done = launch(*evaluate(files, tmp_path / 'run'), env={'PYTHONPATH': f'{files}/shadow:{ROOT}', 'PATH': '/nowhere'})
    check_line(done, ['sandbox', 'nsjail', 'install'])
    assert not (tmp_path / 'run').exists()


def test_a_machine_without_user_namespaces_is_told_so(launch, files, tmp_path):
    if not namespaces.allow('sh', '-c', 'echo 0 > /proc/sys/user/max_user_namespaces'):
        pytest.skip('no user namespace to try it in')
    done = launch(*evaluate(files, tmp_path / 'run'), namespaces=False)
    check_line(done, ['sandbox', 'isolated', 'doctor'])
    assert not (tmp_path / 'run').exists()


def test_a_full_disk_is_named(launch, files, tmp_path):
    (tmp_path / 'disk').mkdir()
    if not namespaces.allow(*namespaces.small_disk(tmp_path / 'disk', '32k')):
        pytest.skip('no user namespace to mount a small disk in')
    done = launch(
        *evaluate(files, tmp_path / 'disk' / 'run'), '--config.model.tools=False', disk=str(tmp_path / 'disk')
    )
    check_line(done, ['No space left on device', 'disk/run'])


def test_a_port_that_is_taken_is_named(launch):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        check_line(launch('sandbox_server', f'--port={port}'), [str(port), 'in use', '--port'])


def test_a_checkpoint_of_another_architecture_is_named(launch, files, tmp_path):
    done = launch('convert', '--to=orbax', f'--source={files}/wide', f'--target={tmp_path}/wide')
    assert done.returncode == 0, done.stderr
    done = launch(
        'convert', '--to=hf', f'--source={tmp_path}/wide', f'--like={files}/model', f'--target={tmp_path}/new'
    )
    check_line(done, ['params.policy does not fit', '[272, 64]', '[272, 32]'])
    assert not (tmp_path / 'new').exists()


def test_a_start_without_a_launcher_is_the_same():
    done = subprocess.run(
        [sys.executable, ROOT / 'launch/evaluate.py', *mistakes.CASES['unknown key'][0][1:]],
        cwd='/',
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == "error: unknown config key 'sampels' (did you mean samples?)\n"


def test_an_extra_that_is_unknown_is_refused_before_anything_is_installed():
    done = subprocess.run(
        ['bash', ROOT / 'launch/setup.sh'],
        env=os.environ | {'EXTRA': 'gpu'},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == 'setup: EXTRA=gpu is unknown; choose tpu, cuda12, cuda13 or plan\n'
