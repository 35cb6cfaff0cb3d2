"""The fakes keep the promises that other tests build on."""

import time

import pytest

from retool_jax.core.records import ExecResult, Verdict
from retool_jax.text.tokenizer import check_exact
from tests import fakes


def test_the_byte_tokenizer_is_byte_exact():
    check_exact(fakes.byte_tokenizer())


def test_the_fake_pool_answers_from_a_script():
    failed = ExecResult(Verdict.TIMEOUT, '', '')
    pool = fakes.FakePool({'print(1)': '1\n', 'while True: pass': failed})
    futures = [pool.submit(code) for code in ('print(1)', 'while True: pass', 'unknown')]
    assert [f.result(0).verdict for f in futures] == [Verdict.OK, Verdict.TIMEOUT, Verdict.ERROR]
    assert futures[0].result(0).stdout == '1\n'
    assert pool.codes == ['print(1)', 'while True: pass', 'unknown']


def test_the_fake_pool_may_compute_its_answers_and_fail():
    pool = fakes.FakePool(lambda code: str(len(code)))
    assert pool.submit('abc').result(0).stdout == '3'

    def broken(code):
        raise ConnectionError(code)

    with pytest.raises(ConnectionError, match='abc'):
        fakes.FakePool(broken).submit('abc').result(0)


def test_slow_answers_arrive_later_and_out_of_order():
    pool = fakes.FakePool(str.upper, latency_s={'slow': 0.2, 'quick': 0.01}.get)
    slow, quick = pool.submit('slow'), pool.submit('quick')
    assert not slow.done()
    assert quick.result(5).stdout == 'QUICK' and slow.result(5).stdout == 'SLOW'
    begun = time.monotonic()
    fakes.FakePool(str.upper, latency_s=0.1).submit('x').result(5)
    assert time.monotonic() - begun >= 0.09
