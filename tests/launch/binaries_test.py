"""Every configuration builds and every mistake through a real binary is one line, exit status 2, nothing written."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from retool_jax.core import cli

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ('cold_start', 'sft', 'ppo', 'evaluate')
ARGS = ('tiny', 'qwen2_5_0_5b', 'qwen2_5_1_5b', 'qwen2_5_7b', 'qwen2_5_14b', 'qwen2_5_32b', 'r1_distill_qwen_32b',
        'qwen3_0_6b', 'qwen3_4b', 'qwen3_8b', 'qwen3_32b')


def launch(name, *arguments):
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    return subprocess.run([sys.executable, ROOT / 'launch' / f'{name}.py', *map(str, arguments)], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('arg', ARGS)
@pytest.mark.parametrize('name', CONFIGS)
def test_every_configuration_builds_and_says_how_it_is_run(name, arg):
    config = cli.load_config(f'configs/{name}.py:{arg}')
    assert config.run.dir == f'runs/{name}_{arg}'
    text = (ROOT / f'configs/{name}.py').read_text()
    assert f'python launch/{name}.py --config=configs/{name}.py:tiny' in text
    assert 'Hardware:' in text


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
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    good = {'id': 'a', 'problem': 'What is 1 + 1?', 'answer': '2'}
    (folder / 'good.jsonl').write_text(json.dumps(good) + '\n')
    (folder / 'empty.jsonl').write_text('')
    (folder / 'torn.jsonl').write_text(json.dumps(good) + '\n{"problem": \n')
    (folder / 'fieldless.jsonl').write_text('{"problem": "What?"}\n')
    (folder / 'model').mkdir()
    (folder / 'odd').mkdir()
    (folder / 'odd' / 'config.json').write_text('{"model_type": "mamba"}')
    (folder / 'busy').mkdir()
    (folder / 'busy' / 'notes.txt').write_text('mine')
    return folder


TINY = '--config=configs/evaluate.py:tiny'
MISTAKES = {
    'unknown key': ([TINY, '--config.sampels=3'], ('sampels', 'samples')),
    'wrong type': ([TINY, '--config.samples=many'], ('samples', 'many')),
    'missing config file': (['--config=configs/evaluation.py:tiny'], ('configs/evaluation.py',)),
    'unknown model': (['--config=configs/evaluate.py:qwen9'], ('qwen9', 'qwen2_5_7b')),
    'no problems named': ([TINY], ('config.problems',)),
    'missing problems': ([TINY, '--config.problems={}/none.jsonl'], ('none.jsonl',)),
    'empty problems': ([TINY, '--config.problems={}/empty.jsonl'], ('empty.jsonl',)),
    'malformed line': ([TINY, '--config.problems={}/torn.jsonl'], ('torn.jsonl:2',)),
    'missing field': ([TINY, '--config.problems={}/fieldless.jsonl'], ('fieldless.jsonl:1', 'answer')),
    'no model directory': (
        ['--config=configs/evaluate.py:qwen2_5_7b', '--config.problems={}/good.jsonl'], ('model.path',)),
    'empty model directory': (
        ['--config=configs/evaluate.py:qwen2_5_7b', '--config.problems={}/good.jsonl', '--config.model.path={}/model'],
        ('config.json',)),
    'unsupported architecture': (
        ['--config=configs/evaluate.py:qwen2_5_7b', '--config.problems={}/good.jsonl', '--config.model.path={}/odd'],
        ('mamba',)),
    'mesh': ([TINY, '--config.problems={}/good.jsonl', '--config.mesh.data=3'], ('mesh', 'data=3')),
    'budget beyond the cache': (
        [TINY, '--config.problems={}/good.jsonl', '--config.turns.max_tokens=9999'], ('max_tokens', 'slots')),
    'somebody else’s folder': ([TINY, '--config.problems={}/good.jsonl', '--config.run.dir={}/busy'], ('busy',)),
}  # fmt: skip


@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_writes_nothing(case, files, tmp_path):
    arguments, words = MISTAKES[case]
    arguments = [a.replace('{}', str(files)) for a in arguments]
    if not any(a.startswith('--config.run.dir') for a in arguments) and case != 'missing config file':
        arguments.append(f'--config.run.dir={tmp_path / "run"}')
    before = sorted(map(str, files.rglob('*')))
    done = launch('evaluate', *arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[-1].startswith('error: ') and 'Traceback' not in done.stderr
    assert all(word in lines[-1] for word in words), lines[-1]
    assert not (tmp_path / 'run' / 'episodes').exists()
    assert sorted(map(str, files.rglob('*'))) == before
