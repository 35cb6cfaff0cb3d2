"""Sets as a hub on loopback has them become the files that the commands read, each with its commit beside it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from retool_jax.tasks import fetch, problems

ROOT = Path(__file__).parents[2]
COMMIT = 'a1' * 20
AIME = [{'id': i, 'problem': f'What is {i} + 1?', 'answer': str(i + 1), 'year': '2024'} for i in range(30)]
TRACE = r'<code>```python\nprint(1 + 1)\n```</code><interpreter>2</interpreter><answer>\boxed{2}</answer>'
CHAT = [{'messages': [{'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': TRACE}]}] * 2_000


def table(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@contextlib.contextmanager
def hub(sets: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server that speaks as much of the hub's protocol as fetching a set takes: (its address, what was asked)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            asked.append(self.path)
            self.answer()

        def answer(self) -> None:
            words = self.path.partition('?')[0].strip('/').split('/')
            if words[:2] == ['api', 'datasets'] and words[4:5] == ['revision']:
                name, known = '/'.join(words[2:4]), sets.get('/'.join(words[2:4]))
                if known is None or words[5] not in ('main', COMMIT):
                    self.say(404, b'{}', {'X-Error-Code': 'RevisionNotFound' if known else 'RepoNotFound'})
                    return
                siblings = [{'rfilename': path} for path in known]
                self.say(200, json.dumps({'id': name, 'sha': COMMIT, 'siblings': siblings}).encode())
                return
            name, path = '/'.join(words[1:3]), '/'.join(words[5:])
            if words[0] != 'datasets' or words[3:5] != ['resolve', COMMIT] or path not in sets.get(name, {}):
                self.say(404, b'', {'X-Error-Code': 'EntryNotFound'})
                return
            body = sets[name][path]
            self.say(200, body, {'X-Repo-Commit': COMMIT, 'ETag': f'"{hashlib.sha1(body).hexdigest()}"'})

        def say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}', asked
        finally:
            server.shutdown()


def run(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith('_proxy')}
    env |= {'HF_ENDPOINT': endpoint, 'HF_HOME': str(home), 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_OFFLINE': '0'}
    return subprocess.run(
        [sys.executable, 'launch/fetch.py', *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_a_set_becomes_the_file_that_commands_read_with_its_commit_beside_it(tmp_path):
    lines = ''.join(json.dumps(row) + '\n' for row in AIME).encode()
    sets = {
        'HuggingFaceH4/aime_2024': {'README.md': b'# AIME', '.gitattributes': b'', 'data/train-0.parquet': table(AIME)},
        'math-ai/aime25': {'README.md': b'', 'test.jsonl': lines},
        'JoeYing/ReTool-SFT': {'data/train-0.parquet': table(CHAT[:500]), 'data/train-1.parquet': table(CHAT[500:])},
    }
    data = tmp_path / 'data'
    with hub(sets) as (endpoint, asked):
        for name in ('aime24', 'aime25', 'retool_sft'):
            done = run(endpoint, tmp_path / 'home', name, f'--to={data}')
            assert done.returncode == 0, done.stderr
            assert f'{fetch.SETS[name].rows:,} rows of {fetch.SETS[name].repository} at {COMMIT}' in done.stderr
        count = len(asked)
        again = run(endpoint, tmp_path / 'home', 'aime24', f'--to={data}')
        assert again.returncode == 0 and COMMIT in again.stderr and len(asked) == count
    assert not any('README' in path for path in asked)
    files = [known.file for known in map(fetch.SETS.get, ('aime24', 'aime25', 'retool_sft'))]
    assert sorted(path.name for path in data.iterdir()) == sorted([*files, *(f'{file}.source' for file in files)])
    for file in files[:2]:
        found = problems.read(data / file)
        assert [(p.question, p.answer) for p in found] == [(row['problem'], row['answer']) for row in AIME]
    assert len(problems.read_traces(data / files[2])) == 2_000
    for file in files:
        facts = json.loads((data / f'{file}.source').read_text())
        assert facts['revision'] == COMMIT and len(facts) == 4
        assert facts['sha256'] == hashlib.sha256((data / file).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        ((), '--set is missing; give one of retool_sft'),
        (('aime2024',), "there is no set 'aime2024' (did you mean aime24?)"),
        (('math500',), 'HuggingFaceH4/MATH-500 at revision'),
        (('aime24', '--revision=none'), "'none'"),
        (('aime24',), f'HuggingFaceH4/aime_2024 at {COMMIT} has 29 rows, not 30'),
        (('aime25',), 'holds no file that a set could be read from'),
        (('aime24', '--to={taken}'), 'is there, and was not fetched'),
    ],
)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(tmp_path, arguments, told):
    sets = {'HuggingFaceH4/aime_2024': {'data/a.parquet': table(AIME[:29])}, 'math-ai/aime25': {'README.md': b''}}
    taken, to = tmp_path / 'taken', tmp_path / 'data'
    taken.mkdir()
    (taken / 'aime24.jsonl').write_text('mine')
    given = [argument.format(taken=taken) for argument in arguments]
    given += [] if any(argument.startswith('--to') for argument in given) else [f'--to={to}']
    with hub(sets) as (endpoint, _):
        done = run(endpoint, tmp_path / 'home', *given)
    assert done.returncode == 2 and done.stdout == '', done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and told in done.stderr
    assert not to.exists() or list(to.iterdir()) == []
    assert [path.name for path in taken.iterdir()] == ['aime24.jsonl']


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    done = run('http://127.0.0.1:9', tmp_path / 'home', 'aime24', f'--to={tmp_path / "data"}')
    assert done.returncode == 2 and done.stderr.startswith('error: HuggingFaceH4/aime_2024 at revision')
    assert 'http://127.0.0.1:9 cannot be fetched' in done.stderr and done.stderr.count('\n') == 1
