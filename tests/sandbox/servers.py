"""Starts the real server as a child process, and speaks to it with the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Server:
    """launch/sandbox_server.py on loopback."""

    def __init__(self, *flags: str, port: int = 0, token: str = ''):
        self.port = port or free_port()
        self.token = token
        self.process = subprocess.Popen(
            [sys.executable, 'launch/sandbox_server.py', f'--port={self.port}', '--zygotes=1', *flags],
            cwd=ROOT,
            env={**os.environ, 'RETOOL_SANDBOX_TOKEN': token},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.stderr.read()
            with contextlib.suppress(OSError):
                if self.request('GET', '/v1/ping')[1] == b'"pong"':
                    return
            time.sleep(0.1)

    @property
    def address(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """(status, body, headers) of one request on a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection('127.0.0.1', self.port, timeout=120)) as connection:
            given = {'Authorization': f'Bearer {self.token}'.encode()} if self.token else {}
            connection.request(method, path, body, given | (headers or {}))
            response = connection.getresponse()
            return response.status, response.read(), response.headers

    def run(self, code: str, **fields) -> dict:
        """The reply of /run_code, which must have status 200."""
        status, body, _ = self.request(
            'POST', '/run_code', json.dumps({'code': code, 'language': 'python', **fields}).encode()
        )
        assert status == 200, body
        return json.loads(body)

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Ends the process and returns what it logged."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        _, log = self.process.communicate(timeout=90)
        return log
