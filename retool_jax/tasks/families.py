"""The twelve families of the embedded arithmetic task: wording, operands, solution, worked steps, snippet.

Three are meant to be done in the head (a call would be a waste), nine need the interpreter. Questions,
worked steps and snippets are short and uniform, because a model of a million parameters learns them from
scratch: a snippet holds nothing but fixed text and operands copied from the question, and no operand has
more than five digits. Each family has at least 5,000 different operand tuples in its training range, so
that the tenth held out by hash is plentiful.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

Operands = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Slip:
    """A natural mistake: `spoil` turns operands and right snippet into one that fails; `remark` names it."""

    spoil: Callable[[Operands, str], str]
    remark: str


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One kind of question; operands are the integers named a, b, c… in wording order."""

    name: str
    mental: bool  # easy enough without a call
    lead: str  # the sentence before the calculation, the same whether it is worked or run
    wordings: tuple[str, ...]  # '{a}', '{b}', '{c}' stand for the operands
    held_out_wording: str  # never trained on
    sample: Callable[[random.Random, bool], Operands]  # (rng, large) -> operands
    solve: Callable[..., int]
    code: Callable[..., str]
    worked: Callable[..., str]  # a human calculation, an intermediate step and the answer
    slips: tuple[Slip, ...]
    ordered: bool = True  # False where the operands may be swapped without changing the question


# --- operands: (rng, large) -> tuple -------------------------------------------------------------


def _sample_sum(rng, large):
    return (rng.randint(1000, 9999) if large else rng.randint(12, 999)), rng.randint(2, 9)


def _sample_maximum(rng, large):
    return tuple(rng.sample(range(1000, 10000) if large else range(10, 1000), 3))


def _sample_remainder(rng, large):
    return (rng.randint(4000, 9999) if large else rng.randint(100, 3999)), rng.choice((2, 5, 10))


def _sample_factors(rng, large):
    return (rng.randint(101, 999) if large else rng.randint(12, 99)), rng.randint(101, 999)


def _sample_power(rng, large):
    if large:
        return rng.randint(30, 99), rng.randint(30, 99), rng.randint(200, 999)
    return rng.randint(2, 29), rng.randint(5, 29), rng.randint(31, 199)


def _sample_gcd(rng, large):
    low, high = (1000, 9999) if large else (24, 999)
    while True:
        g = rng.randint(2, 40)
        x, y = rng.sample(range(-(-low // g), high // g + 1), 2)
        if math.gcd(x, y) == 1:
            return g * x, g * y


def _sample_lcm(rng, large):
    return tuple(rng.sample(range(151, 1000) if large else range(12, 151), 2))


def _sample_interval(rng, large):
    start = rng.randint(1000, 4999) if large else rng.randint(100, 899)
    return start, start + rng.randint(20, 60)


def _sample_numeral(rng, large):
    base = rng.randint(4, 9)
    digits = [rng.randint(1, base - 1)] + [rng.randint(0, base - 1) for _ in range(4 if large else 3)]
    return int(''.join(map(str, digits))), base


def _sample_binomial(rng, large):
    if large:
        return rng.randint(31, 60), rng.randint(2, 5), rng.randint(101, 499)
    return rng.randint(8, 30), rng.randint(2, 5), rng.randint(11, 99)


def _sample_series(rng, large):
    start = rng.randint(300, 999) if large else rng.randint(2, 199)
    return start, start + rng.randint(5, 59)


# --- solutions and worked steps ------------------------------------------------------------------


def _primes(a: int, b: int) -> list[int]:
    return [n for n in range(max(a, 2), b + 1) if all(n % d for d in range(2, math.isqrt(n) + 1))]


def _work_sum(a, b):
    units = a % 10 + b
    return f'{a % 10}+{b}={units}, {a - a % 10}+{units}={a + b}.'


def _work_maximum(a, b, c):
    first = max(a, b)
    return f'{a}{"<>"[a > b]}{b}, {first}{"<>"[first > c]}{c}: {max(a, b, c)}.'


def _work_remainder(n, d):
    return f'{n} ends in {n % 10}, {n % 10} mod {d}={n % d}.'


def _work_product(a, b):
    first = b // 100 * 100
    return f'{a}*{first}={a * first}, {a}*{b}={a * b}.'


def _work_power(a, b, m):
    half = b // 2
    return f'{a}^{half}={pow(a, half, m)}, {a}^{b}={pow(a, b, m)}.'


def _work_gcd(a, b):
    return f'{max(a, b)} mod {min(a, b)}={max(a, b) % min(a, b)}: {math.gcd(a, b)}.'


def _work_lcm(a, b):
    return f'gcd({a},{b})={math.gcd(a, b)}: {math.lcm(a, b)}.'


def _digit_sum(a, b):
    return sum(map(int, str(a * b)))


def _work_digit_sum(a, b):
    return f'{a}*{b}={a * b}: {_digit_sum(a, b)}.'


def _work_primes(a, b):
    primes = _primes(a, b)
    return f'{primes[0]} to {primes[-1]}: {len(primes)}.' if primes else '0.'


def _work_numeral(n, base):
    head, last = divmod(n, 10)
    value = int(str(head), base)
    return f'{head} is {value}, {value}*{base}+{last}={int(str(n), base)}.'


def _work_binomial(n, k, m):
    return f'C({n},{k})={math.comb(n, k)}: {math.comb(n, k) % m}.'


def _series(a, b):
    return (b - a + 1) * (a + b) // 2


def _work_series(a, b):
    return f'{b - a + 1}*{a + b}={(b - a + 1) * (a + b)}: {_series(a, b)}.'


# --- slips ---------------------------------------------------------------------------------------

_UNCLOSED = Slip(lambda o, code: code[:-1], 'A parenthesis is missing.')
_CAPITAL = Slip(lambda o, code: code.replace('print', 'Print'), 'It is print in lower case.')
_NO_IMPORT = Slip(lambda o, code: code.removeprefix('import math\n'), 'The import is missing.')


def _slip(template: str, remark: str) -> Slip:
    return Slip(lambda o, code: template.format(*o), remark)


FAMILIES: tuple[Family, ...] = (
    Family(
        'sum', True, 'Add.',
        ('What is {a} + {b}?', 'Add {a} and {b}.', 'Find the sum of {a} and {b}.', 'Compute {a} plus {b}.'),
        'Give the sum {a} plus {b}.',
        _sample_sum, lambda a, b: a + b, 'print({}+{})'.format, _work_sum,
        (_CAPITAL, _UNCLOSED), ordered=False,
    ),
    Family(
        'maximum', True, 'Compare.',
        ('Which is largest: {a}, {b}, {c}?', 'Find the maximum of {a}, {b} and {c}.',
         'Give the largest of {a}, {b} and {c}.', 'What is the maximum of {a}, {b}, {c}?'),
        'Name the largest number: {a}, {b} or {c}.',
        _sample_maximum, max, 'print(max({},{},{}))'.format, _work_maximum,
        (_CAPITAL, _UNCLOSED), ordered=False,
    ),
    Family(
        'remainder', True, 'Look at the last digit.',
        ('What is {a} mod {b}?', 'Find the remainder of {a} divided by {b}.',
         'Divide {a} by {b}. What remains?', 'Compute {a} modulo {b}.'),
        'What remainder does {a} leave when divided by {b}?',
        _sample_remainder, lambda a, b: a % b, 'print({}%{})'.format, _work_remainder,
        (_slip('print({} mod {})', 'Python writes %.'), _UNCLOSED),
    ),
    Family(
        'product', False, 'Multiply.',
        ('What is {a} * {b}?', 'Multiply {a} by {b}.', 'Find the product of {a} and {b}.',
         'Compute {a} times {b}.'),
        'Give the product {a} times {b}.',
        _sample_factors, lambda a, b: a * b, 'print({}*{})'.format, _work_product,
        (_slip('print({}x{})', 'Python writes *.'), _UNCLOSED), ordered=False,
    ),
    Family(
        'power', False, 'Take a power.',
        ('What is {a}^{b} mod {c}?', 'Compute {a}^{b} modulo {c}.',
         'Find the remainder of {a}^{b} divided by {c}.', 'Divide {a}^{b} by {c}. What remains?'),
        'What remainder does {a}^{b} leave modulo {c}?',
        _sample_power, pow, 'print(pow({},{},{}))'.format, _work_power,
        (_slip('print({}^{} mod {})', 'Python writes pow.'), _UNCLOSED),
    ),
    Family(
        'gcd', False, 'Take the gcd.',
        ('What is gcd({a}, {b})?', 'Find the gcd of {a} and {b}.',
         'Compute the greatest common divisor of {a} and {b}.',
         'What is the largest divisor shared by {a} and {b}?'),
        'Give the greatest common divisor of {a}, {b}.',
        _sample_gcd, math.gcd, 'import math\nprint(math.gcd({},{}))'.format, _work_gcd,
        (_NO_IMPORT, _slip('print(gcd({},{}))', 'The import is missing.')), ordered=False,
    ),
    Family(
        'lcm', False, 'Take the lcm.',
        ('What is lcm({a}, {b})?', 'Find the lcm of {a} and {b}.',
         'Compute the least common multiple of {a} and {b}.',
         'What is the smallest multiple of both {a} and {b}?'),
        'Give the least common multiple of {a}, {b}.',
        _sample_lcm, math.lcm, 'import math\nprint(math.lcm({},{}))'.format, _work_lcm,
        (_NO_IMPORT, _slip('print(lcm({},{}))', 'The import is missing.')), ordered=False,
    ),
    Family(
        'digit_sum', False, 'Add the digits.',
        ('What is the digit sum of {a} * {b}?', 'Add the digits of {a} * {b}.',
         'Find the sum of the digits of {a} * {b}.', 'Multiply {a} by {b} and add the digits.'),
        'Give the digit sum of {a} times {b}.',
        _sample_factors, _digit_sum, 'print(sum(map(int,str({}*{}))))'.format, _work_digit_sum,
        (_slip('print(sum(str({}*{})))', 'Digits must be integers.'), _UNCLOSED), ordered=False,
    ),
    Family(
        'primes', False, 'Count the primes.',
        ('How many primes are from {a} to {b}?', 'Count the primes from {a} to {b}.',
         'Find the number of primes from {a} to {b}.', 'How many prime numbers lie in {a} to {b}?'),
        'Give the number of prime numbers from {a} to {b}.',
        _sample_interval, lambda a, b: len(_primes(a, b)),
        'print(sum(all(n%d for d in range(2,n)) for n in range({},{}+1)))'.format, _work_primes,
        (_slip('print(sum(isprime(n) for n in range({},{}+1)))', 'There is no isprime.'), _UNCLOSED),
    ),
    Family(
        'base', False, 'Convert.',
        ('What is {a} in base {b} as a decimal?', 'Convert {a} from base {b} to decimal.',
         'Write the base {b} number {a} in decimal.', 'Read {a} in base {b}. What is its value?'),
        'What is the decimal value of {a} in base {b}?',
        _sample_numeral, lambda n, base: int(str(n), base), "print(int('{}',{}))".format, _work_numeral,
        (_slip('print(int({},{}))', 'The number must be a string.'), _UNCLOSED),
    ),
    Family(
        'binomial', False, 'Count the choices.',
        ('What is C({a},{b}) mod {c}?', 'Compute C({a},{b}) modulo {c}.', 'Find {a} choose {b}, modulo {c}.',
         'How many ways to choose {b} of {a}, modulo {c}?'),
        'What is {a} choose {b} mod {c}?',
        _sample_binomial, lambda n, k, m: math.comb(n, k) % m,
        'import math\nprint(math.comb({},{})%{})'.format, _work_binomial,
        (_NO_IMPORT, _slip('import math\nprint(math.binom({},{})%{})', 'It is called comb.')),
    ),
    Family(
        'series', False, 'Add the series.',
        ('What is the sum of integers from {a} to {b}?', 'Add the integers from {a} to {b}.',
         'Find {a} + ... + {b}.', 'Compute the sum of n for n from {a} to {b}.'),
        'Give the sum of the integers from {a} up to {b}.',
        _sample_series, _series, 'print(sum(range({},{}+1)))'.format, _work_series,
        (_slip('print(sum({} to {}))', 'Python writes range.'), _UNCLOSED),
    ),
)  # fmt: skip
