"""A run's folder has one owner at a time, and a dead one stands in nobody's way; on a disk and in a store."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from ml_collections import ConfigDict

from retool_jax.core.errors import UserError
from retool_jax.stages import folder, owner
from retool_jax.stages.owner import Claim, Owner
from tests import buckets

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from retool_jax.stages.owner import Claim, Owner
held = Claim(sys.argv[1]) if '://' in sys.argv[1] else Owner(Path(sys.argv[1]))
print('held', flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns `tmp_path`."""
    child = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert child.stdout.readline() == 'held\n'
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def write_owner(directory, **fields):
    (directory / owner.NAME).write_text(json.dumps({'host': 'elsewhere', 'pid': 7, 'started': '1'} | fields))


def test_a_second_run_is_refused_with_the_first_one_s_host_and_process(tmp_path, holder):
    before = (tmp_path / owner.NAME).read_bytes()
    with pytest.raises(UserError, match=rf'in use by process {holder.pid} on {socket.gethostname()}; stop that run'):
        Owner(tmp_path)
    assert (tmp_path / owner.NAME).read_bytes() == before


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_run_s_folder_is_taken_over_at_once(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    taken = Owner(tmp_path)
    assert json.loads((tmp_path / owner.NAME).read_text())['pid'] == os.getpid()
    taken.close()
    assert not (tmp_path / owner.NAME).exists()


def test_the_second_run_leaves_the_first_one_s_fresh_folder_alone(tmp_path, holder):
    config = ConfigDict({'run': {'dir': str(tmp_path)}})
    with pytest.raises(UserError, match='in use by process'), folder.claimed(config):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [owner.NAME]


def test_a_run_of_another_host_is_believed_while_its_heart_beats(tmp_path):
    write_owner(tmp_path)
    with pytest.raises(UserError, match='in use by process 7 on elsewhere'):
        Owner(tmp_path)
    stopped = os.stat(tmp_path / owner.NAME).st_mtime - 2 * owner.STALE_S
    os.utime(tmp_path / owner.NAME, (stopped, stopped))
    Owner(tmp_path).close()


def test_a_run_begun_anew_on_another_host_waits_for_the_lost_one_s_heartbeat_to_grow_old(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(owner, 'POLL_S', 0.1)
    write_owner(tmp_path)
    last = time.time() - owner.STALE_S + 1.5
    os.utime(tmp_path / owner.NAME, (last, last))
    with folder.claimed(ConfigDict({'run': {'dir': str(tmp_path)}})):
        assert json.loads((tmp_path / owner.NAME).read_text())['pid'] == os.getpid()
    line = f"run.dir='{tmp_path}' is in use by process 7 on elsewhere; waiting to see whether that still runs\n"
    assert capfd.readouterr().err == line


def test_a_run_of_another_host_that_gives_a_sign_refuses_the_second_one(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, 'POLL_S', 0.1)
    write_owner(tmp_path)
    last = time.time() - 20
    os.utime(tmp_path / owner.NAME, (last, last))
    beat = threading.Timer(0.5, lambda: os.utime(tmp_path / owner.NAME))
    beat.start()
    with (
        pytest.raises(UserError, match='in use by process 7 on elsewhere; stop that run'),
        folder.claimed(ConfigDict({'run': {'dir': str(tmp_path)}})),
    ):
        pass
    beat.join()


def test_one_that_keeps_its_lock_on_another_host_is_waited_for_no_longer_than_patience_lasts(
    tmp_path, holder, monkeypatch
):
    monkeypatch.setattr(owner, 'PATIENCE_S', 0.3)
    monkeypatch.setattr(owner, 'POLL_S', 0.1)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'here')
    holder.send_signal(signal.SIGSTOP)
    calls = []

    def take():
        calls.append(time.monotonic())
        Owner(tmp_path)

    with pytest.raises(UserError, match=f'in use by process {holder.pid} on'):
        owner.patiently(take)
    assert len(calls) > 2


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path):
    write_owner(tmp_path, host=socket.gethostname(), pid=os.getppid(), started='1')
    Owner(tmp_path).close()
    write_owner(tmp_path, host=socket.gethostname(), pid=os.getppid(), started=owner._started(os.getppid()))
    with pytest.raises(UserError, match=f'process {os.getppid()} on'):
        Owner(tmp_path)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{}'])
def test_a_damaged_file_is_no_owner(tmp_path, text):
    (tmp_path / owner.NAME).write_text(text)
    Owner(tmp_path).close()


def test_without_locks_the_process_is_looked_for(tmp_path, holder, monkeypatch):
    def unsupported(*arguments):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(fcntl, 'flock', unsupported)
    with pytest.raises(UserError, match=f'process {holder.pid} on'):
        Owner(tmp_path)
    holder.kill()
    holder.wait()
    Owner(tmp_path).close()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, 'BEAT_S', 0.01)
    held = Owner(tmp_path)
    os.utime(tmp_path / owner.NAME, (0, 0))
    while os.stat(tmp_path / owner.NAME).st_mtime == 0:
        pass
    held.close()


def test_one_process_may_own_a_folder_again_and_again(tmp_path):
    config = ConfigDict({'run': {'dir': str(tmp_path / 'run')}})
    for _ in range(3):
        with folder.claimed(config) as directory:
            assert (directory / owner.NAME).exists()
        assert [path.name for path in directory.iterdir()] == ['config.json']


@pytest.fixture(scope='module')
def bucket():
    with buckets.served():
        yield f'gs://{buckets.BUCKET}'


@pytest.fixture
def address(bucket, tmp_path):
    """A folder of a store, of a name of its own."""
    return f'{bucket}/{tmp_path.name}'


@pytest.fixture
def claimer(address):
    """Another process that owns `address`."""
    child = subprocess.Popen([sys.executable, '-c', HOLD, address], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert child.stdout.readline() == 'held\n'
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def put_owner(address, **fields):
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False)
    fs.pipe_file(f'{root}/{owner.NAME}', json.dumps({'host': 'elsewhere', 'pid': 7, 'started': '1'} | fields).encode())


def test_in_a_store_too_a_second_run_is_refused_and_a_dead_one_s_folder_is_taken_over(address, claimer):
    before = buckets.files(address)
    line = rf"run.dir='{address}' is in use by process {claimer.pid} on {socket.gethostname()}, heard of \d s ago; stop"
    with pytest.raises(UserError, match=line):
        Claim(address)
    assert buckets.files(address) == before and list(before) == [owner.NAME]
    claimer.kill()
    claimer.wait()
    taken = Claim(address)
    assert json.loads(buckets.files(address)[owner.NAME])['pid'] == os.getpid()
    taken.close()
    assert buckets.files(address) == {}


def test_in_a_store_a_run_of_another_host_is_believed_while_its_heart_beats(address, monkeypatch):
    put_owner(address)
    with pytest.raises(UserError, match=r'in use by process 7 on elsewhere, heard of \d s ago'):
        Claim(address)
    monkeypatch.setattr(owner, 'STALE_S', 0.0)
    Claim(address).close()
    monkeypatch.undo()
    monkeypatch.setattr(owner, 'BEAT_S', 0.01)
    held = Claim(address)
    while owner.BEAT not in buckets.files(address):
        time.sleep(0.01)
    held.close()
    assert buckets.files(address) == {}


def test_in_a_store_a_run_begun_anew_on_another_host_waits_too(address, monkeypatch, capfd):
    put_owner(address)
    monkeypatch.setattr(owner, 'STALE_S', 2.0)
    taken = []
    owner.patiently(lambda: taken.append(Claim(address)))
    taken[0].close()
    assert 'waiting to see whether that still runs' in capfd.readouterr().err
    put_owner(address)
    monkeypatch.undo()
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False)
    beat = threading.Timer(1.5, lambda: fs.pipe_file(f'{root}/{owner.BEAT}', b''))
    beat.start()
    with pytest.raises(UserError, match='in use by process 7 on elsewhere'):
        owner.patiently(lambda: taken.append(Claim(address)))
    beat.join()


def test_in_a_store_a_damaged_object_is_no_owner(address):
    fs, root = fsspec.url_to_fs(address)
    for text in (b'', b'{', b'[]', b'null', b'{}'):
        fs.pipe_file(f'{root}/{owner.NAME}', text)
        Claim(address).close()


def test_a_run_whose_folder_was_taken_over_hears_of_it_and_leaves_the_other_s_claim(address):
    held = Claim(address)
    assert owner.check(address, held.token)
    put_owner(address, token='another')
    with pytest.raises(UserError, match='was taken over by process 7 on elsewhere; this run ends'):
        owner.check(address, held.token, leads=False)
    held.close()
    assert json.loads(buckets.files(address)[owner.NAME])['token'] == 'another'
    fsspec.url_to_fs(address)[0].rm_file(f'{address}/{owner.NAME}')
    with pytest.raises(UserError, match='was taken over or removed'):
        owner.check(address, held.token)


def test_who_does_not_lead_writes_after_the_folder_was_given_free_where_the_run_has_left_a_trace(address):
    held = Claim(address)
    assert owner.check(address, held.token, leads=False)
    held.close()
    assert not owner.check(address, held.token, leads=False)
    fsspec.url_to_fs(address)[0].pipe_file(f'{address}/config.json', b'{}')
    assert owner.check(address, held.token, leads=False)


def test_of_two_that_begin_at_once_the_store_lets_one_in(address):
    claims = [subprocess.Popen([sys.executable, '-c', HOLD, address], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE) for _ in range(2)]  # fmt: skip
    ended = []
    while not ended:
        ended = [child for child in claims if child.poll() is not None]
        time.sleep(0.05)
    (loser,) = ended
    line = loser.stderr.read()
    assert 'is in use by process' in line, line
    (winner,) = [child for child in claims if child is not loser]
    assert winner.stdout.readline() == 'held\n'
    winner.kill()
    for child in claims:
        child.communicate()
