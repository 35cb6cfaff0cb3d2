"""What the processes of a run tell each other without a collective: a signal, an end, a death.

Each writes into the store of JAX's coordination service and looks there for what the others wrote: no process can be
waiting in a collective for one that is at its end. A connection of every process to the one that leads tells of deaths:
the kernel closes it, whatever ended a process. A host that is gone closes nothing, and JAX's heartbeats tell.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from retool_jax.core import signals

PLACE = 'retool_jax'  # in the store: NAME/stop/PROCESS, NAME/gone/PROCESS
TICK_S = 0.5  # between two looks: some 1,000 a second where 512 processes ask
LEFT_S = 8.0  # from another one's end to one's own, for what is being written
NEWS_S = 4.0  # in which a failure may turn out to be another process's death
SERVER, NAMELESS = -2, -1  # what a connection is, where it is not that of a process
DIED = 75  # exit status where another process died without a word: EX_TEMPFAIL, it may work next time


class Others:
    """A thread that hears of the other processes, and what is told them.

    client: of the coordination service. wait: returns when all processes have called it.
    """

    def __init__(self, client, process: int, count: int, coordinator: str, wait: Callable[[], None]):
        self.client, self.process, self.count, self.wait = client, process, count, wait
        self.host = coordinator.rpartition(':')[0].strip('[]')
        self.name = f'process {process} on {socket.gethostname()}'
        self.watch = signals.watch
        self.names = {0: f'process 0 on {self.host}'}  # of those that are connected
        self.gone: dict[int, tuple[int, str]] = {}  # others that have ended: (exit status, line)
        self._told = self._leaving = False
        self._over, self._token = threading.Event(), secrets.token_hex(8)
        self._lines = selectors.DefaultSelector()

    def attend(self) -> None:
        """Begins to listen; every process calls it."""
        self._connect()
        self.watch.farewell = self.leave
        self._thread = threading.Thread(target=self._listen, name='others', daemon=True)
        self._thread.start()

    def leave(self, status: int, line: str, text: str = '') -> None:
        """Tells the others that this process ends; with status 0 it returns when all have come as far.

        With another status they end too, within LEFT_S, and `text` is printed. Where this end follows from another
        one's, the process ends here with that one's line instead.
        """
        if status == 0:
            self.wait()  # the one that leads holds the store: with it the others would lose everything
            self._over.set()
            self._thread.join()  # its connections stay open: closed ones would be taken for a death
            return
        if status == 1:  # a collective that failed, perhaps
            self.hear(NEWS_S)
            if self.gone:
                status, line = self._cause()
        self._leaving, caused = True, bool(self.gone) and (status, line) == self._cause()
        if text and not caused:
            print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that leads
            self._put('gone', [status, f'{self.name}: {line}'])
            until = time.monotonic() + LEFT_S + 1
            while self.process == 0 and len(self._news()['gone']) < self.count and time.monotonic() < until:
                time.sleep(TICK_S / 5)  # they hear of it from here
        if caused:
            signals.end(status, line)

    def hear(self, seconds: float) -> None:
        """Returns once another process's end is known, or after so long."""
        until = time.monotonic() + seconds
        while not self.gone and time.monotonic() < until:
            time.sleep(TICK_S / 5)

    def close(self) -> None:
        """Closes its connections, which the end of the process does else: the others take it for a death before."""
        for key in list(self._lines.get_map().values()):
            key.fileobj.close()
        self._lines.close()

    def _cause(self) -> tuple[int, str]:
        return next(iter(self.gone.values()))

    def _put(self, what: str, value: Any, process: int | None = None) -> None:
        process = self.process if process is None else process
        self.client.key_value_set(f'{PLACE}/{what}/{process}', json.dumps(value), allow_overwrite=True)

    def _news(self) -> dict[str, dict[int, Any]]:
        """What all have told: {'stop': {process: signal}, 'gone': {process: [exit status, line]}}."""
        found: dict[str, dict[int, Any]] = {'stop': {}, 'gone': {}}
        for key, text in self.client.key_value_dir_get(f'{PLACE}/'):
            _, what, process = key.split('/')
            found[what][int(process)] = json.loads(text)
        return found

    def _listen(self) -> None:
        while not self._over.is_set():
            closed = [key for key, _ in self._lines.select(TICK_S)]
            with contextlib.suppress(RuntimeError, OSError):  # no answer from the store: the next look will tell
                for key in closed:
                    self._hear(key)
                self._look()

    def _look(self) -> None:
        """Passes signals on in both directions, and hears of ends."""
        number = self.watch.number
        if number and not self._told:
            self._told = True
            self._put('stop', int(number))
        news = self._news()
        told = max(news['stop'].values(), default=0)
        if told and not self.watch.number:
            # To the main thread itself, which may be in a call that only a signal of its own interrupts.
            signal.pthread_kill(threading.main_thread().ident, told)
        for process, (status, line) in news['gone'].items():
            if process != self.process and process not in self.gone:
                self._bury(process, status, line)

    def _bury(self, process: int, status: int, line: str) -> None:
        self.gone[process] = status, line
        if not self._leaving:
            self.watch.end_within(LEFT_S, status, line)

    def _connect(self) -> None:
        """A connection between the one that leads and every other one; where none can be made, heartbeats must do."""
        if self.process == 0:
            server = socket.create_server(('', 0), backlog=self.count)
            self._lines.register(server, selectors.EVENT_READ, SERVER)
            self.client.key_value_set(f'{PLACE}_line', json.dumps([server.getsockname()[1], self._token]))
            return
        port, token = json.loads(self.client.blocking_key_value_get(f'{PLACE}_line', 60_000))
        with contextlib.suppress(OSError):
            line = socket.create_connection((self.host, port), timeout=NEWS_S)
            line.sendall(json.dumps([token, self.process, self.name]).encode())
            self._lines.register(line, selectors.EVENT_READ, 0)

    def _hear(self, key: selectors.SelectorKey) -> None:
        """A new connection, the first words on one, or its end."""
        if key.data == SERVER:
            self._lines.register(key.fileobj.accept()[0], selectors.EVENT_READ, NAMELESS)
            return
        words = b''
        with contextlib.suppress(OSError):
            words = key.fileobj.recv(4096)
        if words and key.data == NAMELESS:
            with contextlib.suppress(ValueError):
                token, process, name = json.loads(words)
                if token == self._token:
                    self.names[process] = name
                    self._lines.modify(key.fileobj, selectors.EVENT_READ, process)
        elif not words:
            self._lines.unregister(key.fileobj)
            key.fileobj.close()
            if key.data >= 0:
                self._miss(key.data)

    def _miss(self, process: int) -> None:
        """The connection of a process is closed: it has said that it ends, or it died."""
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that leads
            self._look()
        if process in self.gone or self._over.is_set():
            return
        line = f'{self.names[process]} died'
        self._bury(process, DIED, line)
        if process:
            self._put('gone', [DIED, line], process)
        else:  # JAX ends this process in a moment, with its stack
            self.watch.end_within(0, DIED, line)
