r"""The grader's child process: pairs of answers in as JSON lines, verdicts out as JSON lines.

Run as `python -m retool_jax.tasks.judge MEMORY_MB TIME_LIMIT_S`.
"""

from __future__ import annotations

import sys

from retool_jax.tasks import child, equality, readings
from retool_jax.tasks.values import Raw, Text

WORDS = 12  # of the longest gold answer in words: nothing equals a whole sentence
# Tables are built at their first use: these build them before the fork.
FIRST = ((r'\frac{1}{2}', '0.5'), ('x>2', r'(2,\infty)'), (r'\sum_{k=1}^{3} k', '6'), ('2*x', 'x+x'))


def main() -> None:
    """Answers {'answer', 'gold'} with {'equal', 'parsed'} or {'late'} or {'died'}; says {'ready'} first."""
    memory_mb, time_limit_s = int(sys.argv[1]), float(sys.argv[2])
    sys.set_int_max_str_digits(0)  # the length of an answer is bounded elsewhere

    def answer(pair: dict) -> dict:
        try:
            with child.limited(time_limit_s):
                return verify(pair)
        except Exception as e:  # MemoryError and RecursionError among them
            return {'equal': False, 'parsed': False, 'error': type(e).__name__}

    child.serve(answer, lambda: [verify({'answer': a, 'gold': b}) for a, b in FIRST], memory_mb)


def verify(pair: dict) -> dict:
    """Whether the two answers of a pair are equal, and whether the gold one could be read."""
    gold = readings.read(pair['gold'])
    equal = equality.equal(readings.read(pair['answer']), gold)
    sentence = isinstance(gold, Text) and sum(len(p.split()) for p in gold.parts if isinstance(p, str)) > WORDS
    return {'equal': bool(equal), 'parsed': not isinstance(gold, Raw) and not sentence}


if __name__ == '__main__':
    main()
