r"""Where an answer is in a text, and when two answers are for certain the same string or the same integer.

Anything beyond that (fractions, sets, radicals, words…) is for `grader`'s child process to decide.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction

_TOKEN = re.compile(r'\\boxed\s*\{|\\.|[{}]', re.DOTALL)  # `\{` and `\\` are one unit each
# Words that say that there is no answer, without spaces; '' is what is left of '-', '...' and '[]'.
_NO_ANSWER = frozenset((
    '', '?', '??', '???', 'proof', 'prove', 'seeproof', 'notfound', 'noanswer', 'noanswerfound', 'answernotfound',
    'n/a', 'none', 'null', 'nil', 'nan', 'unknown', 'missing', 'notavailable', 'notapplicable', 'unavailable', 'tbd',
    'todo', 'error', 'seesolution', 'seeabove', 'solution', 'answer', 'undetermined',
))  # fmt: skip
_UPRIGHT = re.compile(r'\\(?:text[a-z]*|mbox|math(?:rm|bf)|l?dots)(?![a-z])|[\s{}()\[\]$."\'_-]')
_INTEGER = re.compile(r'[+-]?[0-9]+')
_NO_SPACE = re.compile(r'(?<!\\)\\!\s*')
_SPACING = re.compile(r'(?:(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\s)+')
_GROUPS = re.compile(r'(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]| \d|,\d)')  # 1 000 is 1000, and 3 4 is not 34
_COMMAS = re.compile(r'[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?')
_FRACTION = re.compile(r'\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}')
_WORDS = re.compile(r'\\(?:text[a-z]*|mbox|mathrm|mathbf)\s*\{([^{}]*)\}')
_ESCAPED = re.compile(r'\\([\\{}_%#&$])')
_DECIMAL = re.compile(r'-?[0-9]{1,400}(?:\.[0-9]{1,400})?')
_DELIMITERS = (('$$', '$$'), ('$', '$'), (r'\(', r'\)'), (r'\[', r'\]'))


def last_box(text: str) -> str | None:
    r"""Contents of the last complete `\boxed{…}`, braces matched; None without one. Linear in the text."""
    open_braces: list[int] = []  # start of the contents for a box, -1 for any other brace
    best = (-1, -1)
    for match in _TOKEN.finditer(text):
        unit = match[0]
        if unit.startswith(r'\boxed'):
            open_braces.append(match.end())
        elif unit == '{':
            open_braces.append(-1)
        elif unit == '}' and open_braces:
            start = open_braces.pop()
            if start > best[0]:
                best = (start, match.start())
    return text[best[0] : best[1]] if best[0] >= 0 else None


def is_no_answer(gold: str) -> bool:
    """Whether a gold answer says that there is none: 'proof', 'N/A', `\\text{not found}`…"""
    if gold.strip(' .') == 'NA':
        return True
    return _UPRIGHT.sub('', gold).casefold() in _NO_ANSWER


def last_integer(text: str) -> str | None:
    """The last integer of the last line that is not blank."""
    lines = text.rstrip().splitlines()
    integers = _INTEGER.findall(lines[-1]) if lines else []
    return integers[-1] if integers else None


def normalise(answer: str) -> str:
    r"""One spelling for answers that differ only in typesetting.

    Outer dollar signs, spacing, `\left` and `\right`, the final full stop, and the size of a fraction
    (`\dfrac`) carry no meaning; the typographic minus is a minus. Groups of three digits are one number; other
    numbers side by side stay two.
    """
    answer = answer.strip()
    for left, right in _DELIMITERS:
        if len(answer) > len(left + right) and answer.startswith(left) and answer.endswith(right):
            answer = answer[len(left) : -len(right)]
    answer = re.sub(r'\\[dt]frac\b', r'\\frac', answer)
    answer = re.sub(r'\\(?:left|right)(?![a-zA-Z])', '', answer)
    answer = _SPACING.sub(' ', _NO_SPACE.sub('', answer)).replace('\N{MINUS SIGN}', '-')
    answer = _GROUPS.sub(lambda m: m[0].replace(' ', ''), answer)
    # A space matters between letters and digits alone: `\pi r` is not `\pir`, 1 1/2 is not 11/2.
    answer = answer.removesuffix('.').rstrip()
    if _COMMAS.fullmatch(answer):
        return answer.replace(',', '').replace('{}', '')
    return re.sub(r'(?<![a-zA-Z0-9.]) | (?![a-zA-Z0-9.])', '', answer)


def integer(answer: str) -> str | None:
    """Canonical digits of a plain integer ('+025' is '25'); None for anything else."""
    answer = normalise(answer)
    if not _INTEGER.fullmatch(answer):
        return None
    # Digits stay a string: int() refuses more than 4,300 of them.
    digits = answer.lstrip('+-').lstrip('0') or '0'
    return '-' + digits if answer[0] == '-' and digits != '0' else digits


def plain(answer: str) -> str:
    r"""An answer that is a text, without its typesetting: `\text{…}`, outer dollar signs, `\{`, `\\` for a new line,
    and `\frac{a}{b}`, which is a/b."""
    answer = answer.strip()
    for left, right in _DELIMITERS:
        if len(answer) > len(left + right) and answer.startswith(left) and answer.endswith(right):
            answer = answer[len(left) : -len(right)].strip()
    answer = _FRACTION.sub(r'\1/\2', answer)
    answer = _WORDS.sub(r'\1', answer)
    return _ESCAPED.sub(lambda m: '\n' if m[1] == '\\' else m[1], answer)


def same_text(answer: str, gold: str) -> bool:
    """Whether two answers are the same text: letters of either case, blanks that separate no words, a final full
    stop and typesetting aside; lists and records of JSON are compared as values, their numbers as numbers."""
    try:
        return _values(plain(answer)) == _values(plain(gold))
    except (ValueError, RecursionError):
        return _squeezed(plain(answer)) == _squeezed(plain(gold))


def _squeezed(text: str) -> str:
    lines = (re.sub(r'\s*([][(){},:;])\s*', r'\1', ' '.join(line.split())) for line in text.strip().splitlines())
    return '\n'.join(line for line in lines if line).removesuffix('.').casefold()


def _values(text: str) -> object:
    """A list or a record of JSON, or of Python's spelling, to compare; ValueError for any other text."""
    if not text.strip().startswith(('[', '{')):
        raise ValueError('neither a list nor a record')
    try:
        found = json.loads(text)
    except ValueError:
        found = json.loads(text.replace("'", '"'))
    return _comparable(found)


def _comparable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _comparable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_comparable(entry) for entry in value]
    if isinstance(value, bool) or value is None:
        return str(value)
    return Fraction(str(value)) if _DECIMAL.fullmatch(str(value)) else value


def equal_at_sight(answer: str, gold: str) -> bool | None:
    """True or False where strings or plain integers decide; None where mathematics has to."""
    if normalise(answer) == normalise(gold):
        return True
    a, b = integer(answer), integer(gold)
    if a is not None and b is not None:
        return a == b
    return None if answer.strip() else False
