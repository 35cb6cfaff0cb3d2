"""Cold start: what is kept, what is dropped and why, and that its episodes are a rollout's."""

import collections
import dataclasses
import platform

import pytest

from retool_jax.core.records import ExecResult, Problem, Stop, Verdict
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.sandbox.pool import Pool
from retool_jax.stages import cold_start
from retool_jax.stages.config import Mix
from retool_jax.tasks import answers, arithmetic
from retool_jax.text.template import make_template, prompt_ids, wrap_answer, wrap_feedback, wrap_snippet
from retool_jax.traces import drafts, outcome, repair, verification
from retool_jax.traces.verification import Wording
from tests.fakes import FakePool, byte_tokenizer
from tests.sandbox.given import tiny

TOKENIZER = byte_tokenizer()
TINY = make_template('tiny')
FEEDBACK = FeedbackSettings(style='official', max_chars=1024, max_frames=6)
WORDING = Wording(TINY, TOKENIZER, FEEDBACK)
HEAD_ONLY = Mix(easy={'mental': 0.5, 'direct': 0.5}, needy={'mental': 1.0})
MIX = Mix(easy={'code': 0.4, 'mental': 0.5, 'repair': 0.1}, needy={'code': 0.5, 'mental': 0.3, 'repair': 0.2})


@pytest.fixture(scope='module')
def pool():
    if platform.system() != 'Linux' or platform.machine() != 'x86_64':
        pytest.skip('the local pool needs Linux on x86_64')
    with Pool(tiny()) as pool:
        yield pool


def _call(code, words=''):
    return words + wrap_snippet(code)


def _build(problems, mix, pool, seed):
    """Episodes of the embedded task, and how many traces were kept or dropped."""
    items = cold_start.draw(problems, mix, seed)
    found = verification.verify(items, pool, WORDING, answers.equal_at_sight, progress=False)
    return verification.episodes(found), verification.tally(found)


def _judge(text, printed=None, gold='2', max_tokens=None):
    """What becomes of one rewritten answer; `printed` maps code to what a fake run prints."""
    item = repair.read(Problem('s', 'What is 1 + 1?', gold, 'test', ''), text)
    wording = dataclasses.replace(WORDING, max_tokens=max_tokens)
    (judged,) = verification.verify([item], FakePool(printed or {}), wording, answers.equal_at_sight, progress=False)
    assert (judged.episode is not None) == (judged.reason == 'kept') == (judged.detail == '')
    return judged


def _verify(text, printed=None, gold='2', max_tokens=None):
    return _judge(text, printed, gold, max_tokens).reason


def test_every_trace_of_the_embedded_task_survives_a_real_sandbox(pool):
    problems = arithmetic.problems('train', 96, 1)
    episodes, counts = _build(problems, MIX, pool, 1)
    assert counts == {'kept': 96, 'format': 0, 'execution': 0, 'answer': 0, 'length': 0}
    assert [e.problem for e in episodes] == problems
    verdicts = collections.Counter(tuple(call.verdict for call in e.calls) for e in episodes)
    assert set(verdicts) == {(), (Verdict.OK,), (Verdict.ERROR, Verdict.OK)}
    for e in episodes:
        shown = TOKENIZER.decode([t for t, a in zip(e.tokens, e.acted) if not a][e.prompt_length :])
        assert shown == ''.join(wrap_feedback(c.feedback) for c in e.calls)
        if e.calls:
            assert e.calls[-1].stdout.strip() == e.problem.answer
            assert 'Error' in shown or len(e.calls) == 1


def test_episodes_hold_the_segments_masks_and_ids_of_a_rollout():
    problem = arithmetic.problems('train', 4, 0)[3]
    trace = arithmetic.trace(problem, 'repair', 0)
    bad, good = [code for kind, code in trace.parts if kind == 'code']
    error = ExecResult(Verdict.ERROR, '', 'SyntaxError: no\n', exit_code=1)
    pool = FakePool({bad: error, good: problem.answer + '\n'})
    mix = Mix(easy={'repair': 1}, needy={'repair': 1})
    (e,), _ = _build([problem], mix, pool, 0)
    prompt = prompt_ids(TINY, TOKENIZER, problem.question)
    draft = drafts.of_parts(problem, trace.parts)
    said = [render(error, FEEDBACK), problem.answer]
    expected = [(False, prompt)]
    for turn, text in zip(draft.turns, said):
        expected += [(True, TOKENIZER.encode(turn)), (False, TOKENIZER.encode(wrap_feedback(text)))]
    expected.append((True, [*TOKENIZER.encode(draft.turns[-1]), TOKENIZER.eos_ids[0]]))
    assert e.segments() == expected
    assert e.prompt_length == len(prompt) and e.turns == 3 and e.stop == Stop.EOS and not e.void
    assert len(e.tokens) == len(e.acted) == len(e.logprobs) == len(e.versions)
    assert set(e.logprobs) == {0.0}
    assert [call.verdict for call in e.calls] == [Verdict.ERROR, Verdict.OK]


def test_the_same_seed_draws_the_same_traces_and_the_mix_is_kept_apart_for_easy_families():
    problems = arithmetic.problems('train', 1200, 2)
    by_code = {}
    for p in problems:
        for kind in ('code', 'repair'):
            codes = [c for k, c in arithmetic.trace(p, kind, 7).parts if k == 'code']
            by_code[codes[-1]] = p.answer
    mix = Mix(easy={'mental': 1.0}, needy={'code': 0.75, 'mental': 0.25})
    build = lambda: _build(problems, mix, FakePool(by_code), 7)
    episodes, counts = build()
    assert counts['kept'] == 1200
    assert [e.tokens for e in build()[0]] == [e.tokens for e in episodes]
    easy = [e for e in episodes if arithmetic.BY_NAME[e.problem.family].mental]
    needy = [e for e in episodes if not arithmetic.BY_NAME[e.problem.family].mental]
    assert not any(e.calls for e in easy)
    assert 0.70 < sum(bool(e.calls) for e in needy) / len(needy) < 0.80


def test_equal_snippets_run_once():
    problem = arithmetic.problems('train', 4, 0)[3]
    pool = FakePool(lambda code: problem.answer)
    mix = Mix(easy={'code': 1}, needy={'code': 1})
    episodes, _ = _build([problem] * 5, mix, pool, 0)
    assert len(pool.codes) == 1
    assert [e.sample for e in episodes] == [0, 1, 2, 3, 4]


def test_a_mental_mix_needs_no_pool_and_a_coding_one_says_so():
    problems = arithmetic.problems('train', 24, 0)
    episodes, counts = _build(problems, HEAD_ONLY, None, 0)
    assert counts['kept'] == 24 and not any(e.calls for e in episodes)
    with pytest.raises(ValueError, match='give a sandbox pool'):
        _build(problems, MIX, None, 0)


ANSWER = wrap_answer('2')
GOOD = _call('print(1+1)', 'Add. ')


@pytest.mark.parametrize(
    'text, reason',
    [
        (f'Two.\n{ANSWER}', 'kept'),
        (f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}', 'kept'),
        (f'<rewritten>\n{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}\n</rewritten>', 'kept'),
        (f'<code>\n```python\n```\n</code>\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}', 'format'),  # empty
        (f'</code>\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}', 'format'),
        (f'<interpreter>\n2\n</interpreter>\n{ANSWER}', 'format'),
        (f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\nDone.', 'format'),
        (f'{GOOD}\n<interpreter>\n3\n</interpreter>\n\n{ANSWER}', 'execution'),  # not what it prints
        (f'{_call("boom")}\n<interpreter>\nNameError: not scripted\n</interpreter>\n\n{ANSWER}', 'execution'),
        (
            f'{_call("boom")}\n<interpreter>\nTraceback\nNameError: not scripted\n</interpreter>\n\n'
            f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}',
            'kept',
        ),
        (f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{wrap_answer("3")}', 'answer'),
    ],
)
def test_rewritten_answers_are_kept_or_dropped_by_their_real_runs(text, reason):
    assert _verify(text, {'print(1+1)': '2\n'}) == reason


LONG = ' '.join(str(n * n) for n in range(300))  # 1,487 characters, more than feedback shows


@pytest.mark.parametrize('claim', [
    LONG,  # whole
    f'{LONG[:200]}...{LONG[-200:]}',  # as the authors' code cuts
    # As verl does.
    f'{LONG[:128]}...(truncated)...{LONG[-128:]}', f'{LONG[:256]}...(truncated)', f'(truncated)...{LONG[-256:]}',
    f'{LONG[:512]}… [463 characters omitted] …{LONG[-512:]}',  # our own
    f'{LONG[:20]} … {LONG[400:420]} … {LONG[-20:]}', '0 1 4 9 ...'])  # fmt: skip
def test_a_long_output_bears_out_a_claim_that_is_whole_or_cut(claim):
    text = f'{GOOD}\n<interpreter>\n{claim}\n</interpreter>\n\n{ANSWER}'
    assert _verify(text, {'print(1+1)': LONG + '\n'}) == 'kept'


@pytest.mark.parametrize('claim', [
    LONG + ' 1', LONG[:-1], LONG[:200] + LONG[-200:],  # cut without a word
    f'1 {LONG[:200]}...{LONG[-200:]}', f'{LONG[:200]}...{LONG[-200:]}1',  # another head, another tail
    f'{LONG[:20]} … 3 3 3 … {LONG[-20:]}', f'{LONG[-20:]}...{LONG[:20]}', f'{LONG}...{LONG}', f'{LONG}...', '...', '…',
    LONG.replace(' ', '')])  # other numbers  # fmt: skip
def test_a_long_output_bears_out_no_other_claim(claim):
    text = f'{GOOD}\n<interpreter>\n{claim}\n</interpreter>\n\n{ANSWER}'
    assert _verify(text, {'print(1+1)': LONG + '\n'}) == 'execution'


@pytest.mark.parametrize(
    ('claim', 'reason'),
    [
        ('Traceback (most recent call last):\n  File "a.py"\nValueError: ' + 'x' * 500, 'kept'),
        ('Traceback (most recent call last):\n  File "a...' + 'x' * 200, 'kept'),  # cut inside the last line
        ('ValueError: ' + 'x' * 100 + '...' + 'x' * 200, 'kept'),
        ('TypeError: ' + 'x' * 100 + '...' + 'x' * 200, 'execution'),
        ('ValueError: ' + 'x' * 499, 'execution'),
    ],
)
def test_a_long_error_is_compared_by_its_last_line_before_it_is_cut(claim, reason):
    error = ExecResult(Verdict.ERROR, '', 'Traceback\nValueError: ' + 'x' * 500 + '\n', exit_code=1)
    text = (
        f'{_call("boom")}\n<interpreter>\n{claim}\n</interpreter>\n\n'
        f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}'
    )
    assert _verify(text, {'print(1+1)': '2\n', 'boom': error}) == reason


@pytest.mark.parametrize(('printed', 'claim', 'reason'), [
    ('', '', 'kept'), ('', '(no output: use print to see a value)', 'kept'), ('2\n', '', 'execution'),
    ('[1, 2]\n', '[1,2]', 'kept'), ('1\n2\n', '1 2', 'kept'), ('12\n', '1 2', 'execution'),
    ('[0 1 2 ... 7 8 9]\n', '[0 1 2 ... 7 8 9]', 'kept'), ('f(1) = 2\n', 'f(2)...= 2', 'execution')])  # fmt: skip
def test_spacing_aside_a_claim_is_what_was_printed(printed, claim, reason):
    text = f'{GOOD}\n<interpreter>\n{claim}\n</interpreter>\n\n{ANSWER}'
    assert _verify(text, {'print(1+1)': printed}) == reason


def test_an_answer_that_is_not_what_the_snippet_printed_is_dropped():
    problem = arithmetic.problems('train', 4, 0)[3]
    mix = Mix(easy={'code': 1}, needy={'code': 1})
    episodes, counts = _build([problem], mix, FakePool(lambda code: '1'), 0)
    assert not episodes and counts['answer'] == 1


def test_faults_of_the_sandbox_never_become_traces():
    fault = ExecResult(Verdict.SANDBOX_ERROR, '', 'ours')
    text = f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}'
    assert _verify(text, {'print(1+1)': fault}) == 'execution'


@pytest.mark.parametrize('max_tokens', [20, 90])
def test_traces_over_the_budget_are_counted(max_tokens):
    text = f'{GOOD}\n<interpreter>\n2\n</interpreter>\n\n{ANSWER}'
    assert _verify(text, {'print(1+1)': '2\n'}, max_tokens=max_tokens) == 'length'


def test_what_was_dropped_is_told_by_cause_with_its_share():
    rows = outcome.shares({'kept': 30, 'format': 0, 'execution': 9, 'answer': 1, 'length': 0})
    assert [row[1:] for row in rows] == [
        ('30', '75.0 %'),
        ('0', '0.0 %'),
        ('9', '22.5 %'),
        ('1', '2.5 %'),
        ('0', '0.0 %'),
    ]
    assert 'prints something else' in rows[2][0]


def test_bad_mixes_are_refused_by_name():
    with pytest.raises(ValueError, match='^easy.prose: no such kind of trace'):
        Mix(easy={'prose': 1.0}, needy={'mental': 1.0})
    with pytest.raises(ValueError, match='^needy.mental=0.5: the shares must add up to 1'):
        Mix(easy={'mental': 1.0}, needy={'mental': 0.5})
