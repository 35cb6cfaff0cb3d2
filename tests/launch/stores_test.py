"""Runs whose folder, model and data are in a bucket: killed anywhere they end as undisturbed ones on a disk do."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from retool_jax.core import cli, metrics, mirror, settings
from retool_jax.core.cli import ROOT
from retool_jax.stages import parts, sft
from retool_jax.stages.config import FineTuning
from tests import buckets, several
from tests.launch import stops_test
from tests.train import killable, resume_test, small

SEED, DEATHS = '0 2 False', 4


@pytest.fixture(scope='module')
def bucket():
    with buckets.served():
        yield f'gs://{buckets.BUCKET}'


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A model with problems, and what an undisturbed run on a disk left there; its episodes get two quanta a step."""
    folder = tmp_path_factory.mktemp('world') / 'files'
    killable.make_model(folder)
    return resume_test.World(folder, 2, resume_test.finish(folder, 'whole', 2), [])


@pytest.mark.slow
def test_ppo_killed_at_four_moments_ends_in_a_bucket_as_undisturbed_on_a_disk(world, bucket):
    rng, moments = random.Random(SEED), killable.Moments()
    calm = resume_test.finish(world.folder, 'calm', world.quanta, moments, address=f'{bucket}/calm')
    assert calm[1:] == world.whole[1:]
    kinds = sorted(set(moments.log))
    assert {'before upload', 'after upload', 'before removal', 'after removal', 'inside journal'} <= set(kinds)
    killed = runs = 0
    while killed < DEATHS:
        name, address, what = f'run{runs}', f'{bucket}/run{runs}', rng.choice(kinds)
        number = rng.randrange(1 + moments.log.count(what) // killable.STEPS)  # a life makes one step at least
        done = resume_test.live(world, name, f'--at={what}:{number}', f'--dir={address}')
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        killed += done.returncode != 0
        if done.returncode == 0 or killed == DEATHS:
            resume_test.assert_ends_alike(world, name, address)
            assert_the_same_files(world.folder / 'whole', buckets.files(address))
            assert not mirror.working_folder(address, 0).exists()
            runs += 1


def assert_the_same_files(whole: Path, there: dict[str, bytes]) -> None:
    """By name, but for those with clocks or digests in their names; by content where no clock is in it."""
    ours = lambda names: {n for n in names if n.partition('/')[0] not in ('checkpoints', 'tensorboard', 'carried')}
    local = ours(str(path.relative_to(whole)) for path in whole.rglob('*') if path.is_file())
    assert ours(there) == local
    for name in local:
        if name.startswith(('episodes/', 'final/model')):
            assert there[name] == (whole / name).read_bytes(), name


def copied(address: str, directory: Path) -> Path:
    """A folder of the bucket on this disk."""
    fsspec.url_to_fs(address, use_listings_cache=False)[0].get(f'{address}/', str(directory), recursive=True)
    return directory


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores') / 'files'
    killable.make_model(folder)
    killable.make_traces(folder)
    return folder


@pytest.mark.slow
def test_fine_tuning_of_two_processes_that_are_killed_goes_on_in_a_bucket(files, bucket, tmp_path):
    address = f'{bucket}/sft_2'
    flags = [flag.replace(f'={files}/there', f'={address}') for flag in stops_test.command(files, 'sft', 'there')]
    with several.started(2, flags, devices=4) as (children, read):
        while 'metrics.jsonl' not in buckets.files(address):
            assert [child.poll() for child in children] == [None, None], read()
            time.sleep(0.1)
        for child in children:
            child.kill()
        statuses = [child.wait(stops_test.ENDS_S) for child in children]
        # JAX ends the second by itself, which may be quicker than its own signal.
        assert statuses[0] == -signal.SIGKILL and statuses[1] in (-signal.SIGKILL, -signal.SIGABRT), read()
    several.run(2, flags, devices=4)
    several.run(2, stops_test.command(files, 'sft', 'whole'), devices=4)
    assert stops_test.result(copied(address, tmp_path / 'copy')) == stops_test.result(files / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['ppo', 'evaluate'])
def test_a_run_of_two_processes_that_is_stopped_goes_on_from_the_bucket_alone(
    files, bucket, tmp_path, monkeypatch, kind
):
    """As on other hosts, which have no working copy of its folder."""
    address = f'{bucket}/{kind}_stopped'
    flags = [flag.replace(f'={files}/there', f'={address}') for flag in stops_test.command(files, kind, 'there')]
    with several.started(2, flags, devices=4) as (children, read):
        while 'processes  2' not in read()[0]:  # then all is compiled, and episodes are made
            assert [child.poll() for child in children] == [None, None], read()
            time.sleep(0.02)
        time.sleep(0.3)
        children[0].send_signal(signal.SIGTERM)
        statuses = [child.wait(stops_test.ENDS_S) for child in children]
        stops_test.check(statuses, read(), signal.SIGTERM, [0])
    (tmp_path / 'scratch').mkdir()
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'scratch'))
    several.run(2, flags, devices=4)
    assert not list((tmp_path / 'scratch').rglob('*.jsonl*'))
    several.run(2, stops_test.command(files, kind, f'whole_{kind}'), devices=4)
    assert stops_test.result(copied(address, tmp_path / 'copy')) == stops_test.result(files / f'whole_{kind}')


@pytest.mark.slow
def test_a_cold_start_writes_into_a_bucket_what_it_writes_on_a_disk(bucket, tmp_path):
    for directory in (tmp_path / 'cold', f'{bucket}/cold'):
        done = subprocess.run(
            [sys.executable, 'launch/cold_start.py', '--config=configs/cold_start.py:tiny',
             '--config.problems=20', f'--config.run.dir={directory}'],
            cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    there, disk = buckets.files(f'{bucket}/cold'), tmp_path / 'cold'
    names = {str(path.relative_to(disk)) for path in disk.rglob('*') if path.is_file()}
    assert set(there) == names and any(name.startswith('episodes/') for name in names)
    for name in names - {'config.json', 'report.html'}:  # which name the place
        assert there[name] == (disk / name).read_bytes(), name


def tune(files: Path, place: str, directory: str) -> None:
    """A short fine-tuning of what lies below `place`, within this process."""
    values = stops_test.SFT | {'sft.steps': 2, 'traces': f'{place}/traces', 'model.path': f'{place}/model'}
    flags = [f'--config.{key}={value}' for key, value in (values | {'run.dir': directory}).items()]
    stage = settings.build(FineTuning, cli.parse_config(['sft', '--config=configs/sft.py:tiny', *flags]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, 'make_mesh', lambda sizes: small.one_device())
        sft.run(stage)


@pytest.mark.slow
def test_a_model_and_its_data_come_from_a_bucket_and_what_is_made_of_them_goes_there(files, bucket, tmp_path):
    fs, _ = fsspec.url_to_fs(bucket)
    fs.put(f'{files}/', f'{buckets.BUCKET}/inputs', recursive=True)
    tune(files, str(files), str(tmp_path / 'sft'))
    tune(files, f'{bucket}/inputs', f'{bucket}/sft')
    weights = (tmp_path / 'sft' / 'final' / 'model.safetensors').read_bytes()
    there = buckets.files(f'{bucket}/sft')
    assert there['final/model.safetensors'] == weights
    assert [line['sft/loss'] for line in metrics.read(copied(f'{bucket}/sft', tmp_path / 'copy'))] == [
        line['sft/loss'] for line in metrics.read(tmp_path / 'sft')
    ]
    done = subprocess.run(
        [sys.executable, '-m', 'retool_jax.report', f'{bucket}/sft'],
        cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, f'{bucket}/sft/report.html'), done.stderr
    assert {n: d for n, d in buckets.files(f'{bucket}/sft').items() if n != 'report.html'} == there


def test_a_bucket_that_is_not_there_is_one_line_and_nothing_is_written(files, bucket, tmp_path):
    address = 'gs://nobodys/thing'
    values = stops_test.RL | {'model.path': files / 'model', 'run.dir': address}
    flags = [f'--config.{name}={value}' for name, value in values.items()]
    env = os.environ | {'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path / 'scratch')}
    (tmp_path / 'scratch').mkdir()
    done = subprocess.run(
        [sys.executable, 'launch/ppo.py', '--config=configs/ppo.py:tiny', *flags],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith(f"error: run.dir='{address}': there is no such bucket"), done.stderr
    assert 'make it, or correct the address' in line and 'Traceback' not in done.stderr
    assert not list((tmp_path / 'scratch').iterdir())
