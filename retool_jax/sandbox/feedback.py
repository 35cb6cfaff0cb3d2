"""What the model is shown of a result: stdout, then the error, cut in the middle, always the same text."""

from __future__ import annotations

import dataclasses
import re
import signal

from retool_jax.core.checks import MANY, check, one_of, within
from retool_jax.core.records import ExecResult, Verdict

STYLES = ('paper', 'official', 'full')
TIMEOUT_TEXT = 'TimeoutError: the code ran longer than allowed and was stopped.'
MEMORY_TEXT = 'MemoryError: the code used more memory than allowed and was stopped.'
OUTPUT_TEXT = 'OutputError: the code printed more than allowed and was stopped.'
EMPTY_TEXT = '(no output: use print to see a value)'
_TRACEBACK = 'Traceback (most recent call last):\n'


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackSettings:
    """How results are shown. Letters: P the paper, O its evaluation code, R verl's recipe, H this project's choice."""

    style: str  # 'paper' (P): stdout and traceback; 'official' (O): the error's last line; 'full' (H): warnings too
    max_chars: int  # characters of the text, notes of omission apart; the middle is cut; at least 2. O 400; R 256
    max_frames: int  # frames of a traceback in style paper, the last ones; at least 1. H 6

    def __post_init__(self):
        check(self, style=one_of(STYLES), max_chars=within(2, MANY), max_frames=within(1, MANY))


def render(result: ExecResult, settings: FeedbackSettings) -> str:
    """The text between the interpreter tags, without them and without a last newline.

    Raises:
        ValueError: a result of ours (sandbox_error) or of the turn rules; the model is shown none.
    """
    style = settings.style
    error = result.stderr
    if style == 'official':
        error = _last_line(error)
    elif style == 'paper':
        error = _shorten_traceback(error, settings.max_frames)
    match result.verdict:
        case Verdict.OK:
            parts = [result.stdout, result.stderr if style == 'full' else '']
        case Verdict.ERROR:
            note = '' if error.strip() else f'SystemExit: {result.exit_code}'
            parts = [result.stdout if style != 'official' else '', error, note]
        case Verdict.SIGNAL:
            parts = [
                result.stdout if style != 'official' else '',
                error if style == 'full' else '',
                f'The process was ended by {_signal_name(result.signal)}.',
            ]
        case Verdict.TIMEOUT:
            # How far it came depends on the machine: only 'full' shows it.
            parts = [result.stdout, TIMEOUT_TEXT] if style == 'full' else [TIMEOUT_TEXT]
        case Verdict.OOM:
            parts = [result.stdout, MEMORY_TEXT] if style == 'full' else [MEMORY_TEXT]
        case Verdict.OUTPUT_LIMIT:
            head = cut(result.stdout, settings)
            return '\n'.join(filter(None, [head.rstrip('\n'), OUTPUT_TEXT]))
        case _:
            raise ValueError(f'a result with verdict {str(result.verdict)!r} is never shown to the model')
    parts = [part.rstrip('\n') for part in parts if part.strip()]
    return cut('\n'.join(parts), settings) or EMPTY_TEXT


def cut(text: str, settings: FeedbackSettings) -> str:
    """Head and tail of `text`, `max_chars` in all, with a note of what lies between."""
    if len(text) <= settings.max_chars:
        return text
    head = settings.max_chars // 2
    tail = settings.max_chars - head
    omitted = len(text) - settings.max_chars
    note = '...' if settings.style == 'official' else f'… [{omitted} characters omitted] …'
    return text[:head] + note + text[-tail:]


def _last_line(text: str) -> str:
    """The line that names the exception: the last one that is not indented."""
    lines = [line for line in text.splitlines() if line.strip()]
    flush = [line for line in lines if not line[0].isspace()]
    return (flush or lines or [''])[-1]


def _shorten_traceback(text: str, max_frames: int) -> str:
    """Keeps the last frames of the last traceback, and always its final line."""
    start = text.rfind(_TRACEBACK)
    if start < 0:
        return text
    before, body = text[:start], text[start + len(_TRACEBACK) :]
    frames = [match.start() for match in re.finditer(r'^  File ', body, re.M)]
    if len(frames) <= max_frames:
        return text
    dropped = len(frames) - max_frames
    return f'{before}{_TRACEBACK}  … [{dropped} frames omitted] …\n{body[frames[dropped] :]}'


def _signal_name(number: int | None) -> str:
    try:
        return f'signal {signal.Signals(number).name}'
    except ValueError:
        return f'signal {number}'
