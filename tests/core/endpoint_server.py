"""A server on loopback that speaks OpenAI's protocol and misbehaves as it is told; it counts what it is asked.

with serve(lambda asked, tries: Says('4')) as server:
    settings = make_settings(server.url)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from retool_jax.core.endpoint_settings import EndpointSettings

SETTINGS = dict(
    model='tested',
    key_variable=None,
    concurrency=8,
    timeout_s=20.0,
    retries=6,
    backoff_s=0.01,
    max_requests=None,
    max_tokens=None,
)


def make_settings(url: str | None, **changes) -> EndpointSettings:
    return EndpointSettings(**({'url': url} | SETTINGS | changes))


@dataclasses.dataclass(frozen=True)
class Says:
    """An answer, streamed to its end."""

    text: str
    finish: str = 'stop'
    refusal: str = ''
    usage: bool = True
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields beside finish_reason
    after_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Status:
    """An answer that is none."""

    status: int
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: Any = dataclasses.field(default_factory=lambda: {'error': {'message': 'so it is', 'code': None}})


@dataclasses.dataclass(frozen=True)
class Cut:
    """A stream that ends early. cleanly: as if it were whole; else in the middle of a chunk."""

    text: str
    cleanly: bool = False


@dataclasses.dataclass(frozen=True)
class Raw:
    """Lines of a stream as they are, in the place of its events."""

    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Silence:
    """Nothing, or nothing more after `text`, for some seconds; then the connection is closed."""

    seconds: float
    text: str = ''


@dataclasses.dataclass(frozen=True)
class Refuses:
    """The connection is closed before a word."""


Behaviour = Says | Status | Cut | Raw | Silence | Refuses


class Server(http.server.ThreadingHTTPServer):
    """`script(asked, tries)` says what happens to a request: its JSON, and how often the same one came before."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, script: Callable[[dict, int], Behaviour]):
        super().__init__(('127.0.0.1', 0), Handler)
        self.script, self.lock = script, threading.Lock()
        self.asked: collections.Counter[str] = collections.Counter()  # by the hash of the request
        self.answered: collections.Counter[str] = collections.Counter()  # to their end
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        self.now, self.most = 0, 0  # requests at once
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_address[1]}/v1'

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no error here."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        server = self.server
        with server.lock:
            tries = server.asked[key]
            server.asked[key] += 1
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.bodies.append(body)
            server.paths.append(self.path)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            if self.path in ('/v1/chat/completions', '/v1/completions'):
                doing = server.script(body, tries)
            else:
                doing = Status(404, body={'error': {'message': 'no such path'}})
            self.act(doing, key, chat=self.path.endswith('chat/completions'))
        finally:
            with server.lock:
                server.now -= 1

    def act(self, doing: Behaviour, key: str, chat: bool) -> None:
        if isinstance(doing, Status):
            content = doing.body.encode() if isinstance(doing.body, str) else json.dumps(doing.body).encode()
            self.send_response(doing.status)
            for name, value in {'Content-Type': 'application/json', **doing.headers}.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif isinstance(doing, Refuses):
            self.close_connection = True
        elif isinstance(doing, Silence):
            if doing.text:
                self.begin()
                self.event(chat, doing.text)
            self.server.over.wait(doing.seconds)
            self.close_connection = True
        elif isinstance(doing, Cut):
            self.begin()
            for piece in pieces(doing.text):
                self.event(chat, piece)
            if doing.cleanly:
                self.chunk('')
            else:
                self.wfile.write(b'ffff\r\ndata: {"choi')
            self.close_connection = True
        elif isinstance(doing, Raw):
            self.begin()
            for line in doing.lines:
                self.chunk(f'data: {line}\n\n')
            self.chunk('')
        else:
            self.say(doing, key, chat)

    def say(self, says: Says, key: str, chat: bool) -> None:
        time.sleep(says.after_s)
        self.begin()
        for piece in pieces(says.text):
            self.event(chat, piece)
        if says.refusal:
            self.chunk(f'data: {json.dumps({"choices": [{"index": 0, "delta": {"refusal": says.refusal}}]})}\n\n')
        self.event(chat, '', finish_reason=says.finish, **says.extra)
        if says.usage:
            told = {'prompt_tokens': 7, 'completion_tokens': len(says.text), 'total_tokens': 7 + len(says.text)}
            self.chunk(f'data: {json.dumps({"choices": [], "usage": told})}\n\n')
        self.chunk('data: [DONE]\n\n')
        self.chunk('')
        with self.server.lock:
            self.server.answered[key] += 1

    def begin(self) -> None:
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()

    def event(self, chat: bool, text: str, **fields) -> None:
        said = {'delta': {'content': text}} if chat else {'text': text}
        self.chunk(f'data: {json.dumps({"choices": [{"index": 0, "finish_reason": None, **said, **fields}]})}\n\n')

    def chunk(self, text: str) -> None:
        content = text.encode()
        self.wfile.write(f'{len(content):x}\r\n'.encode() + content + b'\r\n')
        self.wfile.flush()


def pieces(text: str) -> list[str]:
    return [text[i : i + 5] for i in range(0, len(text), 5)]


@contextlib.contextmanager
def serve(script: Callable[[dict, int], Behaviour]) -> Iterator[Server]:
    """A server, closed behind the block."""
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
