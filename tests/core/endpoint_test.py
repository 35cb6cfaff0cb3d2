"""A server that misbehaves: nothing is lost, and nothing that was answered is asked for again."""

import email.utils
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retool_jax.core.answers import Answer, Failure, Request, Store
from retool_jax.core.endpoint import FAILURES, Endpoint
from retool_jax.core.errors import UserError
from tests.core.endpoint_server import Cut, Raw, Refuses, Says, Server, Silence, Status, make_settings, serve

ROOT = Path(__file__).parents[2]


def chat(word: str, candidate: int = 0, **parameters) -> Request:
    return Request(messages=[{'role': 'user', 'content': word}], parameters=parameters, candidate=candidate)


def word_of(asked: dict) -> str:
    return asked['messages'][0]['content']


def ask(server: Server | str, directory, requests, **changes) -> tuple[list, Endpoint]:
    url = server if isinstance(server, str) else server.url
    with Endpoint(make_settings(url, **changes), directory) as endpoint:
        return list(endpoint.answers(requests)), endpoint


def contents(directory: Path) -> dict:
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob('*') if p.is_file()}


def test_answers_come_in_the_order_of_the_requests_and_are_kept(tmp_path):
    delays = random.Random(0)
    with serve(lambda asked, tries: Says(word_of(asked).upper(), after_s=delays.random() * 0.02)) as server:
        requests = [chat(f'word {i}') for i in range(40)]
        answers, endpoint = ask(server, tmp_path / 'a', requests)
        assert [a.text for a in answers] == [f'WORD {i}' for i in range(40)]
        assert {a.finish for a in answers} == {'stop'} and answers[0].completion_tokens == len('WORD 0')
        assert 1 < server.most <= 8 and endpoint.counts.answered == 40 and endpoint.counts.retried == 0
        again, endpoint = ask(server, tmp_path / 'a', requests)
        assert again == answers and endpoint.counts.kept == 40 and sum(server.asked.values()) == 40
        turned, _ = ask(server, tmp_path / 'b', requests[::-1])
        assert turned == answers[::-1] and contents(tmp_path / 'a') == contents(tmp_path / 'b')
        assert len(contents(tmp_path / 'a')) == 40


def test_what_is_sent_is_the_request_with_its_parameters_and_no_more(tmp_path):
    with serve(lambda asked, tries: Says('.')) as server:
        ask(
            server,
            tmp_path,
            [chat('a', 3, temperature=0.5, top_k=7), Request(prompt=(5, 6), parameters={'stop': ['x']})],
        )
        sent = sorted(server.bodies, key=lambda body: 'prompt' in body)
        common = {'model': 'tested', 'stream': True, 'stream_options': {'include_usage': True}}
        messages = [{'role': 'user', 'content': 'a'}]
        assert sent[0] == common | {'messages': messages, 'temperature': 0.5, 'top_k': 7}
        assert sent[1] == common | {'prompt': [5, 6], 'stop': ['x']}
        assert sorted(server.paths) == ['/v1/chat/completions', '/v1/completions']


def test_candidates_and_parameters_are_answers_of_their_own(tmp_path):
    number = itertools.count()
    with serve(lambda asked, tries: Says(str(next(number)))) as server:
        requests = [chat('a'), chat('a', 1), chat('a', 2), chat('a', temperature=1), chat('b')]
        first, _ = ask(server, tmp_path, requests)
        assert len({a.text for a in first}) == 5
        assert ask(server, tmp_path, requests)[0] == first
        assert ask(server, tmp_path / 'other', requests, model='another')[0] != first
        twice, _ = ask(server, tmp_path / 'twice', [chat('a'), chat('a')])  # asked for once, on its way or on disk
        assert twice[0] == twice[1] and sum(server.asked.values()) == 11


# Each misbehaves at first and answers in the end.
PASSING = {
    '429': lambda tries: Status(429) if tries < 2 else None,
    '429 with seconds': lambda tries: Status(429, {'Retry-After': '0.02'}) if tries < 2 else None,
    '500': lambda tries: Status(500, body='<html>oh</html>') if tries < 1 else None,
    '503 and 502': lambda tries: [Status(503), Status(502), None][min(tries, 2)],
    'a cut body': lambda tries: Cut('half of i') if tries < 1 else None,
    'a stream that ends early': lambda tries: Cut('half of i', cleanly=True) if tries < 1 else None,
    'a closed connection': lambda tries: Refuses() if tries < 2 else None,
    'no JSON': lambda tries: Raw(('{"choices": [{', '[DONE]')) if tries < 1 else None,
    'another JSON': lambda tries: Raw(('[1, 2]', '"text"', '{"choices": 5}', '[DONE]')) if tries < 1 else None,
    'an error in the stream': lambda tries: Raw(('{"error": {"message": "out of memory"}}',)) if tries < 1 else None,
    'an answer that was given up': lambda tries: Says('half', finish='abort') if tries < 1 else None,
    'silence': lambda tries: Silence(20.0) if tries < 1 else None,
    'silence in the middle': lambda tries: Silence(20.0, 'half of i') if tries < 1 else None,
}


@pytest.mark.parametrize('case', PASSING)
def test_what_passes_is_asked_again_until_it_is_answered(case, tmp_path):
    with serve(lambda asked, tries: PASSING[case](tries) or Says(f'whole {word_of(asked)}')) as server:
        requests = [chat(str(i)) for i in range(6)]
        answers, endpoint = ask(server, tmp_path, requests, timeout_s=1.0)
        assert [a.text for a in answers] == [f'whole {i}' for i in range(6)]
        assert endpoint.counts.retried >= 6 and endpoint.counts.failed == 0
        before = sum(server.asked.values())
        assert ask(server, tmp_path, requests)[0] == answers and sum(server.asked.values()) == before
        assert set(server.answered.values()) <= {1} or case == 'an answer that was given up'


def test_all_of_it_at_once_loses_nothing_and_asks_nothing_twice(tmp_path):
    """A mixture by the request's own hash, so that every try of every request is known beforehand."""
    faults = [
        Status(429), Status(429, {'Retry-After': '0.01'}), Status(500), Cut('ha'), Cut('ha', cleanly=True), Refuses(),
        Raw(('nonsense',)), Silence(20.0), Silence(20.0, 'ha'),
    ]  # fmt: skip
    ends = [Says('fine'), Says(''), Says('', finish='content_filter'), Says('long', finish='length'),
            Says('', refusal='I will not'), Says('untold', usage=False)]  # fmt: skip

    def script(asked, tries):
        draw = random.Random(f'{word_of(asked)}/{tries}')
        return draw.choice(faults) if tries < draw.randrange(3) else ends[int(word_of(asked)) % len(ends)]

    with serve(script) as server:
        requests = [chat(str(i)) for i in range(60)]
        answers, endpoint = ask(server, tmp_path, requests, timeout_s=1.0)
        expected = [('fine', 'stop'), ('', 'stop'), ('', 'content_filter'), ('long', 'length'),
                    ('I will not', 'refusal'), ('untold', 'stop')]  # fmt: skip
        assert [(a.text, a.finish) for a in answers] == expected * 10
        assert endpoint.counts.answered == 60 and endpoint.counts.retried > 15
        assert set(server.answered.values()) == {1} and len(server.answered) == 60
        ask(server, tmp_path, requests)
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize('dated', [False, True])
def test_a_servers_own_patience_is_heeded_by_all_requests(dated, tmp_path):
    after = {}

    def script(asked, tries):
        now = time.time()
        if not after:
            after['at'] = now + 1.5
            value = email.utils.formatdate(now + 2.5, usegmt=True) if dated else '1.5'  # a date has whole seconds
            return Status(429, {'Retry-After': value})
        return Says('early' if now < after['at'] else 'late')

    with serve(script) as server:
        answers, endpoint = ask(server, tmp_path, [chat(str(i)) for i in range(3)], concurrency=1)
        assert [a.text for a in answers] == ['late'] * 3 and endpoint.counts.retried == 1


def test_a_limited_server_that_answers_others_is_not_given_up(tmp_path):
    """Of many requests at once it takes one, again and again: more refusals than tries, and every request answered."""
    gate = threading.Lock()

    def script(asked, tries):
        if not gate.acquire(blocking=False):
            return Status(429)
        try:
            return Says('taken', after_s=0.02)
        finally:
            gate.release()

    with serve(script) as server:
        answers, endpoint = ask(server, tmp_path, [chat(str(i)) for i in range(24)], retries=2, concurrency=12)
        assert all(isinstance(a, Answer) for a in answers) and endpoint.counts.failed == 0


@pytest.mark.parametrize(
    'status, words',
    [
        (401, 'refuses a request without a key 401 key_variable'),
        (403, '403'),
        (404, '404 /v1 so it is'),
        (402, 'nothing left'),
        (307, 'sends requests on elsewhere'),
    ],
)
def test_what_no_request_would_survive_ends_the_run_at_once(status, words, tmp_path):
    with serve(lambda asked, tries: Status(status, {'Location': 'http://elsewhere/v1'})) as server:
        with pytest.raises(UserError) as caught:
            ask(server, tmp_path, [chat(str(i)) for i in range(20)], concurrency=1)
        assert all(word in str(caught.value) for word in words.split()), caught.value
        assert sum(server.asked.values()) == 1 and '\n' not in str(caught.value) and not contents(tmp_path)


def test_a_quota_that_is_used_up_is_not_waited_for(tmp_path):
    poor = Status(429, body={'error': {'message': 'pay', 'code': 'insufficient_quota'}})
    with serve(lambda asked, tries: poor) as server, pytest.raises(UserError, match='nothing left'):
        ask(server, tmp_path, [chat('a')])


def test_a_refused_request_is_the_failure_of_that_one_alone(tmp_path):
    long = lambda asked, tries: (
        Status(400, body={'error': {'message': 'too long'}}) if '3' in word_of(asked) else Says('y')
    )
    with serve(long) as server:
        requests = [chat(str(i)) for i in range(10)]
        answers, endpoint = ask(server, tmp_path, requests)
        assert [type(a) for a in answers] == [Answer] * 3 + [Failure] + [Answer] * 6
        assert answers[3].asked and 'too long' in answers[3].reason and '1 failed' in endpoint.report()
        assert endpoint.counts.retried == 0
        assert ask(server, tmp_path, requests)[1].counts.kept == 9 and max(server.asked.values()) == 2


def test_a_prompt_that_a_filter_refuses_is_answered(tmp_path):
    body = {'error': {'message': 'the policy', 'code': 'content_filter'}}
    with serve(lambda asked, tries: Status(400, body=body)) as server:
        answers, _ = ask(server, tmp_path, [chat('a')])
        assert answers == [Answer('', 'content_filter')] == ask(server, tmp_path, [chat('a')])[0]
        assert sum(server.asked.values()) == 1


def test_a_server_that_refuses_everything_or_is_gone_ends_the_run(tmp_path):
    with serve(lambda asked, tries: Status(422)) as server:
        with pytest.raises(UserError, match=f'{FAILURES} requests in a row failed.*422'):
            ask(server, tmp_path, [chat(str(i)) for i in range(50)], concurrency=1)
        assert sum(server.asked.values()) == FAILURES
    with socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{nobody.getsockname()[1]}/v1'
        with pytest.raises(UserError, match='in a row failed, the last because the connection failed'):
            ask(url, tmp_path, [chat(str(i)) for i in range(50)], retries=1)


@pytest.mark.parametrize('budget, count', [({'max_requests': 7}, 7), ({'max_tokens': 100}, 10)])
def test_a_budget_is_of_the_whole_run(budget, count, tmp_path):
    with serve(lambda asked, tries: Says('abc')) as server:  # 10 tokens with the prompt's
        requests = [chat(str(i)) for i in range(20)]
        ask(server, tmp_path, requests[2:5])
        answers, endpoint = ask(server, tmp_path, requests, concurrency=1, **budget)
        assert [isinstance(a, Answer) for a in answers] == [True] * count + [False] * (20 - count)
        assert not any(a.asked for a in answers[count:]) and endpoint.counts.unasked == 20 - count
        (key, value), *_ = budget.items()
        assert f'{20 - count} were not asked: endpoint.{key}={value} is used up' in endpoint.report()
        answers, endpoint = ask(server, tmp_path, requests)  # a larger one goes on
        assert endpoint.counts.kept == count and all(isinstance(a, Answer) for a in answers)


def test_the_key_is_sent_and_stands_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('TESTED_KEY', 'sk-very-secret')
    for name in ('OPENAI_API_KEY', 'OPENAI_ORG_ID', 'OPENAI_PROJECT_ID', 'OPENAI_ADMIN_KEY'):
        monkeypatch.setenv(name, 'of-another-server')
    for name in ('OPENAI_BASE_URL', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    with serve(lambda asked, tries: Says('.')) as server:
        ask(server, tmp_path, [chat('a')], key_variable='TESTED_KEY')
        ask(server, tmp_path, [chat('b')])
    with_key, without = server.headers
    assert with_key['authorization'] == 'Bearer sk-very-secret' and without['authorization'] == 'Bearer none'
    assert not any('of-another-server' in str(headers) for headers in server.headers)
    echo = Status(400, body={'error': {'message': 'you said sk-very-secret'}})
    with serve(lambda asked, tries: echo) as server:
        answers, endpoint = ask(server, tmp_path, [chat('c')], key_variable='TESTED_KEY')
    assert 'you said ***' in answers[0].reason
    files = b''.join(contents(tmp_path).values())
    assert b'secret' not in files and 'secret' not in ''.join(capfd.readouterr()) + endpoint.report() + repr(endpoint)


def test_a_damaged_file_is_asked_for_again(tmp_path):
    with serve(lambda asked, tries: Says('whole')) as server:
        ask(server, tmp_path, [chat('a'), chat('b')])
        damaged, _ = sorted(tmp_path.rglob('*.json'))
        whole = damaged.read_bytes()
        for content in (b'', whole[:20], b'[]', b'{"text": 3, "other": 4}'):
            damaged.write_bytes(content)
            answers, endpoint = ask(server, tmp_path, [chat('a'), chat('b')], max_tokens=10**6)
            assert [a.text for a in answers] == ['whole'] * 2 and endpoint.counts.answered == 1
            assert damaged.read_bytes() == whole


def test_what_a_server_tells_of_the_end_is_kept(tmp_path):
    says = {
        'vllm': Says('a', extra={'stop_reason': '</code>'}),
        'vllm eos': Says('a', extra={'stop_reason': 151645}),
        'sglang': Says('a', extra={'matched_stop': '</code>'}),
        'vllm, its own eos': Says('a', extra={'stop_reason': None}),
        'none': Says('a'),
    }
    with serve(lambda asked, tries: says[asked['prompt']]) as server:
        answers, _ = ask(server, tmp_path, [Request(prompt=name) for name in says])
        assert [a.stopped_by for a in answers] == ['</code>', 151645, '</code>', '', None]
        assert [a.prompt_tokens for a in answers] == [7] * 5


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'url': 'localhost:8000/v1'}, 'url= must be http://host:port/v1'),
        ({'url': 'ftp://host/v1'}, 'url= must be'),
        ({'url': 'http://'}, 'url= must be'),
        ({'url': 'http://host:99999/v1'}, 'url= must be'),
        ({'url': 'http://host/v1?key=1'}, 'url= must be'),
        ({'concurrency': 0}, 'concurrency=0 [1, 1000]'),
        ({'timeout_s': 0.0}, 'timeout_s=0.0'),
        ({'retries': -1}, 'retries=-1'),
        ({'backoff_s': 0.0}, 'backoff_s=0.0'),
        ({'max_requests': 0}, 'max_requests=0'),
        ({'max_tokens': 0}, 'max_tokens=0'),
    ],
)
def test_values_out_of_range_are_refused(changes, words):
    with pytest.raises(UserError) as caught:
        make_settings(**({'url': 'http://host:1/v1'} | changes))
    assert all(word in str(caught.value) for word in words.split())


@pytest.mark.parametrize('changes', [{'key_variable': 'sk-secret'}, {'url': 'https://me:secret@host/v1'}])
def test_a_secret_in_the_place_of_its_name_is_refused_and_not_repeated(changes):
    with pytest.raises(UserError) as caught:
        make_settings(**({'url': 'http://host:1/v1'} | changes))
    assert 'secret' not in str(caught.value)


def test_a_request_is_of_one_kind():
    with pytest.raises(ValueError, match='either messages or a prompt'):
        Request()
    with pytest.raises(ValueError, match='either messages or a prompt'):
        Request(messages=[], prompt='')


@pytest.mark.parametrize(
    'changes, environment, words',
    [
        ({'url': None}, {}, 'endpoint.url missing'),
        ({'model': None}, {}, 'endpoint.model missing http://127.0.0.1:1/v1'),
        ({'key_variable': 'TESTED_KEY'}, {}, 'endpoint.key_variable=TESTED_KEY export'),
        ({'key_variable': 'TESTED_KEY'}, {'TESTED_KEY': ' '}, 'endpoint.key_variable=TESTED_KEY empty'),
    ],
)
def test_what_a_client_lacks_is_one_line(changes, environment, words, tmp_path, monkeypatch):
    monkeypatch.delenv('TESTED_KEY', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        Endpoint(make_settings(**({'url': 'http://127.0.0.1:1/v1'} | changes)), tmp_path / 'new')
    assert all(word in str(caught.value) for word in words.split())
    assert not (tmp_path / 'new').exists()


def test_a_machine_without_the_client_is_told_what_to_install(tmp_path):
    (tmp_path / 'openai.py').write_text('raise ModuleNotFoundError("No module named openai", name="openai")')
    program = (
        'from tests.core.endpoint_server import make_settings\n'
        'try:\n    make_settings("http://127.0.0.1:1/v1").require()\n'
        'except ValueError as error:\n    print(error)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}'},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.stdout == "openai is not installed; it comes with the extra `rewrite`: pip install 'retool_jax[rewrite]'\n"
    )


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'tests.core.endpoint_run', *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def slow_script(seed: float):
    """Random delays; what is said depends on the request alone."""
    delays = random.Random(seed)
    return lambda asked, tries: Says(f'said of {word_of(asked)}, {asked["seed"]}', after_s=delays.random() * 0.1)


def test_ctrl_c_ends_it_at_once_though_the_server_is_silent(tmp_path):
    with serve(lambda asked, tries: Says('.') if word_of(asked) == '0' else Silence(600.0)) as server:
        process = start(server.url, tmp_path / 'answers', tmp_path / 'out', 4)
        while len(Store(tmp_path / 'answers')) < 1 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        status, said = finish(process)
    assert status == 130 and said.strip().splitlines()[-1] == 'stopped' and not (tmp_path / 'out').exists()
    assert not list(tmp_path.rglob('*.new'))


@pytest.mark.slow
def test_killed_at_five_moments_and_resumed_it_gives_the_same_files(tmp_path):
    with serve(slow_script(0)) as server:
        assert finish(start(server.url, tmp_path / 'whole/answers', tmp_path / 'whole/out', 60))[0] == 0
    for seed in range(2):
        folder = tmp_path / f'killed_{seed}'
        with serve(slow_script(1 + seed)) as server:
            for moment in (1, 17, 40, 66, 110):
                process = start(server.url, folder / 'answers', folder / 'out', 60)
                while len(Store(folder / 'answers')) < moment and process.poll() is None:
                    time.sleep(0.002)
                process.kill()
                assert finish(process)[0] == -signal.SIGKILL
            assert 110 <= len(Store(folder / 'answers')) < 120
            assert finish(start(server.url, folder / 'answers', folder / 'out', 60))[0] == 0
            # An answer may have been on the wire when its reader died, at most one a slot and kill.
            assert sum(server.answered.values()) <= 120 + 5 * 8 and len(server.answered) == 120
        assert contents(folder) == contents(tmp_path / 'whole') and len(contents(folder)) == 121
        with serve(slow_script(9)) as server:
            assert finish(start(server.url, folder / 'answers', folder / 'out', 60))[0] == 0
            assert not server.asked


@pytest.mark.slow
@pytest.mark.parametrize('timeout_s', [20.0, 90.0])
def test_sixty_seconds_of_silence_lose_nothing(timeout_s, tmp_path):
    """Asked again where patience is shorter, waited for where it is longer."""

    def script(asked, tries):
        if word_of(asked) != '1' or tries:
            return Says('said', after_s=0.0)
        return Silence(60.0) if timeout_s < 60 else Says('said', after_s=60.0)

    with serve(script) as server:
        answers, endpoint = ask(server, tmp_path, [chat(str(i)) for i in range(4)], timeout_s=timeout_s)
        assert [a.text for a in answers] == ['said'] * 4
        assert endpoint.counts.retried == (timeout_s < 60) and set(server.answered.values()) == {1}


def test_an_answer_is_plain_json(tmp_path):
    Store(tmp_path).put('ab-0', Answer('é', 'stop'))
    found = json.loads((tmp_path / 'ab/ab-0.json').read_text())
    assert found['text'] == 'é' and found['finish'] == 'stop' and 'secret' not in found
