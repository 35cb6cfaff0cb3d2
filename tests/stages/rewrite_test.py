"""Rewriting: text traces in, verified traces with code out, and a line for everything that was dropped."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import rewrite as configuration
from retool_jax.core import episode_files, settings
from retool_jax.core.errors import UserError
from retool_jax.core.records import Verdict
from retool_jax.stages import rewrite
from retool_jax.stages.rewrite_config import Rewrite
from retool_jax.tasks import problems
from tests.core.endpoint_server import Says, Server, Status, serve

ROOT = Path(__file__).parents[2]
ROWS = (
    {
        'question': 'Natalia sold clips to 48 friends, then half as many. How many did she sell?',
        'answer': 'She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips in all.\n#### 72',
    },
    {'question': 'A box holds 3 times 4 pens and 5 more. How many pens?', 'solution': '3*4 = 12 pens, and '
     'then 12+5 = 17 pens stand there in the box. So it is \\boxed{17}.', 'answer': '17'},
    {'question': 'What are 7 times 8?', 'response': '7*8 = 57. The answer is 57.', 'answer': '56'},
    {'question': 'How many days has a leap year?', 'response': 'It has one more than others.', 'answer': '366'},
)  # fmt: skip


def staged(tmp_path, **changes) -> Rewrite:
    """The stage of the tiny configuration, on traces of a file."""
    file = tmp_path / 'traces.jsonl'
    if not file.exists():
        file.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
    config = configuration.get_config('tiny')
    config.run.dir, config.traces, config.rewriter.kind, config.max_tokens = (
        str(tmp_path / 'run'),
        str(file),
        'calculator',
        4000,
    )
    config.sandbox.concurrency = 2
    for key, value in changes.items():
        block, _, name = key.rpartition('__')
        (config[block] if block else config)[name] = value
    return settings.build(Rewrite, config)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """The folder in which the calculator has rewritten ROWS to run/, and what it said."""
    folder = tmp_path_factory.mktemp('calculator')
    with contextlib.redirect_stdout(io.StringIO()) as said:
        rewrite.run(staged(folder))
    return folder, said.getvalue()


def test_a_calculator_needs_no_model_and_tells_what_it_dropped(ran):
    tmp_path, said = ran
    kept, dropped = read(tmp_path / 'run/kept.jsonl'), read(tmp_path / 'run/dropped.jsonl')
    assert [row['answer'] for row in kept] == ['72', '17']
    assert [(row['reason'], row.get('rewriter', '')) for row in dropped] == [
        ('trace', ''),
        ('rewriter', 'calculator'),
    ]
    assert "'57'" in dropped[0]['detail'] and dropped[0]['rewritten'] == ROWS[2]['response']
    for row, last in zip(kept, ('72', '17')):
        assert '<code>\n```python\n' in row['rewritten']
        assert row['rewritten'].split('<interpreter>\n')[1].startswith(last)
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['counts'] == {
        'kept': 2, 'format': 0, 'execution': 0, 'answer': 0, 'length': 0, 'trace': 1, 'rewriter': 1,
    }  # fmt: skip
    assert summary['statistics']['with_code'] == 1.0 and summary['statistics']['failing_calls'] == 0.0
    made = episode_files.read(tmp_path / 'run/episodes')
    assert [e.calls[-1].verdict for e in made] == [Verdict.OK] * 2
    assert 'the text trace itself does not say the gold answer' in said


def test_what_was_kept_is_a_file_of_traces_that_a_cold_start_keeps_whole(ran):
    tmp_path, _ = ran
    pairs = problems.read_traces(tmp_path / 'run/kept.jsonl')
    assert [problem.answer for problem, _ in pairs] == ['72', '17']
    assert [text for _, text in pairs] == [row['rewritten'] for row in read(tmp_path / 'run/kept.jsonl')]


def test_filters_are_off_unless_asked_and_say_what_they_left_out(ran):
    tmp_path, _ = ran
    shorter, longer = sorted(e.acted_count for e in episode_files.read(tmp_path / 'run/episodes'))
    rewrite.run(staged(tmp_path, filters__min_tokens=longer, run__dir=str(tmp_path / 'again')))
    (row,) = [row for row in read(tmp_path / 'again/dropped.jsonl') if row['reason'] == 'filter']
    assert row['detail'] == f'{shorter} tokens, fewer than {longer}'


def test_nothing_kept_is_one_line_and_the_reasons_are_on_disk(tmp_path):
    (tmp_path / 'traces.jsonl').write_text(json.dumps(ROWS[3]) + '\n')
    with pytest.raises(UserError, match=r'no trace was kept \(1 rewriter\); .*dropped.jsonl says why'):
        rewrite.run(staged(tmp_path))
    assert len(read(tmp_path / 'run/dropped.jsonl')) == 1


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'traces': None}, 'traces is missing'),
        (
            {'traces': None, 'rewriter__kind': 'self', 'golds': 'g.jsonl'},
            "golds='g.jsonl' answers the traces of a file",
        ),
        ({'rewriter__kind': 'parrot'}, "rewriter.kind='parrot' is unknown; choose one of calculator, endpoint, self"),
        ({'rewriter__kind': 'endpoint'}, 'endpoint.url is missing'),
        ({'rewriter__judge': True}, 'endpoint.url is missing'),
        ({'rewriter__kind': 'self', 'model__tools': False}, 'model.tools=False'),
        ({'rewriter__places': ('end',)}, "rewriter.places\\[0\\]='end' is unknown"),
        ({'rewriter__candidates': 0}, 'rewriter.candidates=0 must lie in'),
        ({'filters__per_problem': 0}, 'filters.per_problem=0 must lie in'),
    ],
)
def test_mistakes_are_told_at_the_door(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        staged(tmp_path, **changes)


# --- a model behind a server -----------------------------------------------------------------------


def asked_for(body: dict) -> tuple[int, str]:
    """Which of the sums a request is about, and what is asked of it."""
    content = body['messages'][0]['content']
    number = int(content.split('What is 100 plus ')[1].split('?')[0])
    return number, 'finish' if '# Beginning' in content else 'judge' if 'Verdict: yes' in content else 'rewrite'


def sums(tmp_path, count: int) -> None:
    rows = [
        {
            'question': f'What is 100 plus {n}?',
            'trace': f'It is {100 + n}. \\boxed{{{100 + n}}}',
            'answer': str(100 + n),
        }
        for n in range(count)
    ]
    (tmp_path / 'traces.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def rewriting(n: int, code: str | None = None, claim: str | None = None) -> str:
    code = f'```python\nprint(100 + {n})\n```' if code is None else code
    claim = str(100 + n) if claim is None else claim
    said = (
        f'<code>\n{code}\n</code>\n<interpreter>\n{claim}\n</interpreter>\n\n<answer>\n\\boxed{{{100 + n}}}\n</answer>'
    )
    return f'<think>Let me see.</think>\n<rewritten>\nAdd.\n{said}\n</rewritten>'


def answer(body: dict, tries: int) -> Says | Status:
    """One model: the first eight sums are each another kind of answer."""
    n, task = asked_for(body)
    if task == 'judge':
        return Says('It skips a step.\nVerdict: no' if n == 7 else 'Fine.\nVerdict: yes')
    if task == 'finish':
        real = {1: '101', 5: 'ZeroDivisionError: division by zero'}[n]
        assert f'{real}\n</interpreter>' in body['messages'][0]['content']
        return Says(f'<rewritten>\nSo it is.\n<answer>\n\\boxed{{{100 + n}}}\n</answer>\n</rewritten>')
    if n == 6 and not tries:
        return Status(429, {'Retry-After': '0'})
    return {
        1: Says(rewriting(1, claim='11')),  # another output than is claimed
        2: Says(''),
        3: Says('', refusal='I cannot help with that.'),
        4: Says(rewriting(4, code='print(100 + 4)')),  # no fence
        5: Says(rewriting(5, code='```python\nprint(100 / 0)\n```')),
    }.get(n, Says(rewriting(n)))


def endpoint(server: Server, **changes) -> dict:
    blocks = {'url': server.url, 'model': 'tested', 'backoff_s': 0.01, 'timeout_s': 20.0}
    return {f'endpoint__{key}': value for key, value in blocks.items()} | {
        'rewriter__kind': 'endpoint', 'rewriter__candidates': 1,
    } | changes  # fmt: skip


def test_a_model_behind_a_server_rewrites_judges_and_finishes(tmp_path, capsys):
    sums(tmp_path, 9)
    with serve(answer) as server:
        rewrite.run(staged(tmp_path, **endpoint(server, rewriter__judge=True)))
    kept = {row['answer']: row for row in read(tmp_path / 'run/kept.jsonl')}
    dropped = {row['answer']: row for row in read(tmp_path / 'run/dropped.jsonl')}
    assert sorted(kept) == ['100', '101', '104', '106', '108'] and sorted(dropped) == ['102', '103', '105', '107']
    assert kept['101']['repairs'] == ['finished'] and kept['104']['repairs'] == ['fence']
    assert '<interpreter>\n101\n</interpreter>\n\nSo it is.' in kept['101']['rewritten']
    assert 'think' not in kept['100']['rewritten'] and 'rewritten' not in kept['100']['rewritten']
    reasons = {name: (row['reason'], row['detail']) for name, row in dropped.items()}
    assert reasons['102'] == ('rewriter', 'an empty answer') and reasons['107'] == (
        'verdict',
        'tested holds it for wrong',
    )
    assert reasons['103'] == ('rewriter', 'the model refused (refusal)')
    assert reasons['105'][0] == 'execution' and 'ZeroDivisionError' in dropped['105']['printed']
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['repairs'] == {'finished': 1, 'fence': 1}
    assert {row['rewriter']: row['kept'] for row in summary['yield']} == {'': 0, 'endpoint': 5}
    assert 'tries again' in capsys.readouterr().err


def test_a_second_run_asks_for_nothing_and_writes_the_same_files(tmp_path):
    sums(tmp_path, 9)
    with serve(answer) as server:
        changes = endpoint(server)
        rewrite.run(staged(tmp_path, **changes))
        first, count = files(tmp_path / 'run'), sum(server.asked.values())
        changes |= {'endpoint__concurrency': 3}  # what does not change the answers may be another the next time
        rewrite.run(staged(tmp_path, **changes))
        assert sum(server.asked.values()) == count
    assert files(tmp_path / 'run') == first and 'episodes/cold_start.npz' in first


def files(directory: Path) -> dict[str, str]:
    """Everything that a run says about its traces, by name, as a digest."""
    names = [p for p in directory.rglob('*') if p.is_file() and p.name in NAMES]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


NAMES = ('kept.jsonl', 'dropped.jsonl', 'summary.json', 'cold_start.jsonl.gz', 'cold_start.npz')


@pytest.mark.slow
def test_killed_at_five_moments_and_resumed_it_writes_the_same_files(tmp_path):
    sums(tmp_path, 40)

    def slow(seed: int):
        rng = random.Random(seed)
        delays = [rng.uniform(0.02, 0.6) for _ in range(1000)]
        counted = iter(delays)

        def script(body: dict, tries: int) -> Says | Status:
            found = answer(body, tries)
            if isinstance(found, Status):
                return found
            return Says(found.text, refusal=found.refusal, after_s=next(counted))

        return script

    def command(server: Server, place: str) -> list[str]:
        keys = {
            'run.dir': tmp_path / place, 'traces': tmp_path / 'traces.jsonl', 'rewriter.kind': 'endpoint',
            'rewriter.candidates': 2, 'max_tokens': 4000, 'endpoint.url': server.url, 'endpoint.model': 'tested',
            'endpoint.concurrency': 4, 'sandbox.concurrency': 2,
        }  # fmt: skip
        flags = [f'--config.{key}={value}' for key, value in keys.items()]
        return [sys.executable, 'launch/rewrite.py', '--config=configs/rewrite.py:tiny', *flags]

    def run(server: Server, place: str, moment: int | None) -> int:
        process = subprocess.Popen(
            command(server, place), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while moment is not None and process.poll() is None:
                if len(list((tmp_path / place / 'answers').glob('??/*.json'))) >= moment:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            return process.wait(timeout=300)
        finally:
            process.kill()

    with serve(slow(0)) as server:
        assert run(server, 'whole', None) == 0
        whole, keys = files(tmp_path / 'whole'), set(server.asked)
        url = server.url
    assert len(whole) == len(NAMES)
    with serve(slow(1)) as server:
        # The server's address is part of the configuration, and it is another one now: the answers are the same.
        assert server.url != url or set(server.asked) <= keys
        for moment in (1, 12, 30, 55, 79):
            assert run(server, 'killed', moment) == -signal.SIGKILL
        assert run(server, 'killed', None) == 0
    assert files(tmp_path / 'killed') == whole
