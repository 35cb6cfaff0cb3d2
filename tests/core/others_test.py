"""Processes hear of each other's signals, ends and deaths, over the coordination service itself."""

import concurrent.futures
import queue
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from jax._src.lib import _jax

from retool_jax.core import processes, signals
from retool_jax.core.others import DIED, Others
from retool_jax.core.signals import Terminated, uninterrupted


@pytest.fixture
def pair():
    """Two processes' ends, both in this process; `watch.ends` has what a process would be ended with."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    service = _jax.get_distributed_runtime_service(address, 2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        clients = [_jax.get_distributed_runtime_client(address, i) for i in range(2)]
        list(pool.map(lambda client: client.connect(), clients))
        both = [Others(client, i, 2, address, lambda: None) for i, client in enumerate(clients)]
        for others in both:
            ends = queue.SimpleQueue()
            others.watch = SimpleNamespace(number=0, farewell=None, ends=ends, end_within=lambda *a, to=ends: to.put(a))
        list(pool.map(lambda others: others.attend(), both))
        while len(both[0].names) < 2:  # the second has said who it is
            time.sleep(0.01)
        yield both
        for others in both:
            others.leave(0, '')
        for others in both:
            others.close()
        list(pool.map(lambda client: client.shutdown(), clients))
    service.shutdown()


def test_a_signal_to_one_process_is_heard_by_the_main_thread_of_the_other(pair):
    with pytest.raises(Terminated), uninterrupted():
        pair[1].watch.number = signal.SIGTERM
        while not signals.told():
            time.sleep(0.01)
        pair[0].watch.number = signals.told()  # as the real one does
        processes.agree([0, signals.told()])


def test_the_end_of_one_process_ends_the_other_with_its_line(pair):
    pair[1].leave(2, 'error: no such thing')
    seconds, status, line = pair[0].watch.ends.get(timeout=60)
    assert seconds <= 10 and status == 2
    assert line == f'process 1 on {socket.gethostname()}: error: no such thing'


@pytest.mark.parametrize('dead', [0, 1])
def test_a_process_whose_connection_closes_without_a_word_has_died(pair, dead):
    (line,) = (key.fileobj for key in pair[dead]._lines.get_map().values() if key.data >= 0)
    line.shutdown(socket.SHUT_RDWR)
    _, status, text = pair[1 - dead].watch.ends.get(timeout=60)
    assert status == DIED and text == f'process {dead} on {("127.0.0.1", socket.gethostname())[dead]} died'


def test_all_stop_where_any_is_told_and_in_the_same_way():
    processes.agree([0, 0])
    with pytest.raises(KeyboardInterrupt) as stop:
        processes.agree([0, signal.SIGINT, 0])
    assert stop.type is KeyboardInterrupt
    for numbers in ([signal.SIGTERM, signal.SIGINT], [signal.SIGINT, 0, signal.SIGTERM]):
        with pytest.raises(Terminated):
            processes.agree(numbers)
    assert processes.word([signal.SIGTERM, False]) == [signal.SIGTERM, False]
    assert threading.current_thread() is threading.main_thread()
