"""The remote client: the pool's interface over servers that die, come back, lie or are full."""

from __future__ import annotations

import asyncio
import http.server
import json
import signal
import threading
import time

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox.http.client import Remote, RemoteSettings
from tests.sandbox.servers import Server, free_port


@pytest.fixture(scope='module')
def servers(pools):
    pools('warm')  # skips where the local pool cannot be
    started = [Server(), Server()]
    yield started
    for server in started:
        server.stop()


class Impostor(http.server.BaseHTTPRequestHandler):
    """A server that is up and wrong: `answer` says how."""

    answer: tuple[int, dict] = (500, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers['Content-Length']))
        status, reply = self.answer
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def impostor():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Impostor,), {})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _address(server: http.server.HTTPServer) -> str:
    return f'http://127.0.0.1:{server.server_address[1]}'


def test_a_server_that_would_cut_its_limits_is_not_used_and_says_so(servers):
    remote = Remote(RemoteSettings(addresses=(servers[0].address,), wall_s=90.0))
    with pytest.raises(RuntimeError, match=r"less than asked for: \{'run_timeout': 60.0\}; raise its --max_timeout_s"):
        remote.start()
    remote.close()


def test_results_are_the_pools(servers, pools):
    snippets = [
        'print(1 + 1)',
        '1 / 0',
        'import sys\nsys.exit(3)',
        'import os\nos.abort()',
        'print("x" * 10**6)',
        'x = []\nwhile True: x.append(bytearray(10**7))',
        'while True: pass',
        'import random\nprint(random.random())',
    ]
    settings = RemoteSettings(addresses=tuple(s.address for s in servers), cpu_s=1.0, wall_s=3.0, memory_mb=256)
    with Remote(settings) as remote:
        futures = [remote.submit(code, seed=5) for code in snippets]
        for code, future in zip(snippets, futures):
            there, here = future.result(120), pools('warm').submit(code, seed=5).result(120)
            assert (there.verdict, there.stdout, there.exit_code, there.signal, there.truncated) == (
                here.verdict,
                here.stdout,
                here.exit_code,
                here.signal,
                here.truncated,
            ), code
            if here.verdict is not Verdict.OUTPUT_LIMIT:
                assert there.stderr == here.stderr
        assert sum(remote.stats()['verdicts'].values()) == len(snippets)


def test_load_is_spread_and_async_run_works(servers):
    with Remote(RemoteSettings(addresses=tuple(s.address for s in servers), in_flight=4)) as remote:
        deadline = time.monotonic() + 30
        while not all(host['healthy'] for host in remote.stats()['hosts']):
            assert time.monotonic() < deadline
            time.sleep(0.05)

        async def main():
            return await asyncio.gather(*(remote.run(f'print({i})') for i in range(40)))

        assert [r.stdout for r in asyncio.run(main())] == [f'{i}\n' for i in range(40)]
        assert min(host['served'] for host in remote.stats()['hosts']) > 5


@pytest.mark.slow
def test_a_host_that_dies_and_comes_back_loses_nothing(servers):
    mortal = Server()
    settings = RemoteSettings(addresses=(servers[0].address, mortal.address), backoff_s=0.1, max_backoff_s=0.5)
    with Remote(settings) as remote:
        code = 'import time\ntime.sleep(0.05)\nprint({0})'
        first = [remote.submit(code.format(i)) for i in range(200)]
        time.sleep(0.3)
        mortal.stop(signal.SIGKILL)
        assert [f.result(120).stdout for f in first] == [f'{i}\n' for i in range(200)]
        assert [h['healthy'] for h in remote.stats()['hosts']] == [True, False]
        again = Server(port=mortal.port)
        try:
            deadline = time.monotonic() + 60
            while not remote.stats()['hosts'][1]['healthy']:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            served = remote.stats()['hosts'][1]['served']
            results = [remote.submit(code.format(i)) for i in range(20)]
            assert [f.result(120).stdout for f in results] == [f'{i}\n' for i in range(20)]
            assert remote.stats()['hosts'][1]['served'] > served
        finally:
            again.stop()


@pytest.mark.parametrize(
    'answer',
    [
        (500, {}),
        (200, {}),
        (200, {'status': 'SandboxError', 'message': 'x'}),
        (
            200,
            {
                'status': 'Success',
                'run_result': {'status': 'Finished', 'return_code': 0, 'stdout': '41\n', 'stderr': ''},
            },
        ),
        (
            200,
            {
                'status': 'Success',
                'verdict': 'ok',
                'run_result': {'status': 'Finished', 'return_code': 0, 'stdout': '794133 4999950000\n', 'stderr': ''},
            },
        ),
    ],
)
def test_a_server_that_fails_its_canary_gets_no_snippet(answer, impostor, servers):
    impostor.RequestHandlerClass.answer = answer
    with Remote(RemoteSettings(addresses=(_address(impostor), servers[0].address))) as remote:
        assert [remote.submit(f'print({i})').result(60).stdout for i in range(5)] == [f'{i}\n' for i in range(5)]
        assert remote.stats()['hosts'][0]['served'] == 0
    with (
        pytest.raises(RuntimeError, match='no server can be used'),
        Remote(RemoteSettings(addresses=(_address(impostor),))),
    ):
        pass


def test_a_server_that_turns_bad_is_left_and_its_snippets_run_elsewhere(impostor, servers):
    settings = RemoteSettings(addresses=(_address(impostor), servers[0].address), backoff_s=0.05)
    with Remote(settings) as remote:
        bad = remote.hosts[0]
        for i in range(5):
            impostor.RequestHandlerClass.answer = (503, {})
            bad.healthy = True
            assert remote.submit(f'print({i})').result(60).stdout == f'{i}\n'
        assert remote.stats()['retried'] > 0


def test_retries_have_an_end(impostor):
    remote = Remote(RemoteSettings(addresses=(_address(impostor),), retries=2, backoff_s=0.01, patience_s=0.3))
    result = remote.submit('print(1)').result(60)
    assert result.verdict is Verdict.SANDBOX_ERROR
    remote.close()


@pytest.mark.slow
def test_a_full_server_is_asked_again_later():
    server = Server('--concurrency=1', '--queue=2')
    try:
        with Remote(RemoteSettings(addresses=(server.address,), in_flight=16)) as remote:
            futures = [remote.submit(f'import time\ntime.sleep(0.02)\nprint({i})') for i in range(6)]
            assert [f.result(120).stdout for f in futures] == [f'{i}\n' for i in range(6)]
            assert remote.stats()['retried'] == 0
    finally:
        server.stop()


def test_a_wrong_token_is_said_at_once():
    server = Server(token='hush')
    try:
        with pytest.raises(RuntimeError, match='401'), Remote(RemoteSettings(addresses=(server.address,), token='x')):
            pass
        with Remote(RemoteSettings(addresses=(server.address,), token='hush')) as remote:
            assert remote.submit('print(1)').result(60).stdout == '1\n'
    finally:
        server.stop()


def test_nobody_listening_is_said_with_the_address():
    address = f'http://127.0.0.1:{free_port()}'
    with pytest.raises(RuntimeError, match=address), Remote(RemoteSettings(addresses=(address,))):
        pass


@pytest.mark.parametrize('addresses', [(), ('localhost:80',)])
def test_bad_addresses_name_the_field(addresses):
    with pytest.raises(ValueError, match=r'sandbox\.addresses'):
        RemoteSettings(addresses=addresses)


def test_a_closed_client_answers_at_once(servers):
    remote = Remote(RemoteSettings(addresses=(servers[0].address,))).start()
    future = remote.submit('import time\ntime.sleep(10)')
    time.sleep(0.2)
    remote.close()
    with pytest.raises((RuntimeError, asyncio.CancelledError)):
        future.result(10)
    with pytest.raises(RuntimeError, match='closed'):
        remote.submit('print(1)')
