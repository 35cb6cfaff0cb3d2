"""Lines, banner, progress and tables, with a terminal and without one, from the process that leads alone."""

from __future__ import annotations

import sys

import jax

from retool_jax.core import console


def test_without_a_terminal_progress_is_a_few_plain_lines(capsys, monkeypatch):
    console.banner(model='tiny, 1 M', mesh={'data': 2, 'fsdp': 4})
    with console.progress('SFT [tool]', 3) as advance:
        advance()
        monkeypatch.setattr(console, 'QUIET_S', 0.0)
        advance('loss 0.5')
        advance()
    console.table('Results', ['model', 'avg'], [['tool', '0.93'], ['text only', '0.4']])
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        'model  tiny, 1 M', 'mesh   data=2 × fsdp=4', 'SFT [tool]: 2/3 0 s loss 0.5', 'SFT [tool]: 3/3 0 s loss 0.5',
    ]  # fmt: skip
    assert out.splitlines() == ['Results', 'model       avg', '---------  ----', 'tool       0.93', 'text only   0.4']


def test_on_a_terminal_progress_is_a_bar_and_markup_in_texts_is_shown_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    monkeypatch.setenv('COLUMNS', '120')
    monkeypatch.setenv('TERM', 'xterm-256color')
    console.banner(model='tiny [bold]', run='runs/a')
    with console.progress('SFT [tool]', 2) as advance:
        advance('loss [0.5]')
        advance(n=1)
    err = capsys.readouterr().err
    for text in ('retool_jax', 'tiny [bold]', 'runs/a', 'SFT [tool]', '2/2', 'loss [0.5]'):
        assert text in err


def test_of_several_processes_one_speaks_and_says_how_many_there_are(capsys, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    console.banner(model='tiny')
    assert capsys.readouterr().err.splitlines() == ['model      tiny', 'processes  2']
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    console.say('hello')
    console.banner(model='tiny')
    with console.progress('RL', 3) as advance:
        advance('text', n=2)
    assert capsys.readouterr() == ('', '')
