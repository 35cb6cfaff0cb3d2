"""Repairs: what language models write otherwise is kept under the rule that mends it, or dropped for its reason."""

import json
import platform

import pytest

from retool_jax.core.records import Problem
from retool_jax.sandbox.feedback import FeedbackSettings
from retool_jax.sandbox.pool import Pool
from retool_jax.tasks import answers, problems
from retool_jax.text.template import make_template, wrap_answer, wrap_snippet
from retool_jax.traces import repair, snippets, verification
from retool_jax.traces.verification import Wording
from tests.fakes import byte_tokenizer
from tests.sandbox.given import tiny
from tests.traces.rewritings import TABLE

WORDING = Wording(make_template('tiny'), byte_tokenizer(), FeedbackSettings(style='full', max_chars=1024, max_frames=6))


@pytest.fixture(scope='module')
def pool():
    if platform.system() != 'Linux' or platform.machine() != 'x86_64':
        pytest.skip('the local pool needs Linux on x86_64')
    with Pool(tiny()) as pool:
        yield pool


@pytest.fixture(scope='module')
def judged(pool):
    """What becomes of every rewriting of the table, by its name; their snippets are really run."""
    items = [repair.read(Problem(r.name, 'What is 17 times 23?', r.answer, 'test', ''), r.text) for r in TABLE]
    found = verification.verify(items, pool, WORDING, answers.equal_at_sight, progress=False)
    return {item.draft.problem.id: item for item in found}


@pytest.mark.parametrize('case', TABLE, ids=[case.name for case in TABLE])
def test_a_rewriting_is_kept_mended_or_dropped_as_it_should_be(case, judged):
    found = judged[case.name]
    if isinstance(case.becomes, str):
        assert (found.reason, found.episode) == (case.becomes, None)
        assert all(words in found.detail for words in case.said) and found.detail
        return
    assert (found.reason, found.draft.repairs) == ('kept', case.becomes), found.detail
    assert all(words in found.text for words in case.said)
    assert set(case.becomes) <= set(repair.RULES)


def test_a_box_that_is_all_of_its_line_goes_into_the_element_and_another_stays_in_its_sentence(judged):
    assert judged['a box on a line of its own'].text.count('\\boxed') == 1
    assert 'Done.\n\n<answer>' in judged['a box on a line of its own'].text
    assert judged['a box without its element'].text.count('\\boxed{391}') == 2


def test_what_is_kept_stands_as_it_is_when_it_is_read_again(judged):
    kept = [found for found in judged.values() if found.reason == 'kept']
    for found in kept:
        again = repair.read(found.draft.problem, found.text)
        assert again.repairs == () and again.turns == found.draft.turns
    assert len(kept) >= 20


def test_a_row_of_retool_sft_whose_long_output_its_authors_cut_is_kept(pool, tmp_path):
    code = "for i in range(300):\n    print(i * i * i)\nprint('last', 17 * 23)"
    whole = ''.join(f'{i**3}\n' for i in range(300)) + 'last 391\n'
    said = f'{whole[:200]}...{whole[-200:]}'  # O: over 400 characters, both ends of 200
    written = (
        f'I list them.\n{wrap_snippet(code)}\n<interpreter>\n{said}\n</interpreter>\n\nIt is 391.\n{wrap_answer("391")}'
    )
    asked = 'Use code. *user question:*\nWhat is the last number?\n\nRemember to place the final answer in a box.'
    row = {'messages': [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': written}]}
    (tmp_path / 'ReTool-SFT.jsonl').write_text(json.dumps(row) + '\n')
    ((problem, text),) = problems.read_traces(tmp_path / 'ReTool-SFT.jsonl')
    assert (problem.question, problem.answer) == ('What is the last number?', '391')
    (one,) = verification.verify([repair.read(problem, text)], pool, WORDING, answers.equal_at_sight, progress=False)
    assert (one.reason, one.draft.repairs) == ('kept', ()), one.detail
    assert one.episode.calls[0].stdout == whole and 'characters omitted' in one.text


def test_an_output_that_was_wrong_leaves_a_cut_trace_that_tells_the_real_one(judged):
    found = judged['another output than is claimed']
    assert (found.claimed.strip(), found.printed) == ('391', '408')
    assert found.cut.endswith('</code>\n<interpreter>\n408\n</interpreter>\n\n') and '391' not in found.cut


@pytest.mark.parametrize(
    'code, silent, changed',
    [
        ('x = 1\nx', True, 'x = 1\nprint(x)'),
        ('x = 1\nx  # the result', True, 'x = 1\nprint(x)  # the result'),
        ('é = "ü"; é', True, 'é = "ü"; print(é)'),
        ('(1 +\n 2)', True, 'print((1 +\n 2))'),
        ('x = 1', True, None),
        ('print(1)', True, None),
        ('solve()', True, 'print(solve())'),
        ('solve()', False, None),
        ('[x for x in range(3)]', False, 'print([x for x in range(3)])'),
        ('if x:\n    x', True, None),
        ('x = (', True, None),
    ],
)
def test_a_bare_last_expression_is_printed(code, silent, changed):
    assert snippets.printing(code, silent) == changed


@pytest.mark.parametrize(
    'earlier, code, joined',
    [
        ('x = 2\nprint(x)', 'print(x + 1)', 'x = 2\nprint(x + 1)'),
        ('x = 2\nprint("a",\n      x)\ny = 3', 'print(y)', 'x = 2\ny = 3\nprint(y)'),
        ('x = 2  # pens\nx', 'print(x)', 'x = 2  # pens\nprint(x)'),
        ('for i in range(3):\n    print(i)\nx = i', 'print(x)', 'x = i\nprint(x)'),
        ('def f():\n    print(1)\nf()', 'f()', 'def f():\n    print(1)\nf()\nf()'),
        ('x = 2; print(x)', 'print(x)', 'x = 2\nprint(x)'),
        ('if a:\n    print(1)\nelse:\n    x = 1', 'print(x)', 'if a:\n    pass\nelse:\n    x = 1\nprint(x)'),
    ],
)
def test_a_snippet_stands_behind_an_earlier_one_without_its_prints(earlier, code, joined):
    assert snippets.join(earlier, code) == joined


def test_names_at_the_top_level_are_those_that_a_later_snippet_may_use():
    code = (
        'import numpy as np, math\nfrom sympy import sqrt\na, (b, *c) = 1, (2, 3)\ndef f(x):\n    y = x\nclass K: pass'
    )
    assert snippets.names(code) == {'np', 'math', 'sqrt', 'a', 'b', 'c', 'f', 'K'}
    assert snippets.names('x = (') == set()
