"""What the rewriter and the judge are asked, and how their answers are read."""

import pytest

from retool_jax.core.records import Problem
from retool_jax.text.template import extract_snippet
from retool_jax.traces import drafts, prompts, repair

PROBLEM = Problem('p', 'How many ways are there to choose {3} of 10?', '120', 'test', '')
WORDS = 'First I try 10 * 9 * 8 = 720.\nThat counts orders, so 720 / 6 = \\boxed{120}.'


def asked(messages):
    ((role, content),) = [(m['role'], m['content']) for m in messages]
    assert role == 'user'
    return content


def test_the_rewriter_is_told_the_elements_of_the_papers_template():
    said = ' '.join(asked(prompts.rewrite_messages(PROBLEM, WORDS)).split())
    for element in (
        'attempts that fail',
        'Put code only in the place of calculation that was done by hand and gains',
        'It is complete: its imports',
        'printed by print',
        'Results are exact',
        '<interpreter>',
        '<answer> \\boxed{the final answer} </answer>',
        f'between <{prompts.MARKER}> and </{prompts.MARKER}>',
    ):
        assert element in said, element


def test_the_form_that_is_shown_is_the_one_that_is_read():
    """The example in the instruction is a draft without a flaw once an answer stands behind it."""
    example = prompts._EXAMPLE
    assert extract_snippet(example[: example.index('</code>') + 7]).code == 'from math import comb\nprint(comb(10, 3))'
    draft = repair.read(PROBLEM, f'Count.\n{example}\n\nSo 120.\n<answer>\n\\boxed{{120}}\n</answer>')
    assert drafts.flaw(draft) == '' and draft.repairs == () and draft.printed == ('120\n',)


@pytest.mark.parametrize('make', [prompts.rewrite_messages, prompts.judge_messages])
def test_problem_and_trace_stand_in_it_word_by_word(make):
    said = asked(make(PROBLEM, WORDS))
    assert said.count(PROBLEM.question) == 1 and said.endswith(f'# Solution\n\n{WORDS}')
    assert make(PROBLEM, WORDS) == make(PROBLEM, WORDS) != make(PROBLEM, WORDS + '.')


def test_the_judge_does_not_see_the_gold_answer():
    other = Problem('p', PROBLEM.question, '999', 'test', '')
    assert prompts.judge_messages(other, 'no idea') == prompts.judge_messages(PROBLEM, 'no idea')


def test_who_finishes_gets_the_beginning_with_what_was_printed():
    prefix = 'Count.\n<code>\n```python\nprint(2)\n```\n</code>\n<interpreter>\n2\n</interpreter>'
    said = asked(prompts.finish_messages(PROBLEM, WORDS, prefix))
    assert said.endswith(f'# Beginning\n\n{prefix}') and said.count(WORDS) == 1
    assert 'Write only what follows' in said


@pytest.mark.parametrize(
    'text, holds',
    [
        ('The arithmetic is right.\nVerdict: yes', True),
        ('Step two is wrong.\n\nVerdict: no\n', False),
        ('**Verdict: Yes.**', True),
        ('> Verdict: **no**', False),
        ('## Verdict: `yes`', True),
        ('verdict: no', False),
        ('Verdict: no\nOn reflection the step is right.\nVerdict: yes', True),
        ('I would write "Verdict: yes" but it fails.\nVerdict: no', False),
        ('Verdict: yes or no', None),
        ('Verdict: nothing', None),
        ('My verdict: yes, it holds.', None),
        ('yes', None),
        ('', None),
    ],
)
def test_a_verdict_is_read_from_its_own_line(text, holds):
    assert prompts.judged(text) is holds


@pytest.mark.parametrize(
    'text, inside',
    [
        ('<rewritten>\nall of it\n</rewritten>', 'all of it'),
        ('Here it is:\n<rewritten>\nall of it\n</rewritten>\nI hope it helps.', 'all of it'),
        ('<rewritten>cut before its e', 'cut before its e'),
        ('never opened</rewritten>', 'never opened'),
        ('none\nat all', 'none\nat all'),
        ('</rewritten> turned round <rewritten> here', ' here'),
        ('', ''),
    ],
)
def test_the_marker_is_taken_off(text, inside):
    assert prompts.unmarked(text) == inside
