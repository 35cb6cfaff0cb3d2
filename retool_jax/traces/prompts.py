r"""What a language model is asked that rewrites text traces, finishes them, or judges them.

The elements are those of the paper's template (P §2.2, whose wording is not repeated): the reasoning stays, failed
attempts included; code takes the place of manual calculation where it gains something; complete scripts, imports,
print, exact results; `<answer>\boxed{…}</answer>` at the end; a marker element around the whole. `repair.read` takes
the marker off again.
"""

from __future__ import annotations

import re

from retool_jax.core.records import Problem
from retool_jax.text.template import wrap_answer, wrap_snippet

MARKER = 'rewritten'
type Messages = list[dict[str, str]]  # {'role': …, 'content': …}

_EXAMPLE = f"""\
{wrap_snippet('from math import comb' + chr(10) + 'print(comb(10, 3))')}
<interpreter>
120
</interpreter>"""

_FORM = f"""\
A piece of code looks like this, tags and fence included, and right behind it stands what it prints:
{_EXAMPLE}

How code is written:
- Each script is run in a fresh process. It is complete: its imports, and everything from earlier scripts that it
  uses, stand in it again.
- What is to be seen is printed by print; a bare last expression shows nothing.
- Results are exact wherever they can be: integers, fractions, sympy's expressions. Rounded decimals only where the
  reasoning itself rounds.
- The interpreter element holds exactly what the script prints, character by character, and nothing else. Every script
  is going to be run, and its real output compared: print little, and nothing that you cannot foretell.

The last thing is the final answer, in this form and without other words in it:
{wrap_answer('the final answer')}"""

REWRITE = f"""\
You turn a written solution into one that computes with Python.

Below are a problem and a solution in words. Write the same solution again, from its beginning to its end, so that it
runs code where code helps:
- Keep the reasoning as it is, in its order and its words: observations, doubts, checks, and attempts that fail as much
  as those that succeed. Shorten nothing into a summary and add no knowledge of the result before it is found.
- Put code only in the place of calculation that was done by hand and gains from it: long arithmetic, systems of
  equations, enumerations, expansions, numeric checks. What is seen at a glance stays in words. The calculation that a
  script does is not written out beside it.
- After each output the reasoning goes on from what it says.

{_FORM}

Write the whole between <{MARKER}> and </{MARKER}>, and nothing outside of it."""

FINISH = f"""\
You go on with a solution that computes with Python, from where it was cut.

Below are a problem, a solution of it in words, and the beginning of the same solution with code. That beginning ends
with a script and with what the script really printed when it was run. Trust this output, though the solution in words
may say something else: reason on from it, find what was wrong if something was, and bring the solution to its end.
Write only what follows, and repeat nothing of the beginning. Keep to the manner of the beginning.

{_FORM}

Write it between <{MARKER}> and </{MARKER}>, and nothing outside of it."""

JUDGE = """\
You check a solution of a problem, step by step.

It holds if every step that its answer rests on follows from what stands before it, if the arithmetic is right, and if
the final answer is the result of this reasoning and answers what was asked. Attempts that it gives up itself do not
speak against it. It does not hold if the answer is guessed, if a step that the answer needs is wrong or missing, or if
it contradicts itself.

Say in a few sentences what you found. Then close with one line, exactly
Verdict: yes
if the solution holds, or
Verdict: no
if it does not."""

# The last line that gives a verdict, with whatever emphasis a model puts around it.
_VERDICT = re.compile(r'^[\s>*_#`]*verdict[\s*_`]*:[\s*_`"\']*(yes|no)\b[\s*_`"\'.!]*$', re.IGNORECASE | re.MULTILINE)


def rewrite_messages(problem: Problem, words: str) -> Messages:
    """Asks for the text trace `words` of a problem as one that computes."""
    return _messages(REWRITE, problem=problem.question, solution=words)


def finish_messages(problem: Problem, words: str, prefix: str) -> Messages:
    """Asks for the rest of a rewritten trace. prefix: its beginning, whose last interpreter element holds what was
    really printed."""
    return _messages(FINISH, problem=problem.question, solution=words, beginning=prefix)


def judge_messages(problem: Problem, words: str) -> Messages:
    """Asks whether the text trace `words` holds; the gold answer is not shown, which would be believed."""
    return _messages(JUDGE, problem=problem.question, solution=words)


def judged(text: str) -> bool | None:
    """What a model answered to `judge_messages`: whether the trace holds. None: it gave no verdict in that form."""
    found = _VERDICT.findall(text)
    return found[-1].lower() == 'yes' if found else None


def unmarked(text: str) -> str:
    """What stands in the marker element of an answer, or the whole of it where the marker is missing or left open."""
    begin, end = text.find(f'<{MARKER}>'), text.rfind(f'</{MARKER}>')
    begin = begin + len(MARKER) + 2 if begin >= 0 else 0
    return text[begin : end if end >= begin else len(text)].strip('\n')


def _messages(instruction: str, **parts: str) -> Messages:
    """One user turn: what is to be done, then what it is done to. Some chat templates know no system turn."""
    content = [instruction, *(f'# {name.capitalize()}\n\n{text.strip()}' for name, text in parts.items())]
    return [{'role': 'user', 'content': '\n\n'.join(content)}]
