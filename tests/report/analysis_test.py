"""The six metrics by hand, repairs case by case, purposes by the family of snippet."""

from __future__ import annotations

import random

import pytest

from retool_jax.core.records import Problem, Reward, Stop, ToolCall, Verdict
from retool_jax.report import analysis
from retool_jax.report.runs import Run, Segment, Transcript
from retool_jax.tasks import summary
from retool_jax.tasks.families import FAMILIES
from retool_jax.text.template import wrap_feedback, wrap_snippet
from tests.report.synthesis import run_folder


def call(code: str, verdict: Verdict = Verdict.OK) -> ToolCall:
    return ToolCall(0, code, verdict, '', '', '1', 0, 0.0)


def transcript(parts: list[str | ToolCall], right: bool) -> Transcript:
    """Text and calls in order; a text of n characters counts n tokens, and so does feedback."""
    segments, calls, said = [Segment('prompt', 9, 'a prompt ')], [], ''
    for part in [*parts, None]:
        if isinstance(part, str):
            said += part
            continue
        if part is not None:
            said += wrap_snippet(part.code) if part.code else '</code>'
            calls.append(part)
        segments.append(Segment('model', len(said), said))
        if part is not None:
            segments.append(Segment('tool', 5, wrap_feedback(part.feedback)))
        said = ''
    return Transcript(
        Problem('p', 'q', '1', 's', 'f'),
        0,
        0,
        tuple(s for s in segments if s.text),
        tuple(calls),
        len(calls) + 1,
        Stop.EOS,
        False,
        Reward(1.0 if right else -1.0, right, right, right, '1'),
    )


def test_the_metrics_of_a_small_set_are_those_counted_by_hand():
    good = transcript(['ab', call('import math\n\n# a note\nprint(1)')], right=True)
    bad = transcript([call('x = (', Verdict.ERROR), 'hm', call('print(2)'), 'so'], right=False)
    refused = transcript([call('', Verdict.FORMAT), 'no'], right=False)
    mental = transcript(['in the head'], right=True)
    found = analysis.analyse([good, bad, refused, mental])
    assert (found.answers, found.correct, found.code_ratio) == (4, 0.5, 0.5)
    assert (
        found.response_length
        == sum(s.tokens for t in (good, bad, refused, mental) for s in t.segments if s.kind == 'model') / 4
    )
    assert found.code_lines == (2 + 1 + 1) / 4  # the blank line and the note do not count
    assert found.correct_codes == 2
    assert (found.last_pass_right, found.last_pass_wrong) == (1.0, 1.0)
    answer = ''.join(s.text for s in good.segments[1:])
    assert found.timing == pytest.approx((2 / len(answer) + 0.0) / 2)
    assert (found.failures, found.repaired) == (1, 0)  # `x = (` and `print(2)` have one sign in common
    assert found.purposes == {'arithmetic': 2, 'broken': 1}


def test_what_cannot_be_counted_is_none_and_never_zero():
    found = analysis.analyse([transcript(['words'], right=False)])
    assert found.timing is found.last_pass_right is found.last_pass_wrong is found.self_correction is None
    with pytest.raises(ValueError, match='at least one'):
        analysis.analyse([])


def test_the_last_snippet_decides_and_right_and_wrong_answers_are_apart():
    fails = [call('a'), call('b', Verdict.TIMEOUT)]
    found = analysis.analyse(
        [transcript(fails, right=True), transcript([call('a')], right=True), transcript(fails[::-1], right=False)]
    )
    assert (found.last_pass_right, found.last_pass_wrong) == (0.5, 1.0)


def test_code_ratio_length_and_score_agree_with_the_evaluation_of_the_same_episodes(tmp_path):
    from retool_jax.core import episode_files

    run_folder(tmp_path / 'run', steps=2, held_out=24)
    run = Run(tmp_path / 'run')
    for part in run.parts:
        found = analysis.analyse(run.transcripts(part))
        theirs = summary.summarise(episode_files.read(tmp_path / 'run/episodes', part.name))
        assert (found.code_ratio, found.correct, found.response_length) == pytest.approx(
            (theirs['code_ratio'], theirs['avg'], theirs['length'])
        )


REPAIRS = {
    'a revision that runs': ([('print(gcd(4,6))', 'error'), ('import math\nprint(math.gcd(4,6))', 'ok')], [True]),
    'the same text run again': ([('print(1)', 'timeout'), ('print(1)', 'ok')], [False]),
    'something else that runs': ([('print(gcd(4,6))', 'error'), ('for i in range(9): x += i**2', 'ok')], [False]),
    'a revision that fails again': ([('print(1', 'error'), ('print(1]', 'error')], [False, False]),
    'two failures and one repair': ([('print(1', 'error'), ('print(1]', 'oom'), ('print(1)', 'ok')], [True, True]),
    'a pass before the failure': ([('print(1)', 'ok'), ('print(1', 'error')], [False]),
    'nothing failed': ([('print(1)', 'ok'), ('print(2)', 'ok')], []),
    'our own fault is no failure': ([('print(1)', 'sandbox_error'), ('print(1)', 'ok')], []),
}


@pytest.mark.parametrize('case', REPAIRS)
def test_a_failure_is_repaired_only_by_a_later_revision_that_runs(case):
    snippets, expected = REPAIRS[case]
    calls = [call(code, Verdict(verdict)) for code, verdict in snippets]
    assert [then is not None for _, then in analysis.repairs(calls)] == expected


def test_every_slip_of_the_embedded_task_is_recognised_in_its_correction():
    rng = random.Random(0)
    for family in FAMILIES:
        operands = family.sample(rng, False)
        code = family.code(*operands)
        for slip in family.slips:
            calls = [call(slip.spoil(operands, code), Verdict.ERROR), call(code)]
            assert [then for _, then in analysis.repairs(calls)] == [calls[1]], (family.name, calls)


PURPOSES = {
    'print(12 * 34)': 'arithmetic',
    'print(max(1, 2), sum([3, 4]))': 'arithmetic',
    'import math\nprint(math.comb(9, 2) % 7)': 'library',
    'from math import gcd as g\nprint(g(4, 6))': 'library',
    'import numpy as np\nprint(np.linalg.det([[1, 2], [3, 4]]))': 'library',
    "print(int('1201', 3))": 'conversion',
    'print(sum(map(int, str(2**100))))': 'conversion',
    'print(int(7.5))': 'arithmetic',
    'print(sum(n * n for n in range(9)))': 'enumeration',
    'i = 0\nwhile i < 9:\n    i += 1\nprint(i)': 'enumeration',
    'import itertools\nprint(len(list(itertools.permutations("abc"))))': 'enumeration',
    'def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nprint(f(9))': 'enumeration',
    'from sympy import *\nx = symbols("x")\nprint(solve(x**2 - 2, x))': 'symbolic',
    'import sympy as sp\nfor k in range(3):\n    print(sp.prime(k + 1))': 'symbolic',
    'import random\nprint(sum(random.random() for _ in range(9)))': 'simulation',
    'import numpy as np\nprint(np.random.rand(3).mean())': 'simulation',
    'assert 2 + 2 == 4': 'verification',
    'x = 3\nprint(x ** 2 == 9)': 'verification',
    'import math\nmath.isclose(0.1 + 0.2, 0.3)': 'verification',
    'x = [n for n in range(9) if n == 3]\nprint(x)': 'enumeration',
    'print(1': 'broken',
    'Print 1': 'broken',
    'print(1)\x00': 'broken',
    '': 'arithmetic',
}


@pytest.mark.parametrize('code', PURPOSES)
def test_the_purpose_of_a_snippet_is_the_first_rule_that_fits(code):
    assert analysis.purpose(code) == PURPOSES[code]
    assert analysis.purpose(code) in analysis.PURPOSES


def test_snippets_are_parsed_and_never_run(tmp_path):
    target = tmp_path / 'written'
    assert analysis.purpose(f'open({str(target)!r}, "w").write("x")\nraise SystemExit') in analysis.PURPOSES
    assert not target.exists()


@pytest.mark.parametrize(
    'code',
    [
        '(' * 5_000,
        '-' * 9_000 + '1',
        'x=' * 9_000 + '1',
        '[' * 90 + ']' * 90,
        '1+' * 9_000 + '1',
        'print(1)\n' * 10_000,
        '"\\d" "\\w"',
    ],
)
def test_hostile_snippets_get_a_purpose_too(code):
    assert analysis.purpose(code) in analysis.PURPOSES
    assert analysis.alikeness(code, code) == 1.0
