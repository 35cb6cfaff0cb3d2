"""An episode as coloured text, for a terminal and for a notebook: who wrote what, in the order of its tokens."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator

from retool_jax.core.records import Episode
from retool_jax.text.tokenizer import Tokenizer

# Author → ANSI code, CSS. The colours are those of report.html, readable on light and dark.
STYLES = {
    'prompt': ('90', 'color:#8b93a0'),
    'model': ('0', ''),
    'code': ('94', 'color:#2459d6;background:#2459d618'),
    'tool': ('33', 'color:#b45f06;background:#b45f0618'),
    'answer': ('1;32', 'color:#0d8a4a;font-weight:bold'),
}
_MARKED = re.compile(r'(?P<code><code>.*?(?:</code>|$))|(?P<answer><answer>.*?(?:</answer>|$))', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Ink:
    """Text with its authors; `print` colours it on a terminal, a notebook shows it as HTML."""

    pieces: tuple[tuple[str, str], ...]  # (author, text)
    caption: str

    def __str__(self) -> str:
        painted = ''.join(f'\x1b[{STYLES[author][0]}m{_harmless(text)}\x1b[0m' for author, text in self.pieces)
        return f'{painted}\n── {self.caption}'

    def _repr_html_(self) -> str:
        painted = ''.join(
            f'<span style="{STYLES[author][1]}">{html.escape(text)}</span>' for author, text in self.pieces
        )
        return (
            f'<pre style="white-space:pre-wrap;overflow-wrap:anywhere">{painted}</pre>'
            f'<p style="color:#8b93a0">{html.escape(self.caption)}</p>'
        )


def paint(episode: Episode, tokenizer: Tokenizer) -> Ink:
    """The whole episode; authors are those recorded with each token, code and answer are found in the model's own."""
    pieces: list[tuple[str, str]] = []
    length = 0
    for acted, ids in episode.segments():
        text = tokenizer.decode(ids, specials=length < episode.prompt_length)
        kind = 'prompt' if length < episode.prompt_length else 'model' if acted else 'tool'
        pieces += _split(text) if acted else [(kind, text)]
        length += len(ids)
    facts = [
        episode.problem.id,
        f'sample {episode.sample}',
        f'{episode.acted_count} tokens written',
        *(f'{call.verdict} in {1000 * call.wall_s:.0f} ms' for call in episode.calls),
        f'ended by {episode.stop}',
    ]
    if episode.reward is not None:
        facts.append(f'reward {episode.reward.value:+g} (gold {episode.problem.answer})')
    return Ink(tuple(pieces), ' · '.join(facts))


def _split(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    for match in _MARKED.finditer(text):
        if match.start() > position:
            yield 'model', text[position : match.start()]
        yield match.lastgroup, match[0]
        position = match.end()
    if position < len(text):
        yield 'model', text[position:]


def _harmless(text: str) -> str:
    """Control characters would move the cursor, or worse: shown as symbols, line ends and tabs left alone."""
    return ''.join(c if c in '\n\t' or c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else '�' for c in text)
