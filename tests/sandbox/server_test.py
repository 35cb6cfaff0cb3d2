"""The server: SandboxFusion's schema, refusals, drain, and many clients at once."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import threading
import time

import pytest

from retool_jax.sandbox.server import ServerSettings
from tests.sandbox.conftest import children_of
from tests.sandbox.servers import Server


@pytest.fixture(scope='module')
def server(pools):
    pools('warm')  # skips where the local pool cannot be
    server = Server('--concurrency=4')
    yield server
    server.stop()


@pytest.mark.parametrize(
    'code, fields, status, run_status, return_code, stdout, verdict',
    [
        ('print(1 + 1)', {}, 'Success', 'Finished', 0, '2\n', 'ok'),
        ('print(1)\n1 / 0', {}, 'Failed', 'Finished', 1, '1\n', 'error'),
        ('import sys\nsys.exit(137)', {}, 'Failed', 'Finished', 137, '', 'error'),
        ('import os\nos.abort()', {}, 'Failed', 'Finished', -11, '', 'signal'),
        (
            'print(7, flush=True)\nx = []\nwhile True: x.append(bytearray(b"1" * 10**6))',
            {'memory_limit_MB': 64},
            'Failed',
            'Finished',
            -9,
            '7\n',
            'oom',
        ),
        (
            'import time\nprint(5)\ntime.sleep(60)',
            {'run_timeout': 1},
            'Failed',
            'TimeLimitExceeded',
            None,
            '5\n',
            'timeout',
        ),
        (
            'while True: pass',
            {'run_timeout': 60, 'cpu_timeout': 0.2},
            'Failed',
            'TimeLimitExceeded',
            None,
            '',
            'timeout',
        ),
        ('print(input())', {'stdin': 'x\ny\n'}, 'Success', 'Finished', 0, 'x\n', 'ok'),
        ('print(1)', {'stdin': None, 'unknown_key': 3}, 'Success', 'Finished', 0, '1\n', 'ok'),
        ('print("🦀\\0")', {}, 'Success', 'Finished', 0, '🦀\0\n', 'ok'),
        ('', {}, 'Success', 'Finished', 0, '', 'ok'),
        ('print("\ud800")', {}, 'Failed', 'Finished', 1, '', 'error'),
    ],
)
def test_every_ending_in_the_schemas_words(code, fields, status, run_status, return_code, stdout, verdict, server):
    reply = server.run(code, **fields)
    run = reply['run_result']
    assert (reply['status'], run['status'], run['return_code'], run['stdout'], reply['verdict']) == (
        status,
        run_status,
        return_code,
        stdout,
        verdict,
    ), reply
    assert isinstance(run['stderr'], str) and run['execution_time'] >= 0 and reply['compile_result'] is None
    assert {'message', 'executor_pod_name', 'files', 'truncated', 'cpu_time', 'peak_mb'} <= reply.keys()


def test_files_go_in_and_come_out(server):
    reply = server.run(
        'open("b", "w").write(open("d/a").read() + "!")',
        files={'d/a': base64.b64encode(b'hi').decode()},
        fetch_files=['b', 'missing'],
    )
    assert {k: base64.b64decode(v) for k, v in reply['files'].items()} == {'b': b'hi!'}


@pytest.mark.parametrize(
    'body, word',
    [
        (b'{"language": "python"}', 'code'),
        (b'{"code": 1, "language": "python"}', 'code'),
        (b'{"code": null}', 'code'),
        (b'{', 'JSON'),
        (b'[]', 'body'),
        (b'\xff', 'JSON'),
        (b'', 'JSON'),
        (b'[' * 100_000, 'JSON'),
        (b'{"code": "", "language": "cobol"}', 'python'),
        (b'{"code": "", "run_timeout": -1}', 'run_timeout'),
        (b'{"code": "", "run_timeout": NaN}', 'run_timeout'),
        (b'{"code": "", "files": {"a": "@"}}', 'base64'),
    ],
)
def test_bad_bodies_are_answered_422_with_the_field(body, word, server):
    status, answer, _ = server.request('POST', '/run_code', body)
    assert status == 422 and word in json.loads(answer)['detail'], answer


def test_other_refusals(server):
    assert server.request('POST', '/run_code', b' ' * (33 << 20))[0] == 413
    assert server.request('GET', '/run_code')[0] == 405
    assert server.request('GET', '/nothing')[0] == 404


def test_metrics_count_by_verdict(server):
    server.run('1 / 0')
    text = server.request('GET', '/metrics')[1].decode()
    assert 'sandbox_runs_total{verdict="error"}' in text and 'sandbox_run_seconds_bucket' in text
    assert 'sandbox_refused_total{status="422"}' in text and 'sandbox_waiting 0.0' in text


def call_like_verl(address: str, code: str, stdin: str, timeout: int) -> dict:
    """A request as verl's reward client sends it, and the fields it reads from the answer."""
    payload = json.dumps(
        {
            'compile_timeout': timeout,
            'run_timeout': timeout,
            'code': code,
            'stdin': stdin,
            'memory_limit_MB': 1024,
            'language': 'python',
            'files': {},
            'fetch_files': [],
        }
    )
    host, port = address.removeprefix('http://').split(':')
    connection = http.client.HTTPConnection(host, int(port), timeout=2 * timeout + 10)
    connection.request('POST', '/run_code', payload, {'Content-Type': 'application/json', 'Accept': 'application/json'})
    response = connection.getresponse()
    reply = json.loads(response.read())
    connection.close()
    assert response.status == 200
    compiled, run = reply.get('compile_result'), reply.get('run_result')
    seen = {'api_status': reply.get('status'), 'compiled': compiled}
    if run:
        seen |= {
            'run_status': run.get('status'),
            'stdout': run.get('stdout'),
            'exit_code': run.get('return_code'),
            'duration': run.get('execution_time'),
            'stderr': run.get('stderr'),
        }
    return seen


@pytest.mark.parametrize(
    'code, expected',
    [
        (
            'print(int(input()) * 2)',
            {'api_status': 'Success', 'run_status': 'Finished', 'stdout': '42\n', 'exit_code': 0},
        ),
        ('raise ValueError("no")', {'api_status': 'Failed', 'run_status': 'Finished', 'stdout': '', 'exit_code': 1}),
        (
            'print("a")\nwhile True: pass',
            {'api_status': 'Failed', 'run_status': 'TimeLimitExceeded', 'stdout': 'a\n', 'exit_code': None},
        ),
    ],
)
def test_verls_way_of_asking_works(code, expected, server):
    seen = call_like_verl(server.address, code, '21\n', 2)
    assert seen | expected == seen and seen['compiled'] is None


def test_a_client_that_leaves_ends_its_snippet(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
    idle = len(children_of(server.process.pid))
    body = {
        'code': 'import os\nfor _ in range(20):\n    if os.fork() == 0: break\nwhile True: pass',
        'language': 'python',
        'run_timeout': 60,
    }
    connection.request('POST', '/run_code', json.dumps(body))
    deadline = time.monotonic() + 30
    while len(children_of(server.process.pid)) < idle + 20:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    connection.close()
    while len(children_of(server.process.pid)) > idle:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_queue_answers_429_with_retry_after():
    server = Server('--concurrency=1', '--queue=1')
    try:
        slow = threading.Thread(target=server.run, args=('import time\ntime.sleep(2)',))
        slow.start()
        deadline = time.monotonic() + 30
        while b'sandbox_waiting 1.0' not in server.request('GET', '/metrics')[1]:
            assert time.monotonic() < deadline
        body = json.dumps({'code': 'print(1)', 'language': 'python'}).encode()
        status, _, headers = server.request('POST', '/run_code', body)
        assert status == 429
        assert float(headers['Retry-After']) > 0
        slow.join()
        assert server.run('print(1)')['status'] == 'Success'
    finally:
        server.stop()


def test_with_a_token_nothing_runs_without_it():
    server = Server(token='hush')
    try:
        body = json.dumps({'code': 'print(1)', 'language': 'python'}).encode()
        for given in (
            {'Authorization': 'Bearer wrong'},
            {'Authorization': ''},
            {'Authorization': 'Bearer hüsh'.encode()},
        ):
            assert server.request('POST', '/run_code', body, given)[0] == 401
        assert server.request('GET', '/metrics', None, {'Authorization': ''})[0] == 401
        assert server.run('print(1)')['status'] == 'Success'
    finally:
        server.stop()


@pytest.mark.parametrize('host', ['0.0.0.0', '::', '10.0.0.1', 'example.org'])
def test_addresses_that_others_reach_need_a_token(host):
    with pytest.raises(ValueError, match='RETOOL_SANDBOX_TOKEN'):
        ServerSettings(host=host)
    ServerSettings(host=host, token='x')


def test_sigterm_finishes_what_runs_and_leaves_nothing():
    server = Server()
    below = children_of(server.process.pid)
    replies: list[dict] = []
    thread = threading.Thread(target=lambda: replies.append(server.run('import time\ntime.sleep(1.5)\nprint("done")')))
    thread.start()
    time.sleep(0.7)
    log = server.stop(signal.SIGTERM)
    thread.join()
    assert replies[0]['run_result']['stdout'] == 'done\n', log
    assert 'Traceback' not in log
    deadline = time.monotonic() + 30
    while set(below) & set(children_of(1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _hammer(server: Server, clients: int, seconds: float) -> int:
    """Requests answered, each right, by so many clients at once; fails on a wrong or dropped one."""
    end = time.monotonic() + seconds
    served, faults = [0] * clients, []

    def work(index: int) -> None:
        connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=120)
        try:
            while time.monotonic() < end:
                n = index * 10**6 + served[index]
                connection.request('POST', '/run_code', json.dumps({'code': f'print({n} ** 2)', 'language': 'python'}))
                response = connection.getresponse()
                reply = json.loads(response.read())
                if response.status != 200 or reply['run_result']['stdout'] != f'{n**2}\n':
                    faults.append(reply)
                    return
                served[index] += 1
        except Exception as error:
            faults.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not faults, faults[:3]
    assert min(served) > 0
    return sum(served)


def test_64_clients_at_once_get_right_answers(server):
    assert _hammer(server, 64, 1.5) > 64


@pytest.mark.soak
def test_64_clients_for_a_minute_get_right_answers(server):
    assert _hammer(server, 64, 60.0) > 1000
