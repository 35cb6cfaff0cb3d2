"""Processes give each other what they hold, over lines between hosts; here they are threads of one process."""

import concurrent.futures
import contextlib
import json
import socket
import threading

import numpy as np
import pytest
from jax._src.lib import _jax

from retool_jax.core import columns, ring
from retool_jax.core.errors import UserError
from retool_jax.core.ring import Ring, addresses
from tests import several
from tests.core import gather_run


@contextlib.contextmanager
def clients(count: int):
    """So many clients of one coordination service."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    service = _jax.get_distributed_runtime_service(address, count)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        found = [_jax.get_distributed_runtime_client(address, i) for i in range(count)]
        list(pool.map(lambda client: client.connect(), found))
        yield address, found
        list(pool.map(lambda client: client.shutdown(), found))
    service.shutdown()


@contextlib.contextmanager
def made(count: int):
    """The rings of so many processes, and threads that they run in."""
    barrier = threading.Barrier(count)
    with clients(count) as (address, found), concurrent.futures.ThreadPoolExecutor(count) as pool:
        make = lambda i: Ring(found[i], i, range(count), addresses(address, i == 0), barrier.wait)
        rings = list(pool.map(make, range(count)))
        assert not found[0].key_value_dir_get(f'{ring.PLACE}/')  # what they met by is out of the store
        yield rings, pool
        for each in rings:
            each.close()


def gathered(rings, pool, items) -> list[dict]:
    """What each process has of the others."""
    one = lambda i: {k: columns.join(m) for k, m in rings[i].gather(columns.split(items[i])).items()}
    return list(pool.map(one, range(len(rings))))


@pytest.mark.parametrize('count', [2, 3, 5])
def test_all_have_what_each_gave_whatever_its_size(count):
    rng = np.random.default_rng(0)
    with made(count) as (rings, pool):
        for size in (0, 1, 1000, 3 * ring.PIECE):  # more than the lines themselves hold, in the end
            items = [(i, rng.integers(0, 2**31, size * (i + 1)), 'x' * i) for i in range(count)]
            for process, found in enumerate(gathered(rings, pool, items)):
                assert found.keys() == set(range(count)) - {process}
                for other, (i, array, text) in found.items():
                    assert (i, text) == (other, 'x' * other)
                    np.testing.assert_array_equal(array, items[other][1])


def test_the_others_are_told_when_one_is_gone_and_an_exchange_left_in_its_middle_is_not_taken_up():
    with made(3) as (rings, pool):
        assert gathered(rings, pool, 'abc')[0] == {1: 'b', 2: 'c'}
        waiting = [pool.submit(rings[i].gather, columns.split(i)) for i in (0, 2)]
        rings[1].close()
        with pytest.raises(RuntimeError, match='process 2: the line from process 1 or to process 0 is closed'):
            waiting[1].result(60)
        rings[2].close()  # a process ends with that error
        with pytest.raises(RuntimeError, match='process 0: the line from process 2 or to process 1 is closed'):
            waiting[0].result(60)
        with pytest.raises(RuntimeError, match='left in its middle'):
            rings[0].gather([])


def test_a_stranger_on_the_port_is_sent_away():
    barrier = threading.Barrier(2)
    with clients(2) as (address, found), concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(Ring, found[0], 0, (0, 1), addresses(address, True), barrier.wait)
        own, port, names = json.loads(found[1].blocking_key_value_get(f'{ring.PLACE}/2/0', 60_000))
        assert names[0] == '127.0.0.1'
        strangers = [socket.create_connection((names[0], port), 60) for _ in range(2)]
        strangers[0].sendall(ring.HELLO.pack(b'0' * 32, 1))  # not its token
        strangers[1].sendall(ring.HELLO.pack(own.encode(), 0))  # nor who is waited for
        rings = [Ring(found[1], 1, (0, 1), addresses(address, False), barrier.wait), first.result(60)][::-1]
        for stranger in strangers:
            with stranger:
                assert stranger.recv(1) == b''
        assert gathered(rings, pool, 'ab') == [{1: 'b'}, {0: 'a'}]
        for each in rings:
            each.close()


def test_a_process_that_cannot_be_reached_is_named():
    with clients(2) as (_, found), socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))  # and does not listen
        port = silent.getsockname()[1]
        found[0].key_value_set(f'{ring.PLACE}/2/1', json.dumps(['1' * 32, port, ['127.0.0.1', 'localhost']]))
        with pytest.raises(UserError) as refused:
            Ring(found[0], 0, (0, 1), ['127.0.0.1'], lambda: None)
    place = f'at 127.0.0.1 or localhost, port {port}'
    assert str(refused.value).startswith(f'process 0 on {socket.gethostname()} does not reach process 1 {place} (')
    assert '\n' not in str(refused.value)


def test_rings_of_a_part_of_the_processes_and_of_all_keep_apart():
    barrier = threading.Barrier(4)
    with clients(4) as (address, found), concurrent.futures.ThreadPoolExecutor(4) as pool:
        make = lambda i, members: Ring(found[i], i, members, addresses(address, i == 0), barrier.wait)
        pairs = list(pool.map(make, range(4), [(0, 1), (0, 1), (2, 3), (2, 3)]))
        whole = list(pool.map(make, range(4), [range(4)] * 4))
        assert gathered(pairs, pool, 'abcd') == [{1: 'b'}, {0: 'a'}, {3: 'd'}, {2: 'c'}]
        assert gathered(whole, pool, 'abcd')[2] == {0: 'a', 1: 'b', 3: 'd'}
        for each in pairs + whole:
            each.close()


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 3])
def test_real_processes_hold_all_episodes_in_the_memory_of_their_columns(count, tmp_path):
    several.run(count, ['tests.core.gather_run', '1024', '10000', str(tmp_path)], devices=count)
    expected = gather_run.digest([gather_run.make(i, 10_000) for i in range(1024)])
    for path in sorted(tmp_path.iterdir()):
        found = json.loads(path.read_text())
        assert found['digest'] == expected
        assert found['columns'] == 1024 * 10_000 * 13
        assert found['peak'] - found['before'] < 1.5 * found['columns'] / 2**20
    assert len(list(tmp_path.iterdir())) == count
