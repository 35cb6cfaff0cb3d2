"""uvicorn with patience that ends: deadlines for heads, bodies and readers, a cap on connections, half-closed clients.

uvicorn itself waits for ever for the rest of a request, takes every connection there is a descriptor for, and hangs up
on a client that has closed its writing half. All of this happens below the application, before any token is read.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import resource
import socket
import time

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_TICK_S = 0.5  # between two looks at all connections
_BACKLOG = 4096  # connections that the kernel holds
_ACCEPTED_AT_ONCE = 32  # asyncio takes so many before any of them is looked at
_OTHER_DESCRIPTORS = 64  # of the process: the pool's, the listeners', the interpreter's
_HEAD_BYTES = 1 << 16
_log = logging.getLogger('uvicorn.error')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """What a client may take: seconds per stage of a request, and connections of all clients together."""

    head_s: float = 10.0  # from the connection, or the first byte of a further request
    body_s: float = 60.0
    take_s: float = 60.0  # to read an answer
    idle_s: float = 75.0  # between two requests
    linger_s: float = 2.0  # after the last word, for what is still on its way here
    connections: int = 1024


class Crowd:
    """All connections; those that wait for nobody but their client, by who has to make room first."""

    def __init__(self):
        self.all: set[Connection] = set()
        self.leaving: collections.OrderedDict[Connection, None] = collections.OrderedDict()
        self.strangers: collections.OrderedDict[Connection, None] = collections.OrderedDict()  # no token seen
        self.idle: collections.OrderedDict[Connection, None] = collections.OrderedDict()

    def place(self, connection: Connection, group: collections.OrderedDict | None) -> None:
        """Puts a connection last into a group; None: it is being served."""
        for other in (self.leaving, self.strangers, self.idle):
            other.pop(connection, None)
        if group is not None:
            group[connection] = None

    def remove(self, connection: Connection) -> None:
        """Forgets a connection."""
        self.place(connection, None)
        self.all.discard(connection)

    def make_room(self, most: int, newcomer: Connection) -> bool:
        """Ends the oldest of those that ask for nothing; False where all are being served."""
        while len(self.all) > most:
            waiting = (c for group in (self.leaving, self.strangers, self.idle) for c in group if c is not newcomer)
            if (oldest := next(waiting, None)) is None:
                return False
            oldest.expel(at_once=True)
            self.remove(oldest)
        return True


class _Wire:
    """A transport whose `close` asks the connection first: closed upon unread bytes, TCP would drop the answer."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self.transport, self._connection = transport, connection
        self.close = connection.hang_up

    def is_closing(self) -> bool:
        return self._connection.over or self.transport.is_closing()

    def __getattr__(self, name: str):
        return getattr(self.transport, name)


class Connection(H11Protocol):
    """One client's connection.

    The application may set `scope['state']['known']`: such a client is the last to make room for others.
    """

    def __init__(self, *arguments, patience: Patience, crowd: Crowd, **named):
        super().__init__(*arguments, **named)
        self.patience, self.crowd = patience, crowd
        self.over = False  # the last word is said; what still comes is not read
        self._known = False
        self._half_closed = False  # by the client, who waits for its answer, or has left
        self._answers = 0
        self._stage: tuple[str, int] = ('', 0)
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(_Wire(transport, self))
        self.crowd.all.add(self)
        self.crowd.place(self, self.crowd.strangers)
        if not self.crowd.make_room(self.patience.connections, self):
            self._dismiss(503, 'Service Unavailable', 'too many connections are being served')

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        self.crowd.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.over:
            return
        super().data_received(data)
        if self._busy():
            self.crowd.place(self, None)

    def eof_received(self) -> bool:
        """Whether the connection stays open for the answer that its client still waits for, as HTTP allows."""
        self._half_closed = True
        return not self.over and self._busy() and not self.cycle.more_body

    def on_response_complete(self) -> None:
        self._answers += 1
        self._known |= self.scope['state'].get('known', False)
        super().on_response_complete()  # it may begin a request that was sent ahead
        if not self._busy():
            if self._half_closed or self.conn.their_state is h11.SEND_BODY:  # an answer before the end of the body
                self.hang_up()
            elif not self.over:
                self.crowd.place(self, self.crowd.idle if self._known else self.crowd.strangers)

    def send_400_response(self, msg: str) -> None:
        answered = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        self._abandon_request()
        self.hang_up() if answered else super().send_400_response(msg)

    def hang_up(self) -> None:
        """Closes; where the client is still sending, only after it has had time to read the answer."""
        if self.over:
            return
        self.over = True
        self._unset_keepalive_if_required()
        transport = self.transport.transport
        if self._half_closed or transport.is_closing() or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            transport.close()
        else:
            self._linger()

    def shutdown(self) -> None:
        if not self.over:  # else uvicorn's state machine has nothing to say
            super().shutdown()

    def expel(self, at_once: bool = False) -> None:
        """Ends what this connection waits for in vain; `at_once`: its descriptor is needed."""
        stage = self._what()
        if stage in ('linger', 'take', 'answer'):
            self._abandon_request()
            self.over = True
            self.transport.abort()
        elif stage == 'idle':
            self.hang_up()
        else:
            self._dismiss(408, 'Request Timeout', f'the {stage} of the request did not come in time', at_once)

    def look(self, now: float) -> None:
        """Expels a client that has been too long in one stage; finds out whether a half-closed one is still there."""
        stage = (self._what(), self._answers)
        if stage != self._stage:
            self._stage, self._since = stage, now
        if stage[0] != 'answer':
            if now - self._since > getattr(self.patience, f'{stage[0]}_s'):
                self.expel()
        elif self._half_closed and self.scope['http_version'] == '1.1' and not self.cycle.response_started:
            # A client that has left answers this with a reset, which ends its snippet; one that waits skips it.
            self.transport.write(b'HTTP/1.1 100 Continue\r\n\r\n')

    def _what(self) -> str:
        """The stage: whom this connection waits for."""
        if self.transport.get_write_buffer_size():
            return 'take'
        if self.over:
            return 'linger'
        if self._busy():
            return 'body' if self.cycle.more_body else 'answer'
        return 'idle' if self.cycle is not None and not self.conn.trailing_data[0] else 'head'

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _dismiss(self, status: int, phrase: str, detail: str, at_once: bool = False) -> None:
        """Says why, and hangs up."""
        if not (self._busy() and self.cycle.response_started):
            body = f'{{"detail": "{detail}"}}'
            self.transport.write(
                f'HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nRetry-After: 1\r\n'
                f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}'.encode()
            )
        self._abandon_request()
        self.over = True
        self.transport.transport.close() if at_once else self._linger()

    def _abandon_request(self) -> None:
        """Tells the application that its client has left."""
        if self._busy():
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _linger(self) -> None:
        self.crowd.place(self, self.crowd.leaving if self in self.crowd.all else None)
        with contextlib.suppress(OSError, RuntimeError):  # gone meanwhile
            self.transport.write_eof()
            self.flow.resume_reading()


class Listener(uvicorn.Server):
    """A server of connections with patience."""

    def __init__(self, app, patience: Patience, **options):
        most = min(patience.connections, max(8, _descriptors() - _OTHER_DESCRIPTORS - _ACCEPTED_AT_ONCE))
        self.crowd = Crowd()
        http = functools.partial(Connection, patience=dataclasses.replace(patience, connections=most), crowd=self.crowd)
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws='none',
                interface='asgi3',
                proxy_headers=False,
                backlog=_ACCEPTED_AT_ONCE,
                timeout_keep_alive=int(patience.idle_s),
                h11_max_incomplete_event_size=_HEAD_BYTES,
                **options,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)
        self._watch = asyncio.create_task(self._look_around())

    async def _look_around(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for connection in list(self.crowd.all):
                try:
                    connection.look(now)
                except Exception:
                    _log.exception('a connection is ended for a fault of the server')
                    connection.transport.abort()


def _descriptors() -> int:
    """How many this process may have, its soft limit raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
