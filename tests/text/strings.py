"""Strings on which tokenizers are compared: words, numbers, white space, code, chat marks, all of Unicode's planes."""

from __future__ import annotations

import random

WORDS = ('the', 'answer', "isn't", "I'LL", 'naïve', 'Straße', 'café', 'Ελλάδα', 'число', '数学', '日本語テスト',
         '한국어', 'عربي',
         'עברית', 'हिन्दी', '🙂', '👩‍👩‍👧', 'x²', '½', '٣', '１２', 'e\u0301', '\u200b', '…', '—', '$\\frac{1}{2}$',
         'snake_case',
         'CamelCase', '<|im_start|>', '<|im_end|>', '<tool_call>', '<s>', '</s>', '[INST]', '▁', 'don’t')  # fmt: skip
SPACES = (' ', '  ', '   ', '\n', '\n\n', '\r\n', '\t', ' \n', '\n  ', '\u00a0', '\u3000', '')
CODE = ('def f(x):\n    return x**2\n', 'for i in range(10):\n\tprint(i, end="")\n', '```python\nprint(1+1)\n```\n',
        '<code>\n', '</code>', '{"a": [1, 2.50, -3e10]}', 'a[i]+=b[j]//2;', '#include <stdio.h>\r\n',
        "f'{x:>10}'", '!=', '->')  # fmt: skip


def make_strings(count: int, seed: int = 0) -> list[str]:
    """`count` different strings, the same for a seed: one to twelve pieces of one of the kinds, or of all."""
    rng, found = random.Random(seed), {}
    number = lambda: rng.choice(
        (str(rng.randrange(10 ** rng.randrange(1, 12))), f'{rng.random() * 1000:.3f}', f'{rng.randrange(10**6):,}')
    )
    letters = lambda: ''.join(rng.choice('etaoinshrdlucmfwypvbgkjqxzETAOIN') for _ in range(rng.randrange(1, 10)))
    plane = lambda: chr(
        rng.choice(
            (
                rng.randrange(0x20, 0x250),
                rng.randrange(0x250, 0xD800),
                rng.randrange(0xE000, 0xFFFE),
                rng.randrange(0x10000, 0x20000),
            )
        )
    )
    pieces = (lambda: rng.choice(WORDS), number, letters, lambda: rng.choice(SPACES), lambda: rng.choice(CODE), plane)
    while len(found) < count:
        kinds = rng.choice([pieces, *((piece,) for piece in pieces)])
        join = rng.choice(SPACES)
        found[join.join(rng.choice(kinds)() for _ in range(rng.randrange(1, 13)))] = None
    return list(found)
