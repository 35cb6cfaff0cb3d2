"""Whether an interpreter really said what a trace claims that it said."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from retool_jax.core.checks import MANY
from retool_jax.core.records import ExecResult, Verdict
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.text.template import wrap_feedback

# Where an output was cut: an ellipsis, and a word about it in brackets if there is one: '...', '…', '(truncated)...',
# '...(truncated)...', '… [12 characters omitted] …'.
_NOTE = r'[\[(<][^\[\]()<>\n]{0,60}?(?:truncat|omit|cut|skip|char|more|lines)[^\[\]()<>\n]{0,60}[\])>]'
_DOTS = r'(?:\.{3,}|…)'
_CUT = re.compile(rf'{_NOTE}\s*{_DOTS}|{_DOTS}(?:\s*{_NOTE}(?:\s*{_DOTS})?)?')
# Numbers as programs and people write them: 1,000 · 12.0 · .5 · 1e-3 · 2/3. Not the 2 of x2 or the 1 of v1.0.1.
_NUMBER = re.compile(
    r'(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)?(?:(?<=\d)\.?|\.(?=\d))\d*(?:[eE][-+]?\d+)?'
    r'(?:/\d+)?(?![\w]|\.\d)'
)
_DIGITS = 3  # significant ones that a rounded number must keep


def bears_out(result: ExecResult, claim: str, feedback: FeedbackSettings) -> bool:
    """Whether a run says what was claimed, spacing aside; of an error only the last line, styles differ.

    The whole output is compared, whatever `feedback` would leave of it. Where the claim holds an ellipsis it was cut
    there: what stands before, between and after must follow one another in the output, beginning with its first
    character and ending with its last.
    """
    said, printed, claimed = _texts(result, claim, feedback)
    if result.verdict == Verdict.OK:  # what was printed, or what this project adds to it where it is nothing
        return _shows(claimed, printed) or _shows(claimed, said)
    *above, last = claimed.splitlines() or ['']
    error = (said.splitlines() or [''])[-1]
    # A cut inside the last line has left the head of another one before it.
    return _shows(last, error) or bool(above and _CUT.search(last) and _shows('…' + _CUT.split(last)[-1], error))


def same_numbers(result: ExecResult, claim: str, feedback: FeedbackSettings) -> bool:
    """Whether a run that went well says what was claimed but for the form of its numbers: 12 for 12.0, 1,000 for 1000,
    0.333 for 0.3333333333333333 (rounded to three significant digits or more), 1/2 for 0.5."""
    _, printed, claimed = _texts(result, claim, feedback)
    if result.verdict != Verdict.OK or _spaced(_NUMBER.sub('#', claimed)) != _spaced(_NUMBER.sub('#', printed)):
        return False
    pairs = zip(_NUMBER.findall(claimed), _NUMBER.findall(printed), strict=True)
    return all(_same_number(said, really) for said, really in pairs)


def _texts(result: ExecResult, claim: str, feedback: FeedbackSettings) -> tuple[str, str, str]:
    """(what the model would see of a result, uncut; what was printed; what was claimed), without tags."""
    whole = dataclasses.replace(feedback, max_chars=MANY, max_frames=MANY)
    said, printed, claimed = (
        re.sub(r'</?interpreter>', '', text).strip()
        for text in (wrap_feedback(render(result, whole)), wrap_feedback(result.stdout), wrap_feedback(claim))
    )
    return said, printed, claimed


def _same_number(claimed: str, printed: str) -> bool:
    said, really = _value(claimed), _value(printed)
    if said is None or really is None or said == really:
        return said is not None and said == really
    decimals = re.search(r'\.(\d+)$', claimed)
    digits = len(re.sub(r'\D', '', claimed).lstrip('0'))
    return bool(decimals) and digits >= _DIGITS and abs(said - really) * 10 ** len(decimals[1]) <= Fraction(1, 2)


def _value(text: str) -> Fraction | None:
    whole, _, below = text.replace(',', '').partition('/')
    try:
        return Fraction(whole) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _shows(claimed: str, said: str) -> bool:
    """Whether `claimed` is `said`, or what is left of it with something cut out at every ellipsis."""
    if _spaced(claimed) == (said := _spaced(said)):
        return True
    head, *others = (_spaced(part) for part in _CUT.split(claimed))
    if not others or not any((head, *others)) or not said.startswith(head):
        return False
    *between, tail = others
    place = len(head)
    for part in between:  # at least one character is missing at each cut
        place = said.find(part, place + 1)
        if place < 0:
            return False
        place += len(part)
    return said.endswith(tail) and place < len(said) - len(tail)


def _spaced(text: str) -> str:
    """Spacing counts between two words or numbers alone: there it is one blank."""
    return re.sub(r'(?<!\w)\s+|\s+(?!\w)', '', re.sub(r'\s+', ' ', text.strip()))
