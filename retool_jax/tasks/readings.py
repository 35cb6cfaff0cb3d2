r"""An answer's text to a value: its lists, brackets, relations, units and forms here, its expressions elsewhere.

`read` never fails: what is no mathematics as a whole is `Text` where it is words, and `Raw` otherwise. A part of an
answer is never taken for the whole.
"""

from __future__ import annotations

import re

import sympy

from retool_jax.tasks import bounded, latex, notation, syntax, units
from retool_jax.tasks.bounded import Unreadable
from retool_jax.tasks.notation import CURRENCY, RUN
from retool_jax.tasks.regions import region_of
from retool_jax.tasks.values import Form, Matrix, Number, Raw, Region, Relation, Sequence, Text, Value

MOST = 200  # items of the longest list that is an answer

_OPEN, _SHUT = {'(': ')', '[': ']', r'\{': r'\}', r'\langle': r'\rangle', '{': '}'}, (')', ']', r'\}', r'\rangle', '}')
_UNIT = re.compile(r'\\(?:[a-zA-Z]+|.)|⟦[^⟦⟧]*⟧|[<>=!]=|.', re.DOTALL)
_SIGNS = {'=': '=', '==': '=', '<': '<', r'\lt': '<', '>': '>', r'\gt': '>', r'\le': '<=', r'\leq': '<=', '<=': '<=',
          r'\leqslant': '<=', r'\ge': '>=', r'\geq': '>=', '>=': '>=', r'\geqslant': '>=', r'\ne': '!=', r'\neq': '!=',
          '!=': '!=', r'\approx': '~', r'\in': 'in'}  # fmt: skip
_THOUSANDS = re.compile(r'(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)')
_PLAIN = re.compile(
    r'([+-]?)\s*(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+)|\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d+)\s*\}?)?'
)
_REPEATING = re.compile(
    r'([+-]?\d*)\.(\d*)(?:\\(?:overline|bar|dot|overset\{\\?[.cdot]*\})\s*\{?(\d+)\}?|\((\d+)\)|(?:\\[lc]?dots|\.\.\.))'
)
_BASE = re.compile(r'([+-]?)\(?([0-9A-Fa-f]+)\)?\s*_\s*\{?\s*[⟦(]?\s*(\w+)\s*[⟧)]?\s*\}?')
_IN_WORDS = re.compile(r'([+-]?)([0-9A-Fa-f]+)\s*\(?⟦\s*\(?(?:in )?base⟧?\s*[-:]?\s*(\w+)\s*\)?⟧?\)?')
_NUMERALS = {'two': 2, 'three': 3, 'four': 4, 'five': 5, 'six': 6, 'seven': 7, 'eight': 8, 'nine': 9, 'ten': 10,
             'eleven': 11, 'twelve': 12, 'sixteen': 16}  # fmt: skip
_CLOCK = re.compile(r'(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s*(?:⟦?\s*([ap])\.?\s*m\.?\s*⟧?)?', re.IGNORECASE)
_CHOICE = re.compile(
    r'(?:⟦\s*(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*⟧?\s*)?[⟦(\s]*([A-Z])\s*[⟧).:\s]*|⟦?\s*\(?\s*([a-zA-Z])\s*\)?\s*⟧'
)
_LITERAL = {'0b': 2, '0o': 8, '0x': 16}
_NUMBER_SETS = {'R': sympy.S.Reals, 'Z': sympy.S.Integers, 'N': sympy.S.Naturals, 'Q': sympy.S.Rationals,
                'C': sympy.S.Complexes}  # fmt: skip


def read(answer: str) -> Value:
    """The value of a bare answer."""
    return read_clean(notation.clean(answer))


def read_clean(text: str) -> Value:
    """The same of cleaned text."""
    try:
        return _read(text, 0)
    except (Unreadable, RecursionError):
        return _read_words(text)


def _read(text: str, depth: int) -> Value:
    if depth > bounded.DEPTH:
        raise Unreadable('nested too deep')
    text = _strip(text)
    if not text:
        raise Unreadable('nothing')
    whole = _read_form(text)
    if whole is not None:
        return whole
    text = _join_thousands(text)
    items, separators = _split(text, (',', ';', '⟦and⟧', '⟦or⟧'))
    if len(items) > 1:
        return _read_list(items, separators, depth)
    sides, signs = _split(text, _SIGNS)
    if len(sides) > 1:
        return _read_relation(sides, [_SIGNS[s] for s in signs], depth)
    if _split(text, (r'\cup', r'\cap', r'\setminus', r'\backslash'))[1]:
        return Region(_read_set(text, depth))
    if r'\pm' in text or r'\mp' in text:
        return _read_signs(text, depth)
    bracketed = _read_brackets(text, depth)
    return bracketed if bracketed is not None else _read_number(text, depth)


def _strip(text: str) -> str:
    """The text without a final stop, and without braces or quotes around the whole."""
    text = text.strip()
    while True:
        before = text
        if text.endswith(('.', ',', ';')) and not text.endswith('..'):
            text = text[:-1].rstrip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in '"\'`':
            text = text[1:-1].strip()
        if text.startswith('{') and _matching(text) == len(text) - 1 and not _split(text[1:-1], (',',))[1]:
            text = text[1:-1].strip()
        if text.startswith('**') and text.endswith('**') and len(text) > 4:
            text = text[2:-2].strip()
        if text == before:
            return text


def _matching(text: str) -> int:
    """Where the bracket that opens a text is closed; half-open intervals are closed by the other kind."""
    depth, position = 0, 0
    for match in _UNIT.finditer(text):
        unit, position = match[0], match.start()
        depth += (unit in _OPEN) - (unit in _SHUT)
        if depth == 0:
            return position
    return -1


def _split(text: str, marks) -> tuple[list[str], list[str]]:
    """A text cut at marks that stand outside brackets, and the marks; a run '⟦ and ⟧' is the mark '⟦and⟧'."""
    parts, separators, depth, start = [], [], 0, 0
    for match in _UNIT.finditer(text):
        unit = match[0]
        if unit in _OPEN:
            depth += 1
        elif unit in _SHUT:
            depth -= 1
        elif depth == 0:
            mark = '⟦' + unit[1:-1].strip(' ,').lower() + '⟧' if unit.startswith('⟦') else unit
            if mark in marks:
                parts.append(text[start : match.start()])
                separators.append(mark)
                start = match.end()
    parts.append(text[start:])
    return [p.strip() for p in parts], separators


def _read_form(text: str) -> Value | None:
    """The value of a text that is one by its outer form: a choice, a number with commas, of a base, a time, a ratio."""
    if ((match := _CHOICE.fullmatch(text)) and len(text) > 1) or text in ('e', 'i', 'E', 'I'):
        return Text(((text if match is None else match[1] or match[2]).casefold(),))
    if match := re.fullmatch(r'\\mathbb\s*\{([RZNQC])\}', text):
        return Region(_NUMBER_SETS[match[1]])
    if re.fullmatch(r'\\(?:emptyset|varnothing)|\\\{\s*\\\}|\{\s*\}', text):
        return Sequence('set', ())
    if (match := RUN.fullmatch(text)) is not None:
        return Text((notation.words(match[1]),))
    match = _BASE.fullmatch(text) or _IN_WORDS.fullmatch(text)
    if match and (match[2].isdigit() or match[2].isupper()):
        base = _NUMERALS.get(match[3].lower(), int(match[3]) if match[3].isdecimal() else 0)
        return _of_base(match[1], match[2], base)
    if (match := re.fullmatch(r'([+-]?)(0[box])([0-9a-fA-F]+)', text)) is not None:
        return _of_base(match[1], match[3], _LITERAL[match[2]])
    return _read_clock(text) or _read_ratio(text)


def _join_thousands(text: str) -> str:
    """The text without commas between groups of three digits; within brackets every comma stands between values."""
    depths, depth = [], 0
    for char in text:
        depth += (char in '([{') - (char in ')]}')
        depths.append(depth)
    return _THOUSANDS.sub(lambda m: m[0] if depths[m.start()] else m[0].replace(',', ''), text)


def _of_base(sign: str, digits: str, base: int) -> Value:
    try:
        return Form('base', (int(sign + digits, base), base))
    except ValueError:
        raise Unreadable('digits beyond the base') from None


def _read_clock(text: str) -> Value | None:
    match = _CLOCK.fullmatch(text)
    if not match or not (match[2] or match[4]) or int(match[1]) > 24 or int(match[2] or 0) > 59:
        return None
    hours, half = int(match[1]), (match[4] or '').lower()
    if half and not 1 <= hours <= 12:
        return None
    seconds = 3600 * (hours % 12 + 12 * (half == 'p') if half else hours) + 60 * int(match[2] or 0)
    return Form('clock', (seconds + int(match[3] or 0), bool(half) or hours > 12 or hours == 0))


def _read_ratio(text: str) -> Value | None:
    parts, _ = _split(text.replace(r'\colon', ':'), (':', '⟦to⟧'))
    if not 2 <= len(parts) <= 6:
        return None
    try:
        return Form('ratio', tuple(_expression(p) for p in parts))
    except Unreadable:
        return None


def _read_list(items: list[str], separators: list[str], depth: int) -> Value:
    kept = [item for item in items if item]  # of ', and' one part is empty
    empty = sum(not item for item in items)
    if len(kept) > MOST or empty > sum('⟦' in s for s in separators) or not kept:
        raise Unreadable('a list with gaps')
    values = tuple(_read(item, depth + 1) for item in kept)
    if all(isinstance(v, Relation | Region) for v in values):
        regions = [region_of(v) for v in values]
        if all(r is not None for r in regions) and any(isinstance(v, Region) or v.signs != ('=',) for v in values):
            both = separators and all(s == '⟦and⟧' for s in separators)
            return Region(sympy.Intersection(*regions) if both else sympy.Union(*regions))
    return values[0] if len(values) == 1 else Sequence('list', values)


def _read_relation(sides: list[str], signs: list[str], depth: int) -> Value:
    if len(sides) > 8 or not all(sides):
        raise Unreadable('a relation without a side')
    if 'in' in signs:
        if len(sides) != 2:
            raise Unreadable('a chain with \\in')
        return _read(sides[1], depth + 1)
    sides = [Number(latex.read(s)) if re.fullmatch('[a-zA-Z]', s) else _read(s, depth + 1) for s in sides]
    return Relation(tuple(signs), tuple(sides))


def _read_set(text: str, depth: int) -> sympy.Set:
    for marks in ((r'\cup',), (r'\setminus', r'\backslash'), (r'\cap',)):
        parts, separators = _split(text, marks)
        if separators:
            sets = [_read_set(part, depth + 1) for part in parts]
            if marks[0] == r'\setminus':
                return sets[0] - sympy.Union(*sets[1:])
            return sympy.Union(*sets) if marks[0] == r'\cup' else sympy.Intersection(*sets)
    region = region_of(_read(text, depth + 1))
    if region is None:
        raise Unreadable('no set of real numbers')
    return region


def _read_signs(text: str, depth: int) -> Value:
    r"""Both values of `\pm`; one sign alone or with `\mp` against it."""
    if text.count(r'\pm') + text.count(r'\mp') > 1 and r'\mp' not in text:
        raise Unreadable(r'more than one \pm')
    both = [text.replace(r'\pm', a).replace(r'\mp', b) for a, b in (('+', '-'), ('-', '+'))]
    return Sequence('list', tuple(_read(t, depth + 1) for t in both))


def _read_brackets(text: str, depth: int) -> Value | None:
    """What brackets around the whole say: a tuple, an interval, a set, a matrix; None where they are a number's."""
    if match := re.fullmatch(r'\\begin\s*\{([pb]?)matrix\}(.*)\\end\s*\{\1matrix\}', text, re.DOTALL):
        rows = [row for row in re.split(r'\\\\', match[2]) if row.strip()]
        made = tuple(tuple(_read(cell, depth + 1) for cell in row.split('&')) for row in rows)
        if not made or len(set(map(len, made))) != 1:
            raise Unreadable('rows of unequal lengths')
        return Matrix(made)
    opening = next((o for o in _OPEN if text.startswith(o)), None)
    if opening is None and not text.startswith(']'):
        return None
    if text.startswith(']'):  # ]0, 1[ as some write open ends
        inner, kind = text[1:-1], '(' + {'[': ')', ']': ']'}.get(text[-1], '')
    else:
        end = _matching(text)
        closing = next((c for c in _SHUT if text.endswith(c)), '')
        if opening == '[' and text.endswith('[') and end < 0:
            inner, kind = text[1:-1], '[)'
        elif end < 0 or not closing or end != len(text) - len(closing):
            return None
        else:
            inner, kind = text[len(opening) : end], opening + closing
    kinds = {r'\{\}': 'set', '{}': 'set', r'\langle\rangle': 'angle', '()': '()', '[]': '[]', '(]': '(]', '[)': '[)'}
    if kind not in kinds or not inner.strip():
        raise Unreadable('brackets')
    kind = kinds[kind]
    if kind == 'set' and len(built := _split(inner, ('|', r'\mid', ':'))[0]) == 2:
        return _read_built(*built, depth)
    items, _ = _split(inner, (',', ';') if ';' not in inner else (';',))
    if len(items) == 1 and kind == '()':
        return _read(inner, depth + 1) if not re.match(r'\s*[+-]?[\d.\s]*$', inner) else None
    if (len(items) == 1 and kind not in ('set', '[]')) or len(items) > MOST:
        raise Unreadable('brackets around one value')
    if items[-1] == '':
        items.pop()  # (1,) as Python prints it
    return Sequence(kind, tuple(_read(item, depth + 1) for item in items))


def _read_built(name: str, condition: str, depth: int) -> Value:
    r"""A set by its condition, `\{x : x > 1\}`."""
    region = region_of(_read(condition, depth + 1)) if re.fullmatch(r'[a-zA-Z](\s*\\in.*)?', name) else None
    if region is None:
        raise Unreadable('a condition')
    return Region(region)


def _read_number(text: str, depth: int) -> Value:
    """A number or an expression with its unit, percent sign or currency."""
    text, unit = _split_unit(text)
    percent = re.fullmatch(r'(.*?)\s*(?:%|⟦\s*(?:percent|pct|per cent|percentage)\s*⟧)', text, re.DOTALL)
    if percent:
        text = percent[1]
    value = _repeating(text) or _plain(text)
    if value is None:
        made = _scalar(text)
        if not isinstance(made, Number):
            if unit or percent:
                raise Unreadable('a unit of what is no number')
            return made
        value = made
    expr, decimal = value.expr, value.decimal
    if expr.has(latex.DEGREE):
        expr, unit = expr.subs(latex.DEGREE, 1), unit or 'degree'
    place = value.place
    if percent:
        expr, place = expr / 100, None if place is None else place / 100
    return Number(expr, decimal, place, bool(percent), unit)


def _scalar(text: str) -> Value:
    try:
        return syntax.read(text)
    except Unreadable:
        return Number(latex.read(text), bool(re.search(r'\d\.\d|\.\d', text)))


def _expression(text: str) -> sympy.Expr:
    value = _read_number(text, 0)
    if not isinstance(value, Number):
        raise Unreadable('no number')
    return value.expr


def _split_unit(text: str) -> tuple[str, str]:
    """A number's text without its unit, and the unit's name; every other word stays, and makes it no number."""
    unit = ''
    if match := re.match(rf'([+-]?)\s*(?:⟦?\s*(?:US|A|C|Rs)\.?\s*⟧?)?([{CURRENCY}£€¥₹])\s*', text):
        unit = units.read(match[2].replace(CURRENCY, '$'))
        text = match[1] + text[match.end() :]
    elif match := re.match(r'([+-]?)⟦?\s*Rs\.?\s*⟧?\.?\s*(?=\d)', text):
        unit, text = 'rupee', match[1] + text[match.end() :]
    if match := re.search(rf'\s*([{CURRENCY}£€¥₹¢])$', text):
        return text[: match.start()], unit or units.read(match[1].replace(CURRENCY, '$'))
    start = text.find('⟦')
    if start <= 0:
        return text, unit
    tail = re.sub(r'/\s*([a-z]+)', r'/\1', RUN.sub(r' \1 ', text[start:])).replace(r'\cdot', '·')
    head = text[:start]
    if head.rstrip().endswith('°'):
        head, tail = head.rstrip()[:-1], '° ' + tail
    name = units.read(tail.strip())
    return (head.strip(), name) if name else (text, unit)


def _plain(text: str) -> Number | None:
    """A number in digits, with its last place where it is a decimal."""
    match = _PLAIN.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    sign, whole, part, *exponents = match.groups()
    power = int(next(filter(None, exponents), '0'))
    value = bounded.number(f'{whole}.{part or ""}e{power}')
    if part is None and match[4] is None:  # 10^{-20} and 1e3 × are exact where no point is
        return Number(-value if sign == '-' else value)
    digits = len((whole + (part or '')).lstrip('0'))
    place = bounded.number(f'1e{power - len(part or "")}')
    if digits >= 15:  # a float, printed whole: its last places are no longer sure
        place = max(place, abs(value) * sympy.Rational(1, 10**12))
    return Number(-value if sign == '-' else value, bool(part), place if part else None)


def _repeating(text: str) -> Number | None:
    r"""`0.1\overline{6}`, `0.1(6)`, `0.1666…`: the fraction; other decimals with dots are cut off, not repeated."""
    match = _REPEATING.fullmatch(text.replace(' ', ''))
    if not match:
        return None
    whole, part, *blocks = match.groups()
    block = next(filter(None, blocks), '')
    if not block:
        repetend = re.search(r'(\d+?)\1\1+$|(\d\d+)\2$', part)
        if not repetend:
            return _plain(f'{whole}.{part}')
        block = repetend[1] or repetend[2]
        part = part[: repetend.start()]
    sign, whole = (-1 if whole.startswith('-') else 1), whole.lstrip('+-') or '0'
    nines = (10 ** len(block) - 1) * 10 ** len(part)
    value = sympy.Rational(int(whole + part + block) - int(whole + part), nines)
    return Number(sign * value)


def _read_words(text: str) -> Value:
    """Words with numbers between them, or the bare text."""
    text = _strip(text)
    if '⟦' not in text or len(text) > 400:
        return Raw(' '.join(text.split()))
    parts, position = [], 0
    for run in RUN.finditer(text):
        parts += [_part(text[position : run.start()]), notation.words(run[1])]
        position = run.end()
    parts.append(_part(text[position:]))
    kept = [p for p in parts if p not in ('', None)]
    return Text(tuple(kept)) if kept else Raw(text)


def _part(text: str) -> Value | str | None:
    text = text.strip(' .,;:!?')
    if not text:
        return None
    try:
        return _read(text, 1)
    except (Unreadable, RecursionError):
        return Raw(' '.join(text.split()))
