"""The server: SandboxFusion's schema, refusals, drain, and many clients at once."""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.sandbox.conftest import children_of
from tests.sandbox.servers import Server


@pytest.fixture(scope='module')
def server(pools):
    pools('warm')  # skips where the local pool cannot be
    server = Server('--concurrency=4')
    yield server
    assert 'Traceback' not in server.stop()


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


def test_other_refusals_say_what_there_is(server):
    assert server.request('POST', '/run_code', b' ' * (33 << 20))[0] == 413
    assert server.request('POST', '/run_code', iter([b' ' * (1 << 20)] * 33))[0] == 413  # in chunks
    for method, path, status in (('GET', '/run_code', 405), ('OPTIONS', '/run_code', 405), ('GET', '/nothing', 404),
                                 ('POST', '/run_code/', 404), ('POST', '/run_jupyter', 404), ('POST', '/submit', 404),
                                 ('GET', '/%00%ff%F0%9F%A6%80', 404), ('GET', '//', 404), ('DELETE', '/v1/ping', 405),
                                 ('GET', 'http://x/v1/ping', 404), ('OPTIONS', '*', 404)):  # fmt: skip
        got, body, _ = server.request(method, path)
        assert got == status and 'POST /run_code' in json.loads(body)['detail'], (method, path, got)
    assert server.request('HEAD', '/v1/ping')[:2] == (200, b'')
    detail = json.loads(server.request('POST', '/run_code', b'{"code": "", "language": "pytest"}')[1])['detail']
    assert "'pytest' is not run here" in detail and 'python and python3' in detail


@pytest.mark.parametrize('name', ['../x', '/python/x', 'a\0b', 'x' * 300, '.', '', '\ud800', 'a/'])
def test_files_that_cannot_be_written_are_answered_422_and_nothing_runs(name, server):
    ran = server.request('GET', '/metrics')[1].decode().count('sandbox_runs_total{verdict="error"}')
    body = json.dumps({'code': '1 / 0', 'files': {name: '', 'a': ''}}).encode()
    status, answer, _ = server.request('POST', '/run_code', body)
    assert status == 422 and 'files' in json.loads(answer)['detail']
    assert server.request('GET', '/metrics')[1].decode().count('sandbox_runs_total{verdict="error"}') == ran


def test_names_in_any_script_come_back_and_so_do_those_that_are_no_text(server):
    reply = server.run(
        'open("é🦀", "w").write("1")\nopen(b"\\x80", "w").write("2")\nprint(open("数/a").read())',
        files={'数/a': base64.b64encode('é'.encode()).decode()},
        fetch_files=['é🦀', '\udc80', '\ud800', 'a\0b', 'x' * 9999],
        stdin='\ud800🦀',
    )
    assert reply['run_result']['stdout'] == 'é\n', reply
    assert {k: base64.b64decode(v) for k, v in reply['files'].items()} == {'é🦀': b'1', '\udc80': b'2'}


def _bodies(seed: int, count: int):
    """Bodies of /run_code, most of them wrong in some way: values of other types, cut, or with a byte turned."""
    rng = random.Random(seed)
    fields = ['code', 'language', 'compile_timeout', 'run_timeout', 'memory_limit_MB', 'stdin', 'files', 'fetch_files',
              'seed', 'cpu_timeout', 'é\ud800']  # fmt: skip
    values = [None, True, 0, -1, 1, 0.01, 1e-9, 1e308, 10**30, float('nan'), float('inf'), '', 'a', 'python', '🦀',
              '\ud800', '\0', 'eA==', [], ['a'], ['\ud800', '\0'], [[]], {}, {'a': 'eA=='}, {'\ud800': 'eA=='},
              {'..': None}, {'a': ['b']}, [[[[[[]]]]]], 'x' * 5000]  # fmt: skip
    for _ in range(count):
        body = {'code': 'print(1)'} | {f: rng.choice(values) for f in rng.sample(fields, rng.randrange(4))}
        data = bytearray(json.dumps(body).encode())
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        yield bytes(data)


def test_no_body_brings_a_500(server):
    statuses = collections.Counter()
    for body in _bodies(seed=1, count=400):
        status, answer, _ = server.request('POST', '/run_code', body)
        statuses[status] += 1
        assert status in (200, 422) and isinstance(json.loads(answer), dict), (status, body[:300])
        assert status == 422 or json.loads(answer)['status'] != 'SandboxError', body[:300]
    assert min(statuses.values()) > 20 and len(statuses) == 2, statuses


def test_metrics_count_by_verdict(server):
    server.run('1 / 0')
    text = server.request('GET', '/metrics')[1].decode()
    assert 'sandbox_runs_total{verdict="error"}' in text and 'sandbox_run_seconds_bucket' in text
    assert 'sandbox_refused_total{status="422"}' in text and 'sandbox_waiting 0.0' in text
    assert 'sandbox_up 1.0' in text


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


def test_a_pool_that_dies_within_a_request_and_for_good_is_said_by_every_route():
    server = Server('--concurrency=2')
    try:
        replies = []
        body = b'{"code": "import time\\ntime.sleep(3)"}'
        ask = lambda: replies.append(server.request('POST', '/run_code', body))
        asking = [threading.Thread(target=ask) for _ in range(2)]
        [thread.start() for thread in asking]
        deadline = time.monotonic() + 60
        while server.request('GET', '/v1/ping')[0] == 200:
            assert time.monotonic() < deadline
            for supervisor in _supervisors(server.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(supervisor, signal.SIGKILL)
        [thread.join() for thread in asking]
        for status, answer, _ in [*replies, server.request('GET', '/v1/ping'),
                                  server.request('POST', '/run_code', b'{"code": ""}')]:  # fmt: skip
            assert status == 503 and 'died 4 times in a row' in json.loads(answer)['detail']
        assert b'sandbox_up 0.0' in server.request('GET', '/metrics')[1]
    finally:
        assert 'Traceback' not in server.stop()


def _supervisors(pid: int) -> list[int]:
    found = []
    for child in children_of(pid):
        with contextlib.suppress(OSError):
            if b'sandbox.supervisor' in Path(f'/proc/{child}/cmdline').read_bytes():
                found.append(child)
    return found


def test_bodies_that_wait_or_come_are_bounded_by_their_bytes():
    server = Server('--concurrency=1', '--queue_mb=32')
    try:
        body = json.dumps({'code': 'import time\ntime.sleep(2)\n#' + 'x' * (10 << 20), 'memory_limit_MB': 512}).encode()
        statuses: list[int] = []
        asking = [threading.Thread(target=lambda: statuses.append(server.request('POST', '/run_code', body)[0]))
                  for _ in range(12)]  # fmt: skip
        [thread.start() for thread in asking]
        [thread.join() for thread in asking]
        assert set(statuses) == {200, 429} and statuses.count(429) >= 6, statuses
        assert server.run('print(1)')['status'] == 'Success'
    finally:
        assert 'Traceback' not in server.stop()


def test_snippets_longer_than_the_drain_are_answered_503_with_no_traceback():
    server = Server('--drain_s=1')
    replies = []
    thread = threading.Thread(target=lambda: replies.append(
        server.request('POST', '/run_code', b'{"code": "import time\\ntime.sleep(9)"}')))  # fmt: skip
    thread.start()
    time.sleep(0.7)
    log = server.stop()
    thread.join()
    assert replies[0][0] == 503 and 'Traceback' not in log, log


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
