"""The listener: clients that are slow, many, gone, half-closed or talk nonsense cost themselves, with no traceback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from retool_jax.sandbox.http.listener import Listener, Patience
from tests.sandbox.conftest import children_of
from tests.sandbox.servers import ROOT, Server, free_port

BODY = b'{"code": "print(1)"}'
SHORT = Patience(head_s=1.0, body_s=1.5, take_s=2.0, idle_s=3.0, linger_s=1.0, connections=6)


class Echo:
    """A real listener on a thread, over an application that reads what is asked and answers as much as is asked."""

    def __init__(self, patience: Patience = SHORT):
        self.port, self.left = free_port(), 0
        listening = socket.create_server(('127.0.0.1', self.port))
        self.listener = Listener(self.answer, patience, log_level='warning', access_log=False, lifespan='off')
        self.thread = threading.Thread(target=self.listener.run, args=([listening],), daemon=True)
        self.thread.start()
        while not self.listener.started:
            time.sleep(0.01)

    async def answer(self, scope, receive, send):
        """GET /SECONDS/BYTES; a header `token` makes its client known; POST reads the body first."""
        seconds, size = (float(x) for x in scope['path'].strip('/').split('/'))
        scope['state']['known'] = any(name == b'token' for name, _ in scope['headers'])
        message = {'more_body': scope['method'] == 'POST'}
        while message.get('more_body'):
            message = await receive()
            if message['type'] == 'http.disconnect':
                self.left += 1
                return
        if seconds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while (await receive())['type'] != 'http.disconnect':
                        pass
                    self.left += 1
                    return
        await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'%d' % size)]})
        await send({'type': 'http.response.body', 'body': b'x' * int(size)})

    def connect(self) -> socket.socket:
        return socket.create_connection(('127.0.0.1', self.port), timeout=20)

    def stop(self) -> None:
        self.listener.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def echo(caplog):
    server = Echo()
    yield server
    server.stop()
    assert 'Traceback' not in caplog.text and not [r for r in caplog.records if r.levelname == 'ERROR'], caplog.text


def everything(client: socket.socket) -> bytes:
    """What comes until the end; a reset counts as one."""
    got = b''
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            got += part
    return got


def get(path: str = '/0/2', *headers: str, version: str = '1.1') -> bytes:
    return '\r\n'.join([f'GET {path} HTTP/{version}', 'Host: x', *headers, '', '']).encode()


def ask(client: socket.socket, request: bytes) -> int:
    """The status of one answer with a small body."""
    client.sendall(request)
    got = b''
    while b'\r\n\r\n' not in got:
        part = client.recv(4096)
        assert part, got
        got += part
    return int(got.split()[1])


def drip(client: socket.socket, drop: bytes) -> tuple[float, bytes]:
    """Sends a drop every 0.2 s until the connection ends, a minute at most: after how long, what was answered."""
    start = time.monotonic()
    client.settimeout(0.2)
    got = b''
    while time.monotonic() - start < 60:
        with contextlib.suppress(OSError):
            client.sendall(drop)
        try:
            part = client.recv(4096)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        got += part
        if not part:
            break
    return time.monotonic() - start, got


@pytest.mark.parametrize('sent', [b'', b'GET', get()[:-2], b'GET / HTTP/1.1\r\nA: ' + b'b' * 5000])
def test_a_head_that_does_not_come_is_cut_off_however_slowly_it_drips(echo, sent):
    with echo.connect() as client:
        client.sendall(sent)
        seconds, got = drip(client, b'y' if sent else b'')
        assert seconds > 0.9 and got.startswith(b'HTTP/1.1 408 ')


@pytest.mark.parametrize('head', [b'Content-Length: 100\r\n\r\n', b'Transfer-Encoding: chunked\r\n\r\n'])
def test_a_body_that_does_not_come_is_cut_off_however_slowly_it_drips(echo, head):
    with echo.connect() as client:
        client.sendall(b'POST /0/2 HTTP/1.1\r\nHost: x\r\n' + head)
        seconds, got = drip(client, b'1\r\ny\r\n' if b'chunked' in head else b'y')
        assert seconds > 1.4 and got.startswith(b'HTTP/1.1 408 ')
    deadline = time.monotonic() + 60
    while not echo.left and time.monotonic() < deadline:  # the handler hears of it after the client
        time.sleep(0.05)
    assert echo.left == 1


def test_a_client_that_does_not_read_its_answer_is_cut_off(echo):
    with echo.connect() as client:
        client.sendall(get('/0/60000000'))
        deadline = time.monotonic() + 60
        while echo.listener.crowd.all or not echo.listener.server_state.total_requests:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(everything(client)) < 60_000_000


def test_a_client_that_sends_ahead_and_never_reads_is_cut_off(echo):
    with echo.connect() as client:
        client.settimeout(1.0)
        with contextlib.suppress(OSError):
            for _ in range(400):
                client.sendall(get('/0/100000') * 100)
        deadline = time.monotonic() + 60
        while echo.listener.crowd.all:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_client_that_says_nothing_more_is_closed_and_blank_lines_are_nothing(echo):
    with echo.connect() as client:
        assert ask(client, get()) == 200
        deadline = time.monotonic() + 60
        client.settimeout(0.5)
        while True:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                client.sendall(b'\r\n')
            try:
                if not client.recv(4096):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break


def test_requests_sent_ahead_are_answered_in_order(echo):
    with echo.connect() as client:
        client.sendall(b''.join(get(f'/0/{i}') for i in range(1, 6)) + get('/0/6', 'Connection: close'))
        got = everything(client)
    assert got.count(b'HTTP/1.1 200') == 6 and got.count(b'x') == 1 + 2 + 3 + 4 + 5 + 6


def test_a_client_that_closes_its_writing_half_gets_all_its_answers(echo):
    with echo.connect() as client:
        client.sendall(get('/1.2/3') + get('/0/4'))
        client.shutdown(socket.SHUT_WR)
        got = everything(client)
    assert got.count(b'HTTP/1.1 200') == 2 and got.count(b'x') == 7 and b'100 Continue' in got
    with echo.connect() as client:  # an HTTP/1.0 client would not understand an interim answer
        client.sendall(get('/1.2/3', version='1.0'))
        client.shutdown(socket.SHUT_WR)
        got = everything(client)
    assert got.count(b'200') == 1 and b'xxx' in got and b'100' not in got
    assert echo.left == 0


@pytest.mark.parametrize('sent', [get('/30/2'), b'POST /0/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12'])
def test_a_client_that_leaves_is_noticed(echo, sent):
    with echo.connect() as client:
        client.sendall(sent)
        time.sleep(0.3)
    deadline = time.monotonic() + 5
    while not echo.left:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_answer_before_the_end_of_the_body_arrives_whole(echo):
    for headers in (b'', b'Connection: close\r\n'):
        with echo.connect() as client:  # GET: the application does not read the body
            client.sendall(b'GET /0/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n' + headers + b'\r\n')
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                client.sendall(b'y' * 3_000_000)
            assert everything(client).endswith(b'\r\n\r\nxx')


def test_idle_clients_make_room_and_strangers_before_those_that_are_known(echo):
    known = echo.connect()
    assert ask(known, get('/0/2', 'token: t')) == 200
    strangers = [echo.connect() for _ in range(40)]
    for stranger in strangers:
        with contextlib.suppress(OSError):
            stranger.sendall(b'GET /')
    with echo.connect() as client:
        assert ask(client, get()) == 200
    assert ask(known, get('/0/2', 'token: t')) == 200
    assert len(echo.listener.crowd.all) <= SHORT.connections + 1
    assert sum(b'408' in everything(s) for s in strangers) > 0
    [client.close() for client in (known, *strangers)]


def test_where_all_are_being_served_a_further_client_is_answered_503(echo):
    busy = [echo.connect() for _ in range(SHORT.connections)]
    for client in busy:
        client.sendall(get('/2/2'))
    time.sleep(0.3)
    for _ in range(3):
        with echo.connect() as client:
            with contextlib.suppress(OSError):
                client.sendall(get())
            got = everything(client)
        assert got.startswith(b'HTTP/1.1 503 ') and b'Retry-After' in got
    for client in busy:
        assert b'200 OK' in client.recv(4096)
        client.close()
    with echo.connect() as client:
        assert ask(client, get()) == 200


NONSENSE = [
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(range(256)),  # TLS
    b'GET /\r\n\r\n',
    b'GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n',
    b'GET / HTTP/1.1\r\n\r\n',  # no host
    b'GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n',
    b'GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n\r\n',
    b'GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n',
    b'GET / HTTP/1.1\r\nHost: x\r\nA: ' + b'y' * 200_000 + b'\r\n\r\n',
    b'GET / HTTP/1.1\r\n' + b''.join(b'H%d: x\r\n' % i for i in range(20_000)) + b'\r\n',
    b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n',
    b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: ' + b'9' * 40 + b'\r\n\r\n',
    b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx',
    b'POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n',
]


@pytest.mark.parametrize('sent', NONSENSE)
def test_nonsense_is_answered_400_and_closed(echo, sent):
    with echo.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(sent)
        got = everything(client)
    assert got.startswith(b'HTTP/1.1 400 ')


@pytest.mark.parametrize('path', ['POST /0/2', 'GET /0/2', 'GET /1/2'])
def test_a_broken_chunk_at_any_time_leaves_no_traceback(echo, path):
    with echo.connect() as client:
        client.sendall(f'{path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n'.encode())
        time.sleep(0.3)
        with contextlib.suppress(OSError):
            client.sendall(b'nonsense\r\n\r\n')
            client.sendall(b'more')
        got = everything(client)
    assert got.startswith(b'HTTP/1.1 200 ' if path == 'GET /0/2' else b'HTTP/1.1 400 ')


def test_methods_and_versions_of_http(echo):
    for request, body in ((get(version='1.0'), b'xx'), (get().replace(b'GET', b'HEAD'), b''), (get('/0/0'), b''),
                          (get().replace(b'GET', b'OPTIONS'), b'xx'), (get('/0/2', 'Expect: 100-continue'), b'xx'),
                          (get('/0/2', 'Connection: Upgrade', 'Upgrade: websocket'), b'xx')):  # fmt: skip
        with echo.connect() as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            got = everything(client)
        assert b' 200 OK\r\n' in got and got.endswith(b'\r\n\r\n' + body), request


def test_it_ends_with_slow_clients_of_every_kind(echo):
    clients = [echo.connect() for _ in range(5)]
    clients[0].sendall(b'GET /')
    clients[1].sendall(b'POST /0/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12')
    clients[2].sendall(get('/0/60000000'))
    clients[3].sendall(b'\xff\r\n\r\n')
    assert ask(clients[4], get()) == 200
    time.sleep(0.3)
    echo.stop()
    [client.close() for client in clients]


def test_the_cap_stays_below_the_descriptors_that_there_are():
    code = ('import resource\n'
            'resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))\n'
            'from retool_jax.sandbox.http.listener import Listener, Patience\n'
            'print(Listener(None, Patience()).config.http.keywords)')  # fmt: skip
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)}
    )
    assert 'connections=104' in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope='module')
def server(pools):
    pools('warm')  # skips where the local pool cannot be
    server = Server('--concurrency=2', '--connections=16', token='hush')
    yield server
    assert 'Traceback' not in server.stop()


def post(*headers: str, body: bytes = BODY, token: str = 'hush') -> bytes:
    lines = ['POST /run_code HTTP/1.1', 'Host: x', f'Content-Length: {len(body)}', f'Authorization: Bearer {token}']
    return '\r\n'.join([*lines, *headers, '', '']).encode() + body


def test_a_flood_of_strangers_keeps_nobody_out(server):
    strangers = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(60)]
    for stranger in strangers:
        with contextlib.suppress(OSError):
            stranger.sendall(b'POST /run_code HTTP/1.1\r\n')
    assert server.run('print(1)')['run_result']['stdout'] == '1\n'
    assert server.request('GET', '/v1/ping')[0] == 200
    [stranger.close() for stranger in strangers]


@pytest.mark.parametrize('half', [False, True])
def test_a_client_that_has_left_ends_its_snippet_and_one_that_waits_gets_it(half, server):
    idle = len(children_of(server.process.pid))
    forks = 'import os, time\nfor _ in range(12):\n    if os.fork() == 0: time.sleep(60)\n'
    # 8 s: on a loaded machine a look at all children takes more than one.
    body = json.dumps({'code': forks + f'time.sleep({8 if half else 50})\nprint("done")', 'run_timeout': 60}).encode()
    with socket.create_connection(('127.0.0.1', server.port), timeout=60) as client:
        client.sendall(post(body=body))
        deadline = time.monotonic() + 30
        while len(children_of(server.process.pid)) < idle + 12:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if half:
            client.shutdown(socket.SHUT_WR)
            assert b'"done\\n"' in everything(client)
    while len(children_of(server.process.pid)) > idle + 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
