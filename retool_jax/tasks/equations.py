"""The equations of a worked solution: which arithmetic stands in a text, what it comes to, and whether that holds.

Read are GSM8K's notes (`<<48/2=24>>`) and plain `expression = value` between words and units: brackets, powers
(`2^3`), percent, fractions and mixed numbers, currencies, thousands in groups, `x` and `×`, `.5`, and chains
(`a = b = c`). A note stands for the equation of the text around it, unless the note alone does not hold. Everything is
computed in fractions: an equation holds where both sides are equal, or where the stated value is the left side rounded
to the digits it has; any other is wrong, however near it comes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from retool_jax.tasks.expressions import NUMBER, number, value

TOKENS = 200  # of a longer expression nothing is computed
WORDS = 4  # that may stand between two numbers of an expression: "116 pages x 1/4"
NOTE = re.compile(r'<<([^<>]*)>>')
# One spelling for each sign, before anything is cut into tokens.
_SPELLINGS = (
    *((re.compile(f'[{signs}]'), said) for signs, said in (('−–', '-'), ('×✕✖∙·⋅', '*'), ('≈≅', '='))),
    *((re.compile(rf'\\{name}(?![a-z])'), said) for name, said in (('times', '*'), ('cdot', '*'), ('div', '÷'))),
    *((re.compile(f' ?{sign}'), f' {said}') for sign, said in (('½', '1/2'), ('¼', '1/4'), ('¾', '3/4'), ('⅓', '1/3'),
                                                              ('⅔', '2/3'), ('⅕', '1/5'), ('⅛', '1/8'))),
    (re.compile(r'\\([%$])'), r'\1'),
    (re.compile(r'(?<=\d)\s*\bper\s?cent\b'), '%'),
    (re.compile(r'(?<=[\d%)])\s+(?:times|multiplied by)\s+(?=[$£€(]?\.?\d)'), ' * '),
    (re.compile(r'(?<=[\d%)])\s+divided by\s+(?=[$£€(]?\.?\d)'), ' ÷ '),
    (re.compile(r'(?<=[\d%)])\s+plus\s+(?=[$£€(]?\.?\d)'), ' + '),
    (re.compile(r'(?<=[\d%)])\s+minus\s+(?=[$£€(]?\.?\d)'), ' - '),
    # A share of a number: "20% of 50", "(1/3) of the 60".
    (re.compile(r'(?<=[%)])\s+of\s+(?:the\s+|his\s+|her\s+|their\s+)?(?=[$£€(]?\.?\d)'), ' * '),
    (re.compile(r'(?<![\d.])(\d+/\d+)\s+of\s+(?:the\s+|his\s+|her\s+|their\s+)?(?=[$£€(]?\.?\d)'), r'\1 * '),
)  # fmt: skip
_TOKEN = re.compile(
    rf'(?P<number>{NUMBER})'
    r'|(?P<times>(?:(?<=[\d%)])|(?<=[\w%)]\s))[xX](?=\s*[$£€¥(]*\.?\d))'
    r'|(?P<variable>(?:\b|(?<=\d))[xXyYzZ]\b|(?<=\d)[A-Z]\b|\b[B-HJKM-Zb-fi-kn-rt-z]\b)'  # no unit, no article
    r'|(?P<glue>(?<=\w)-(?=[A-Za-z])|/(?=\s*[A-Za-z]))'  # a word with a hyphen; a rate, "40 meters/minute"
    r'|(?P<sign>\*\*|\^|[-+*/÷()\[\]])|(?P<percent>%)|(?P<word>[^\W\d]+)|(?P<money>[$€£¥])|(?P<end>\S)'
)
_STATED = re.compile(
    rf'\s*(?:about\s+|approximately\s+|~\s*)?(-?)\s*[$€£¥]?\s*(-?)({NUMBER}(?: \d{{3}}(?![\d,.]\d))*)(\s*%)?'
)
_HEAD = re.compile(rf'\s*-?\s*[$€£¥]?\s*(?:{NUMBER})?[\s$€£¥]*')  # between an equation's sign and its note
_COUNTS_NOTHING = re.compile(
    r'an?|and|are|as|at|because|but|by|each|from|has|have|her?|his|in|is|it|more|less|of|on|or|per|she|so|than|that|the|'
    r'their|then|there|they|this|to|was|were|will|with|total|for|since|when|while|which|after|before|during|if|into|'
    r'every|altogether|all|only|we|you|also|percent|plus|minus|x'
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation of a worked solution."""

    expression: tuple[str, ...]  # numbers, operators and brackets of Python
    value: Fraction  # as it is stated
    counts: str  # what the result counts, a word in small letters; '' where none is said
    holds: bool  # whether the expression comes to this value, or to one that rounds to it
    before: str = ''  # whole sentences between the equation before it and this one, in one line


@dataclasses.dataclass(frozen=True)
class _Equation:
    """A step and where it stands in its line."""

    start: int
    equals: int
    end: int
    expression: tuple[str, ...]
    stated: str
    holds: bool


def lines(worked: str) -> list[str]:
    """The lines of a worked solution without its notes, blank ones and the one that repeats the answer."""
    return [NOTE.sub('', line) for line in _noted(worked)]


def read(worked: str) -> list[Step]:
    """The equations of a worked solution in their order, those that do not hold among them."""
    made, before = [], ''
    for noted in _noted(worked):
        line, notes = _plain(noted)
        place = 0
        for found in _equations(line, notes):
            before += _sentences(line[place : found.start], place > 0)
            counts = _counts(line, found.end, found.stated)
            made.append(Step(found.expression, number(found.stated), counts, found.holds, before.strip()))
            before, place = '', max(place, found.end)
        before += _sentences(line[place:], place > 0) + ' '
    return made


def rounds(exact: Fraction, stated: str) -> bool:
    """Whether a stated number is a value rounded to the digits that it has: 3.33 for 10/3, halves to either side."""
    digits = len(stated.partition('.')[2])
    return abs(exact - number(stated)) <= Fraction(1, 2 * 10**digits)


# --- lines and notes -----------------------------------------------------------------------------


def _noted(worked: str) -> list[str]:
    return [line.strip() for line in worked.splitlines() if line.strip() and not line.startswith('####')]


def _plain(noted: str) -> tuple[str, list[tuple[int, str]]]:
    """A line in one spelling and without its notes; each note with its place there."""
    line, notes, place = '', [], 0
    for note in NOTE.finditer(noted):
        line += noted[place : note.start()]
        notes.append((len(line), _spelt(note[1])))
        place = note.end()
    # Spelling moves what stands behind: each piece is put into it by itself.
    cuts = [0, *(at for at, _ in notes)]
    line += noted[place:]
    pieces = [_spelt(line[a:b]) for a, b in zip(cuts, [*cuts[1:], len(line)])]
    starts = [sum(map(len, pieces[: i + 1])) for i in range(len(notes))]
    return ''.join(pieces), [(at, said) for at, (_, said) in zip(starts, notes)]


def _spelt(text: str) -> str:
    for spelling, said in _SPELLINGS:
        text = spelling.sub(said, text)
    return text


def _sentences(text: str, inside: bool) -> str:
    """Whole sentences and clauses of a piece of text; `inside`: it begins inside one, which is not whole."""
    if inside:
        begin = re.search(r'[.:;!?]\s', text + ' ')
        text = text[begin.end() :] if begin else ''
    ends = [found.end() for found in re.finditer(r'[.:;!?](?=\s|$)', text)]
    return text[: ends[-1]] if ends else ''


# --- equations in a line -------------------------------------------------------------------------


def _equations(line: str, notes: Sequence[tuple[int, str]]) -> list[_Equation]:
    written = list(_of_text(line))
    for at, said in notes:
        found = _of_note(said, at)
        if found is None:
            continue
        twins = [e for e in written if e.equals < at and _HEAD.fullmatch(line, e.equals + 1, at)]
        if found.holds or not any(e.holds for e in twins):
            behind = _STATED.match(line, at)
            end = behind.end() if behind and number(behind[3]) == abs(number(found.stated)) else at
            start = min((e.start for e in twins), default=at)
            # What the words state instead ("$<<5/100=0.05>>5") stays an equation that does not hold.
            written = [e for e in written if e not in twins or (not e.holds and e.stated != found.stated)]
            written.append(dataclasses.replace(found, start=start, end=end))
    return sorted(written, key=lambda e: (e.equals, e.end))


def _of_note(said: str, at: int) -> _Equation | None:
    """The equation of a note, all of whose sides must be arithmetic and nothing else."""
    *sides, stated = said.split('=')
    result = _STATED.fullmatch(stated.rstrip())
    tokens = [list(_TOKEN.finditer(side)) for side in sides]
    if not (sides and result and all(tokens)) or any(
        t.lastgroup in ('word', 'variable', 'end') for ts in tokens for t in ts
    ):
        return None
    texts = [_joined(side) for side in tokens]
    if not _computes(texts[0]) or any(value(' '.join(_python(text)), {}) is None for text in texts):
        return None
    stated = ('-' if result[1] or result[2] else '') + result[3]
    told = [_told(text, stated, bool(result[4])) for text in texts]
    return _Equation(at, at, at, told[0] or tuple(_python(texts[0])), stated, all(told))


def _of_text(line: str) -> Iterator[_Equation]:
    """The equations of a line, chains among them: `a = b = c` is one where a is b, and a step each where b begins with
    the value of a ("5*2 = 10 + 3 = 13")."""
    tokens = list(_TOKEN.finditer(line))
    signs = [i for i, token in enumerate(tokens) if token[0] == '=']
    first: tuple[int, list[str]] | None = None  # the side that a chain began with
    for place, i in enumerate(signs):
        left, begin = _left(tokens, i)
        chained, first = first, None
        if chained and begin <= signs[place - 1] + 1:
            begin, left = chained
        sides = [side for side in _sides(left) if value(' '.join(_python(side)), {}) is not None]
        start = tokens[begin].start() if begin < len(tokens) else tokens[i].start()
        if place + 1 < len(signs):  # the whole right side, up to the next sign
            right, from_ = _left(tokens, signs[place + 1])
            worth = value(' '.join(_python(right)), {}) if from_ <= i + 1 and len(right) > 1 else None
            same = [s for s in sides if worth is not None and value(' '.join(_python(s)), {}) == worth]
            if same:
                first = begin, same[0]
                continue
        result = _STATED.match(line, tokens[i].end())
        if not result:
            continue
        sides = [side for side in sides if _computes(side)]
        if not sides:
            continue
        stated, end = ('-' if result[1] or result[2] else '') + result[3], result.end()
        quotient = re.compile(r'\s*/\s*(\d+)(?![\d.,]*\d)').match(line, result.end(3))  # "= 3/4"
        told = next(filter(None, (_told(side, stated, bool(result[4])) for side in sides)), None)
        if quotient and int(quotient[1]):
            share = f'{stated}/{quotient[1]}'
            exact = next((s for s in sides if value(' '.join(_python(s)), {}) == number(share)), None)
            if exact is not None:
                told, stated, end = tuple(_python(exact)), share, quotient.end()
        yield _Equation(start, tokens[i].start(), end, told or tuple(_python(sides[0])), stated, told is not None)


def _left(tokens: Sequence[re.Match[str]], stop: int) -> tuple[list[str], int]:
    """Numbers and signs before the token `stop`, and the first token that belongs to them. Words of units between them
    are left out."""
    begin, words, last = stop, 0, None  # last: the number, sign or bracket to the right
    for i in reversed(range(stop)):
        token, kind = tokens[i], tokens[i].lastgroup
        if stop - i > TOKENS:
            return [], stop
        if kind in ('end', 'variable'):
            break
        if kind == 'word':
            words += 1
            if words > WORDS:
                break
        elif kind not in ('money', 'glue'):
            closes = kind in ('number', 'percent') or token[0] in ')]'
            opens = last is not None and (last.lastgroup == 'number' or last[0] in '([')
            if closes and opens and not _side_by_side(tokens, i, last):
                break  # two numbers side by side: another clause
            words, last, begin = 0, token, i
        elif kind == 'money' and begin == i + 1:
            begin = i
    return _joined(tokens[begin:stop]), begin


def _side_by_side(tokens: Sequence[re.Match[str]], i: int, right: re.Match[str]) -> bool:
    """Whether a number and what stands right of it are one: `2(3 + 4)`, `(5)(3)`, `1 1/2`."""
    left = tokens[i]
    if right[0] in '([':
        return left.end() == right.start()
    return left.lastgroup == 'number' and left.end() + 1 == right.start() and _is_mixed(tokens, i)


def _is_mixed(tokens: Sequence[re.Match[str]], i: int) -> bool:
    """Whether a mixed number, `1 1/2`, begins with a token."""
    whole, *others = tokens[i : i + 4]
    if len(others) < 3 or not re.fullmatch(r'\d+/\d+', ''.join(t[0] for t in others)) or not whole[0].isdigit():
        return False
    return whole.end() + 1 == others[0].start() and int(others[0][0]) < int(others[2][0])


def _is_divisor(tokens: Sequence[re.Match[str]], i: int) -> bool:
    """Whether a fraction that is divided by begins with a token: written closer than the division before it, as in
    `60 / 3/4` and `60 ÷ 3/4`."""
    before, fraction = tokens[i - 1] if i else None, tokens[i : i + 3]
    if before is None or before[0] not in '/÷' or not re.fullmatch(r'\d+/\d+', ''.join(t[0] for t in fraction)):
        return False
    close = fraction[0].end() == fraction[1].start() and fraction[1].end() == fraction[2].start()
    return close and (before[0] == '÷' or before.end() < fraction[0].start())


def _joined(tokens: Sequence[re.Match[str]]) -> list[str]:
    """Tokens as signs and numbers of Python, `%` aside, which `_python` puts into words."""
    found: list[str] = []
    skip = 0
    for i, token in enumerate(tokens):
        if skip:
            skip -= 1
            continue
        kind, said = token.lastgroup, token[0]
        if kind == 'number':
            if _is_mixed(tokens, i):
                found += ['(', _digits(said), '+', _digits(tokens[i + 1][0]), '/', _digits(tokens[i + 3][0]), ')']
                skip = 3
            elif _is_divisor(tokens, i):
                found += ['(', _digits(said), '/', _digits(tokens[i + 2][0]), ')']
                skip = 2
            else:
                found.append(_digits(said))
        elif kind in ('sign', 'times', 'percent'):
            said = {'[': '(', ']': ')', '^': '**', 'x': '*', 'X': '*', '÷': '/'}.get(said, said)
            if said == '(' and found and (found[-1][0].isdigit() or found[-1] in ')%'):
                found.append('*')
            found.append(said)
    return found


def _computes(side: Sequence[str]) -> bool:
    return any(token in ('+', '-', '*', '/', '**', '%') for token in side[1:])


def _digits(said: str) -> str:
    """A number as Python writes it."""
    whole, point, behind = said.replace(',', '').partition('.')
    return (whole.lstrip('0') or '0') + point + behind


def _sides(left: Sequence[str]) -> Iterator[list[str]]:
    """The left side of an equation, and shorter ones where what stands before them is no arithmetic: a dash, the
    number of a list ("2) 5 + 3"), a bracket that is still open ("20 apples (5 * 4 = 20)")."""
    for start in range(len(left)):
        ahead = list(left[:start])
        dash = all(t in ('+', '-', '*', '/', ')', '%') for t in ahead)
        item = len(ahead) == 2 and ahead[0].isdigit() and ahead[1] == ')'
        bracket = ahead[-1:] == ['('] or (ahead[-1:] == ['*'] and ahead[-2:-1] == ['('])
        if not ahead or dash or item or (bracket and left.count('(') > left.count(')')):
            yield list(left[start:])


def _python(side: Sequence[str], percent: bool = True) -> list[str]:
    """A side with its percent signs as hundredths, or without them."""
    made: list[str] = []
    for i, token in enumerate(side):
        if token != '%':
            made.append(token)
        elif percent and i >= 2 and side[i - 2] in ('/', '**'):
            made[-1:] = ['(', made[-1], '/', '100', ')']
        elif percent:
            made += ['/', '100']
    return made


def _told(side: Sequence[str], stated: str, percent: bool) -> tuple[str, ...] | None:
    """The side as an expression that comes to the stated number, or to one that rounds to it; None for none.

    Where the number is a percentage the expression counts in hundredths as well: 5 / 20 = 25% is 5 / 20 * 100.
    """
    forms = [_python(side)]
    if percent:
        bare = _python(side, percent=False)
        simple = len(side) == 1 or all(t not in ('+', '-') for t in side)
        forms = [bare, forms[0], [*forms[0], '*', '100'] if simple else ['(', *forms[0], ')', '*', '100']]
    worth = [(form, value(' '.join(form), {})) for form in forms]
    exact = [form for form, found in worth if found is not None and found == number(stated)]
    near = [form for form, found in worth if found is not None and rounds(found, stated)]
    return next((tuple(form) for form in (*exact, *near)), None)


def _counts(line: str, end: int, stated: str) -> str:
    """What the result of an equation counts: the word behind it, or behind the same number before the equation."""
    same = re.finditer(rf'(?<![\d.]){re.escape(stated)}(?![\d.])', line[:end])
    if line[:end].endswith('%'):
        return 'percent'
    for start in (end, *(m.end() for m in same)):
        word = re.match(r'\s*(?:more |fewer |total |first |extra )?([A-Za-z]+)', line[start:])
        if word and not _COUNTS_NOTHING.fullmatch(word[1].lower()) and len(word[1]) > 1:
            return word[1].lower()
    return 'money' if re.search(r'[$€£¥]', line) else ''
