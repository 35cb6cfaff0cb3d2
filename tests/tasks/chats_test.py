"""Chats: one question, and an answer whose calls and results are joined or refused by name."""

import json
from pathlib import Path

import pytest

from retool_jax.core.errors import UserError
from retool_jax.tasks import chats, problems
from retool_jax.text.template import extract_snippet
from retool_jax.traces import drafts, repair

SHARED = Path(__file__).parents[3] / 'shared/cases/turn2'
ASK = {'role': 'user', 'content': 'How many?'}
END = {'role': 'assistant', 'content': 'It is 12.\n<answer>\n\\boxed{12}\n</answer>'}
SNIPPET = '<code>\n```python\nprint(3*4)\n```\n</code>'
JOINED = f'So.\n{SNIPPET}\n<interpreter>\n12\n</interpreter>\n\n{END["content"]}'


def call(arguments={'code': 'print(3*4)'}, name='code_interpreter', **more):  # noqa: B006
    return {'type': 'function', 'id': 'c1', 'function': {'name': name, 'arguments': arguments}} | more


def said(text, **more):
    return {'role': 'assistant', 'content': text} | more


def joined(*messages):
    return chats.trace([ASK, *messages], 'f:1', 'messages')


@pytest.mark.parametrize('messages', [
    [said(JOINED)],
    # calls in the text, results as turns of a user or a tool, wrapped or not
    [said(f'So.\n{SNIPPET}'), {'role': 'user', 'content': '<interpreter>\n12\n</interpreter>'}, END],
    [said(f'So.\n{SNIPPET}\n'), {'role': 'user', 'content': '12'}, END],
    [said(f'So.\n{SNIPPET}'), {'role': 'user', 'content': '```output\n12\n```'}, END],
    [said(f'So.\n{SNIPPET}'), {'role': 'tool', 'content': '12\n'}, END],
    [said(f'So.\n{SNIPPET}'), {'role': 'ipython', 'content': [{'type': 'text', 'text': '12'}]}, END],
    [said(f'So.\n{SNIPPET.removesuffix("</code>")}'), {'role': 'user', 'content': '12'}, END],  # stop strings cut off
    # calls beside the text
    [said('So.', tool_calls=[call()]), {'role': 'tool', 'tool_call_id': 'c1', 'content': '12'}, END],
    [said('So.', tool_calls=[call('{"code": "print(3*4)"}')]), {'role': 'tool', 'content': '12'}, END],
    [said('So.', tool_calls=[call('print(3*4)', 'python')]), {'role': 'tool', 'content': '12'}, END],
    [said('So.', tool_calls=[call({'script': 'print(3*4)', 'timeout': 5}, 'run_code')]),
     {'role': 'function', 'name': 'run_code', 'content': '12'}, END],
    [said('So.', tool_calls=[{'name': 'python', 'arguments': {'input': 'print(3*4)'}}]),
     {'role': 'tool', 'content': '12'}, END],
    # Qwen's elements
    [said('So.\n<tool_call>\n{"name": "python", "arguments": {"code": "print(3*4)"}}\n</tool_call>'),
     {'role': 'user', 'content': '<tool_response>\n12\n</tool_response>'}, END],
    # a block of Python that a result follows
    [said('So.\n```python\nprint(3*4)\n```'), {'role': 'tool', 'content': '12'}, END],
    [said('So.\n```python\nprint(3*4)\n```\n'), {'role': 'user', 'content': '```output\n12\n```'}, END],
    # ShareGPT's spelling
    [{'from': 'gpt', 'value': 'So.'}, {'from': 'function_call', 'value': json.dumps(
        {'name': 'python', 'arguments': {'code': 'print(3*4)'}})}, {'from': 'observation', 'value': '12'},
     {'from': 'gpt', 'value': END['content']}],
])  # fmt: skip
def test_turns_are_joined_into_one_trace_with_its_calls(messages):
    assert joined(*messages) == JOINED
    draft = repair.read(None, joined(*messages))
    assert [extract_snippet(turn).code for turn in draft.turns[:-1]] == ['print(3*4)']
    assert not drafts.flaw(draft)


def test_several_calls_of_a_turn_each_get_their_result():
    text = joined(
        said('', tool_calls=[call({'code': 'a'}), call({'code': 'b'})]),
        {'role': 'tool', 'content': '1'},
        {'role': 'tool', 'content': '</code> 2'},
        said(None, tool_calls=[call({'code': 'c'})]),
        {'role': 'tool', 'content': '3'},
        END,
    )
    draft = repair.read(None, text)
    assert [extract_snippet(turn).code for turn in draft.turns[:-1]] == ['a', 'b', 'c']
    assert [claim.strip() for claim in draft.printed] == ['1', '</code> 2', '3']


@pytest.mark.parametrize(
    'messages, words',
    [
        ([], 'holds no assistant message'),
        ([said(None)], 'holds no assistant message'),
        ([said('12'), {'role': 'user', 'content': 'And twice that?'}, said('24')], 'holds 2 questions of the user'),
        ([said('So.'), {'role': 'tool', 'content': '12'}, END], 'a result that no call precedes'),
        (
            [said(f'So.\n{SNIPPET}'), {'role': 'tool', 'content': '1'}, {'role': 'tool', 'content': '2'}],
            'no call precedes',
        ),
        ([said('', tool_calls=[call({'query': 'pens'}, 'search')]), END], "calls 'search'"),
        ([said('', tool_calls=[call({'a': 'x', 'b': 'y'})]), END], 'without a script'),
        ([said('', tool_calls=[call(None)]), END], 'without a script'),
        ([said('', tool_calls=['x']), END], 'a call that cannot be read'),
        ([said('', tool_calls=[{'function': {}}]), END], 'a call that cannot be read'),
        ([{'role': 'critic', 'content': ''}], "role 'critic'"),
        ([{'role': 'assistant', 'content': [{'type': 'image_url', 'image_url': 'x'}]}], 'content other than text'),
        (['12'], 'where a message was expected'),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name(messages, words):
    with pytest.raises(UserError, match=rf"^f:1: field 'messages' .*{words}") as caught:
        joined(*messages)
    assert '\n' not in str(caught.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason='no shared cases')
def test_traces_that_people_met_keep_their_question_and_their_calls():
    for case in json.loads((SHARED / 'traces.json').read_text()):
        ((problem, text),) = problems.read_traces(SHARED / case['file'])
        assert (problem.question, problem.answer) == (case['question'], '12')
        draft = repair.read(problem, text)
        assert [extract_snippet(turn).code for turn in draft.turns[:-1]] == ['print(3*4)']
        assert not drafts.flaw(draft)
