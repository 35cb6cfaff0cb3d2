"""The pool's interface over servers elsewhere: least-loaded host, canaries, retries, back-off.

Hosts may die and come back. What a server calls its own fault, and whatever happens between here
and there, is run again elsewhere; what the snippet did comes back as it is.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time

import httpx

from retool_jax.core.errors import UserError
from retool_jax.core.records import ExecResult, Fault, Verdict
from retool_jax.sandbox import canary as canary_lib
from retool_jax.sandbox.pool import PoolFull


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """Which servers, and how patient to be with them."""

    addresses: tuple[str, ...]  # 'http://host:port'
    token: str = ''
    cpu_s: float = 5.0
    wall_s: float = 15.0
    memory_mb: int = 256
    in_flight: int = 64  # requests at once, per host
    queue: int = 16384  # snippets waiting here; one more raises PoolFull
    retries: int = 8  # of one snippet, over all hosts
    connect_s: float = 5.0
    queue_s: float = 120.0  # how long a server may let a snippet wait
    backoff_s: float = 0.5  # of a host after a fault; doubles up to max_backoff_s
    max_backoff_s: float = 30.0
    patience_s: float = 600.0  # with no host at all

    def __post_init__(self):
        object.__setattr__(self, 'addresses', tuple(a.rstrip('/') for a in self.addresses))
        if not self.addresses:
            raise UserError('sandbox.addresses is empty: name at least one server, as http://host:port')
        for address in self.addresses:
            if not address.startswith(('http://', 'https://')):
                raise UserError(f'sandbox.addresses: {address!r} must start with http:// or https://')


@dataclasses.dataclass
class Host:
    """What is known of one server."""

    address: str
    healthy: bool = False
    in_flight: int = 0
    faults: int = 0  # in a row
    served: int = 0
    paused_until: float = 0.0  # it said 429
    reason: str = 'not tried yet'


class HostFault(Exception):
    """The server, or the way to it, failed; the snippet is not to blame."""


class Refused(ValueError):
    """Every server would refuse this request: a wrong token, a body too large."""


class Remote:
    """A sandbox on other machines, with the interface of `pool.Pool`."""

    def __init__(self, settings: RemoteSettings):
        self.settings = settings
        self.hosts = [Host(address) for address in settings.addresses]
        self._ready: concurrent.futures.Future = concurrent.futures.Future()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task] = set()
        self._waiting: dict[concurrent.futures.Future, None] = {}
        self._counts: collections.Counter = collections.Counter()
        self._retried = 0
        self._closed = False

    def start(self) -> Remote:
        """Tries every server.

        Raises:
            RuntimeError: none passes its canary, and why.
        """
        self._launch()
        self._ready.result()
        return self

    def __str__(self) -> str:
        s = self.settings
        return f'{", ".join(s.addresses)}; {s.cpu_s:g} s CPU, {s.wall_s:g} s, {s.memory_mb} MiB a snippet'

    def __enter__(self) -> Remote:
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, code: str, seed: int = 0) -> concurrent.futures.Future[ExecResult]:
        """Queues a snippet and returns at once.

        Raises:
            PoolFull: too many wait.
            RuntimeError: the client is closed.
        """
        self._launch()
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError('sandbox: the remote client is closed')
            if len(self._waiting) >= self.settings.queue:
                raise PoolFull(f'sandbox: {len(self._waiting)} snippets wait already (sandbox.queue)')
            self._waiting[future] = None
        self._loop.call_soon_threadsafe(self._begin, future, code, seed)
        return future

    async def run(self, code: str, seed: int = 0) -> ExecResult:
        """Runs a snippet; cancelling the task drops it."""
        return await asyncio.wrap_future(self.submit(code, seed))

    def stats(self) -> dict:
        """Counts since the start, and the state of every host."""
        with self._lock:
            return {
                'waiting': len(self._waiting),
                'verdicts': dict(self._counts),
                'retried': self._retried,
                'hosts': [dataclasses.asdict(host) for host in self.hosts],
            }

    def close(self) -> None:
        """Drops what waits and ends the thread."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(30.0)

    def _launch(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed:
                started = threading.Event()
                self._thread = threading.Thread(
                    target=lambda: asyncio.run(self._main(started)), name='sandbox-remote', daemon=True
                )
                self._thread.start()
                started.wait()

    async def _main(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._changed = asyncio.Condition()
        started.set()
        s = self.settings
        timeout = httpx.Timeout(s.wall_s + s.queue_s, connect=s.connect_s)
        headers = {'Authorization': f'Bearer {s.token}'} if s.token else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=s.in_flight * len(self.hosts))
        async with httpx.AsyncClient(timeout=timeout, headers=headers, limits=limits, trust_env=False) as self._client:
            watchers = [asyncio.create_task(self._watch(host)) for host in self.hosts]
            await self._stopped.wait()
            for task in [*watchers, *self._tasks]:
                task.cancel()
            await asyncio.gather(*watchers, *self._tasks, return_exceptions=True)
        for future in [self._ready, *self._waiting]:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(RuntimeError('sandbox: the remote client was closed'))

    async def _watch(self, host: Host) -> None:
        """Sends a canary whenever the host is down, later and later, until it sings."""
        tried = 0
        while True:
            if not host.healthy:
                try:
                    await self._prove(host)
                    host.healthy, host.faults, host.reason = True, 0, ''
                    if not self._ready.done():
                        self._ready.set_result(None)
                except (HostFault, Refused) as error:
                    host.faults += 1
                    host.reason = str(error)
                tried += 1
                all_failed = all(h.reason not in ('', 'not tried yet') for h in self.hosts)
                if tried == 1 and all_failed and not self._ready.done():
                    reasons = '; '.join(f'{h.address}: {h.reason}' for h in self.hosts)
                    self._ready.set_exception(RuntimeError(f'sandbox: no server can be used: {reasons}'))
                await self._notify()
            s = self.settings
            pause = s.backoff_s if host.healthy else min(s.max_backoff_s, s.backoff_s * 2 ** min(host.faults - 1, 16))
            await asyncio.sleep(pause)

    async def _prove(self, host: Host) -> None:
        ours = canary_lib.combined()
        fields, reply = await self._post(host, ours.code, 0)
        # A server of another make is asked for right answers only: it promises another isolation.
        probe = ours if 'verdict' in reply else canary_lib.CANARIES[0]
        if probe is not ours:
            fields, _ = await self._post(host, probe.code, 0)
        if cut := reply.get('cut'):  # silently shorter limits would be other rewards
            raise HostFault(f'it gives less than asked for: {cut}; raise its --max_timeout_s or --max_memory_mb')
        if not canary_lib.passed(probe, fields):
            raise HostFault(f'its canary failed ({fields.verdict}: {fields.stdout[-80:]!r})')

    def _begin(self, future: concurrent.futures.Future, code: str, seed: int) -> None:
        task = self._loop.create_task(self._carry(future, code, seed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, future: concurrent.futures.Future, code: str, seed: int) -> None:
        """Takes one snippet to a result, from host to host."""
        try:
            result = await self._run_somewhere(future, code, seed)
            with self._lock:
                self._counts[str(result.verdict)] += 1
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_result(result)
        except Exception as error:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)
        finally:
            if not self._stopped.is_set():
                with self._lock:
                    self._waiting.pop(future, None)

    async def _run_somewhere(self, future: concurrent.futures.Future, code: str, seed: int) -> ExecResult:
        attempts = 0
        last: Host | None = None
        reason = 'no server answers'
        while attempts <= self.settings.retries and not future.cancelled():
            host = await self._choose(last)
            if host is None:
                break
            host.in_flight += 1
            try:
                result, _ = await self._post(host, code, seed)
                if result.verdict is Verdict.SANDBOX_ERROR:
                    raise HostFault(result.stderr or 'SandboxError')
                host.faults = 0
                host.served += 1
                return result
            except _Busy as busy:
                host.paused_until = time.monotonic() + busy.seconds
                last = host
            except HostFault as error:
                attempts += 1
                last, reason = host, str(error)
                with self._lock:
                    self._retried += 1
                host.healthy, host.reason = False, reason  # its watcher sends a canary before it serves again
                host.faults += 1
            finally:
                host.in_flight -= 1
                await self._notify()
        return ExecResult(Verdict.SANDBOX_ERROR, '', reason, fault=Fault.SERVER)

    async def _choose(self, last: Host | None) -> Host | None:
        """The healthy host with the fewest requests, another than the last one where there is another."""
        deadline = time.monotonic() + self.settings.patience_s
        while True:
            now = time.monotonic()
            free = [
                h for h in self.hosts if h.healthy and h.in_flight < self.settings.in_flight and h.paused_until <= now
            ]
            if free:
                return min(free, key=lambda h: (h is last, h.in_flight, h.served))
            if now > deadline:
                return None
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await self._changed.wait()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _post(self, host: Host, code: str, seed: int) -> tuple[ExecResult, dict]:
        s = self.settings
        body = {
            'language': 'python',
            'code': code,
            'run_timeout': s.wall_s,
            'cpu_timeout': s.cpu_s,
            'seed': seed,
            'memory_limit_MB': s.memory_mb,
        }
        try:
            response = await self._client.post(f'{host.address}/run_code', json=body)
        except httpx.HTTPError as error:
            raise HostFault(f'{type(error).__name__}: {error}') from None
        if response.status_code == 429:
            raise _Busy(_seconds(response.headers.get('retry-after', '1')))
        if response.status_code in (400, 401, 403, 404, 413, 422):
            raise Refused(f'sandbox: {host.address} answers {response.status_code}: {response.text[:200]}')
        if response.status_code != 200:
            raise HostFault(f'status {response.status_code}: {response.text[:200]}')
        try:
            reply = response.json()
            return _result(reply), reply
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HostFault(f'an answer outside the schema: {error}') from None


class _Busy(HostFault):
    """The server's queue is full."""

    def __init__(self, seconds: float):
        super().__init__('429')
        self.seconds = seconds


def _seconds(text: str) -> float:
    try:
        return min(60.0, max(0.05, float(text)))
    except ValueError:
        return 1.0  # a date


def _result(reply: dict) -> ExecResult:
    """A reply of the schema; one of another server lacks our verdict, which is then read from its words."""
    if reply['status'] == 'SandboxError':
        return ExecResult(Verdict.SANDBOX_ERROR, '', str(reply.get('message') or 'SandboxError'))
    run = reply.get('run_result') or reply['compile_result']
    code = run.get('return_code')
    if 'verdict' in reply:
        verdict = Verdict(reply['verdict'])
    elif run['status'] == 'TimeLimitExceeded':
        verdict = Verdict.TIMEOUT
    elif code is not None and code < 0:
        verdict = Verdict.SIGNAL
    else:
        verdict = Verdict.OK if reply['status'] == 'Success' else Verdict.ERROR
    exited = verdict in (Verdict.OK, Verdict.ERROR)
    number = reply.get('signal', -code if verdict is Verdict.SIGNAL else None)
    return ExecResult(
        verdict,
        run.get('stdout') or '',
        run.get('stderr') or '',
        code if exited else None,
        number,
        float(reply.get('cpu_time') or 0.0),
        float(run.get('execution_time') or 0.0),
        float(reply.get('peak_mb') or 0.0),
        bool(reply.get('truncated')),
    )
