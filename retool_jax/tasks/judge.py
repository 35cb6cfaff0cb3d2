r"""The grader's child process: pairs of answers in as JSON lines, verdicts out as JSON lines.

It parses what a model wrote, which may hang, exhaust memory or crash. So the process imports sympy
once and forks a worker that answers; the kernel's timer of its CPU time ends a worker that is late, whatever
it is doing (an exception from a signal handler would not end one long C call), and the next worker is
forked within milliseconds. CPU time, because a busy machine must not make a right answer wrong.
Run as `python -m retool_jax.tasks.judge MEMORY_MB TIME_LIMIT_S`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

from retool_jax.tasks import equality, readings
from retool_jax.tasks.values import Raw, Text

WORDS = 12  # of the longest gold answer in words: nothing equals a whole sentence


def main() -> None:
    """Answers {'answer', 'gold'} with {'equal', 'parsed'} or {'late'} or {'died'}; says {'ready'} first."""
    memory_mb, time_limit_s = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Libraries may print: the protocol has the real standard output to itself.
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)

    sys.set_int_max_str_digits(0)  # the length of an answer is bounded elsewhere
    # Tables are built at their first use: build them before the fork.
    for answer, gold in ((r'\frac{1}{2}', '0.5'), ('x>2', r'(2,\infty)'), (r'\sum_{k=1}^{3} k', '6'), ('2*x', 'x+x')):
        verify({'answer': answer, 'gold': gold})
    _reply(replies, {'ready': True})
    while True:
        worker = os.fork()
        if worker == 0:
            _serve(replies, time_limit_s)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if status == 0:
            return
        _reply(replies, {'late' if os.WTERMSIG(status) == signal.SIGPROF else 'died': True})


def verify(pair: dict) -> dict:
    """Whether the two answers of a pair are equal, and whether the gold one could be read."""
    gold = readings.read(pair['gold'])
    equal = equality.equal(readings.read(pair['answer']), gold)
    sentence = isinstance(gold, Text) and sum(len(p.split()) for p in gold.parts if isinstance(p, str)) > WORDS
    return {'equal': bool(equal), 'parsed': not isinstance(gold, Raw) and not sentence}


def _serve(replies: int, time_limit_s: float) -> None:
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, time_limit_s)  # SIGPROF's default action ends the process
        try:
            reply = verify(json.loads(line))
        except Exception as e:  # MemoryError and RecursionError among them
            reply = {'equal': False, 'parsed': False, 'error': type(e).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(replies, reply)


def _reply(replies: int, message: dict) -> None:
    os.write(replies, (json.dumps(message) + '\n').encode())


if __name__ == '__main__':
    main()
