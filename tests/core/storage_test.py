"""What is in a store is read as a file is, and what the store refuses is one line."""

from __future__ import annotations

import errno
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from retool_jax.core import storage
from retool_jax.core.errors import UserError
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


def test_what_is_read_comes_here_once_and_a_path_is_returned_as_it_is(address):
    fs, root = fsspec.url_to_fs(address)
    fs.pipe({f'{root}/set/a.jsonl': b'1', f'{root}/set/data/b.jsonl': b'2', f'{root}/set/c.safetensors': b'3'})
    assert storage.local('problems', 'a/b') == Path('a/b')
    assert storage.local('problems', f'{address}/set/a.jsonl').read_bytes() == b'1'
    assert storage.local('problems', f'{address}/set/a.jsonl').name == 'a.jsonl'
    assert set(content(storage.local('problems', f'{address}/set'))) == {'a.jsonl', 'data/b.jsonl', 'c.safetensors'}
    assert set(content(storage.model_files('model.path', f'{address}/set'))) == {'a.jsonl', 'data/b.jsonl'}
    fs.rm(f'{root}/set', recursive=True)
    assert storage.local('problems', f'{address}/set/a.jsonl').read_bytes() == b'1'
    with pytest.raises(UserError, match=rf"problems='{address}/none': there is no such bucket or object"):
        storage.local('problems', f'{address}/none')


def test_a_range_is_read_in_pieces_that_meet(address, monkeypatch):
    monkeypatch.setattr(storage, 'PIECE', 7)
    monkeypatch.setattr(storage, 'PIECES', 2)
    data = np.arange(100, dtype=np.uint8)
    fsspec.url_to_fs(address)[0].pipe_file(f'{address}/x', data.tobytes())
    for start, size in ((0, 100), (3, 41), (99, 1), (5, 0), (0, 14)):
        assert (storage.read_range(f'{address}/x', start, size) == data[start : start + size]).all()


class Refusing(BaseHTTPRequestHandler):
    """Forbids everything."""

    def do_GET(self):
        body = b'{"error": {"code": 403, "message": "no access"}}'
        self.send_response(403)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused):
        pass


def test_a_store_that_forbids_is_one_line_with_the_way_to_log_in(monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in buckets.environment(f'http://127.0.0.1:{server.server_port}').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"run.dir='gs://closed/run': the store forbids it .*; log in \(gcloud auth"):
        storage.reach('run.dir', 'gs://closed/run')
    server.shutdown()
    server.server_close()


def test_a_store_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(storage, 'PATIENCE_S', 0.5)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        for name, value in buckets.environment(f'http://127.0.0.1:{silent.getsockname()[1]}').items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            UserError, match=r"model.path='gs://silent/m': the store does not answer within 0.5 s; check"
        ):
            storage.reach('model.path', 'gs://silent/m')


def test_a_bucket_that_is_not_there_and_a_missing_package_are_told_with_the_remedy(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"run.dir='gs://nobody/run': there is no such bucket or object .*; make it"):
        storage.reach('run.dir', 'gs://nobody/run')
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    sys.modules['fsspec.registry']._registry.pop('gs', None)
    with pytest.raises(UserError, match=r"x='gs://bucket/new': gs:// needs .* pip install 'retool_jax\[gcs\]'"):
        storage.reach('x', 'gs://bucket/new')


def test_mistakes_of_ours_and_errors_of_paths_stay_what_they_are():
    with pytest.raises(KeyError), storage.told('run.dir', 'gs://bucket/run'):
        raise KeyError('ours')
    with pytest.raises(OSError, match='disk'), storage.told('run.dir', 'runs/a'):
        raise OSError('disk')
    with pytest.raises(OSError, match='No space left'), storage.told('run.dir', 'gs://bucket/run'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    line = "run.dir='gs://b/r': the store fails: OSError: torn; start the same"
    with pytest.raises(UserError, match=line), storage.told('run.dir', 'gs://b/r'):
        raise OSError('torn')
