"""Signals wait for the end of what must not be cut in two, and are not lost."""

import signal
import threading

import pytest

from retool_jax.core.cli import Terminated
from retool_jax.core.signals import uninterrupted


def terminate(signum, frame):
    raise Terminated


@pytest.fixture(autouse=True)
def as_the_door_does():
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(('number', 'kind'), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_takes_effect_when_the_block_is_over(number, kind):
    done = []
    with pytest.raises(KeyboardInterrupt) as stop, uninterrupted():
        signal.raise_signal(number)
        signal.raise_signal(number)
        done.append(1)
    assert done == [1] and stop.type is kind
    with pytest.raises(kind):  # the handler from before is back
        signal.raise_signal(number)


def test_without_a_signal_nothing_happens_and_errors_pass():
    with uninterrupted():
        pass
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError


def test_other_threads_do_their_work():
    done = []

    def work():
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
