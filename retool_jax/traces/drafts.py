"""A trace before its snippets are run: the turns of a rollout, cut out of an answer with inline tags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from retool_jax.core.records import Problem
from retool_jax.text.template import extract_snippet, wrap_feedback, wrap_snippet

# A call and, where it is there, the interpreter element behind it.
CALL = re.compile(r'<code>.*?</code>(?:\s*<interpreter>\n?(?P<said>.*?)</interpreter>\n{0,2})?', re.DOTALL)
TAG = re.compile(r'</?(?:code|interpreter|answer)>')
CONCLUSION = re.compile(r'<answer>\s*\\boxed\{.*\}\s*</answer>\s*\Z', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A trace before its snippets are run: the policy's turns, all but the last ending in `</code>`."""

    problem: Problem
    turns: tuple[str, ...]
    printed: tuple[str | None, ...]  # what each snippet is said to have printed; None where nothing is said
    repairs: tuple[str, ...] = ()  # what was mended in it: names of repair.RULES, in order
    rewriter: str = ''  # who wrote it, where a rewriter did
    candidate: int = 0  # among those that it wrote of one trace

    @property
    def codes(self) -> list[str]:
        """The scripts of its calls. Meant for drafts without a `flaw`."""
        return [extract_snippet(turn).code for turn in self.turns[:-1]]

    def with_code(self, call: int, code: str, *repairs: str) -> Draft:
        """The same draft with another script in one of its calls, and what was mended so."""
        turn = self.turns[call]
        turn = turn[: turn.rindex('<code>')] + wrap_snippet(code)
        turns = (*self.turns[:call], turn, *self.turns[call + 1 :])
        return dataclasses.replace(self, turns=turns, repairs=(*self.repairs, *repairs))


def of_parts(problem: Problem, parts: Sequence[tuple[str, str]]) -> Draft:
    """A draft of ('text', words) and ('code', script) parts; of the scripts it is not said what they print."""
    turns = ['']
    for kind, text in parts:
        turns[-1] += wrap_snippet(text) if kind == 'code' else text
        if kind == 'code':
            turns.append('')
    return Draft(problem, tuple(turns), (None,) * (len(turns) - 1))


def read(problem: Problem, text: str, repairs: Sequence[str] = ()) -> Draft:
    """An answer with inline tags as turns."""
    turns, printed, position = [], [], 0
    for call in CALL.finditer(text):
        turns.append(text[position : call.start()] + call[0][: call[0].index('</code>') + len('</code>')])
        printed.append(call['said'])
        position = call.end()
    return Draft(problem, (*turns, text[position:]), tuple(printed), tuple(repairs))


def flaw(draft: Draft) -> str:
    """What in tags, their order or fences is not as rollout needs it to detect a call and an answer; '' for nothing."""
    *calls, last = draft.turns
    for number, turn in enumerate(calls, 1):
        if TAG.findall(turn) != ['<code>', '</code>'] or not turn.endswith('</code>'):
            return f'tags before call {number} are not one <code> and one </code>'
        if turn.count('```') != 2 or extract_snippet(turn) is None:
            return f'call {number} holds no Python between one pair of fences'
    found = TAG.findall(last)
    if found != ['<answer>', '</answer>']:
        if not any('answer' in tag for tag in found):
            return 'no answer element at the end' if not found else f'{found[0]} without its partner'
        return f'the last part holds {" ".join(found)} where one answer element belongs'
    return '' if CONCLUSION.search(last) else 'the answer element is not a box alone, at the very end'


def text(draft: Draft) -> str:
    """A draft as an answer with inline tags, with what its snippets are said to have printed."""
    element = lambda words: '' if words is None else f'\n<interpreter>\n{words.rstrip()}\n</interpreter>\n\n'
    return ''.join(turn + element(words) for turn, words in zip(draft.turns, (*draft.printed, None)))


def prefix(draft: Draft, feedback: Sequence[str]) -> str:
    """The text of a draft up to and with what the interpreter gave back to its first len(feedback) calls."""
    return ''.join(turn + wrap_feedback(text) for turn, text in zip(draft.turns, feedback))
