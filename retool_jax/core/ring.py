"""What processes hold, to each other: over TCP, from host to host, with no device and no store between.

Each process sends to the next one and passes on what it receives from the one before, until all have everything: a
host sends and receives each item once, however many processes there are. The store of JAX's coordination service
tells where they listen. Items do not go through it: one process would hold all of them, and send them to each.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hmac
import json
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np

from retool_jax.core.errors import UserError

PLACE = 'retool_jax_ring'  # in the store: PLACE/MEMBERS/PROCESS, until its lines are there
PIECE = 2**20  # bytes of one read; of what is written the parts that are smaller go together up to so many
MEET_S = 120.0  # for a line from the process before, once all listen
ANSWER_S = 30.0  # for an answer on a new line
LENGTH = struct.Struct('<Q')  # bytes of a message, before it
HELLO = struct.Struct('<32sI')  # the token of the one that listens, and who comes


def addresses(coordinator: str, here: bool) -> list[str]:
    """Where other processes may reach this one: its end of the way to the coordinator, and a name.

    The first is 127.0.0.1 where the coordinator is on this host, and then no use to other hosts.
    coordinator: host:port. here: this process holds the coordinator, so that its host's name reaches it.
    """
    host = coordinator.rpartition(':')[0].strip('[]')
    family, kind, *_, place = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return [probe.getsockname()[0], host if here else socket.gethostname()]


class Ring:
    """Lines to the next process and from the one before; all make it at once, and then the same calls.

    client: of the coordination service. members: the processes of the ring, this one among them; of rings that have as
    many none shares a process. names: of this process (`addresses`). wait: returns when all members have called it.

    Raises: UserError where the next process cannot be reached.
    """

    def __init__(self, client, process: int, members: Sequence[int], names: Sequence[str], wait: Callable[[], None]):
        at = members.index(process)
        self.process, self._back = process, [*members[at::-1], *members[:at:-1]]  # this one, the one before, …
        self._before, self._after = self._back[1], self._back[-1]
        self._whole = True  # no exchange was left in its middle, with half a message on the lines
        self._source, self._target = self._meet(client, names, wait)
        self._writer = self._target.makefile('wb', PIECE)
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._send, name='ring', daemon=True).start()

    def gather(self, parts: Sequence[memoryview]) -> dict[int, memoryview]:
        """Gives all others a message, in parts that follow each other; returns theirs, by process.

        The parts have to stay as they are until it returns. Raises: RuntimeError where a line is closed.
        """
        if not self._whole:
            raise RuntimeError('an exchange between the processes was left in its middle')
        self._whole, found, sent = False, {}, []
        try:
            for process in self._back[1:]:
                sent.append(concurrent.futures.Future())
                self._outbox.put((parts, sent[-1]))
                message = self._receive()
                found[process] = message
                parts = [message]
            for each in sent:
                each.result()
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f'process {self.process}: the line from process {self._before} or to process {self._after} is closed '
                f'({error})'
            ) from error
        self._whole = True
        return found

    def close(self) -> None:
        """Closes the lines, which the end of the process does else."""
        for line in (self._source, self._target):
            with contextlib.suppress(OSError):  # the other end has closed it
                line.shutdown(socket.SHUT_RDWR)
            line.close()
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self._writer.close()

    def _send(self) -> None:
        while (given := self._outbox.get()) is not None:
            try:
                self._write(given[0])
                given[1].set_result(None)
            except (OSError, ValueError) as error:  # ValueError: `close` came between
                given[1].set_exception(error)
            del given  # or a message would lie here until the next one

    def _write(self, parts: Sequence[memoryview]) -> None:
        self._writer.write(LENGTH.pack(sum(part.nbytes for part in parts)))
        for part in parts:
            self._writer.write(part)
        self._writer.flush()

    def _receive(self) -> memoryview:
        (size,) = LENGTH.unpack(_read(self._source, LENGTH.size))
        return _read(self._source, size)

    def _meet(self, client, names: Sequence[str], wait: Callable[[], None]) -> tuple[socket.socket, socket.socket]:
        """The lines from the process before and to the next one; each shows the other a token out of the store."""
        family = socket.AF_INET6 if ':' in names[0] else socket.AF_INET
        own, place = secrets.token_hex(16), f'{PLACE}/{len(self._back)}'
        with socket.create_server(('', 0), family=family) as server:
            client.key_value_set(f'{place}/{self.process}', json.dumps([own, server.getsockname()[1], names]))
            wait()
            look = lambda process: json.loads(client.blocking_key_value_get(f'{place}/{process}', int(MEET_S * 1000)))
            (theirs, *_), (token, port, hosts) = look(self._before), look(self._after)
            came: concurrent.futures.Future = concurrent.futures.Future()
            expected, answer = HELLO.pack(own.encode(), self._before), theirs.encode()
            threading.Thread(target=_welcome, args=(server, expected, answer, came), daemon=True).start()
            try:
                target = self._reach(hosts, port, HELLO.pack(token.encode(), self.process), own.encode())
                source = came.result(MEET_S)
            finally:
                with contextlib.suppress(OSError):  # a closed one would go on being waited at
                    server.shutdown(socket.SHUT_RDWR)
        client.key_value_delete(f'{place}/{self.process}')  # both neighbours have read it: they are connected
        for line in (source, target):
            line.settimeout(None)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return source, target

    def _reach(self, hosts: Sequence[str], port: int, hello: bytes, answer: bytes) -> socket.socket:
        failed: OSError | None = None
        for host in hosts:
            try:
                line = socket.create_connection((host, port), ANSWER_S)
            except OSError as error:
                failed = error
                continue
            try:
                line.sendall(hello)
                if hmac.compare_digest(_read(line, len(answer)), answer):
                    return line
                failed = OSError('another program answers')
            except OSError as error:
                failed = error
            line.close()
        raise UserError(
            f'process {self.process} on {socket.gethostname()} does not reach process {self._after} at '
            f'{" or ".join(hosts)}, port {port} ({failed}); the processes of a run send each other their episodes: '
            'let their hosts reach each other by TCP, on all ports'
        )


def _welcome(server: socket.socket, expected: bytes, answer: bytes, came: concurrent.futures.Future) -> None:
    """Waits for the one who says what is `expected`; sets `came` to its line."""
    while True:
        try:
            line, _ = server.accept()
        except OSError as error:  # nobody waits any more
            came.set_exception(error)
            return
        line.settimeout(ANSWER_S)
        try:
            if hmac.compare_digest(_read(line, len(expected)), expected):
                line.sendall(answer)
                came.set_result(line)
                return
        except OSError:
            pass  # a stranger
        line.close()


def _read(line: socket.socket, size: int) -> memoryview:
    """So many bytes; OSError where the line closes before."""
    found = memoryview(np.empty(size, np.uint8))
    rest = found
    while rest:
        taken = line.recv_into(rest[:PIECE])
        if not taken:
            raise ConnectionError('closed by the other end')
        rest = rest[taken:]
    return found
