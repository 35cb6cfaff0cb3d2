"""The text that the model is shown."""

from __future__ import annotations

import signal

import pytest

from retool_jax.core.records import ExecResult, Verdict
from retool_jax.sandbox import feedback
from retool_jax.sandbox.feedback import FeedbackSettings, render

TRACEBACK = (
    'Traceback (most recent call last):\n  File "<cell>", line 3, in <module>\n    f()\n'
    '  File "<cell>", line 2, in f\n    return 1 / 0\n           ~~^~~\nZeroDivisionError: division by zero\n'
)


def result(verdict=Verdict.OK, stdout='', stderr='', **rest) -> ExecResult:
    return ExecResult(verdict=verdict, stdout=stdout, stderr=stderr, **rest)


def settings(**changes) -> FeedbackSettings:
    return FeedbackSettings(**{'style': 'paper', 'max_chars': 1024, 'max_frames': 6} | changes)


@pytest.mark.parametrize(
    'style, given, expected',
    [
        ('paper', result(stdout='42\n'), '42'),
        ('official', result(stdout='42\n'), '42'),
        ('paper', result(stdout='  a\n\nb \n\n'), '  a\n\nb '),
        ('paper', result(), feedback.EMPTY_TEXT),
        ('paper', result(stdout='\n \n'), feedback.EMPTY_TEXT),
        ('paper', result(stdout='1\n', stderr='<cell>:1: SyntaxWarning: x\n'), '1'),
        ('full', result(stdout='1\n', stderr='<cell>:1: SyntaxWarning: x\n'), '1\n<cell>:1: SyntaxWarning: x'),
        ('paper', result(Verdict.ERROR, '5\n', TRACEBACK, exit_code=1), '5\n' + TRACEBACK.rstrip()),
        ('official', result(Verdict.ERROR, '5\n', TRACEBACK, exit_code=1), 'ZeroDivisionError: division by zero'),
        (
            'official',
            result(Verdict.ERROR, '', '  File "<cell>", line 1\n    x = = 1\n        ^\nSyntaxError: invalid syntax\n'),
            'SyntaxError: invalid syntax',
        ),
        ('paper', result(Verdict.ERROR, 'a\n', exit_code=3), 'a\nSystemExit: 3'),
        ('official', result(Verdict.ERROR, 'a\n', exit_code=3), 'SystemExit: 3'),
        ('paper', result(Verdict.ERROR, '', 'bye\n', exit_code=1), 'bye'),
        ('paper', result(Verdict.SIGNAL, 'a\n', signal=signal.SIGSEGV), 'a\nThe process was ended by signal SIGSEGV.'),
        ('paper', result(Verdict.TIMEOUT, 'some', 'x'), feedback.TIMEOUT_TEXT),
        ('full', result(Verdict.TIMEOUT, 'some', 'x'), 'some\n' + feedback.TIMEOUT_TEXT),
        ('paper', result(Verdict.OOM, 'some'), feedback.MEMORY_TEXT),
        ('paper', result(Verdict.OUTPUT_LIMIT, 'xx\n'), 'xx\n' + feedback.OUTPUT_TEXT),
    ],
)
def test_styles(style, given, expected):
    assert render(given, settings(style=style)) == expected


def test_long_output_keeps_head_and_tail_and_says_how_much_is_missing():
    text = ''.join(chr(97 + i % 26) for i in range(1000))
    shown = render(result(stdout=text), settings(max_chars=100))
    assert shown == text[:50] + '… [900 characters omitted] …' + text[-50:]
    assert render(result(stdout=text), settings(style='official', max_chars=400)) == text[:200] + '...' + text[-200:]
    assert render(result(stdout='x' * 100), settings(max_chars=100)) == 'x' * 100


def test_the_final_line_of_an_error_survives_any_output():
    shown = render(result(Verdict.ERROR, 'x' * 10**6, TRACEBACK), settings(max_chars=200))
    assert shown.endswith('ZeroDivisionError: division by zero') and len(shown) < 260


def test_output_limit_keeps_its_sentence():
    shown = render(result(Verdict.OUTPUT_LIMIT, 'x' * 10**6), settings(max_chars=200))
    assert shown.endswith(feedback.OUTPUT_TEXT) and len(shown) < 320


def test_only_the_last_frames_are_kept(pools):
    code = 'def f(n):\n    if n == 0: raise ValueError("deep")\n    g(n)\ndef g(n): f(n - 1)\nf(20)'
    outcome = pools('warm').submit(code).result(60)
    shown = render(outcome, settings(max_frames=3, max_chars=4000))
    assert shown.count('  File "<cell>"') == 3
    assert shown.startswith(
        'Traceback (most recent call last):\n  … [39 frames omitted] …\n  File "<cell>", line 3, in f\n'
    )
    assert shown.endswith('\nValueError: deep')


def test_real_tracebacks_show_no_runner_and_no_path_of_the_host(pools):
    outcome = pools('warm').submit('import json\njson.loads("{")').result(60)
    shown = render(outcome, settings(max_chars=4000))
    assert 'runner' not in shown and '/work' not in shown and '/root' not in shown and '/home' not in shown
    assert shown.startswith(
        'Traceback (most recent call last):\n  File "<cell>", line 2, in <module>\n    json.loads("{")\n'
    )


@pytest.mark.parametrize('verdict', [Verdict.SANDBOX_ERROR, Verdict.FORMAT, Verdict.CAP])
def test_what_is_not_the_snippets_is_never_shown(verdict):
    with pytest.raises(ValueError, match='never shown'):
        render(result(verdict), settings())


@pytest.mark.parametrize('field, value', [('style', 'loud'), ('max_chars', 1), ('max_frames', 0)])
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        settings(**{field: value})
