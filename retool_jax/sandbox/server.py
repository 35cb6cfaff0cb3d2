"""The pool over HTTP, in SandboxFusion's schema: POST /run_code, GET /v1/ping, GET /metrics.

Every run is answered with status 200; 422 is a body that cannot be run, 413 one too large, 429
with Retry-After a full queue, 401 a missing token. Extra keys go both ways: `seed`, `cpu_timeout`
in; `verdict`, `truncated`, `cpu_time`, `peak_mb`, `signal` out.
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
from typing import Annotated

import prometheus_client
import pydantic
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from retool_jax.core.errors import UserError
from retool_jax.core.records import ExecResult, Verdict
from retool_jax.sandbox.pool import Job, Outcome, Pool, PoolFull, SandboxSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens and what a request may ask for."""

    host: str = '127.0.0.1'  # anything else needs a token
    port: int = 8080  # 0: any free one
    token: str = ''  # '' asks for none
    max_timeout_s: float = 60.0  # a larger run_timeout is cut to this
    max_memory_mb: float = 4096.0
    max_body_bytes: int = 32 << 20
    drain_s: float = 60.0  # after SIGTERM, for what runs

    def __post_init__(self):
        if not self.token and not _is_loopback(self.host):
            raise UserError(f'host={self.host!r}: reachable by others, so a token is needed '
                            '(environment variable RETOOL_SANDBOX_TOKEN)')


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def _text(value: object) -> str:
    if not isinstance(value, str):  # not pydantic's str: it refuses lone surrogates, which Python code may hold
        raise ValueError('must be a string')
    return value


def _content(value: object) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except binascii.Error:
        raise ValueError('must be base64') from None


Seconds = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class RunCode(pydantic.BaseModel):
    """The body of /run_code."""

    code: Annotated[str, pydantic.PlainValidator(_text)]
    language: str = 'python'
    compile_timeout: Seconds = 10.0
    run_timeout: Seconds = 10.0
    memory_limit_MB: float = -1  # the schema's spelling
    stdin: str | None = ''
    files: dict[str, Annotated[bytes, pydantic.PlainValidator(_content)] | None] = {}
    fetch_files: list[str] = []
    seed: int = 0
    cpu_timeout: Seconds | None = None  # CPU seconds; without it run_timeout bounds both

    @pydantic.field_validator('language')
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ('python', 'python3', 'pytest'):
            raise ValueError('only python is run here')
        return value

    def job(self, settings: ServerSettings) -> Job:
        """What the pool is asked to do."""
        wall_s = min(self.run_timeout, settings.max_timeout_s)
        return Job(
            code=self.code, seed=self.seed, stdin=(self.stdin or '').encode('utf-8', 'surrogatepass'),
            files={name: content for name, content in self.files.items() if content is not None},
            fetch=tuple(self.fetch_files), wall_s=wall_s, cpu_s=min(self.cpu_timeout or wall_s, wall_s),
            memory_mb=min(self.memory_limit_MB, settings.max_memory_mb) if self.memory_limit_MB > 0 else None)


def reply(outcome: Outcome, name: str) -> dict:
    """An outcome in the schema's words."""
    result = outcome.result
    if result.verdict is Verdict.SANDBOX_ERROR:
        return {'status': 'SandboxError', 'message': result.stderr or 'the sandbox failed', 'compile_result': None,
                'run_result': None, 'executor_pod_name': name, 'files': {}, 'verdict': str(result.verdict)}
    timed_out = result.verdict is Verdict.TIMEOUT
    return {
        'status': 'Success' if result.verdict is Verdict.OK else 'Failed', 'message': '', 'compile_result': None,
        'run_result': {
            'status': 'TimeLimitExceeded' if timed_out else 'Finished', 'execution_time': result.wall_s,
            'return_code': None if timed_out else _return_code(result),
            'stdout': result.stdout, 'stderr': result.stderr},
        'executor_pod_name': name,
        'files': {path: base64.b64encode(content).decode() for path, content in outcome.files.items()},
        'verdict': str(result.verdict), 'truncated': result.truncated, 'cpu_time': result.cpu_s,
        'peak_mb': result.peak_mb, 'signal': result.signal}


def _return_code(result: ExecResult) -> int:
    if result.exit_code is not None:
        return result.exit_code
    return -(result.signal or 9)  # as subprocess says it; killed for memory or output: SIGKILL


class Metrics:
    """What /metrics shows; a registry of its own, so that several servers fit one process."""

    def __init__(self, pool: Pool):
        self.registry = prometheus_client.CollectorRegistry()
        self.runs = prometheus_client.Counter(
            'sandbox_runs', 'Snippets by verdict', ['verdict'], registry=self.registry)
        self.seconds = prometheus_client.Histogram(
            'sandbox_run_seconds', 'Wall seconds of snippets', registry=self.registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30))
        self.refused = prometheus_client.Counter(
            'sandbox_refused', 'Requests not run, by status', ['status'], registry=self.registry)
        for key in ('waiting', 'retried', 'respawned', 'recycled'):
            gauge = prometheus_client.Gauge(f'sandbox_{key}', f'Pool: {key}', registry=self.registry)
            gauge.set_function(lambda key=key: pool.stats().get(key, 0))


def make_app(pool: Pool, settings: ServerSettings) -> Starlette:
    """The application over a pool that it starts and closes."""
    metrics = Metrics(pool)
    name = socket.gethostname()

    def refuse(status: int, message: str, headers: dict | None = None) -> Response:
        metrics.refused.labels(str(status)).inc()
        return JSONResponse({'detail': message}, status, headers)

    def authorized(request: Request) -> bool:
        given = request.headers.get('authorization', '').removeprefix('Bearer ')
        return not settings.token or hmac.compare_digest(given.encode(), settings.token.encode())

    async def run_code(request: Request) -> Response:
        if not authorized(request):
            return refuse(401, 'a token is needed: Authorization: Bearer …', {'WWW-Authenticate': 'Bearer'})
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > settings.max_body_bytes:
                return refuse(413, f'the body is larger than {settings.max_body_bytes} bytes')
        try:
            job = RunCode.model_validate(json.loads(bytes(body))).job(settings)
        except (pydantic.ValidationError, ValueError, RecursionError) as error:
            return refuse(422, _explain(error))
        try:
            future = asyncio.wrap_future(pool.submit_job(job))
        except PoolFull:
            return refuse(429, 'the queue is full', {'Retry-After': '1'})
        outcome = await _unless_gone(request, future)
        if outcome is None:
            return Response(status_code=499)  # nobody reads it
        metrics.runs.labels(str(outcome.result.verdict)).inc()
        metrics.seconds.observe(outcome.result.wall_s)
        return JSONResponse(reply(outcome, name))

    async def ping(_: Request) -> Response:
        return JSONResponse('pong')

    async def show_metrics(request: Request) -> Response:
        if not authorized(request):
            return refuse(401, 'a token is needed: Authorization: Bearer …', {'WWW-Authenticate': 'Bearer'})
        return PlainTextResponse(prometheus_client.generate_latest(metrics.registry),
                                 media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(pool.start)
        try:
            yield
        finally:
            await asyncio.to_thread(pool.close)

    return Starlette(lifespan=lifespan, routes=[
        Route('/run_code', run_code, methods=['POST']), Route('/v1/ping', ping), Route('/metrics', show_metrics)])


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


def _explain(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return '; '.join(f'{".".join(map(str, e["loc"])) or "body"}: {e["msg"]}' for e in error.errors(
            include_url=False, include_context=False, include_input=False))
    return f'the body is no JSON object: {error}'


def open_port(server: ServerSettings) -> socket.socket:
    """The listening socket, before anything is started; ValueError where the address cannot be had."""
    family = socket.AF_INET6 if ':' in server.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((server.host, server.port))
    except OSError as error:
        listening.close()
        raise UserError(f'{server.host}:{server.port}: {error.strerror}; choose another --port or --host') from None
    listening.set_inheritable(True)
    return listening


def serve(server: ServerSettings, sandbox: SandboxSettings) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs."""
    listening = open_port(server)
    app = make_app(Pool(sandbox), server)
    config = uvicorn.Config(app, host=server.host, port=server.port, access_log=False, log_level='info', lifespan='on',
                            backlog=4096, timeout_keep_alive=75, timeout_graceful_shutdown=int(server.drain_s))
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
