"""Who may ask the server, and for how much: tokens, limits, the port for metrics, settings that mean nothing."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import urllib.parse

import pytest

from retool_jax.core.errors import UserError
from retool_jax.sandbox.http.server import ServerSettings, serve
from tests.sandbox.given import tiny
from tests.sandbox.servers import Server, free_port

TOKEN = 'hüsh: @/%?'  # any text may be one


@pytest.fixture(scope='module')
def guarded(pools):
    pools('warm')
    port = free_port()
    server = Server(f'--metrics_port={port}', '--max_timeout_s=2', '--max_memory_mb=300', token=TOKEN)
    server.metrics_port = port
    yield server
    assert 'Traceback' not in server.stop()


def _basic(user: str, password: str) -> bytes:
    return b'Basic ' + base64.b64encode(f'{user}:{password}'.encode())


def test_with_a_token_nothing_runs_without_it(guarded):
    body = json.dumps({'code': 'print(1)', 'language': 'python'}).encode()
    token = TOKEN.encode()
    for given in (b'', b'Bearer', b'Bearer ', b'Bearer wrong', b'Bearer ' + token[:-1], b'Bearer ' + token + b'x',
                  token, b'Digest ' + token, b'Bearer' + token, _basic(TOKEN, ''), _basic('', ''), _basic('', 'wrong'),
                  b'Basic @@', b'Basic ' + token, b'Basic', b'Bearer \xff\xfe', b'x' * 9000):  # fmt: skip
        status, answer, headers = guarded.request('POST', '/run_code', body, {'Authorization': given})
        assert status == 401 and 'token' in json.loads(answer)['detail'], given
        assert 'Bearer' in headers['WWW-Authenticate'] and 'Basic' in headers['WWW-Authenticate']
        assert guarded.request('GET', '/metrics', None, {'Authorization': given})[0] == 401
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', guarded.port, timeout=60)) as connection:
        connection.putrequest('POST', '/run_code')
        for value in (b'Bearer wrong', b'Bearer ' + token, f'{len(body)}'):
            connection.putheader('Authorization' if isinstance(value, bytes) else 'Content-Length', value)
        connection.endheaders(body)
        assert connection.getresponse().status == 401  # two of them: who is it?


@pytest.mark.parametrize('bearer, basic', [(b'Bearer ', b'Basic '), (b'bearer ', b'basic '), (b'BEARER  ', b'bAsIc ')])
def test_the_scheme_is_written_in_any_case(bearer, basic, guarded):
    body = json.dumps({'code': 'print(1)', 'language': 'python'}).encode()
    password = _basic('any', TOKEN).replace(b'Basic ', basic)
    for given in (bearer + TOKEN.encode(), bearer + TOKEN.encode('latin-1'), password):
        assert guarded.request('POST', '/run_code', body, {'Authorization': given})[0] == 200


@pytest.mark.parametrize('library', ['requests', 'httpx'])
def test_clients_that_can_send_nothing_else_send_the_token_in_the_address(library, guarded):
    client = pytest.importorskip(library)  # verl's and SandboxFusion's clients post with requests
    body = {'code': 'print(1)', 'language': 'python', 'run_timeout': 10, 'stdin': '', 'files': {}}
    address = f'127.0.0.1:{guarded.port}/run_code'
    answer = client.post(f'http://sandbox:{urllib.parse.quote(TOKEN, safe="")}@{address}', json=body, timeout=60)
    assert answer.status_code == 200 and answer.json()['run_result']['stdout'] == '1\n'
    assert client.post(f'http://{address}', json=body, timeout=60).status_code == 401


def test_what_is_cut_is_said(guarded):
    reply = guarded.run('import time\nprint(1)\ntime.sleep(9)', run_timeout=600, memory_limit_MB=1024)
    assert reply['run_result']['status'] == 'TimeLimitExceeded' and reply['run_result']['execution_time'] < 4
    assert reply['cut'] == {'run_timeout': 2.0, 'memory_limit_MB': 300.0}
    assert 'run_timeout was cut to 2' in reply['message']
    assert guarded.run('print(1)', run_timeout=1, memory_limit_MB=200)['message'] == ''


def test_metrics_are_scraped_without_the_token_on_a_port_of_their_own_and_nothing_else_is_there(guarded):
    def ask(method: str, path: str, host: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection('127.0.0.1', guarded.metrics_port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, b'{"code": ""}' if method == 'POST' else None, {'Host': host})
            response = connection.getresponse()
            return response.status, response.read()

    for host in ('x', f'127.0.0.1:{guarded.port}'):  # what the client calls it does not matter
        status, text = ask('GET', '/metrics', host)
        assert status == 200 and b'sandbox_waiting' in text
        assert ask('POST', '/run_code', host)[0] == ask('GET', '/v1/ping', host)[0] == 404
    headers = {'Host': f'127.0.0.1:{guarded.metrics_port}', 'Authorization': ''}
    assert guarded.request('GET', '/metrics', None, headers)[0] == 401


@pytest.mark.parametrize(
    'fields', [{'max_timeout_s': float('nan')}, {'max_memory_mb': 0}, {'drain_s': float('inf')}, {'metrics_port': 8080}]
)
def test_settings_of_the_server_that_mean_nothing_are_refused_by_name(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        ServerSettings(**fields)


def test_memory_by_default_must_not_exceed_the_most():
    with pytest.raises(UserError, match='max_memory_mb=100'):
        serve(ServerSettings(max_memory_mb=100.0), tiny(memory_mb=256))


@pytest.mark.parametrize('host', ['0.0.0.0', '::', '10.0.0.1', 'example.org'])
def test_addresses_that_others_reach_need_a_token(host):
    with pytest.raises(ValueError, match='RETOOL_SANDBOX_TOKEN'):
        ServerSettings(host=host)
    ServerSettings(host=host, token='x')
