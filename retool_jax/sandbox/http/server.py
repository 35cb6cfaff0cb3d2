"""The pool over HTTP: POST /run_code and GET /v1/ping in SandboxFusion's schema (schema.py); GET /metrics.

Every run is answered with status 200; 422 is a body that cannot be run, 413 one too large, 429 with Retry-After a full
queue, 401 a missing token, 503 a pool that cannot run anything, 408 a request that does not come (listener.py).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import hmac
import ipaddress
import json
import socket
from collections.abc import AsyncIterator

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from retool_jax.core.checks import above, check, within
from retool_jax.core.errors import UserError
from retool_jax.sandbox.http import schema
from retool_jax.sandbox.http.listener import Listener, Patience
from retool_jax.sandbox.pool import Outcome, Pool, PoolFull
from retool_jax.sandbox.settings import MOST, SandboxSettings

_WANTED = 'a token is needed: Authorization: Bearer TOKEN, or http://any:TOKEN@host in the address'
_CHALLENGE = {'WWW-Authenticate': 'Bearer, Basic realm="sandbox"'}
_GONE = Response(status_code=499)  # nobody reads it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens and what a request may ask for."""

    host: str = '127.0.0.1'  # anything else needs a token
    port: int = 8080
    metrics_port: int = 0  # /metrics without the token, on a port of its own; 0: none
    token: str = ''  # '' asks for none
    max_timeout_s: float = 60.0  # a larger run_timeout or cpu_timeout is cut to this, and the answer says so
    max_memory_mb: float = 4096.0  # the same for memory_limit_MB
    max_body_bytes: int = 32 << 20
    drain_s: float = 60.0  # after SIGTERM, for what runs
    connections: int = 1024  # clients at once; beyond them the idle make room, or 503

    def __post_init__(self):
        if not self.token and not _is_loopback(self.host):
            raise UserError(
                f'host={self.host!r}: reachable by others, so a token is needed '
                '(environment variable RETOOL_SANDBOX_TOKEN)'
            )
        ports, seconds = within(0, 65535), MOST['wall_s']
        check(
            self,
            port=ports,
            metrics_port=ports,
            max_timeout_s=above(0, seconds),
            drain_s=within(0, seconds),
            max_memory_mb=above(0, MOST['memory_mb']),
            connections=within(1, 2**16),
        )
        if self.metrics_port and self.metrics_port == self.port:
            raise UserError(f'metrics_port={self.metrics_port} is the port of the server itself; choose another')


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


class Reply(JSONResponse):
    """JSON in ASCII: lone surrogates, which names of files may hold, pass as escapes."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(',', ':')).encode()


class Metrics:
    """What /metrics shows; a registry of its own, so that several servers fit one process."""

    def __init__(self, pool: Pool):
        self.registry = prometheus_client.CollectorRegistry()
        self.runs = prometheus_client.Counter(
            'sandbox_runs', 'Snippets by verdict', ['verdict'], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            'sandbox_run_seconds',
            'Wall seconds of snippets',
            registry=self.registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.refused = prometheus_client.Counter(
            'sandbox_refused', 'Requests not run, by status', ['status'], registry=self.registry
        )
        up = prometheus_client.Gauge('sandbox_up', '1 where snippets can run', registry=self.registry)
        up.set_function(lambda: float(not pool.ailing()))
        for key in ('waiting', 'retried', 'respawned', 'recycled'):
            gauge = prometheus_client.Gauge(f'sandbox_{key}', f'Pool: {key}', registry=self.registry)
            gauge.set_function(lambda key=key: pool.stats().get(key, 0))


class Service:
    """What the routes do, over a pool that the application starts and closes."""

    def __init__(self, pool: Pool, settings: ServerSettings):
        self.pool, self.settings = pool, settings
        self.metrics = Metrics(pool)
        self._name = socket.gethostname()
        self._reading = 0  # bytes of all bodies on their way in
        self._most_reading = max(pool.settings.queue_mb << 20, settings.max_body_bytes)

    def refuse(self, status: int, message: str, headers: dict | None = None) -> Response:
        """A request that is not run, counted."""
        self.metrics.refused.labels(str(status)).inc()
        return Reply({'detail': message}, status, headers)

    async def run_code(self, request: Request) -> Response:
        """POST /run_code."""
        if not authorized(request, self.settings.token):
            return self.refuse(401, _WANTED, _CHALLENGE)
        request.scope['state']['known'] = True  # listener.py: the last to make room
        try:
            body = await self._read(request)
            if isinstance(body, Response):
                return body
            job, cut = schema.read(body).job(self.settings.max_timeout_s, self.settings.max_memory_mb)
            del body  # what waits is held once, by the pool
            future = asyncio.wrap_future(self.pool.submit_job(job))
            del job
            outcome = await _unless_gone(request, future)
        except ClientDisconnect:
            return _GONE
        except PoolFull as full:
            return self.refuse(429, str(full), {'Retry-After': '1'})
        except ValueError as error:
            return self.refuse(422, str(error))
        except RuntimeError as error:  # the pool is broken or closed, and says why
            return self.refuse(503, str(error))
        except asyncio.CancelledError:  # drain_s is over
            return self.refuse(503, 'the server ends')
        if outcome is None:
            return _GONE
        self.metrics.runs.labels(str(outcome.result.verdict)).inc()
        self.metrics.seconds.observe(outcome.result.wall_s)
        return Reply(schema.reply(outcome, self._name, cut))

    async def _read(self, request: Request) -> bytes | Response:
        """The body, or the refusal of one that is too large, alone or with the others on their way."""
        most = self.settings.max_body_bytes
        announced = int(request.headers.get('content-length', 0))  # h11 has seen that it is one number
        body, size = bytearray(), announced
        self._reading += size
        try:
            if self._reading > self._most_reading and self._reading > size:
                return self.refuse(429, 'too many bodies are on their way', {'Retry-After': '1'})
            if size > most:
                return self.refuse(413, f'the body is larger than {most} bytes')
            async for chunk in request.stream():
                body += chunk
                if len(body) > size:  # in chunks, of no announced length
                    self._reading += len(body) - size
                    size = len(body)
                    if size > most:
                        return self.refuse(413, f'the body is larger than {most} bytes')
                    if self._reading > self._most_reading:
                        return self.refuse(429, 'too many bodies are on their way', {'Retry-After': '1'})
            return bytes(body)
        finally:
            self._reading -= size

    async def ping(self, _: Request) -> Response:
        """GET /v1/ping: 503 where no snippet can run."""
        reason = self.pool.ailing()
        return Reply({'detail': reason}, 503) if reason else Reply('pong')

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics on the server's port."""
        if not authorized(request, self.settings.token):
            return self.refuse(401, _WANTED, _CHALLENGE)
        return await self.scrape(request)

    async def scrape(self, _: Request) -> Response:
        """GET /metrics on a port of its own, where who may ask is the network's business."""
        return PlainTextResponse(
            prometheus_client.generate_latest(self.metrics.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )

    async def turn_away(self, _: Request, error: HTTPException) -> Response:
        """What there is no route for."""
        return self.refuse(
            error.status_code,
            f'{error.detail}: this server does POST /run_code, GET /v1/ping and GET '
            f'/metrics; languages: {", ".join(schema.LANGUAGES)}',
            error.headers,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """The pool lives as long as the application."""
        await asyncio.to_thread(self.pool.start)
        try:
            yield
        finally:
            await asyncio.to_thread(self.pool.close)


def authorized(request: Request, token: str) -> bool:
    """Whether a request carries the token: as a bearer's, or as the password of HTTP Basic with any user."""
    if not token:
        return True
    given = [value for name, value in request.headers.raw if name == b'authorization']
    scheme, _, secret = (given[0] if len(given) == 1 else b'').strip().partition(b' ')
    secret = secret.strip()
    if scheme.lower() == b'basic':
        try:
            secret = base64.b64decode(secret, validate=True).partition(b':')[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b'bearer':
        return False
    spellings = [token.encode()]
    with contextlib.suppress(UnicodeEncodeError):
        spellings.append(token.encode('latin-1'))  # so do older clients
    return any([hmac.compare_digest(secret, spelling) for spelling in spellings])


def make_app(pool: Pool, settings: ServerSettings) -> ASGIApp:
    """The application over a pool that it starts and closes."""
    service = Service(pool, settings)
    handlers = {HTTPException: service.turn_away}
    main = Starlette(
        lifespan=service.lifespan,
        exception_handlers=handlers,
        routes=[
            Route('/run_code', service.run_code, methods=['POST']),
            Route('/v1/ping', service.ping),
            Route('/metrics', service.show_metrics),
        ],
    )
    scraped = Starlette(exception_handlers=handlers, routes=[Route('/metrics', service.scrape)])
    for app in (main, scraped):
        app.router.redirect_slashes = False

    async def by_port(scope: Scope, receive: Receive, send: Send) -> None:
        on_own_port = scope['type'] == 'http' and scope['server'][1] == settings.metrics_port
        await (scraped if on_own_port else main)(scope, receive, send)

    return by_port


async def _unless_gone(request: Request, future: asyncio.Future) -> Outcome | None:
    """The outcome, or None after the client left (its snippet is killed)."""

    async def leave() -> None:
        while (await request.receive())['type'] != 'http.disconnect':
            pass

    gone = asyncio.create_task(leave())
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        return future.result() if future.done() else None
    finally:
        gone.cancel()
        future.cancel()


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is started.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(f'{host}:{port}: {error.strerror}; choose another --port or --host') from None
    listening.set_inheritable(True)
    return listening


def serve(server: ServerSettings, sandbox: SandboxSettings) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs.

    Raises:
        UserError: a port that cannot be had, or a snippet's usual memory above what a request may get.
    """
    if sandbox.memory_mb > server.max_memory_mb:
        raise UserError(
            f'memory_mb={sandbox.memory_mb} of a snippet that names none exceeds max_memory_mb='
            f'{server.max_memory_mb:g}; raise this or lower that'
        )
    with contextlib.ExitStack() as stack:
        ports = (server.port, server.metrics_port) if server.metrics_port else (server.port,)
        sockets = [stack.enter_context(open_port(server.host, port)) for port in ports]
        app = make_app(Pool(sandbox), server)
        Listener(
            app,
            Patience(connections=server.connections),
            access_log=False,
            log_level='info',
            lifespan='on',
            timeout_graceful_shutdown=int(server.drain_s),
        ).run(sockets=sockets)
