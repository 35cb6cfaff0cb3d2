"""Chats of public sets: which turn asks, and the turns of an answer with tool calls joined into one trace.

Spellings that are known: `role`/`content` and ShareGPT's `from`/`value`; contents as text or as a list of text parts;
calls as code tags in the text, as OpenAI's `tool_calls`, as Qwen's `<tool_call>` elements, or as a Python block that a
result follows; results as turns of a tool or of the user.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

from retool_jax.core.errors import UserError
from retool_jax.text.template import wrap_snippet

ROLES = {
    'system': 'system', 'developer': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant',
    'gpt': 'assistant', 'model': 'assistant', 'function_call': 'assistant', 'tool': 'tool', 'function': 'tool',
    'ipython': 'tool', 'observation': 'tool', 'tool_response': 'tool',
}  # fmt: skip
INTERPRETER = re.compile(r'python|interpreter|code|jupyter|sandbox', re.IGNORECASE)  # names of functions that run code
_CALL = re.compile(r'<tool_call>\s*(\{.*?\})\s*</tool_call>', re.DOTALL)
_RESPONSE = re.compile(r'<tool_response>\n?(.*?)\n?</tool_response>', re.DOTALL)
_BLOCK = re.compile(r'```(?:python|py)[ \t]*\n(.*?)\n[ \t]*```\s*\Z', re.DOTALL)
_OUTPUT = re.compile(r'\s*```(?:output|text|)[ \t]*\n(.*?)\n?```\s*', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message, or several of one speaker in a row."""

    role: str  # 'system', 'user', 'assistant' or 'tool'
    text: str
    calls: tuple[str, ...] = ()  # scripts that stand beside the text


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and ('role' in m or 'from' in m) for m in value)
    )


def question(messages: object, where: str, field: str) -> str:
    """The one question of the user; a user's turn that gives a tool's result back is none.

    Raises: UserError for a chat without a question, or with more than one, whose last would be without its context.
    """
    turns = _read(messages, where, field)
    asked = [
        i for i, turn in enumerate(turns) if turn.role == 'user' and turn.text.strip() and _result(turns, i) is None
    ]
    if not asked:
        raise UserError(f'{where}: field {field!r} holds no user message with text content')
    if len(asked) > 1:
        raise UserError(f'{where}: field {field!r} holds {len(asked)} questions of the user; a problem has one')
    return turns[asked[0]].text


def trace(messages: object, where: str, field: str) -> str:
    """The assistant's turns as one answer with inline tags: each call a snippet, each result an interpreter element.

    Raises: UserError where there is no answer, or a call or a result that cannot be joined.
    """
    turns = _read(messages, where, field)
    question(messages, where, field)
    text, waiting = '', 0  # calls that have no result yet
    for i, turn in enumerate(turns):
        result = _result(turns, i)
        if result is not None:
            if _open(text):  # the stop string was cut off
                text = f'{text.rstrip()}\n</code>'
            if not waiting and not text.rstrip().endswith('</code>'):
                text = _as_call(text, where, field)
            before, after = _split_waiting(text.rstrip(), waiting)
            text = f'{before}\n<interpreter>\n{result.strip(chr(10))}\n</interpreter>\n\n{after}'
            waiting = max(waiting - 1, 0)
        elif turn.role == 'assistant':
            text += turn.text.strip() if turn.calls or not text else turn.text
            for call in turn.calls:
                text += f'\n{wrap_snippet(call)}'
            waiting += len(turn.calls)
    if not text.strip():
        raise UserError(f'{where}: field {field!r} holds no assistant message with text content')
    return text


def _split_waiting(text: str, waiting: int) -> tuple[str, str]:
    """An answer cut behind the first of the calls that wait at its end."""
    pieces = text.rsplit('</code>', max(waiting, 1))
    return pieces[0] + '</code>', '</code>'.join(pieces[1:])


def _as_call(text: str, where: str, field: str) -> str:
    """The answer with its last block of Python, which a result follows, written as a call."""
    block = _BLOCK.search(text)
    if block is None:
        raise UserError(
            f'{where}: field {field!r} holds a result that no call precedes; write calls as <code>```python …```</code>'
        )
    return f'{text[: block.start()]}{wrap_snippet(block[1])}'


def _open(text: str) -> bool:
    """Whether a call at the end of a text is not closed."""
    start = text.rfind('<code>')
    return start > text.rfind('</code>') and re.fullmatch(r'<code>\s*```.*```\s*', text[start:], re.DOTALL) is not None


def _result(turns: list[Turn], i: int) -> str | None:
    """The result that a turn gives back, without its wrapping; None for a turn that gives none."""
    turn = turns[i]
    if turn.role not in ('tool', 'user'):
        return None
    answered = any(t.role == 'assistant' for t in turns[:i])
    for wrapping in (re.compile(r'\s*<interpreter>\n?(.*?)\n?</interpreter>\s*', re.DOTALL), _RESPONSE, _OUTPUT):
        match = wrapping.fullmatch(turn.text.strip())
        if match and answered:
            return match[1]
    before = turns[i - 1]
    called = answered and (before.calls or before.text.rstrip().endswith('</code>') or _open(before.text))
    return turn.text if turn.role == 'tool' or called else None


def _read(messages: object, where: str, field: str) -> list[Turn]:
    if not isinstance(messages, list):
        raise UserError(f'{where}: field {field!r} holds no user message with text content')
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f'{where}: field {field!r} holds {str(message)[:40]!r} where a message was expected')
        name = message.get('role') or message.get('from')
        if name not in ROLES:
            raise UserError(f'{where}: field {field!r} has a message of role {name!r}; known are {", ".join(ROLES)}')
        content = message.get('content') if 'content' in message else message.get('value')
        text = _text(content, where, field)
        calls = [_code(call, where, field) for call in message.get('tool_calls') or ()]
        if name == 'function_call':
            text, calls = '', [_code(text, where, field)]
        elif ROLES[name] == 'assistant':
            calls = [_code(call, where, field) for call in _CALL.findall(text)] + calls
            text = _CALL.sub('', text).rstrip() if calls else text
        turns.append(Turn(ROLES[name], text, tuple(calls)))
    return turns


def _text(content: object, where: str, field: str) -> str:
    """The text of a message: a string, nothing, or a list of parts that are text."""
    if content is None:
        return ''
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get('text'), str) for part in content
    ):
        return '\n'.join(part['text'] for part in content)
    raise UserError(f'{where}: field {field!r} has a message with content other than text')


def _code(call: object, where: str, field: str) -> str:
    """The script of a call; UserError for one of another tool."""
    try:
        call = json.loads(call) if isinstance(call, str) else call
        function = call.get('function') or call
        name, arguments = function['name'], function.get('arguments', function.get('parameters'))
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f'{where}: field {field!r} has a call that cannot be read: {str(call)[:60]!r}') from None
    if not isinstance(name, str) or not INTERPRETER.search(name):
        raise UserError(f'{where}: field {field!r} calls {name!r}: the one tool is an interpreter of Python')
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments  # the script itself
    if isinstance(arguments, str):
        return arguments
    texts = [value for value in arguments.values() if isinstance(value, str)] if isinstance(arguments, Mapping) else []
    named = [
        arguments[key]
        for key in ('code', 'script', 'python', 'source')
        if isinstance(arguments, Mapping) and isinstance(arguments.get(key), str)
    ]
    if named or len(texts) == 1:
        return (named or texts)[0]
    raise UserError(f'{where}: field {field!r} calls {name!r} without a script: {str(arguments)[:60]!r}')
