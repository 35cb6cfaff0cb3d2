"""An evaluation through a server: the real binary, sandbox and judge; the server's model follows a script."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool_jax.core import cli, episode_files, settings
from retool_jax.core.answers import Store
from retool_jax.core.errors import UserError
from retool_jax.core.records import Stop, Verdict
from retool_jax.report import pages
from retool_jax.stages import config, embedded, evaluate, folder, served
from retool_jax.text.tokenizer import load_tokenizer
from tests.core.endpoint_server import Says, serve

ROOT = Path(__file__).parents[2]
PROBLEMS = 10


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A tokenizer without weights and without config.json, and problems."""
    directory = tmp_path_factory.mktemp('served')
    embedded.write_model(directory / 'model')
    (directory / 'model' / 'config.json').unlink()
    rows = [{'id': f'p{i}', 'problem': f'What is {i} * 7?', 'answer': str(7 * i)} for i in range(PROBLEMS)]
    (directory / 'problems.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return directory


def speaker(files, after_s=lambda text: 0.0, wrong=()):
    """A model that multiplies by code and says what the interpreter printed; of problems in `wrong`, one more."""
    tokenizer = load_tokenizer(files / 'model')

    def script(asked, tries):
        text = tokenizer.decode(asked['prompt'])
        wait_s = after_s(text)
        printed = re.search(r'<interpreter>\n(\d+)', text)
        if not printed:
            a, b = re.search(r'(\d+) \* (\d+)', text).groups()
            return Says(f'<code>\n```python\nprint({a} * {b})\n```\n', extra={'stop_reason': '</code>'}, after_s=wait_s)
        found = int(printed[1]) + (int(printed[1]) // 7 in wrong)
        return Says(f'<answer>\n\\boxed{{{found}}}\n', extra={'stop_reason': '</answer>'}, after_s=wait_s)

    return script


def arguments(files, url, directory, **changes):
    given = {
        'problems': files / 'problems.jsonl',
        'model.path': files / 'model',
        'run.dir': directory,
        'samples': 2,
        'backend': 'endpoint',
        'endpoint.url': url,
        'endpoint.model': 'scripted',
        'endpoint.backoff_s': 0.01,
        'sandbox.zygotes': 1,
    } | changes
    return ['--config=configs/evaluate.py:tiny', *(f'--config.{key}={value}' for key, value in given.items())]


def stage(*given):
    return settings.build(
        config.Evaluation, cli.parse_config(['x', *arguments(*given[:3], **(given[3] if given[3:] else {}))])
    )


def test_a_served_model_is_scored_like_one_of_our_own(files, tmp_path, capsys):
    with serve(speaker(files, wrong=(3, 4))) as server:
        run = tmp_path / 'run'
        found = evaluate.run(stage(files, server.url, run))['problems']
        assert found['avg'] == 0.8 and found['problems'] == PROBLEMS and found['code_ratio'] == 1.0
        assert found['verdicts'] == {Verdict.OK: 2 * PROBLEMS} and found['stops'] == {Stop.ANSWER: 2 * PROBLEMS}
        assert found['by_problem']['p3']['avg'] == 0 and found['by_problem']['p2']['avg'] == 1
        assert json.loads((run / 'summary.json').read_text())['problems']['avg'] == 0.8
        made = episode_files.read(run / 'episodes', 'val_problems')
        assert len(made) == 2 * PROBLEMS and all(call.stdout.strip().isdigit() for e in made for call in e.calls)
        # Two samples of a turn are one request, asked twice.
        assert set(server.answered.values()) == {2} and len(server.answered) == 2 * PROBLEMS
        assert f'{4 * PROBLEMS} answers of' in capsys.readouterr().err and len(Store(run / 'answers')) == 4 * PROBLEMS
        page = pages.write(run).read_text()
        assert 'NaN' not in re.sub(r'isNaN|Number\.NaN', '', page)
        assert not (run / 'model').exists()
    # Everything is on disk: a server is not needed any more, and where it was does not matter.
    again = evaluate.run(stage(files, 'http://127.0.0.1:1/v1', run, {'endpoint.concurrency': 3, 'sampler.slots': 99}))
    assert again['problems'] == found
    with pytest.raises(UserError, match='endpoint.model: .scripted., now .other.'):
        evaluate.run(stage(files, server.url, run, {'endpoint.model': 'other'}))
    with pytest.raises(UserError, match='backend: .endpoint., now .engine.'):
        evaluate.run(stage(files, server.url, run, {'backend': 'engine'}))


def test_a_budget_that_is_used_up_keeps_what_is_finished(files, tmp_path):
    with serve(speaker(files)) as server:
        limited = stage(files, server.url, tmp_path / 'run', {'endpoint.max_requests': 20, 'endpoint.concurrency': 2})
        with pytest.raises(UserError, match='episodes are not finished: endpoint.max_requests=20 is used up') as caught:
            evaluate.run(limited)
        unfinished = int(re.match(r'(\d+) of 20 ', str(caught.value))[1])
        kept = episode_files.read(tmp_path / 'run/episodes' / evaluate.UNFINISHED)
        assert len(kept) == 20 - unfinished > 5 and not (tmp_path / 'run/summary.json').exists()
        assert evaluate.run(stage(files, server.url, tmp_path / 'run'))['problems']['avg'] == 1
        assert sum(server.asked.values()) == 4 * PROBLEMS


def test_nothing_of_a_run_stays_where_the_first_request_is_refused(files, tmp_path):
    with serve(speaker(files)) as server:
        with pytest.raises(UserError, match='404'):
            evaluate.run(stage(files, server.url.removesuffix('/v1'), tmp_path / 'run'))
        assert not (tmp_path / 'run').exists()


def test_keys_that_may_change_are_keys_of_the_endpoint():
    keys = settings.keys(config.Evaluation)
    named = [key for key in served.FREE if '.' in key]
    assert set(named) == {key for key in keys if key.startswith('endpoint.')} - {'endpoint.model'}
    assert 'answers' in folder.RESULTS and served.ANSWERS == 'answers'


def test_an_evaluation_by_the_engine_knows_nothing_of_the_client():
    program = (
        'import sys\nfrom retool_jax.core import cli, settings\nfrom retool_jax.stages import config, evaluate\n'
        'found = cli.parse_config(["x", "--config=configs/evaluate.py:tiny", "--config.problems=p.jsonl"])\n'
        'settings.build(config.Evaluation, found)\nprint("openai" in sys.modules)'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == 'False\n', done.stderr


@pytest.mark.slow
def test_killed_at_five_moments_and_gone_on_with_it_scores_the_same(files, tmp_path):
    slow = lambda text: 0.05 + 0.01 * (len(text) % 7)
    with serve(speaker(files, slow, wrong=(5,))) as server:

        def start(directory):
            command = [sys.executable, 'launch/evaluate.py', *arguments(files, server.url, directory)]
            command.append('--config.endpoint.concurrency=2')
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

        def end(process, status):
            _, said = process.communicate(timeout=600)
            assert process.returncode == status, said

        end(start(tmp_path / 'whole'), 0)
        run = tmp_path / 'killed'
        for moment in (1, 8, 15, 22, 30):
            process = start(run)
            while len(Store(run / 'answers')) < moment and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL if moment != 15 else signal.SIGTERM)
            end(process, -signal.SIGKILL if moment != 15 else 143)
        before, kept = sum(server.answered.values()), len(Store(run / 'answers'))
        assert 30 <= kept < 4 * PROBLEMS
        end(start(run), 0)
        assert (run / 'summary.json').read_bytes() == (tmp_path / 'whole/summary.json').read_bytes()
        # What was on its way to the last one that was killed may have been counted since: two at most.
        assert 0 <= sum(server.answered.values()) - before - (4 * PROBLEMS - kept) <= 2
        texts = [
            [(e.problem.id, e.sample, e.tokens, e.stop) for e in episode_files.read(d / 'episodes', 'val_problems')]
            for d in (run, tmp_path / 'whole')
        ]
        assert texts[0] == texts[1]
