"""A wheel in a fresh environment, from a folder that is not the repository: every console script does its work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = Path(sys.prefix) / 'bin' / 'uv'
SCRIPTS = (
    'rewrite', 'cold-start', 'sft', 'ppo', 'evaluate', 'demo', 'convert', 'plan', 'doctor', 'report', 'sandbox'
)  # fmt: skip
SMALL = ['--config.sandbox.zygotes=1', '--config.sampler.rows=8', '--config.run.seed=1']
STEP = [
    '--config.ppo.steps=1',
    '--config.ppo.problems_per_step=8',
    '--config.ppo.samples=2',
    '--config.turns.max_turn_tokens=32',
]


def version_of(python: str) -> str:
    """'3.12' of an interpreter, '' of what is none."""
    asked = [python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])']
    return subprocess.run(asked, text=True, capture_output=True).stdout.strip()


def interpreter(version: str, folder: Path) -> str:
    """The path of a CPython of that version: this test's, on PATH, pyenv's, uv's, or one that uv gets into a folder.

    Where there is none the test is skipped, and says which versions there are.
    """
    root = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    uv = lambda *words, **more: subprocess.run([UV, 'python', *words, version], text=True, capture_output=True, **more)
    places = [sys.executable, shutil.which(f'python{version}'), *map(str, root.glob('versions/*/bin/python3'))]
    places += [uv('find').stdout.strip()]
    there = {version_of(place): place for place in filter(None, places)}
    if version in there:
        return there[version]
    got = uv('install', env=os.environ | {'UV_PYTHON_INSTALL_DIR': str(folder)})
    for place in map(str, folder.glob('*/bin/python3')):
        if version_of(place) == version:
            return place
    why = got.stderr.partition('\n')[0]
    pytest.skip(f'no Python {version}: there are {", ".join(sorted(there))}; uv got none: {why}')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy of what git knows, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp('source')
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, text=True, capture_output=True
    )
    if not UV.exists() or listed.returncode:
        pytest.skip('a wheel is built by uv from what git lists')
    for name in listed.stdout.split('\n'):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run([UV, 'build', '--wheel', '-q', '-o', folder / 'dist', folder], check=True)
    (built,) = (folder / 'dist').glob('*.whl')
    return built


@pytest.fixture(scope='module', params=['3.12', '3.13'])
def environment(request, wheel, tmp_path_factory):
    """The bin/ of an environment that holds the wheel with its extra `server`, at the pinned versions."""
    folder = tmp_path_factory.mktemp('environment') / 'env'
    python = interpreter(request.param, tmp_path_factory.mktemp('pythons'))
    subprocess.run([UV, 'venv', '-q', '--python', python, folder], check=True)
    subprocess.run(
        [
            UV,
            'pip',
            'install',
            '-q',
            '--python',
            folder / 'bin' / 'python',
            '-c',
            ROOT / 'requirements.lock',
            f'{wheel}[server]',
        ],
        check=True,
    )
    return folder / 'bin'


@pytest.fixture(scope='module')
def call(environment, tmp_path_factory):
    """Runs a console script in a folder of its own that all calls share."""
    folder = tmp_path_factory.mktemp('elsewhere')
    env = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'XLA_FLAGS')}

    def run(script: str, *arguments: object, status: int = 0) -> str:
        done = subprocess.run(
            [environment / f'retool-{script}', *map(str, arguments)],
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=600,
            env=env | {'JAX_PLATFORMS': 'cpu'},
        )
        assert done.returncode == status, f'{script}: {done.returncode}\n{done.stdout}\n{done.stderr}'
        return done.stdout + done.stderr

    run.folder, run.bin, run.env = folder, environment, env
    return run


@pytest.mark.slow
def test_nothing_but_the_package_enters_site_packages(call):
    site = next((call.bin.parent / 'lib').glob('python3*')) / 'site-packages'
    assert {path.name for path in site.glob('*') if path.name in ('configs', 'launch', 'tests', 'docs')} == set()
    assert (site / 'retool_jax/_configs/ppo.py').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('script', SCRIPTS)
def test_every_script_prints_its_help(call, script):
    text = call(script, '--help')
    assert 'Traceback' not in text and len(text.splitlines()) >= 3
    if script not in ('doctor', 'report'):
        assert '--' in text


@pytest.mark.slow
def test_the_stages_follow_each_other(call):
    (call.folder / 'worked.jsonl').write_text(
        '{"question": "What are 17 times 23?", "answer": "17*23 = 391, so it is 391.\\n#### 391"}\n'
    )
    worked = ('--config.traces=worked.jsonl', '--config.rewriter.kind=calculator', '--config.max_tokens=1000')
    call('rewrite', '--config=configs/rewrite.py:tiny', *worked, *SMALL[:1])
    assert '17 * 23' in (call.folder / 'runs/rewrite_tiny/kept.jsonl').read_text()
    call('cold-start', '--config=configs/cold_start.py:tiny', '--config.problems=60', *SMALL[:1])
    assert (call.folder / 'runs/cold_start_tiny/episodes').is_dir()
    call('sft', '--config=configs/sft.py:tiny', '--config.traces=runs/cold_start_tiny/episodes', '--config.sft.steps=2')
    final = 'runs/sft_tiny/final'
    assert (call.folder / final / 'model.safetensors').is_file()
    call('ppo', '--config=configs/ppo.py:tiny', f'--config.model.path={final}', *SMALL, *STEP)
    (call.folder / 'sums.jsonl').write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    call(
        'evaluate',
        '--config=configs/evaluate.py:tiny',
        '--config.problems=sums.jsonl',
        '--config.samples=2',
        f'--config.model.path={final}',
        '--config.turns.max_turn_tokens=32',
        *SMALL,
    )
    summary = json.loads((call.folder / 'runs/evaluate_tiny/summary.json').read_text())
    assert summary['sums']['problems'] == 1 and summary['sums']['k'] == 2
    assert 'written' in call('convert', '--to=orbax', f'--source={final}', '--target=converted')
    assert 'report.html' in call('report', 'runs/ppo_tiny')
    assert (call.folder / 'runs/ppo_tiny/report.html').is_file()
    line = call('sft', '--config=configs/sft.py:tiny', '--config.traces=nowhere', status=2)
    assert line.startswith('error: ') and 'nowhere' in line


@pytest.mark.slow
def test_the_demo_is_told_to_its_end(call):
    sizes = {
        'recipe.problems_seen': 120,
        'recipe.sft_steps': 4,
        'recipe.lead_steps': 2,
        'text.lead_steps': 2,
        'recipe.problems': 12,
        'recipe.apart_problems': 12,
        'recipe.samples': 1,
    }
    call('demo', *(f'--config.{key}={value}' for key, value in sizes.items()), *SMALL, *STEP)
    assert (call.folder / 'runs/demo_tiny/report.html').is_file()


@pytest.mark.slow
def test_a_configuration_of_the_folder_goes_before_that_of_the_package_and_may_build_on_it(call):
    (call.folder / 'configs').mkdir()
    (call.folder / 'configs' / 'mine.py').write_text(
        'from configs import base\n\ndef get_config(arg):\n    config = base.reinforcement(arg, "mine")\n'
        '    config.ppo.steps = 7\n    return config\n'
    )
    assert '--config.ppo.steps=7 ' in call('ppo', '--config=configs/mine.py:tiny', '--help')
    assert '--config.ppo.steps=20 ' in call('ppo', '--config=configs/ppo.py:tiny', '--help')
    shutil.rmtree(call.folder / 'configs')


@pytest.mark.slow
def test_a_plan_and_the_doctor_answer(call):
    plan = json.loads(call('plan', '--config=configs/ppo.py:tiny', '--topology=h100:8', '--json').splitlines()[-1])
    assert plan['fits'] and plan['chips'] == 8
    done = subprocess.run([call.bin / 'retool-doctor'], cwd=call.folder, env=call.env, text=True, capture_output=True)
    assert done.returncode in (0, 1) and 'snippets run isolated' in done.stdout


@pytest.mark.slow
def test_the_sandbox_serves_until_it_is_told_to_stop(call):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [call.bin / 'retool-sandbox', f'--port={port}', '--zygotes=1'],
        cwd=call.folder,
        env=call.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    request = urllib.request.Request(
        f'http://127.0.0.1:{port}/run_code',
        headers={'Content-Type': 'application/json'},
        data=json.dumps({'code': 'print(6 * 7)', 'language': 'python'}).encode(),
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.load(answer)
            break
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.2)
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=60)
    assert found['run_result']['stdout'] == '42\n' and server.returncode in (0, 143)
