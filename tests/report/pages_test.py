"""The page as a file: self-contained, honest about what it leaves out, readable from any run's folder."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retool_jax.core import episode_files
from retool_jax.report import browser, pages, plots
from retool_jax.report.browser import Limits
from retool_jax.report.runs import Part, Run
from tests.report.synthesis import run_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    return run_folder(tmp_path_factory.mktemp('made') / 'run', steps=4, problems=12, held_out=24)


@pytest.fixture
def run_dir(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / 'run')


def index_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', page)[1])


def bodies_of(page: str) -> list[dict]:
    return [json.loads(x) for x in re.findall(r'<script type="application/json" id="e\d+">(.*?)</script>', page)]


def expand(runs: list[int]) -> list[int]:
    return [value for value, count in zip(runs[::2], runs[1::2]) for _ in range(count)]


def test_the_page_is_whole_and_asks_the_network_for_nothing(run_dir):
    page = pages.write(run_dir)
    assert page == run_dir / 'report.html'
    text = page.read_text()
    assert not re.findall(r'(?:src|href|action)\s*=\s*["\']?(?!["\']?(?:#|data:))', text)
    assert not re.search(r'https?://|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|<!-- \w+ -->', text)
    assert text.count('<script') == text.count('</script>')
    for section in ('Scores', 'Learning curves', 'How code is used', 'Episodes'):
        assert f'>{section}</h2>' in text
    assert not list(run_dir.glob('*.new'))


def test_the_scores_of_the_summary_stand_on_the_page_with_their_intervals(run_dir):
    text = pages.write(run_dir).read_text()
    summary = json.loads((run_dir / 'summary.json').read_text())
    for name in ('base', 'sft', 'tool_rl', 'text_rl'):
        low, high = summary[name]['ci']
        assert f'<p class="big">{100 * summary[name]["avg"]:.1f}' in text
        assert f'{100 * low:.1f} – {100 * high:.1f}' in text
    assert f'<b>{100 * summary["tool_rl"]["apart"]["larger_range"]["avg"]:.1f}</b>' in text


def test_every_problem_has_its_row(run_dir):
    text = pages.write(run_dir).read_text()
    summary = json.loads((run_dir / 'summary.json').read_text())
    table = text.split('Score by problem')[1].split('</table>')[0]
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th>(.*?)</tr>', table)
    assert {name for name, _ in rows} == summary['sft']['by_problem'].keys()
    marks = [(name, [float(x) for x in re.findall(r'--v:([\d.]+)', cells)]) for name, cells in rows]
    for name, found in marks:
        models = [summary[m]['by_problem'][name]['avg'] for m in ('base', 'sft', 'tool_rl', 'text_sft', 'text_rl')]
        assert found == pytest.approx(models, abs=5e-4)
    totals = [sum(found) for _, found in marks]
    assert totals == sorted(totals, reverse=True)


def test_an_evaluation_of_one_set_shows_its_three_scores_and_each_problem_s_answers(tmp_path):
    record = {
        'avg': 0.5,
        'maj': 1.0,
        'exact': 0.5,
        'lenient': 1.0,
        'gold': r'\frac{1}{2}',
        'answer': '<b>',
        'family': '',
        'code': 0.5,
        'calls': 1.0,
        'length': 123.4,
        'truncated': 0.25,
    }
    scores = {'avg': 0.5, 'ci': [0.4, 0.6], 'pass': 0.9, 'pass_ci': [0.8, 1.0], 'maj': 0.7, 'maj_ci': [0.6, 0.8]}
    summary = {'aime24': scores | {'k': 4, 'problems': 1, 'by_problem': {'p-1': record}}}
    (tmp_path / 'summary.json').write_text(json.dumps(summary))
    text = pages.write(tmp_path).read_text()
    for title, value in (('aime24, avg@4', '50.0'), ('aime24, pass@4', '90.0'), ('aime24, maj@4', '70.0')):
        assert re.search(rf'{title}</h3><p class="big">{value}', text)
    row = re.search(r'<th scope="row">p-1</th>(.*?)</tr>', text)[1]
    cells = re.sub(r'<[^>]+>', ' ', row).split()
    assert cells == ['50', '100', '50', '100', '50', '25', '123', r'\frac{1}{2}', '&lt;b&gt;']


def test_every_embedded_episode_is_the_saved_one_token_for_token(run_dir):
    text = pages.write(run_dir, Limits(episodes=300)).read_text()
    index, bodies = index_of(text), bodies_of(text)
    assert len(index['rows']) == len(bodies) == 300
    assert f'300 of {sum(map(Run(run_dir).count, Run(run_dir).parts)):,} saved episodes' in text
    saved = {part['name']: episode_files.read(run_dir / 'episodes', part['name']) for part in index['parts']}
    seen = set()
    for row, body in zip(index['rows'], bodies):
        name, problem = index['parts'][row[0]]['name'], index['problems'][row[2]]
        (episode,) = [e for e in saved[name] if (e.problem.id, e.sample) == (problem[0], row[3])]
        seen.add((name, *problem[:1], row[3]))
        tokens, acted = body['t'], np.array(episode.acted)
        assert tokens['ids'] == episode.tokens
        assert expand(tokens['acted']) == acted.astype(int).tolist()
        assert np.allclose(np.array(tokens['logprobs']) / 1000, np.array(episode.logprobs)[acted], atol=6e-4)
        assert expand(tokens['versions']) == np.array(episode.versions)[acted].tolist()
        assert row[4] == episode.reward.value and row[5] == episode.reward.correct
        assert [c[1] for c in body['c']] == row[6] == [str(c.verdict) for c in episode.calls]
        for (place, *_), call in zip(body['c'], episode.calls):  # each call beside what it was answered with
            assert body['s'][place][0] == 't' and call.feedback.strip() in body['s'][place][1]
        spelled = ''.join(index['vocabulary'][str(i)] for i in episode.tokens[episode.prompt_length :])
        assert spelled == ''.join(text for kind, text in body['s'] if kind != 'p')
    assert len(seen) == 300


def test_a_tight_budget_thins_tokens_first_and_then_episodes(run_dir):
    text = pages.write(run_dir, Limits(episodes=200, tokens=3000)).read_text()
    with_tokens = [body for body in bodies_of(text) if 't' in body]
    assert 0 < len(with_tokens) < 100 and sum(len(body['t']['ids']) for body in with_tokens) <= 3000
    assert f'{len(with_tokens):,} of them carry their tokens' in text
    few = pages.write(run_dir, Limits(episodes=200, characters=5000)).read_text()
    assert 0 < len(bodies_of(few)) < 60


def test_every_part_is_in_the_selection_and_it_is_the_same_each_time(run_dir):
    first = pages.write(run_dir, Limits(episodes=120)).read_text()
    assert {p['name'] for p in index_of(first)['parts']} == {p.name for p in Run(run_dir).parts}
    assert index_of(pages.write(run_dir, Limits(episodes=120)).read_text()) == index_of(first)


def test_quotas_take_small_parts_whole_and_share_what_is_left():
    assert browser.quotas([5, 100, 100], 105) == [5, 50, 50]
    assert browser.quotas([5, 6], 100) == [5, 6]
    assert sum(browser.quotas([1000] * 7, 100)) == 100


def test_a_long_run_is_read_at_both_ends_and_evenly_between():
    parts = [Part('tool', i, f'tool_{i:05d}') for i in range(400)] + [Part('val_sft', -1, 'val_sft')]
    steps = [p.step for p in browser.spread(parts, 40) if p.training]
    assert len(steps) == 40 and steps[0] == 0 and steps[-1] == 399
    assert {b - a for a, b in itertools.pairwise(steps)} == {10, 11}
    assert parts[-1] in browser.spread(parts, 40)


@pytest.mark.parametrize('kept', [['metrics.jsonl'], ['summary.json'], ['episodes'], ['metrics.jsonl', 'episodes']])
def test_a_run_of_one_kind_of_file_has_a_page_of_what_there_is(run_dir, kept):
    for path in list(run_dir.iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = pages.write(run_dir).read_text()
    assert ('Learning curves</h2>' in text) == ('metrics.jsonl' in kept)
    assert ('Scores</h2>' in text) == ('summary.json' in kept)
    assert ('Episodes</h2>' in text) == ('episodes' in kept)


def test_a_run_of_one_model_has_its_curves_without_phases(tmp_path):
    lines = [{'step': i, 'time': 0.0, 'rewards/correct': i / 9, 'val/aime24/avg@32': i / 20} for i in range(9)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    text = pages.write(tmp_path).read_text()
    assert 'Right answers' in text and 'aime24/avg@32' in text and 'with interpreter' not in text


def test_episodes_without_arrays_or_tokenizer_are_shown_as_text(run_dir):
    shutil.rmtree(run_dir / 'model')
    for path in (run_dir / 'episodes').glob('*.npz'):
        path.unlink()
    text = pages.write(run_dir, Limits(episodes=50)).read_text()
    assert index_of(text)['vocabulary'] == {} and not any('t' in body for body in bodies_of(text))


def test_hostile_text_stays_data(run_dir):
    path = run_dir / 'episodes' / 'val_sft_new_operands.jsonl.gz'
    evil = '</script><script>window.harmed=1</script><!--<script> \u2028 \ud800 <img src=x onerror=alert(1)>'
    with episode_files.open_text(path) as file:
        header, first, *rest = file.read().splitlines()
    line = json.loads(first)
    line['segments'][1]['text'] = line['problem']['question'] = line['problem']['family'] = evil
    path.with_suffix('').write_text('\n'.join([header, json.dumps(line), *rest]) + '\n')  # as earlier versions wrote it
    text = pages.write(run_dir).read_text(encoding='utf-8')
    assert '<script>window.harmed' not in text and '<img' not in text and '<!--' not in text
    harmless = evil.replace('\ud800', '?')
    assert any(problem[1] == harmless for problem in index_of(text)['problems'])


@pytest.mark.parametrize(
    'name, damage, told',
    [
        ('episodes/tool_00001.jsonl', '{"schema": 1, "episodes": 1}\n{"oops": 1}\n', 'tool_00001.jsonl'),
        ('episodes/tool_00001.jsonl', 'not json\n', 'tool_00001.jsonl'),
        ('episodes/tool_00001.jsonl.gz', 'not compressed', 'tool_00001.jsonl.gz'),
        ('episodes/tool_00001.jsonl', '{"schema": 99, "episodes": 0}\n', 'schema 99'),
        ('summary.json', '{', 'summary.json'),
        ('metrics.jsonl', '{"step": 0}\nnonsense\n', 'metrics.jsonl:2'),
    ],
)
def test_a_damaged_file_is_named_and_the_old_report_stays(run_dir, name, damage, told):
    (run_dir / 'report.html').write_text('the old one')
    (run_dir / name).write_text(damage)
    with pytest.raises(ValueError, match=re.escape(told)):
        pages.write(run_dir)
    assert (run_dir / 'report.html').read_text() == 'the old one'


def test_the_picture_is_a_png_of_the_curves(run_dir):
    picture = plots.curves(run_dir)
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 10_000
    (run_dir / 'metrics.jsonl').unlink()
    (run_dir / 'summary.json').write_text('{}')
    with pytest.raises(ValueError, match='nothing to draw'):
        plots.curves(run_dir)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_page_and_says_where(run_dir):
    done = command('-m', 'retool_jax.report', str(run_dir), '--episodes', '40')
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run_dir / 'report.html')
    assert len(index_of((run_dir / 'report.html').read_text())['rows']) == 40


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    for arguments, told in (
        ([str(tmp_path / 'none')], 'does not exist'),
        ([str(tmp_path)], 'nothing to report'),
        ([str(tmp_path), '--episodes', '0'], 'give 1 or more'),
    ):
        done = command('-m', 'retool_jax.report', *arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and told in done.stderr


def test_a_page_is_written_without_matplotlib_or_jax(run_dir):
    program = f"""import sys
from retool_jax.report import pages, plots
pages.write({str(run_dir)!r})
print(*sorted({{'matplotlib', 'jax', 'torch', 'flax'}} & set(sys.modules)))"""
    done = command('-W', 'error', '-c', program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ''
