"""Rewritings as language models write them: what each becomes, by which repairs or for which reason.

Each is of one problem, 'What is 17 times 23?' with the answer 391 unless said otherwise, and is run for real.
"""

from __future__ import annotations

import dataclasses

SNIPPET = 'product = 17 * 23\nprint(product)'
CALL = f'<code>\n```python\n{SNIPPET}\n```\n</code>'
SAID = '\n<interpreter>\n391\n</interpreter>\n\n'
END = '<answer>\n\\boxed{391}\n</answer>'
FIRST = '<code>\n```python\na = 17\nb = 23\nprint(a + b)\n```\n</code>\n<interpreter>\n40\n</interpreter>\n\n'


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """One answer of a rewriter."""

    name: str
    text: str
    becomes: tuple[str, ...] | str  # the repairs of what is kept, or the reason for which it is dropped
    said: tuple[str, ...] = ()  # parts of the kept text, or of the reason's detail
    answer: str = '391'


TABLE = (
    Rewriting('as it was asked for', f'Multiply.\n{CALL}{SAID}It is 391.\n{END}', ()),
    Rewriting('inside its marker', f'<rewritten>\nMultiply.\n{CALL}{SAID}{END}\n</rewritten>', ()),
    Rewriting('without code', f'17 times 23 is 391.\n{END}', ()),
    Rewriting(
        'a failure and its correction',
        '<code>\n```python\nprint(17 * x)\n```\n</code>\n<interpreter>\n'
        'Traceback (most recent call last):\n  File "a.py", '
        f"line 1\nNameError: name 'x' is not defined\n</interpreter>\n\nI forgot to define it.\n{CALL}{SAID}{END}",
        (),
        ("NameError: name 'x' is not defined", 'I forgot'),
    ),
    Rewriting('a script without its fence', f'<code>\n{SNIPPET}\n</code>{SAID}{END}', ('fence',), (CALL,)),
    Rewriting('a fence left open', f'<code>\n```python\n{SNIPPET}\n</code>{SAID}{END}', ('fence',), (CALL,)),
    Rewriting('a fence without its beginning', f'<code>\n{SNIPPET}\n```\n</code>{SAID}{END}', ('fence',), (CALL,)),
    Rewriting(
        'the end of the code tags left out',
        f'<code>\n```python\n{SNIPPET}\n```\n<interpreter>\n391\n</interpreter>\n\n{END}',
        ('code_end',),
        (f'{CALL}{SAID}',),
    ),
    Rewriting('a box without its element', f'{CALL}{SAID}So it is \\boxed{{391}}.', ('answer_tag',), (END, 'So it is')),
    Rewriting('a box on a line of its own', f'{CALL}{SAID}Done.\n\n\\[\n\\boxed{{391}}\n\\]', ('answer_tag',), (END,)),
    Rewriting('an element left open', f'{CALL}{SAID}<answer>\n\\boxed{{391}}', ('answer_tag',), (END,)),
    Rewriting('a bare answer in its element', f'{CALL}{SAID}<answer>391</answer>', ('answer_box',), (END,)),
    Rewriting(
        'words in the answer element',
        f'{CALL}{SAID}<answer>\nThe product is \\boxed{{391}}.\n</answer>',
        ('answer_words',),
        ('The product is', END),
    ),
    Rewriting(
        'the answer in bold',
        f'{CALL}{SAID}<answer>The product is **391**.</answer>',
        ('answer_words',),
        (END, '**391**'),
    ),
    Rewriting('words behind the answer', f'{CALL}{SAID}{END}\n\nI hope this helps!', ('after_answer',), (END,)),
    Rewriting('the answer twice', f'{CALL}{SAID}{END}\nAgain:\n{END}', ('answer_again',), (END, 'Again:')),
    Rewriting(
        'two answers',
        f'{CALL}{SAID}{END.replace("391", "390")}\nNo:\n{END}',
        'format',
        ('one answer element',),
    ),
    Rewriting('an answer before the call', f'{END}\nLet me check it.\n{CALL}{SAID}{END}', 'format', ('call 1',)),
    Rewriting(
        'a bare last expression',
        f'<code>\n```python\nproduct = 17 * 23\nproduct\n```\n</code>{SAID}{END}',
        ('print',),
        ('print(product)\n',),
    ),
    Rewriting(
        'a call that returns its value',
        '<code>\n```python\ndef solve():\n    return 17 * 23\n\nsolve()\n```\n</code>\n'
        '<interpreter>\n391\n</interpreter>\n\n'
        + END,
        ('print',),
        ('\nprint(solve())\n',),
    ),
    Rewriting(
        'a second snippet that uses names of the first',
        f'{FIRST}<code>\n```python\nprint(a * b)\n```\n</code>{SAID}{END}',
        ('joined',),
        ('```python\na = 17\nb = 23\nprint(a * b)\n```',),
    ),
    Rewriting(
        'names of the first, and a bare last expression',
        f'{FIRST}<code>\n```python\na * b\n```\n</code>{SAID}{END}',
        ('joined', 'print'),
        ('```python\na = 17\nb = 23\nprint(a * b)\n```',),
    ),
    Rewriting(
        'a tool call of Qwen',
        'Multiply.\n<tool_call>\n{"name": "code_interpreter", "arguments": '
        '{"code": "product = 17 * 23\\nprint(product)"}}\n'
        f'</tool_call>\n<tool_response>\n391\n</tool_response>\n{END}',
        ('call_tags',),
        (f'{CALL}{SAID}',),
    ),
    Rewriting(
        'a block of Markdown and its output',
        f'Multiply.\n\n```python\n{SNIPPET}\n```\n\n```output\n391\n```\nIt is \\boxed{{391}}.',
        ('call_tags', 'answer_tag'),
        (f'{CALL}{SAID}', END),
    ),
    Rewriting('no interpreter element', f'{CALL}\nSo the product is 391.\n{END}', ('output',), (f'{CALL}{SAID}',)),
    Rewriting(
        'no interpreter element, and not the answer',
        f'<code>\n```python\nprint(17 + 23)\n```\n</code>\nSo the product is 391.\n{END}',
        'answer',
        ('does not print the answer',),
    ),
    Rewriting(
        'an output in other spacing',
        '<code>\n```python\nprint([17, 23])\nprint(17 * 23)\n```\n</code>\n'
        '<interpreter>\n[17,23]  391\n</interpreter>\n\n' + END,
        (),
        ('[17, 23]\n391\n',),
    ),
    Rewriting(
        'numbers in another form',
        '<code>\n```python\nprint(17 * 23 / 1)\nprint(1000 * 17, 1 / 3)\n```\n</code>\n'
        f'<interpreter>\n391\n17,000 0.3333\n</interpreter>\n\nIt is 391.\n{END}',
        ('number_form',),
        ('391.0\n17000 0.3333333333333333\n',),
    ),
    Rewriting(
        'another output than is claimed',
        f'<code>\n```python\nprint(17 * 24)\n```\n</code>{SAID}{END}',
        'execution',
        ('call 1 prints something else',),
    ),
    Rewriting(
        'a rounded claim of two digits',
        f'<code>\n```python\nprint(391.4)\n```\n</code>{SAID}{END}',
        'execution',
        ('call 1 prints something else',),
    ),
    Rewriting(
        'a last call that fails as it is told to',
        '<code>\n```python\nprint(1 / 0)\n```\n</code>\n'
        '<interpreter>\nZeroDivisionError: division by zero\n</interpreter>\n\n'
        + END,
        'execution',
        ('the last call ends with error',),
    ),
    Rewriting('a wrong answer', f'{CALL}{SAID}<answer>\n\\boxed{{392}}\n</answer>', 'answer', ("'392' is not '391'",)),
    Rewriting('no answer at all', f'{CALL}{SAID}The product is 391.', 'format', ('no answer element',)),
    Rewriting('an interpreter element of its own', f'I expect <interpreter>\n391\n</interpreter>\n{END}', 'format'),
    Rewriting(
        'a call of another language',
        f'<code>\n```javascript\nconsole.log(391)\n```\n</code>{SAID}{END}',
        'format',
    ),
    Rewriting('a call that is empty', f'<code>\n```python\n```\n</code>{SAID}{END}', 'format', ('call 1',)),
)  # fmt: skip
