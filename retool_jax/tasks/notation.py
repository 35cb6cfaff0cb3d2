r"""One spelling for what LaTeX, print and Python write in many: the cleaned text that `readings` takes apart.

Words come out as runs ⟦…⟧, whether they were in `\text` or bare; letters that are variables stay. Typesetting
that carries no meaning goes: sizes, colours, spaces, delimiters of mathematics.
"""

from __future__ import annotations

import re

from retool_jax.tasks import units

CURRENCY = '¤'  # a dollar sign that is money, not the delimiter of mathematics

FUNCTIONS = frozenset((
    'sin', 'cos', 'tan', 'cot', 'sec', 'csc', 'sinh', 'cosh', 'tanh', 'coth', 'arcsin', 'arccos', 'arctan', 'asin',
    'acos', 'atan', 'arccot', 'arcsec', 'arccsc', 'acot', 'asec', 'acsc', 'asinh', 'acosh', 'atanh', 'log', 'ln', 'lg',
    'exp', 'sqrt', 'cbrt', 'abs', 'gcd', 'lcm', 'max', 'min', 'floor', 'ceil', 'ceiling', 'factorial', 'binomial',
    'comb',
))  # fmt: skip
GREEK = frozenset((
    'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'varepsilon', 'zeta', 'eta', 'theta', 'vartheta', 'iota', 'kappa',
    'lambda', 'mu', 'nu', 'xi', 'rho', 'sigma', 'tau', 'upsilon', 'phi', 'varphi', 'chi', 'psi', 'omega', 'Gamma',
    'Delta', 'Theta', 'Lambda', 'Xi', 'Sigma', 'Upsilon', 'Phi', 'Psi', 'Omega',
))  # fmt: skip
# Names that Python expressions may hold (`syntax` reads them); before `(` or `.` they are no words.
PYTHON = frozenset((
    'Fraction', 'Rational', 'Integer', 'Float', 'Decimal', 'Matrix', 'array', 'FiniteSet', 'Interval', 'Union', 'Abs',
    'log2', 'log10', 'pow', 'math', 'np', 'numpy', 'sympy', 'sp', 'cmath', 'float64', 'float32', 'int64', 'int32',
    'int', 'float', 'complex', 'list', 'tuple', 'set', 'sorted', 'perm', 'mpf', 'I', 'E', 'oo', 'inf', 'nan', 'Eq', 'S',
    'open', 'Lopen', 'Ropen',
    'round', 'bool',
))  # fmt: skip

_PRINT = {
    '−': '-', '–': '-', '‐': '-', '‑': '-', '﹣': '-', '－': '-', '＋': '+', '×': r'\times ', '⋅': r'\cdot ',
    '·': r'\cdot ', '∙': r'\cdot ', '•': r'\cdot ', '÷': r'\div ', '∕': '/', '⁄': '/', '∞': r'\infty ', 'π': r'\pi ',
    '≤': r'\le ', '≥': r'\ge ', '⩽': r'\le ', '⩾': r'\ge ', '≠': r'\ne ', '≈': r'\approx ', '±': r'\pm ', '∓': r'\mp ',
    '∪': r'\cup ', '∩': r'\cap ', '∈': r'\in ', '∅': r'\emptyset ', '∖': r'\setminus ', 'ℝ': r'\mathbb{R}',
    'ℤ': r'\mathbb{Z}', 'ℚ': r'\mathbb{Q}', 'ℕ': r'\mathbb{N}', 'ℂ': r'\mathbb{C}', '⟨': r'\langle ', '⟩': r'\rangle ',
    '⌊': r'\lfloor ', '⌋': r'\rfloor ', '⌈': r'\lceil ', '⌉': r'\rceil ', 'º': '°', '′': "'", '’': "'", '‘': "'",
    '“': '"', '”': '"', '％': '%', '（': '(', '）': ')', '，': ',', '：': ':', '＝': '=', '∣': r'\mid ', '　': ' ',
    '\xa0': ' ', '\u2009': ' ', '\u202f': ' ', '\u200b': '', '\ufeff': '', '…': r'\ldots ', '‰': '/1000', 'µ': 'μ',
}  # fmt: skip
_GREEK_PRINT = dict(zip('αβγδεζηθικλνξρστυφχψωΓΔΘΛΞΣΦΨΩ', (
    'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta', 'eta', 'theta', 'iota', 'kappa', 'lambda', 'nu', 'xi', 'rho',
    'sigma', 'tau', 'upsilon', 'phi', 'chi', 'psi', 'omega', 'Gamma', 'Delta', 'Theta', 'Lambda', 'Xi', 'Sigma', 'Phi',
    'Psi', 'Omega')))  # fmt: skip
_FRACTIONS = {'⅐': (1, 7), '⅑': (1, 9), '⅒': (1, 10), **dict(zip('½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞', (
    (1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (1, 5), (2, 5), (3, 5), (4, 5), (1, 6), (5, 6), (1, 8), (3, 8), (5, 8),
    (7, 8))))}  # fmt: skip
_PRINT |= {sign: f'\\{name} ' for sign, name in _GREEK_PRINT.items()}
_PRINT |= {sign: rf'\frac{{{top}}}{{{bottom}}}' for sign, (top, bottom) in _FRACTIONS.items()}
_PRINTED = str.maketrans(_PRINT)
_RAISED, _LOWERED = '⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ', '₀₁₂₃₄₅₆₇₈₉'
_SPACE = re.compile(r'(?:(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|\\(?:en|em|thick|med|thin)?space(?![a-zA-Z])|~|\s)+')
_NEGATIVE = re.compile(r'\\!\s*|\\(?:negthinspace|displaystyle|textstyle|limits|nolimits|strut)(?![a-zA-Z])\s*')
_SIZES = re.compile(r'\\(?:left|right|[bB]igg?[lrm]?|mathopen|mathclose)(?![a-zA-Z])\s*\.?')
_DELIMITERS = (('$$', '$$'), ('$', '$'), (r'\(', r'\)'), (r'\[', r'\]'))
_WRAPPER = re.compile(r'\\(?:boxed|fbox|ensuremath|underline|phantom|mathop|color\{\w+\}|textcolor\{\w+\})\s*\{')
_TEXT = re.compile(
    r'\\(text(?:bf|it|rm|tt|sf|sc|up|normal)?|mbox|hbox|math(?:rm|bf|it|sf|tt|cal|frak|scr|normal|bfit)|operatorname\*?'
    r'|boldsymbol|bm|pmb|bf|rm|it|emph)\s*\{'
)
_LETTERS = re.compile(r'(?<![\\a-zA-Z])[a-zA-Z]+')
_GROUPS = re.compile(r'(?<![\d.,])(?<!\d )(\d{1,3}(?: \d{3})+)(?![\d/]| \d|,\d)')
_WORDS_OF_TWO = frozenset((
    'no', 'on', 'is', 'it', 'in', 'up', 'at', 'or', 'if', 'to', 'of', 'by', 'us', 'we', 'me', 'my', 'he', 'go', 'so',
    'as', 'an', 'am', 'pm', 'ok',
))  # fmt: skip
RUN = re.compile('⟦([^⟦⟧]*)⟧')


def clean(answer: str) -> str:
    """The cleaned text of an answer."""
    text = answer.strip()
    for left, right in _DELIMITERS:
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if left.strip('$') or '$' not in inner.replace(r'\$', ''):
                text = inner.strip()
    text = _read_print(text.translate(_PRINTED))
    text = text.replace('⟦', '').replace('⟧', '')
    text = text.replace(r'\$', CURRENCY)
    text = text.replace('$', '') if text.count('$') % 2 == 0 else text.replace('$', CURRENCY)
    text = re.sub(r'\\[dtc]frac(?![a-zA-Z])', r'\\frac', text)
    text = re.sub(r'\\left\s*\|', r'\\lvert ', text)
    text = re.sub(r'\\right\s*\|', r'\\rvert ', text)
    text = _SIZES.sub('', _NEGATIVE.sub('', text))
    text = re.sub(r'\{([^{}]*)\\choose([^{}]*)\}', r'\\binom{\1}{\2}', _unwrap(text))
    text = re.sub(r'\\mathbb\s+([A-Z])', r'\\mathbb{\1}', text)
    text = re.sub(r'([)\]])\s*U\s*([(\[])', r'\1\\cup \2', text)  # a union, as it is typed
    text = _mark_text(text)
    text = text.replace('{,}', ',').replace(r'\%', '%').replace(r'\degree', '°').replace(r'\#', '#').replace(r'\&', '&')
    text = re.sub(r'\s*\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})', '°', text)
    text = _SPACE.sub(' ', text).strip()
    text = _GROUPS.sub(lambda m: m[1].replace(' ', ''), text)
    text = re.sub(r'°\s*(?:⟦\s*)?([CF])(?![a-zA-Z])\s*⟧?', r'⟦°\1⟧', text)
    text = _LETTERS.sub(lambda m: _mark_word(m, text), text)
    text = re.sub(r'⟦\s*([a-z]{1,7})\s*⟧\s*/\s*⟦\s*([a-z]{1,7})\s*⟧', r'⟦\1/\2⟧', text)
    text = re.sub(r'(?<!⟦and)(?<!⟦or)⟧( ?)⟦(?!(?:and|or)⟧)', r'\1', text)
    text = re.sub(r'\\frac\s*\{\s*⟦([^⟦⟧]*)⟧\s*\}\s*\{\s*⟦([^⟦⟧]*)⟧\s*\}', r'⟦\1/\2⟧', text)
    return text.strip()


def words(text: str) -> str:
    """A run's text for comparison: case, marks and spacing do not count ('p.m.' is 'PM')."""
    text = text.translate(str.maketrans({c: '' for c in '.,;!?"\'`*'})).casefold()
    return ' '.join(text.replace('-', ' ').split())


def is_word(letters: str) -> bool:
    """Whether bare letters are a word, not a product of variables.

    A product has no vowel (`xyz`, `rst`) or is of distinct letters of the alphabet's beginning (`abc`); two letters
    are a product unless they are a common word.
    """
    lower = letters.lower()
    if len(letters) < 3:
        return len(letters) == 2 and lower in _WORDS_OF_TWO
    if set(lower) <= set('abcd') and len(set(lower)) == len(lower):
        return False
    return bool(set(lower) & set('aeiou')) or len(letters) > 4


def _read_print(text: str) -> str:
    text = re.sub(f'[{_RAISED}]+', lambda m: '^{' + m[0].translate(
        str.maketrans(_RAISED, '0123456789+-()n')) + '}', text)  # fmt: skip
    text = re.sub(f'[{_LOWERED}]+', lambda m: '_{' + m[0].translate(str.maketrans(_LOWERED, '0123456789')) + '}', text)
    for sign, root in (('√', r'\sqrt'), ('∛', r'\sqrt[3]'), ('∜', r'\sqrt[4]')):
        text = re.sub(sign + r'\s*(\d+(?:\.\d+)?|[a-zA-Z]|\\[a-zA-Z]+)', lambda m, r=root: f'{r}{{{m[1]}}}', text)
        text = text.replace(sign, root)
    return text


def _close(text: str, start: int) -> int:
    """Where the brace that is open at `start` closes, -1 where it does not."""
    depth = 1
    for match in re.finditer(r'\\.|[{}]', text[start:], re.DOTALL):
        depth += {'{': 1, '}': -1}.get(match[0], 0)
        if depth == 0:
            return start + match.start()
    return -1


def _unwrap(text: str) -> str:
    while match := _WRAPPER.search(text):
        end = _close(text, match.end())
        if end < 0:
            return text
        text = text[: match.start()] + text[match.end() : end] + text[end + 1 :]
    return text


def _mark_text(text: str) -> str:
    out, position = [], 0
    while match := _TEXT.search(text, position):
        end = _close(text, match.end())
        if end < 0:
            break
        out += [text[position : match.start()], _mark(match[1], text[match.end() : end])]
        position = end + 1
    return ''.join(out) + text[position:]


def _mark(command: str, content: str) -> str:
    """What a text command says: a function, letters of mathematics, mathematics, or a run of words."""
    plain = _SPACE.sub(' ', content).strip()
    if _TEXT.search(plain):
        return _mark_text(plain)
    if command.startswith('operatorname') or plain in FUNCTIONS:
        return f'\\{plain} ' if plain in FUNCTIONS or plain in ('Re', 'Im', 'arg') else f'⟦{plain}⟧'
    if re.fullmatch(r'[a-zA-Z]', plain) and (command not in ('mathrm', 'rm', 'text', 'mbox') or plain in 'ei'):
        return plain
    if not re.search(r'[a-zA-Z]', re.sub(r'\\[a-zA-Z]+', '', plain)):
        return f' {plain} ' if plain else ''  # numbers and signs, set upright
    mathematical = command.startswith('math') or command in ('boldsymbol', 'bm', 'pmb')
    if mathematical and not re.fullmatch(r'[a-zA-Zμ°. /^0-9{}-]*', plain):
        return plain
    if re.search(r',|\b(?:and|or)\b', plain):  # several answers, or what joins them
        return f' {plain} '
    if re.search(r'(?<!\^)\d', plain):  # '6 students': the number is mathematics
        return re.sub(r"[a-zA-Z°](?:[a-zA-Z.'° -]*[a-zA-Z.°])?", lambda m: f'⟦{m[0]}⟧', plain)
    return '⟦' + ' ' * content[:1].isspace() + plain.replace('{', '').replace('}', '') + '⟧'


def _mark_word(match: re.Match, text: str) -> str:
    letters = match[0]
    before, after = text[: match.start()], text[match.end() :]
    if before.count('⟦') > before.count('⟧') or re.search(r'\\(?:begin|end|mathbb)\s*\{$', before):
        return letters
    number = re.search(r'[\d})%.]( ?)$', before)
    if number and not number[1] and letters in units.SPACED:
        return letters
    if number and (letters in units.BARE or (letters in units.SPACED and number[1])) and not re.match(r'\s*\(', after):
        return f'⟦{letters}⟧'
    calls = re.match(r'\s*[(.]\S', after)
    if letters in ('pi', 'oo', 'inf', 'infinity', 'Infinity') or letters in GREEK:
        return letters
    if letters in PYTHON and (calls or before.endswith('.') or len(letters) < 3):
        return letters
    if letters in FUNCTIONS and (not number or calls or re.match(r'\s*[\\\d{a-zA-Z_^]', after)):
        return letters
    if re.match(r'\s*[_(]', after) and not is_word(letters):
        return letters
    return f'⟦{letters}⟧' if is_word(letters) else letters
