"""What is handed in is checked there: the field and the reason, before anything runs; what is a number is taken."""

from __future__ import annotations

import decimal
import fractions
import json
import math

import numpy as np
import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox.frames import SIZES
from retool_jax.sandbox.job import Job
from retool_jax.sandbox.pool import Pool
from tests.sandbox.given import tiny

SMALL = tiny(scratch_mb=1, scratch_inodes=16, memory_mb=64)


def read(frame: bytes) -> tuple[dict, bytes]:
    """Header and payload of a frame."""
    size, payload = SIZES.unpack_from(frame)
    assert len(frame) == SIZES.size + size + payload
    return json.loads(frame[SIZES.size : SIZES.size + size]), frame[SIZES.size + size :]


@pytest.mark.parametrize(
    'fields, word',
    [
        ({'code': b'print(1)'}, 'code'),
        ({'code': None}, 'code'),
        ({'code': 'x' * (65 << 20)}, 'code'),
        ({'stdin': 'text'}, 'stdin'),
        ({'stdin': None}, 'stdin'),
        ({'stdin': b'x' * (1 << 20) + b'y'}, 'stdin'),
        *[({name: value}, name) for name in ('cpu_s', 'wall_s', 'memory_mb')
          for value in (math.nan, math.inf, -math.inf, -1.0, 0, 1e300, 10**400, '1', b'1', True, 1j, [1],
                        np.float32('nan'), np.array([1, 2]), {})],
        *[({'seed': value}, 'seed') for value in (1.5, math.nan, '1', None, np.float64(1))],
        ({'files': [('a', b'')]}, 'files'),
        ({'files': {'a': 'text'}}, "'a'"),
        ({'files': {'a': None}}, "'a'"),
        *[({'files': {name: b''}}, 'files') for name in (
            '', '.', '..', '/', '/box', '/box/', '../x', '/etc/passwd', '/python/x', '//box/x', 'a/../../x', 'a/',
            'a/.', 'a/..', 'a\0b', '\ud800', 'a/\udc80', 'x' * 256, 'é' * 128, '/'.join(['x' * 200] * 21), b'a', 1,
            None)],
        ({'files': {'a': b'', 'a/b': b''}}, 'directory'),
        ({'files': {'a/b/c': b'', 'a/b': b''}}, 'directory'),
        ({'files': {'a': b'', './a': b''}}, 'second'),
        ({'files': {f'f{i}': b'' for i in range(16)}}, 'directories'),
        ({'files': {'/'.join('abcdefghijklmnop'): b''}}, 'directories'),
        ({'files': {f'f{i}': b'x' * 4097 for i in range(13)}, 'stdin': b'x' * 1_000_000}, 'MiB'),
        ({'files': {'a': b'x' * 600_000}, 'memory_mb': 0.5}, 'room for 0.5 MiB'),
        ({'fetch': 'name'}, 'fetch'),
        ({'fetch': None}, 'fetch'),
        ({'fetch': (1,)}, 'fetch'),
        ({'fetch': (b'a',)}, 'fetch'),
        ({'fetch': tuple(map(str, range(1025)))}, '1024'),
        ({'fetch': ('a/' * 20_000,)}, '16384'),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_by_its_field(fields, word):
    with pytest.raises(ValueError) as caught:
        Job(**{'code': ''} | fields).frame(0, SMALL)
    assert word in str(caught.value) and len(str(caught.value)) < 300 and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'value',
    [2, 2.0, np.float32(2), np.float64(2), np.int8(2), np.array(2.0), fractions.Fraction(2), decimal.Decimal(2)],
)
def test_every_number_is_a_number(value):
    header, _ = read(Job(code='', cpu_s=value, wall_s=value, memory_mb=value).frame(7, SMALL))
    assert (header['cpu_s'], header['wall_s'], header['memory_mb'], header['id']) == (2.0, 2.0, 2.0, 7)


def test_a_frame_holds_each_byte_once():
    job = Job(code='é\ud800', stdin=bytearray(b'\0\xff'), files={'d/a': b'12', '/box/b': memoryview(b'3')},
              seed=np.int64(-1), fetch=['a', 'b', 'a', 'a\0b', '\ud800'])  # fmt: skip
    header, payload = read(job.frame(0, SMALL))
    assert payload == 'é\ud800'.encode('utf-8', 'surrogatepass') + b'\0\xff123'
    assert header['files'] == [['/box/d/a', 2], ['/box/b', 1]] and header['seed'] == 2**32 - 1
    assert header['fetch'] == ['a', 'b', 'a\0b', '\ud800']


def test_fifteen_files_and_one_page_less_than_all_fit():
    Job(code='', files={f'f{i}': b'x' * 4096 for i in range(15)}).frame(0, SMALL)
    Job(code='', files={'f': b'x' * (1 << 20)}).frame(0, SMALL)


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_files_that_just_fit_can_be_written(path):
    full = Job(code='import os\nprint(len(os.listdir()), len(input()))',
               files={f'f{i}': b'x' * 4096 for i in range(14)}, stdin=b'y' * (242 * 4096))  # fmt: skip
    with Pool(tiny(path=path, zygotes=1, spares=1, concurrency=1, scratch_mb=1, scratch_inodes=16)) as pool:
        result = pool.submit_job(full).result(60).result
        assert (result.verdict, result.stdout) == (Verdict.OK, f'14 {242 * 4096}\n'), result.stderr


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_every_name_is_free_for_the_snippets_own_files(path, pools):
    names = ['.stdin', ' ', '-rf', 'a\nb', 'é🦀', '..a', 'x' * 255, 'tmp', 'json.py/x']
    job = Job(code='import os\nprint(input(), sorted(os.listdir()) == sorted(' f'{names[:-1]} + ["json.py"]))',
              files={n: n.encode() for n in names}, stdin=b'in\n', fetch=names)  # fmt: skip
    outcome = pools(path).submit_job(job).result(60)
    assert outcome.result.stdout == 'in True\n', outcome.result.stderr
    assert outcome.files == {n: n.encode() for n in names}


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_names_that_no_file_can_have_are_not_found_and_cost_nothing(path, pools):
    pool = pools(path)
    lost = pool.stats().get('retried', 0)
    job = Job(code='open("a", "w").write("1")', fetch=('a\0b', '\ud800', 'x' * 9999, '', '.', '/', '../a', 'a'))
    outcome = pool.submit_job(job).result(60)
    assert (outcome.result.verdict, outcome.files) == (Verdict.OK, {'a': b'1'})
    assert pool.stats().get('retried', 0) == lost


def test_a_snippet_with_refused_fields_leaves_the_pool_as_it_was(pools):
    pool = pools('warm')
    before = pool.stats()
    for fields in ({'memory_mb': math.nan}, {'code': b''}, {'files': {'../x': b''}}, {'fetch': ('a',) * 3 + (None,)}):
        with pytest.raises(ValueError):
            pool.submit_job(Job(**{'code': 'print(1)'} | fields))
    assert pool.stats() == before
