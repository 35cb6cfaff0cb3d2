"""Signals wait for the end of what must not be cut in two, and are not lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retool_jax.core import signals
from retool_jax.core.cli import ROOT
from retool_jax.core.signals import Terminated, uninterrupted

# The main thread is in a call that takes minutes and lets no handler run, as a compilation does.
COMPILING = """
import hashlib
from retool_jax.core import cli
def main():
    print('begun', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
cli.run_plain(main)
"""


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


@pytest.mark.parametrize(('number', 'kind'), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_block_that_asks_stops_itself_and_hears_of_nothing_twice(number, kind):
    with pytest.raises(KeyboardInterrupt) as stop, uninterrupted():
        assert signals.told() == 0
        with uninterrupted():
            signal.raise_signal(number)
        assert signals.told() == number  # the inner block is over, the outer one is not
        raise signals.stop(signals.told())
    assert stop.type is kind and signals.told() == 0
    with uninterrupted():
        assert signals.told() == 0


@pytest.mark.parametrize(('sent', 'status', 'line'), [
    ([signal.SIGTERM], 143, 'stopped by SIGTERM; what ran then has not come to an end within 0.5 s'),
    pytest.param([signal.SIGINT, signal.SIGINT], 130, 'interrupted twice', marks=pytest.mark.slow),
])  # fmt: skip
def test_a_process_whose_main_thread_hears_nothing_ends_all_the_same(sent, status, line):
    child = subprocess.Popen(
        [sys.executable, '-c', COMPILING], cwd=ROOT, env=os.environ | {signals.GRACE: '5.5'}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout.readline() == 'begun\n'
    ticks = lambda: int(Path(f'/proc/{child.pid}/stat').read_text().split()[13])
    began = ticks()
    while ticks() < began + 10:  # 0.1 s of computing
        time.sleep(0.01)
    for number in sent:
        child.send_signal(number)
        time.sleep(1.1 * signals.TWICE_S * (len(sent) > 1))
    _, written = child.communicate(timeout=60)
    assert (child.returncode, written) == (status, f'{line}\n')


def test_ctrl_c_that_was_held_back_for_long_is_not_taken_for_a_second_one():
    script = (
        'import signal, time\nfrom retool_jax.core import signals\nsignals.TWICE_S = 0.0\n'
        'def stop(number, frame):\n    raise signals.stop(number)\n'
        'signals.listen(stop)\n'
        'with signals.Watch(5.0):\n    try:\n        with signals.uninterrupted():\n'
        '            signal.raise_signal(signal.SIGINT)\n            time.sleep(0.3)\n'
        '    except KeyboardInterrupt:\n        time.sleep(0.3)\n        print("saved")\n'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, 'saved\n'), done.stderr


@pytest.mark.parametrize('text', ['soon', '5', '-1', 'nan'])
def test_a_grace_that_leaves_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(signals.GRACE, text)
    with pytest.raises(ValueError, match=f"^RETOOL_GRACE_S='{text}': expected seconds, more than 5"):
        signals.grace()
