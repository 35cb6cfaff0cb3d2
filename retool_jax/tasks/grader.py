r"""Rewards: the model's own last box against the gold answer, mathematics judged in killable children.

Strings and plain integers are compared here; everything else goes to `judge`, one process per worker,
started when first needed. It ends what is late by itself; should the whole process hang or die, it is
killed and started anew from here. Answers that are no mathematics are judged as texts, or by the verifier of the
data set that made the problem (`Problem.judge`), in a child too.
"""

from __future__ import annotations

import concurrent.futures
import queue
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from retool_jax.core.errors import UserError
from retool_jax.core.records import Reward
from retool_jax.tasks import answers, gym
from retool_jax.tasks.child import Child

STYLES = ('paper', 'verl')
CACHE_SIZE = 100_000


class Verdict(NamedTuple):
    """What is known of an answer: whether it equals the gold answer, and whether the judge was too late to say."""

    equal: bool
    late: bool = False


class Grader:
    """Judges answers; owns `workers` child processes. Safe to share between threads.

    An answer that takes more than `time_limit_s` of CPU time, needs more than `memory_mb` or is longer than
    `max_length` characters is not equal to the gold answer (unless it is the same string). A busy machine
    changes no verdict: no limit on an answer is by the clock on the wall.

    Raises:
      UserError: no such style, or limits within which nothing can be judged.
    """

    def __init__(
        self,
        style: str = 'paper',
        time_limit_s: float = 5.0,
        memory_mb: int = 1024,
        workers: int = 1,
        max_length: int = 2000,
    ):
        if style not in STYLES:
            raise UserError(f'reward style is {style!r}: take one of {", ".join(STYLES)}')
        if not (time_limit_s > 0 and memory_mb >= 256 and workers >= 1):
            raise UserError(
                f'grader: time_limit_s={time_limit_s} must be > 0, memory_mb={memory_mb} >= 256, workers={workers} >= 1'
            )
        self.style, self.time_limit_s, self.max_length = style, time_limit_s, max_length
        self.timeouts = self.deaths = 0  # answers that were late, and judges that died
        self._workers = workers
        judges = [Child('retool_jax.tasks.judge', memory_mb, time_limit_s) for _ in range(workers)]
        verifiers = [Child('retool_jax.tasks.gym_child', gym.MEMORY_MB, time_limit_s) for _ in range(workers)]
        self._children = judges + verifiers
        self._judges, self._verifiers = _queue(judges), _queue(verifiers)
        self._cache: dict[tuple[str, str], bool] = {}

    def grade(self, text: str, gold: str, calls: int = 0, whole: str | None = None, judge: str = '') -> Reward:
        """The reward of a model's last words.

        Args:
          text: what the model itself wrote after its last tool output (`template.final_text`), which is not cut
            again: whatever stands in it, tags too, is the model's.
          gold: the gold answer.
          calls: tool calls made; they matter to style 'verl' only.
          whole: everything after the prompt, tool outputs among it, for the authors' rule; None: `text` is all.
          judge: who says whether an answer is right (`Problem.judge`).
        """
        whole = text if whole is None else whole
        box = answers.last_box(text)
        verdict = Verdict(False) if box is None else self.judge(box, gold, judge)
        lenient = verdict.equal or any(
            given is not None and self.judge(given, gold, judge).equal
            for given in (answers.last_box(whole) if whole is not text else None, answers.last_integer(whole))
        )
        exact = box is not None and answers.normalise(box) == answers.normalise(gold)
        value = shape(verdict.equal, self.style, calls)
        return Reward(value, verdict.equal, exact, lenient, box or '', verdict.late)

    def grade_many(
        self,
        texts: Sequence[str],
        golds: Sequence[str],
        calls: Iterable[int] | None = None,
        wholes: Sequence[str] | None = None,
        judges: Sequence[str] | None = None,
    ) -> list[Reward]:
        """The same for a batch, over all workers; order kept. Raises: ValueError for different lengths."""
        calls = [0] * len(texts) if calls is None else list(calls)
        wholes = texts if wholes is None else wholes
        judges = [''] * len(texts) if judges is None else judges
        if not len(texts) == len(golds) == len(calls) == len(wholes):
            raise ValueError(
                f'grade_many got {len(texts)} texts, {len(golds)} golds, {len(calls)} calls, {len(wholes)} wholes'
            )
        with concurrent.futures.ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(self.grade, texts, golds, calls, wholes, judges))

    def equal(self, answer: str, gold: str) -> bool:
        """Whether two bare answers are mathematically the same; never raises on what a model wrote."""
        return self.judge(answer, gold).equal

    def judge(self, answer: str, gold: str, judge: str = '') -> Verdict:
        """`equal`, and whether the judge ran out of time; such a verdict is not remembered.

        `judge` is a problem's: '' for mathematics, 'text', or the name of a generated problem (`tasks.gym`).
        """
        if judge == 'text':
            return Verdict(answers.same_text(answer, gold))
        at_sight = answers.equal_at_sight(answer, gold) if not judge else None
        if at_sight is not None:
            return Verdict(at_sight)
        if len(answer) > max(self.max_length, 2 * len(gold)):
            return Verdict(False)
        key = (answer, judge or gold)
        if key not in self._cache:
            reply = self._ask_verifier(answer, judge) if judge else self._ask(answer, gold)
            if 'equal' not in reply:
                return Verdict(False, 'late' in reply)
            if len(self._cache) >= CACHE_SIZE:
                self._cache.clear()
            self._cache[key] = bool(reply['equal'])
        return Verdict(self._cache[key])

    def parses(self, gold: str) -> bool:
        """Whether a gold answer can be judged: it is mathematics, or a few words (which equal only themselves), and no
        word that stands for none. One for which the judge ran out of time counts as readable."""
        if answers.integer(gold) is not None:
            return True
        if answers.is_no_answer(gold):
            return False
        reply = self._ask(gold, gold)
        return 'late' in reply or 'died' in reply or bool(reply.get('parsed'))

    def _ask(self, answer: str, gold: str) -> dict:
        return self._ask_one(self._judges, {'answer': answer, 'gold': gold})

    def _ask_verifier(self, answer: str, judge: str) -> dict:
        # A verifier knows no typesetting: `\\text{…}`, `\\{` and dollar signs go first.
        return self._ask_one(self._verifiers, {'do': 'score', 'answer': answers.plain(answer)} | gym.locate(judge))

    def _ask_one(self, idle: queue.SimpleQueue[Child], message: dict) -> dict:
        child = idle.get()
        try:
            reply = child.ask(message)
            if 'died' in reply:  # by this answer, or by something that has nothing to do with it
                self.deaths += 1
                reply = child.ask(message)
        finally:
            idle.put(child)
        self.timeouts += 'late' in reply
        return reply

    def close(self) -> None:
        """Ends the children; the grader may be used again."""
        for child in self._children:
            child.kill()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def shape(correct: bool, style: str, calls: int = 0) -> float:
    """Reward value: 'paper' ±1 (ReTool eq. 2); 'verl' lifts a wrong answer by 0.1 a call, at most to −0.6."""
    if correct:
        return 1.0
    return -1.0 if style == 'paper' else min(-0.6, -1.0 + 0.1 * calls)


def _queue(children: Sequence[Child]) -> queue.SimpleQueue[Child]:
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for child in children:
        idle.put(child)
    return idle
