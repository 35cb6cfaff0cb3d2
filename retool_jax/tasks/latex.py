r"""Mathematics in LaTeX, or as it is typed, to sympy: one expression without relations, sets or words.

Nothing is dropped or guessed: what the grammar does not know raises `Unreadable`. Sums, integrals and limits go
through math-verify's own reader (latex2sympy2_extended), which knows them.
"""

from __future__ import annotations

import re

import sympy

from retool_jax.tasks import bounded
from retool_jax.tasks.bounded import Unreadable
from retool_jax.tasks.notation import FUNCTIONS, GREEK

DEGREE = sympy.Symbol('°')

_TOKEN = re.compile(
    r'\s*(?:(?P<number>\d+\.\d+|\.\d+|\d+\.(?!\d)|\d+)|(?P<command>\\(?:[a-zA-Z]+|.))|(?P<name>' + '|'.join(
        sorted((*FUNCTIONS, *GREEK, 'pi', 'oo', 'inf', 'infinity'), key=len, reverse=True)
    ) + r')(?![a-zA-Z])|(?P<letter>[a-zA-Z])|(?P<power>\*\*)|(?P<sign>[-+*/^_!()\[\]{}|\',°%]))'
)  # fmt: skip
_DERIVATIVE = re.compile(r'\\frac\s*\{\s*d\s*\}\s*\{\s*d\s*[a-z]\s*\}')  # d is no variable there
_CALCULUS = re.compile(r'\\(?:int|sum|prod|lim)(?![a-zA-Z])')
_ACCENTS = frozenset((
    'overline', 'bar', 'vec', 'hat', 'tilde', 'dot', 'ddot', 'overrightarrow', 'widehat', 'widetilde', 'underline',
    'mathbb',
))  # fmt: skip
_NAMES = {'Re': 're', 'Im': 'im', 'lg': 'lg'}
_OPEN = {'(': ')', '[': ']', '{': '}'}
_BRACKETS = {
    r'\lfloor': (r'\rfloor', sympy.floor),
    r'\lceil': (r'\rceil', sympy.ceiling),
    r'\lvert': (r'\rvert', abs),
    r'\vert': (r'\vert', abs),
    r'\mid': (r'\mid', abs),
    '|': ('|', abs),
}
_TIMES, _OVER = ('*', r'\cdot', r'\times', r'\ast'), ('/', r'\div')
_MANY = frozenset(('gcd', 'lcm', 'max', 'min', 'binomial', 'comb'))


def read(text: str) -> sympy.Expr:
    """The expression that a text is."""
    if _CALCULUS.search(text):
        return _read_calculus(text)
    if _DERIVATIVE.search(text):
        raise Unreadable('a derivative')
    parser = _Parser(text)
    expression = parser.sum()
    if parser.kind:
        raise Unreadable(f'{parser.text!r} is left over')
    return expression


def _read_calculus(text: str) -> sympy.Expr:
    from latex2sympy2_extended import latex2sympy

    try:
        expression = latex2sympy(text, normalization_config=None).doit()
    except Exception as error:  # whatever its parser raises
        raise Unreadable(str(error)[:80]) from None
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit):
        raise Unreadable('no closed form')
    return expression


class _Parser:
    """Recursive descent over tokens; `kind` and `text` are the token that is next, '' at the end."""

    def __init__(self, text: str):
        self.tokens, position = [], 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise Unreadable(f'{text[position : position + 8]!r}')
            spaced = match[0][0].isspace()
            self.tokens.append((match.lastgroup, match[0].strip(), spaced))
            position = match.end()
        self.place = self.depth = 0
        self.bars = 0  # open |, at which a product ends

    @property
    def kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ''

    @property
    def text(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ''

    def take(self, *texts: str) -> bool:
        if self.kind and self.text in texts:
            self.place += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f'no {text!r}')

    def sum(self) -> sympy.Expr:
        self.depth += 1
        if self.depth > bounded.DEPTH:
            raise Unreadable('nested too deep')
        total, sign = sympy.S.Zero, 1
        while self.text in ('+', '-') and self.kind:
            sign *= -1 if self.text == '-' else 1
            self.place += 1
        total = sign * self.product()
        while self.text in ('+', '-') and self.kind:
            sign = -1 if self.text == '-' else 1
            self.place += 1
            while self.take('-'):
                sign = -sign
            total = total + sign * self.product()
        self.depth -= 1
        return bounded.check(total)

    def product(self) -> sympy.Expr:
        value = self.chain()
        while self.kind and self.text in (*_TIMES, *_OVER):
            over = self.text in _OVER
            self.place += 1
            negative = self.take('-')
            start = self.place
            right = self.chain(divisor=over)
            if over and self.place == start:
                raise Unreadable('nothing to divide by')
            right = -right if negative else right
            value = bounded.divide(value, right) if over else bounded.check(value * right)
        return value

    def chain(self, divisor: bool = False) -> sympy.Expr:
        """Factors side by side. Of a divisor only one may be there: 1/2x says not which of two things it is."""
        whole = self.kind == 'number' and self.text.isdigit()
        value = self.power()
        if whole and self.place and self.tokens[self.place - 1][0] == 'number' and not divisor:
            value += self.fraction_part()
        while self.starts_factor():
            if divisor:
                raise Unreadable('a product behind a slash')
            if self.kind == 'number' and self.tokens[self.place - 1][1] not in ')}!':
                raise Unreadable('two numbers side by side')
            value = bounded.check(value * self.power())
        return value

    def fraction_part(self) -> sympy.Expr:
        r"""The fraction of a mixed number: `\frac{1}{2}` or ` 1/2` behind a whole number; 0 without one."""
        number = r'\{?(\d+)\}?'
        rest = ' '.join(token[1] for token in self.tokens[self.place : self.place + 8])
        match = re.match(r'\\frac (?:\{ (\d+) \}|(\d)) (?:\{ (\d+) \}|(\d))', rest) or re.match(
            r'\\frac (\d)(\d)(?!\S)', rest)  # fmt: skip
        if match:
            top, bottom = (int(g) for g in match.groups() if g)
            if top < bottom:
                self.place += len(match[0].split())
                return sympy.Rational(top, bottom)
        match = re.match(rf'{number} / {number}(?! [\d(^!])', rest)
        if match and self.tokens[self.place][2] and int(match[1]) < int(match[2]):
            self.place += 3
            return sympy.Rational(int(match[1]), int(match[2]))
        return sympy.S.Zero

    def starts_factor(self) -> bool:
        if self.kind in ('number', 'letter', 'name'):
            return True
        if self.kind == 'sign':
            return self.text in '([{' or (self.text == '|' and not self.bars)
        if self.kind == 'command':
            return self.text not in (*_TIMES, *_OVER, r'\rfloor', r'\rceil', r'\rvert', r'\pm', r'\mp', r'\}') and not (
                self.text in (r'\vert', r'\mid') and self.bars
            )
        return False

    def power(self) -> sympy.Expr:
        value = self.atom()
        while self.kind in ('sign', 'power'):
            if self.take('^', '**'):
                value = bounded.power(value, self.exponent())
            elif self.take('!'):
                value = bounded.factorial(value)
            elif self.take('°'):
                value = value * DEGREE
            elif self.take('%'):
                value = value / 100
            else:
                break
        return value

    def exponent(self) -> sympy.Expr:
        sign = -1 if self.take('-') else 1
        self.take('+')
        value = self.atom()
        if self.kind == 'power' or (self.kind and self.text == '^'):  # towers go from the top
            self.place += 1
            value = bounded.power(value, self.exponent())
        return sign * value

    def group(self, opening: str) -> sympy.Expr:
        bars, self.bars = self.bars, 0
        value = self.sum()
        self.expect(_OPEN[opening])
        self.bars = bars
        return value

    def atom(self) -> sympy.Expr:
        kind, text = self.kind, self.text
        self.place += 1
        if kind == 'number':
            return bounded.number(text)
        if kind == 'sign' and text in _OPEN:
            return self.group(text)
        if text in _BRACKETS:
            return self.bracket(text)
        if kind == 'letter':
            return self.symbol(text)
        if kind == 'name' or kind == 'command':
            return self.command(text.removeprefix('\\'))
        raise Unreadable(f'{text!r}')

    def bracket(self, text: str) -> sympy.Expr:
        closing, function = _BRACKETS[text]
        self.bars += closing == text
        value = self.sum()
        self.bars -= closing == text
        self.expect(closing)
        return function(value)

    def symbol(self, name: str) -> sympy.Expr:
        subscript = self.subscript()
        while self.take("'"):
            subscript += "'"
        if not subscript and name in ('e', 'i'):
            return sympy.E if name == 'e' else sympy.I
        if not subscript and name in 'fg' and self.text == '(':  # a function of a name, f(x) is no product
            self.place += 1
            return sympy.Function(name)(self.group('('))
        return sympy.Symbol(name + subscript)

    def subscript(self) -> str:
        if not self.take('_'):
            return ''
        start = self.place
        if self.take('{'):
            depth = 1
            while depth:
                if not self.kind:
                    raise Unreadable('an open subscript')
                depth += {'{': 1, '}': -1}.get(self.text, 0)
                self.place += 1
        else:
            self.place += 1
        return '_' + ''.join(token[1] for token in self.tokens[start : self.place]).strip('{}')

    def argument(self) -> sympy.Expr:
        r"""The argument of `\frac` or `\sqrt`: a group, or a single digit, letter or command."""
        if self.take('{'):
            return self.group('{')
        if self.kind == 'number' and len(self.text) > 1:  # \frac12 is one half
            digit, rest = self.text[0], self.text[1:]
            if not self.text.isdigit():
                raise Unreadable(self.text)
            self.tokens[self.place] = ('number', rest, False)
            return sympy.Integer(digit)
        return self.atom()

    def applied(self) -> sympy.Expr:
        """The argument of a function: a group, or the factors up to the next function or sign."""
        if self.kind == 'sign' and self.text in _OPEN:
            opening = self.text
            self.place += 1
            return self.group(opening)
        value = self.power()
        while self.starts_factor() and self.text.removeprefix('\\') not in FUNCTIONS and self.text not in '([{':
            value = value * self.power()
        return value

    def command(self, name: str) -> sympy.Expr:
        if name == 'frac':
            top = self.argument()
            return bounded.divide(top, self.argument())
        if name == 'sqrt':
            return self.root()
        if name in ('binom', 'dbinom', 'tbinom'):
            top = self.argument()
            return bounded.binomial(top, self.argument())
        if name in ('pi', 'infty', 'oo', 'inf', 'infinity'):
            return sympy.pi if name == 'pi' else sympy.oo
        if name in ('imath', 'ell'):
            return sympy.I if name == 'imath' else sympy.Symbol('ell')
        if name in GREEK:
            return self.symbol(name.removeprefix('var'))
        if name in _ACCENTS:
            start = self.place
            self.argument()
            inner = ''.join(token[1] for token in self.tokens[start : self.place])
            return self.symbol(f'{name}{inner}')
        if name in ('angle', 'measuredangle', 'triangle'):
            start = self.place
            while self.kind == 'letter':
                self.place += 1
            return sympy.Symbol(name + ''.join(token[1] for token in self.tokens[start : self.place]))
        if name in FUNCTIONS or name in _NAMES:
            return self.function(_NAMES.get(name, name))
        raise Unreadable(f'\\{name}')

    def root(self) -> sympy.Expr:
        degree = sympy.Integer(2)
        if self.take('['):
            degree = self.group('[')
        return bounded.root(self.group('(') if self.take('(') else self.argument(), degree)

    def function(self, name: str) -> sympy.Expr:
        base = exponent = None
        while self.kind == 'sign' and self.text in '^_':
            if self.take('_'):
                base = self.argument()
            else:
                self.place += 1
                exponent = self.exponent()
        if name in _MANY:
            values = self.several()
        else:
            values = [self.applied()]
        if exponent == -1 and base is None and name in bounded.INVERSES:
            name, exponent = bounded.INVERSES[name], None
        if base is not None:
            if name != 'log':
                raise Unreadable(f'{name} with a subscript')
            values.append(base)
        value = bounded.apply(name, values, in_degrees=DEGREE)
        return value if exponent is None else bounded.power(value, exponent)

    def several(self) -> list[sympy.Expr]:
        opening = self.text
        if not self.take('(', '{', '['):
            raise Unreadable('a function of several values without them')
        bars, self.bars = self.bars, 0
        values = [self.sum()]
        while self.take(','):
            values.append(self.sum())
        self.expect(_OPEN[opening])
        self.bars = bars
        return values
