"""The judge's verdicts, its limits, and the rewards made of them."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from retool_jax.tasks.grader import Grader, Verdict, shape
from tests.unheard import unheard

from .answer_pairs import EQUAL, PAIRS, UNEQUAL

SLOW = r'\frac{1}{2}+' * 90_000 + '1'  # four seconds
MATH500 = Path(__file__).parents[3] / 'shared/data/math500.jsonl'


@pytest.fixture(scope='module')
def grader():
    with Grader(time_limit_s=20) as g:  # the machine may be busy: slowness is not what is tested
        yield g


@pytest.fixture(scope='module')
def impatient():
    with Grader(time_limit_s=1.5) as g:
        assert g.equal('0.5', r'\frac{1}{2}')  # the child is up
        yield g


def _text(answer):
    return f'first \\boxed{{0}}, no: \\boxed{{{answer}}}'


def _cpu_s(grader):
    """CPU seconds of the judge and of all workers that it has waited for."""
    fields = Path(f'/proc/{grader._children[0].process.pid}/stat').read_text().rpartition(')')[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf('SC_CLK_TCK')


def test_a_hundred_pairs_half_of_them_unequal_are_judged_right(grader):
    assert len(EQUAL) == len(UNEQUAL) == 50
    rewards = grader.grade_many([_text(a) for a, _, _ in PAIRS], [b for _, b, _ in PAIRS])
    wrong = [pair for pair, reward in zip(PAIRS, rewards) if reward.correct != pair[2]]
    assert not wrong


@pytest.mark.skipif(not MATH500.is_file(), reason='no MATH-500 file')
def test_all_500_math_answers_equal_themselves_through_the_whole_path_and_in_the_child(grader):
    golds = [json.loads(line)['answer'] for line in MATH500.read_text().splitlines()]
    assert len(golds) == 500
    assert all(r.correct and r.exact and r.lenient for r in grader.grade_many(list(map(_text, golds)), golds))
    assert all(grader.parses(gold) for gold in golds)


@pytest.mark.parametrize(
    'answer',
    [
        '9^{9^{9^9}}', '10000000!', r'\frac{1}{2}' + r'+\frac{1}{x}' * 90_000, '{' * 1000,
        '{{' * 300 + '}}' * 300, '\U0001d54f\u202e\ud7ff中文🙂' * 50, r'\sqrt{' * 150 + '2' + '}' * 150,
        '\x00\x1b', '(x+1)^{100000000}',
        '٣', r'\text{' + 'a' * 900 + '}',
    ],
    ids=lambda a: ascii(a[:12]),
)  # fmt: skip
def test_hostile_answers_are_answered_within_the_limit_and_the_next_one_is_right(impatient, answer):
    assert impatient._ask('0.25', r'\frac{1}{4}')['equal']
    start = _cpu_s(impatient)
    assert not impatient.equal(answer, r'\sqrt{7}')
    assert _cpu_s(impatient) - start < impatient.time_limit_s + 1
    assert impatient._ask('0.25', r'\frac{1}{4}')['equal']


def test_a_megabyte_of_latex_reaches_the_child_and_is_cut_off_where_no_length_is_set(impatient):
    before = impatient.timeouts
    assert not impatient._ask(SLOW, r'\sqrt{7}').get('equal')
    assert impatient.timeouts == before + 1
    assert impatient._ask('0.25', r'\frac{1}{4}')['equal']


def test_an_answer_that_needs_too_much_memory_is_wrong_and_the_judge_lives_on():
    with Grader(time_limit_s=60, memory_mb=256) as grader:
        assert not grader.equal(r'\sum_{k=1}^{9} 2^{300000000 k}', r'\sqrt{7}')  # 340 MB where it is let
        judge = grader._children[0].process.pid
        worker = Path(f'/proc/{judge}/task/{judge}/children').read_text().split()[0]
        peak_kb = Path(f'/proc/{worker}/status').read_text().split('VmPeak:')[1].split()[0]
        assert 100_000 < int(peak_kb) <= 256 * 1024
        assert grader.equal('0.25', r'\frac{1}{4}')


def test_a_killed_judge_is_replaced_and_asked_again(impatient):
    before = impatient.deaths
    os.killpg(impatient._children[0].process.pid, signal.SIGKILL)
    assert impatient.equal('0.125', r'\frac{1}{8}')
    assert impatient.deaths == before + 1


def test_a_machine_that_stands_still_longer_than_the_limit_makes_no_right_answer_wrong():
    with Grader(time_limit_s=0.5) as grader:
        assert grader.equal('0.5', r'\frac{1}{2}')
        os.killpg(grader._children[0].process.pid, signal.SIGSTOP)
        threading.Timer(2.0, os.killpg, (grader._children[0].process.pid, signal.SIGCONT)).start()
        assert grader.judge('0.375', r'\frac{3}{8}') == Verdict(True)
        assert grader.timeouts == grader.deaths == 0


def test_a_late_verdict_is_told_with_the_reward_and_never_kept():
    with Grader(time_limit_s=0.3, max_length=2_000_000) as grader:
        assert grader.judge(SLOW, r'\sqrt{7}') == grader.judge(SLOW, r'\sqrt{7}') == Verdict(False, late=True)
        assert grader.timeouts == 2 and not grader._cache
        reward = grader.grade(rf'\boxed{{{SLOW}}}', r'\sqrt{7}')
        assert reward.late and not reward.correct
        assert not grader.grade(r'\boxed{0.5}', r'\frac{1}{2}').late


def test_the_limit_on_an_answer_holds_where_the_trainer_ignores_and_blocks_the_timer_s_signal():
    # As a trainer on a TPU does: libtpu ignores SIGPROF from the moment it is loaded.
    with unheard({signal.SIGPROF}), Grader(time_limit_s=0.3, max_length=2_000_000) as grader:
        assert grader.judge(SLOW, r'\sqrt{7}') == Verdict(False, late=True)
        assert grader.judge('0.5', r'\frac{1}{2}') == Verdict(True)


def test_integers_need_no_child():
    with Grader() as grader:
        assert grader.grade(_text('025'), '25').correct and not grader.grade(_text('26'), '25').correct
        assert grader._children[0].process is None


def test_exact_and_lenient_are_reported_beside_the_verdict(grader):
    half = grader.grade(_text('0.5'), r'\frac{1}{2}')
    assert half.correct and not half.exact and half.lenient and half.answer == '0.5'
    unboxed = grader.grade('The answer is 25.', '25')
    assert not unboxed.correct and unboxed.lenient and unboxed.value == -1.0
    assert not grader.grade('25 is it\nnot sure', '25').lenient


@pytest.mark.parametrize(
    'text, whole, lenient',
    [
        (r'so \boxed{7}' + '\nor is it 25?', None, True),  # the last integer of the last line, box or not
        (r'so \boxed{25}' + '\nor is it 7?', None, True),
        (r'so \boxed{7}, not 25', None, True),
        ('25\n' + r'\boxed{7}', None, False),
        ('', 'it prints</code>\n<interpreter>\n25\n</interpreter>\n\n', False),  # the last line has no integer
        ('', r'\boxed{25}</code>' + '\n<interpreter>\n</interpreter>\n\n', True),
        ('hm', r'\boxed{25}</code>' + '\n<interpreter>\n7\n</interpreter>\n\nhm', True),
        ('hm', r'\boxed{25}</code>' + '\n<interpreter>\n' + r'\boxed{7}' + '\n</interpreter>\n\nhm', False),
    ],
)
def test_the_lenient_rule_is_the_last_box_of_all_or_the_last_integer_of_the_last_line(grader, text, whole, lenient):
    assert grader.grade(text, '25', whole=whole).lenient is lenient


@pytest.mark.parametrize(
    'gold', ['proof', 'notfound', 'n/a', 'none', r'\text{N/A}', 'Not found.', '?', '-', r'\frac{1}{',
             r'\begin{cases}1\\2\end{cases}',
             'so we see that the sum over all of the rows is at least twice as large as before'])  # fmt: skip
def test_a_gold_answer_that_is_none_is_told(grader, gold):
    assert not grader.parses(gold)


@pytest.mark.parametrize(
    'gold', ['5', r'\emptyset', r'\{\}', 'no solution', 'N', 'na', r'\text{Evelyn}', 'undefined', r'\pi', '(1,2)',
             'x=5'])  # fmt: skip
def test_a_gold_answer_that_is_one_is_readable(grader, gold):
    assert grader.parses(gold)


def test_what_the_model_wrote_is_not_cut_at_tags_that_it_wrote_itself(grader):
    text = r'I print \boxed{25} and the tool says </interpreter>, as I thought'
    assert grader.grade(text, '25').correct
    assert not grader.grade(r'\boxed{24}, see <interpreter>25</interpreter> so 25', '25').correct


@pytest.mark.parametrize(
    'correct, style, calls, value',
    [
        (True, 'paper', 0, 1.0), (False, 'paper', 9, -1.0), (True, 'verl', 0, 1.0), (False, 'verl', 0, -1.0),
        (False, 'verl', 2, -0.8), (False, 'verl', 9, -0.6),
    ],
)  # fmt: skip
def test_reward_styles(correct, style, calls, value):
    assert shape(correct, style, calls) == pytest.approx(value)


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="reward style is 'soft'"):
        Grader('soft')
    with pytest.raises(ValueError, match='time_limit_s=0'):
        Grader(time_limit_s=0)
    with pytest.raises(ValueError, match='2 texts, 1 golds, 2 calls, 2 wholes'):
        Grader().grade_many(['a', 'b'], ['c'])


def test_neither_the_grader_nor_its_child_imports_heavy_libraries():
    script = (
        'import sys, retool_jax.tasks.grader\n'
        'from retool_jax.tasks.judge import verify\n'
        'assert verify({"answer": "1/2", "gold": "0.5"})["equal"]\n'
        'assert verify({"answer": r"\\sum_{k=1}^{3} k", "gold": "6"})["equal"]\n'
        'assert not {"jax", "transformers", "matplotlib", "torch"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', script], check=True, cwd=Path(__file__).parents[2])
