"""Coloured text: every token once, under its author, harmless on a terminal and in a page."""

import re

from retool_jax.core.records import Episode, Problem, Reward, Stop, ToolCall, Verdict
from retool_jax.report import ink
from retool_jax.text.template import wrap_answer, wrap_feedback, wrap_snippet
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


def make(output='4'):
    episode = Episode(Problem('p7', 'What is 2 + 2?', '4', 'test', ''), sample=1, step=0)
    episode.append([257, *TOKENIZER.encode('user\nWhat is 2 + 2?'), 258], acted=False)
    episode.prompt_length = len(episode.tokens)

    def write(text):
        ids = TOKENIZER.encode(text)
        episode.append(ids, acted=True, logprobs=[-0.1] * len(ids))

    write('I compute it.\n' + wrap_snippet('print(2 + 2)'))
    episode.append(TOKENIZER.encode(wrap_feedback(output)), acted=False)
    write('So: ' + wrap_answer('4') + '<code>left open')
    episode.calls.append(ToolCall(0, 'print(2 + 2)', Verdict.OK, '4\n', '', '4', 40, 0.012))
    episode.stop, episode.reward = Stop.ANSWER, Reward(1.0, True, True, True, '4')
    return episode


def test_every_piece_stands_under_its_author():
    assert ink.paint(make(), TOKENIZER).pieces == (
        ('prompt', '<|im_start|>user\nWhat is 2 + 2?<|im_end|>'),
        ('model', 'I compute it.\n'),
        ('code', wrap_snippet('print(2 + 2)')),
        ('tool', wrap_feedback('4')),
        ('model', 'So: '),
        ('answer', wrap_answer('4')),
        ('code', '<code>left open'),
    )


def test_a_terminal_gets_colours_and_nothing_else_that_moves_it():
    text = str(ink.paint(make('\x1b[2J\x07\u202e<b>'), TOKENIZER))
    assert '\x1b[94m<code>' in text and '\x1b[33m\n<interpreter>' in text and '␛[2J␇�' in text
    assert all(c.isprintable() for c in re.sub(r'\x1b\[[\d;]+m|[\n\t]', '', text))
    assert text.endswith(
        '── p7 · sample 1 · ' + f'{make().acted_count} tokens written · ok in 12 ms · '
        'ended by answer · reward +1 (gold 4)'
    )


def test_a_notebook_gets_escaped_html():
    page = ink.paint(make('<script>alert(1)</script>'), TOKENIZER)._repr_html_()
    assert '<script>' not in page and '&lt;script&gt;' in page and page.count('<span') == page.count('</span>') == 7
