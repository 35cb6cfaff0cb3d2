"""Gold answers of traces: the trace's own are told apart, and a problem file's take their place."""

import json

import pytest

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.tasks import golds, problems, schemas

CHAT = lambda question, answer: [
    {'role': 'user', 'content': question},
    {'role': 'assistant', 'content': f'So.\n<answer>\n\\boxed{{{answer}}}\n</answer>'},
]
ROWS = [
    {'messages': CHAT('What is 1 + 1?', 2)},  # nothing but what the trace says
    {'messages': CHAT('What is  2 + 2?', 5), 'answer': None},
    {'messages': CHAT('What is 3 + 3?', 7), 'answer': '6'},
    {'problem': 'What is 4 + 4?', 'answer': '8', 'response': '\\boxed{9}'},
    {'messages': CHAT('What is 5 + 5?', 10)},
]


@pytest.fixture
def traces(tmp_path):
    path = tmp_path / 'traces.jsonl'
    path.write_text('\n'.join(map(json.dumps, ROWS)))
    return path


def test_rows_whose_answer_is_their_own_last_box_are_named(traces):
    read = problems.read_traces(traces)
    own = golds.own(read, traces)
    assert [problem.id in own for problem, _ in read] == [True, True, False, False, True]


def test_a_problem_file_gives_them_their_gold_answers_and_no_others(traces):
    read = problems.read_traces(traces)
    known = [
        Problem('x', 'What is 2 + 2?', '4', 's', ''),
        Problem('y', 'What is 3 + 3?', '99', 's', ''),
        Problem('z', 'What is 1 + 1?', '2', 's', ''),
    ]
    found, left = golds.join(read, golds.own(read, traces), known)
    assert [problem.answer for problem, _ in found] == ['2', '4', '6', '8', '10']
    assert [text for _, text in found] == [text for _, text in read] and left == {read[4][0].id}


def test_a_question_with_two_answers_has_none_and_a_strange_file_is_refused(traces):
    read = problems.read_traces(traces)
    own = golds.own(read, traces)
    twice = [Problem(str(i), 'What is 1 + 1?', str(i), 's', '') for i in range(2)]
    with pytest.raises(UserError, match='golds: no question of this file is that of a trace'):
        golds.join(read, own, twice)
    _, left = golds.join(read, own, [*twice, Problem('x', 'What is 2 + 2?', '4', 's', '')])
    assert len(left) == 2


@pytest.mark.parametrize(
    ('row', 'has'),
    [
        ({'prompt': [], 'reward_model': {'ground_truth': '3'}}, True),
        ({'reward_model': {'ground_truth': None}}, False),
        ({'Answer': 0}, True),
        ({'solution': ''}, False),
        ({'messages': []}, False),
    ],
)
def test_an_answer_beside_the_chat_is_seen_in_every_spelling(row, has):
    assert schemas.has_gold(row) == has
