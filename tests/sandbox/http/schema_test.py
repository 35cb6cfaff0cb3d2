"""SandboxFusion's words: what of a body is refused and by which name, what is cut, and what the reply says."""

from __future__ import annotations

import base64
import json
import time

import pytest

from retool_jax.core.records import ExecResult, Verdict
from retool_jax.sandbox.http import schema
from retool_jax.sandbox.pool import Outcome

X = base64.b64encode(b'x').decode()
WRONG = {
    'code': [None, 1, True, [], {}, 1.5],
    'language': ['pytest', 'cpp', 'Python', 'python2', '', 'jupyter', 'nodejs', '🦀', '\ud800', None, 1, ['python']],
    'stdin': [1, True, [], {}],
    'files': [[], 'x', 1, None, {'a': 1}, {'a': 'é'}, {'a': '@'}, {'a': 'eA'}, {'\ud800': 1}, {'a': [X]}, {'🦀': '🦀'}],
    'fetch_files': ['a', 1, None, {}, [1], [None], [['a']]],
    'seed': [1.5, '1', True, None, [], {}],
    **{
        name: [0, -1, -1e-9, 'NaN', '1', '', True, [], {}, 10**400]
        for name in ('run_timeout', 'cpu_timeout', 'compile_timeout')
    },
    'memory_limit_MB': [0, -2, -0.5, '1', True, None, [], {}, 10**400],
}


@pytest.mark.parametrize('field, value', [(field, value) for field, values in WRONG.items() for value in values])
def test_a_field_of_a_wrong_type_or_size_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf'^{field}\b'):
        schema.read(json.dumps({'code': ''} | {field: value}).encode())


@pytest.mark.parametrize('word', ['NaN', 'Infinity', '-Infinity', '1e999', '-1e999'])
@pytest.mark.parametrize('field', ['run_timeout', 'cpu_timeout', 'compile_timeout', 'memory_limit_MB', 'seed'])
def test_numbers_that_are_none_are_refused(field, word):
    with pytest.raises(ValueError, match=rf'^{field}\b'):
        schema.read(f'{{"code": "", "{field}": {word}}}'.encode())


@pytest.mark.parametrize(
    'body',
    [
        *(b'', b'{', b'[]', b'1', b'null', b'"a"', b'\xff', b'\0', b'{"code": ""', b'{"code": ""}}', b"{'code': ''}"),
        *(b'[' * 100_000, b'{"a":' * 100_000, b'{"code": "", "seed": ' + b'9' * 5000 + b'}'),
        *(b'{"code": "\n"}', b'{"code": tru}'),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ValueError, match=r'^(the body is no JSON object|body)'):
        schema.read(body)


@pytest.mark.parametrize('language', schema.LANGUAGES)
def test_what_is_in_the_schema_is_taken(language):
    job, cut = schema.read(json.dumps({
        'code': 'é\ud800', 'language': language, 'compile_timeout': 10, 'run_timeout': 7, 'memory_limit_MB': -1,
        'stdin': None, 'files': {'a': X, 'b': None, 'c': ''}, 'fetch_files': ['a', '\ud800'], 'seed': 10**30,
        'unknown': [[{}]],
    }).encode()).job(60.0, 1024.0)  # fmt: skip
    assert (job.code, job.stdin, job.files) == ('é\ud800', b'', {'a': b'x', 'c': b''})
    assert (job.wall_s, job.cpu_s, job.memory_mb, job.fetch, cut) == (7.0, 7.0, None, ('a', '\ud800'), {})


def test_encodings_of_json_are_all_the_same():
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32'):
        assert schema.read('{"code": "é"}'.encode(encoding)).code == 'é'


def test_what_is_more_than_the_server_gives_is_cut_and_said():
    asked = {'code': '', 'run_timeout': 600, 'cpu_timeout': 90, 'memory_limit_MB': 1e300}
    job, cut = schema.read(json.dumps(asked).encode()).job(60.0, 1024.0)
    assert (job.wall_s, job.cpu_s, job.memory_mb) == (60.0, 60.0, 1024.0)
    assert cut == {'run_timeout': 60.0, 'memory_limit_MB': 1024.0, 'cpu_timeout': 60.0}
    said = schema.reply(Outcome(ExecResult(Verdict.OK, '', ''), {}), 'pod', cut)
    assert said['cut'] == cut and 'run_timeout was cut to 60' in said['message'] and 'memory_limit' in said['message']
    job, cut = schema.read(b'{"code": "", "run_timeout": 61}').job(60.0, 1024.0)
    assert cut == {'run_timeout': 60.0} and job.cpu_s == 60.0


def test_cpu_time_of_several_processes_may_exceed_wall_time():
    job, cut = schema.read(b'{"code": "", "run_timeout": 5, "cpu_timeout": 20}').job(60.0, 1024.0)
    assert (job.wall_s, job.cpu_s, cut) == (5.0, 20.0, {})


@pytest.mark.parametrize('unit', ['[],', '{},', '"a",', '1,', '{"a":[]},', '"\\\\",'])
def test_a_body_of_very_many_values_is_refused_before_it_holds_up_others(unit):
    body = ('{"code": "", "x": [' + unit * 1_000_000 + '1]}').encode()
    start = time.process_time()
    with pytest.raises(ValueError, match='more than 65536 values'):
        schema.read(body)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    'code', ['x = [{1,2}, "a"]\n' * 100_000, '\\"[,' * 500_000, '"' * 400_000 + ',' * 100_000, '"\\']
)
def test_what_stands_within_the_code_is_not_counted(code):
    assert schema.read(json.dumps({'code': code}).encode()).code == code


def test_an_unfinished_string_is_refused_in_linear_time():
    start = time.process_time()
    with pytest.raises(ValueError, match='no JSON object'):
        schema.read(b'{"code": "' + b'\\",' * 1_000_000)
    assert time.process_time() - start < 2.0
