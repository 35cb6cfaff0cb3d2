"""The report in a real browser: filters clicked, what is shown read back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retool_jax.core import episode_files
from retool_jax.report import pages
from retool_jax.report.browser import Limits
from tests.report import chrome
from tests.report.synthesis import run_folder

pytestmark = pytest.mark.skipif(bool(chrome.MISSING), reason=chrome.MISSING)
HARM = '</script><script>window.harmed=1</script><img src=x onerror="window.harmed=1"> '


@pytest.fixture(scope='module')
def page(tmp_path_factory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp('browsed') / 'run')
    hostile = folder / 'episodes' / 'val_sft_new_operands.jsonl.gz'
    with episode_files.open_text(hostile) as file:
        header, first, *rest = file.read().splitlines()
    line = json.loads(first)
    line['problem']['question'] = line['segments'][1]['text'] = HARM + 'zebra'
    hostile.with_suffix('').write_text('\n'.join([header, json.dumps(line), *rest]) + '\n')
    return pages.write(folder, Limits(episodes=2000))


@pytest.fixture(scope='module')
def chromium() -> Iterator[chrome.Browser]:
    with chrome.start() as browser:
        yield browser


@pytest.fixture
def window(chromium, page) -> chrome.Browser:
    chromium.resize(1280, 900)
    chromium.open(Path('/dev/null'))
    chromium.open(page)
    return chromium


def count(window) -> int:
    return int(window.run('return document.getElementById("count").textContent').split()[0].replace(',', ''))


def shown_facts(window) -> str:
    return window.run('return document.querySelector("#viewer .about").innerText')


def rows_of(page: Path) -> tuple[list, dict]:
    text = page.read_text()
    index = json.loads(text.split('id="index">')[1].split('</script>')[0])
    return index['rows'], index


def until(window, condition: str) -> None:
    end = time.monotonic() + 20
    while not window.run(f'return {condition}'):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def test_the_page_opens_without_an_error_and_holds_two_thousand_episodes_in_few_nodes(window):
    assert window.messages() == []
    assert count(window) == 2000
    assert window.run('return document.querySelectorAll("#list .row").length') < 60
    assert window.run('return document.querySelectorAll("#token-view").length') == 0
    window.run('const l = document.getElementById("list"); l.scrollTop = l.scrollHeight;')
    until(window, '!!document.querySelector("#list .row[data-i=\'1999\']")')
    assert window.run('return document.querySelectorAll("#list .row").length') < 60


def test_each_filter_leaves_the_episodes_that_the_data_says(window, page):
    rows, index = rows_of(page)
    cases = [
        ('kind', 'tool', lambda r: index['parts'][r[0]]['kind'] == 'tool'),
        ('step', '12', lambda r: index['parts'][r[0]]['step'] == 12),
        ('family', 'gcd', lambda r: index['problems'][r[2]][3] == 'gcd'),
        ('result', 'wrong', lambda r: not r[5]),
        ('verdict', 'error', lambda r: 'error' in r[6]),
        ('verdict', 'ok', lambda r: 'ok' in r[6]),
        ('verdict', 'none', lambda r: not r[6]),
    ]
    for name, value, passes in cases:
        window.choose(f'#filter-{name}', value)
        expected = sum(map(passes, rows))
        assert 0 < expected < len(rows)
        assert count(window) == expected, name
        label = window.run(
            'const s = document.querySelector(arguments[0]); return s.selectedOptions[0].text', f'#filter-{name}'
        )
        assert label.endswith(f'({expected})')
        window.click('#clear')
        assert count(window) == len(rows)


def test_filters_work_together_and_the_viewer_follows(window, page):
    rows, index = rows_of(page)
    window.choose('#filter-kind', 'tool')
    window.choose('#filter-verdict', 'error')
    window.choose('#filter-result', 'right')
    expected = sum(index['parts'][r[0]]['kind'] == 'tool' and 'error' in r[6] and r[5] == 1 for r in rows)
    assert count(window) == expected > 1
    assert 'right · reward 1' in shown_facts(window) and 'from tool_' in shown_facts(window).replace('\n', ' ')
    assert window.run('return document.querySelectorAll("#viewer .said .tool.bad").length') >= 1
    window.type('#filter-words', 'no such problem')
    assert count(window) == 0
    assert 'No episode passes' in window.run('return document.getElementById("viewer").innerText')
    window.click('#clear')
    assert count(window) == 2000


def test_a_click_opens_the_episode_with_its_text_code_and_output(window, page):
    rows, index = rows_of(page)
    wanted = next(i for i, r in enumerate(rows) if r[6] == ['error', 'ok'])
    body = json.loads(page.read_text().split(f'id="e{wanted}">')[1].split('</script>')[0])
    window.choose('#filter-verdict', 'error')
    window.run('document.getElementById("list").scrollTop = 0')
    window.click(f'#list .row[data-i="{wanted}"]')
    assert window.run('return document.querySelector("#list [aria-selected=true]").dataset.i') == str(wanted)
    question = window.run('return document.querySelector("#viewer h3").textContent')
    assert question == index['problems'][rows[wanted][2]][1]
    code = window.run('return [...document.querySelectorAll("#viewer .said .code")].map(e => e.textContent)')
    said = ''.join(text for kind, text in body['s'] if kind == 'm')
    assert len(code) == 2 and all(text in said for text in code)
    output = window.run('return [...document.querySelectorAll("#viewer .said .tool")].map(e => e.textContent)')
    fed = [text.strip() for kind, text in body['s'] if kind == 't']
    assert len(output) == 2 and all(text in shown for text, shown in zip(fed, output))
    assert window.run('return location.hash') == f'#episode-{wanted}'
    window.run('document.getElementById("list").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"}))')
    assert window.run('return document.querySelector("#list [aria-selected=true]").dataset.i') != str(wanted)


def test_model_code_and_interpreter_have_their_own_colours_in_light_and_dark(window):
    window.choose('#filter-verdict', 'ok')
    look = """const colour = s => getComputedStyle(document.querySelector(s)).backgroundColor;
        return [colour('body'), colour('.said .code'), colour('.said .tool'), colour('.said .answer')];"""
    window.dark(False)
    light = window.run(look)
    window.dark(True)
    dark = window.run(look)
    window.dark(False)
    assert len(set(light)) == len(set(dark)) == 4 and not set(light) & set(dark)


def test_the_token_view_shows_authors_and_logprobs_on_demand(window, page):
    window.choose('#filter-verdict', 'ok')
    window.click('#tokens')
    number = int(window.run('return document.querySelector("#list [aria-selected=true]").dataset.i'))
    tokens = json.loads(page.read_text().split(f'id="e{number}">')[1].split('</script>')[0])['t']
    classes = window.run('return [...document.querySelectorAll("#token-view span")].map(e => e.className)')
    acted = [value for value, n in zip(tokens['acted'][::2], tokens['acted'][1::2]) for _ in range(n)]
    assert classes == ['acted' if a else 'fed' for a in acted]
    window.run("""document.querySelector('#token-view .acted').dispatchEvent(
        new PointerEvent('pointerover', {bubbles: true}))""")
    facts = window.run('return document.getElementById("token-facts").innerText')
    assert f'log p {tokens["logprobs"][0] / 1000:.3f}' in facts and f'id {tokens["ids"][acted.index(1)]}' in facts
    window.click('#tokens')
    assert window.run('return document.querySelectorAll("#token-view").length') == 0


def test_hostile_text_is_shown_and_never_run(window):
    window.type('#filter-words', 'zebra')
    assert count(window) >= 1
    assert 'window.harmed=1' in window.run('return document.getElementById("viewer").innerText')
    assert window.run('return window.harmed') is None
    assert window.run('return document.querySelectorAll("img").length') == 0
    assert window.messages() == []


def test_a_link_to_an_episode_opens_it(window, page):
    window.run('location.hash = "#episode-1234"; location.reload()')
    until(window, 'document.querySelector("#list [aria-selected=true]")?.dataset.i === "1234"')


def test_a_chart_reads_out_both_models_under_the_pointer(window):
    spot = window.run("""const s = document.querySelector('.chart svg');
        s.scrollIntoView({block: 'center', behavior: 'instant'});
        const b = s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];""")
    window.command('Input.dispatchMouseEvent', type='mouseMoved', x=spot[0], y=spot[1])
    text = window.run('return document.querySelector(".chart .readout").innerText')
    assert text.startswith('step ') and 'with interpreter' in text and 'text only' in text and text.count('%') == 2


@pytest.mark.parametrize('width', [360, 700, 1920])
def test_no_window_is_too_narrow_for_the_page(window, width):
    window.resize(width, 800)
    assert window.run('return document.documentElement.scrollWidth') <= width
    for selector in ('#tokens', '#filter-words', '#list'):
        left, right = window.run(
            'const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.left, b.right]', selector
        )
        assert 0 <= left < right <= width


@pytest.mark.parametrize('models', [5, 8, 13])
def test_no_table_of_scores_scrolls_sideways_at_any_width(chromium, tmp_path, models):
    folder = run_folder(tmp_path / 'run')
    summary = json.loads((folder / 'summary.json').read_text())
    block = summary['tool_rl']
    for number in range(5, models):  # beside the five of a demo
        summary[f'a_further_model_{number}'] = block
    (folder / 'summary.json').write_text(json.dumps(summary))
    chromium.open(pages.write(folder, Limits(episodes=20)))
    for width in (1920, 1400, 1280, 1000, 700, 480, 360):
        chromium.resize(width, 900)
        found = chromium.run("""return [...document.querySelectorAll('.tables .scroll')].filter(e => e.offsetParent)
            .map(e => [e.closest('section').querySelector('h3').innerText, e.scrollWidth - e.clientWidth])""")
        assert len(found) >= 3 and all(over <= 0 for _, over in found), (width, found)
        assert chromium.run('return document.documentElement.scrollWidth') <= width
    chromium.resize(1400, 900)
    text = chromium.run('return document.querySelector(".tables").innerText')
    assert all(name in text for name in ('Beside the score', 'RL, tools', 'Text start'))
