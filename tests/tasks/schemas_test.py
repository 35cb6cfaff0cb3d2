"""Schemas of public sets: each row of the guide's table is read as it is meant."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from retool_jax.core.errors import UserError
from retool_jax.tasks import answers, problems
from retool_jax.tasks.schemas import read_problem

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / 'shared'
QUESTION, CHAT = 'How many?', [{'role': 'system', 'content': 'Think.'}, {'role': 'user', 'content': 'How many?'}]
WORKED = 'One box holds 4, so 3*4 = <<3*4=12>>12.\n#### 12'
WRITTEN = {'role': 'assistant', 'content': 'I count \\boxed{13}.'}

SCHEMAS = {  # a row of the guide's table → rows in that schema; the answer to each is 12
    'own': [{'id': 'a', 'problem': QUESTION, 'answer': '12', 'family': 'sums'}],
    'AIME': [{'Problem': QUESTION, 'Answer': 12, 'Solution': 'long', 'ID': '2024-I-4'},
             {'problem': QUESTION, 'answer': '012', 'solution': 'So \\boxed{12}.', 'url': 'x', 'year': '2024'},
             {'problem': QUESTION, 'answer': 12.0, 'problem_idx': 1}],
    'MATH': [{'problem': QUESTION, 'solution': 'Not \\boxed{1} but \\boxed{12}.', 'subject': 'Algebra', 'level': 1},
             {'problem': QUESTION, 'solution': 'It is \\boxed{12}.', 'answer': '12', 'unique_id': 'test/a/1.json'}],
    'GSM8K': [{'question': QUESTION, 'answer': WORKED}, {'question': QUESTION, 'answer': '#### 12'},
              {'question': QUESTION, 'answer': 'Plainly.\n#### 12\n'}, {'question': QUESTION, 'solution': WORKED}],
    'SVAMP': [{'ID': 'chal-1', 'Body': 'Three boxes.', 'Question': QUESTION, 'Equation': '( 3 * 4 )', 'Answer': 12.0}],
    'DAPO': [{'data_source': 'math_dapo', 'prompt': CHAT, 'reward_model': {'ground_truth': '12', 'style': 'rule'},
              'extra_info': {'index': 'u0'}},
             {'prompt': QUESTION, 'solution': '12', 'source_prompt': CHAT, 'reward_model': {'ground_truth': '12'}},
             {'prompt': QUESTION, 'solution': None, 'reward_model': {'ground_truth': '12'}}],
    'Skywork-OR1': [{'prompt': CHAT, 'reward_model': {'ground_truth': '["12"]'}},
                    {'prompt': json.dumps(CHAT), 'reward_model': {'ground_truth': "['12']"}},
                    {'prompt': CHAT, 'reward_model': '{"ground_truth": "12", "style": "rule"}'},
                    {'problem': QUESTION, 'answer': '[ "12" ]'}, {'problem': QUESTION, 'answer': ['12']}],
    'chat and label': [{'prompt': CHAT, 'label': '12'}, {'prompt': CHAT, 'answer': '12'},
                       {'prompt': CHAT, 'ground_truth': 12}, {'prompt': CHAT, 'solution': '$12$'},
                       {'messages': CHAT, 'ground_truth': '12', 'dataset': 'MATH'},
                       {'prompt': CHAT[1:], 'answer': None, 'solution': 'So \\boxed{12}.'},
                       {'conversations': [{'from': 'human', 'value': QUESTION}], 'answer': '12'},
                       {'prompt': [{'role': 'user', 'content': [{'type': 'text', 'text': QUESTION}]}], 'label': 12}],
    'text and label': [{'prompt': QUESTION, 'label': '12'}, {'question': QUESTION, 'solution': '12'},
                       {'question': QUESTION, 'gold': '12'}, {'problem': QUESTION, 'solution': '\\frac{24}{2}'},
                       {'problem': QUESTION, 'expected_answer': '12', 'generated_solution': '\\boxed{13}'}],
    'model-written': [{'messages': [*CHAT, WRITTEN], 'answer': '12'},
                      {'problem': QUESTION, 'messages': [*CHAT, WRITTEN], 'answer': '12', 'generations': ['\\boxed{1}'],
                       'solution': 'So \\boxed{14}.'},
                      {'problem': QUESTION, 'solution': 'So \\boxed{13}.', 'final_answer': '12'},
                      {'instruction': QUESTION, 'input': '', 'output': 'So 3*4, \\boxed{12}.'}],
    'null columns': [{'problem': None, 'question': QUESTION, 'answer': None, 'ground_truth': '12', 'messages': None},
                     {'problem': '', 'prompt': CHAT, 'answer': ' ', 'label': '12'},
                     {'question': QUESTION, 'messages': [], 'answer': [], 'solution': '12'}],
    'ReTool-SFT': [{'messages': [
        {'role': 'user', 'content': 'Tools.\n*user question:*\nAnswer the following Math Problem and put the answer '
                                    f'in \\boxed{{answer}}\n\n{QUESTION}\n\nRemember to place the final answer last.'},
        {'role': 'assistant', 'content': '<answer>\n\\boxed{12}\n</answer>'}]}],
}  # fmt: skip


def only(row):
    return read_problem(row, 'f:1', 'f-0', 'f')


@pytest.mark.parametrize('name', SCHEMAS)
def test_every_schema_of_the_guide_is_read(name, tmp_path):
    asked = 'Three boxes. How many?' if name == 'SVAMP' else QUESTION
    for row in SCHEMAS[name]:
        problem = only(row)
        assert problem.question == asked, row
        assert problem.answer in ('12', '$12$', '\\frac{24}{2}'), row
        (tmp_path / 'a.jsonl').write_text(json.dumps(row))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / 'a.parquet')
        for file in ('a.jsonl', 'a.parquet'):
            (read,) = problems.read(tmp_path / file)
            assert (read.question, read.answer) == (asked, problem.answer), (file, row)


def test_the_guide_lists_these_schemas_and_no_others():
    guide = (ROOT / 'docs/guide.md').read_text()
    table = guide[guide.index('| schema |') :].partition('\n\n')[0]
    assert re.findall(r'^\| ([^|`]+?) \|', table, re.MULTILINE)[1:] == list(SCHEMAS)


def test_ids_and_families_are_found_in_any_case():
    assert (only({'ID': 'x', 'Body': 'B', 'Question': 'Q', 'Answer': 1.0, 'Type': 'Sum'}).id) == 'x'
    assert only({'problem': 'Q', 'answer': 1, 'Subject': 'Algebra'}).family == 'Algebra'
    assert only({'problem': 'Q', 'answer': 1, 'id': 0}).id == '0'
    assert only({'problem': 'Q', 'answer': 1, 'id': None, 'extra_info': {'index': 3}}).id == '3'
    assert only({'problem': 'Q', 'answer': 1, 'id': '', 'extra_info': {'index': None}}).id == 'f-0'


@pytest.mark.parametrize('answer, read', [
    ('1,200', '1200'), ('#### 1,200', '1200'), ('x\n#### -3', '-3'), ('x\n#### 1/2\n', '1/2'), ('#### $5', '$5'),
    ('(1,200)', '(1,200)'), ('1,2', '1,2'), ('[1, 2]', '[1, 2]'), ('[12]', '[12]'), ('["1"', '["1"'),
    ('["\\\\frac{1}{2}"]', '\\frac{1}{2}'), ('a #### b', 'a #### b'), ('nonempty', 'nonempty'),
    ('no solution', 'no solution'),
    ('The answer is \\boxed{7}.', '7'), ('\\boxed{7}\\pi', '\\boxed{7}\\pi'), ('So it is.\n\n\\boxed{7}', '7'),
    ('$\\boxed{7}$.', '7')])  # fmt: skip
def test_an_answer_keeps_its_meaning(answer, read):
    assert only({'problem': 'Q', 'answer': answer}).answer == read


@pytest.mark.parametrize('row, words', [
    *(({'answer': word}, 'which stands for no answer') for word in (
        'proof', 'Proof', 'notfound', 'not found', 'n/a', 'N/A', 'none', 'None.', 'null', 'NaN', '?', '#### none',
        '\\boxed{none}', '["n/a"]')),
    ({'answer': '["1", "2"]'}, "field 'answer' is"), ({'answer': ['1', '2']}, "field 'answer' is"),
    ({'answer': {'value': 1}}, "field 'answer' is"),
    ({'solution': 'We add them up and see.'}, "field 'solution' is .* in a box or behind ####"),
    ({'solution': '3 times 4'}, "field 'solution' is"),
    ({'output': 'Three boxes\nof four'}, "field 'output' is"),
    ({'answer': None, 'label': None}, "field 'answer' is null"),
    ({'messages': [*CHAT, {'role': 'assistant', 'content': 'So there are twelve.'}]}, 'messages: last box'),
    ({}, 'none of the fields answer'),
])  # fmt: skip
def test_what_is_no_answer_is_refused_by_field(row, words):
    with pytest.raises(UserError, match=f'^f:1: .*{words}') as caught:
        only({'problem': 'Q'} | row)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'row, words',
    [
        ({'prompt': [*CHAT, WRITTEN, {'role': 'user', 'content': 'And 5?'}], 'label': '1'}, 'holds 2 questions'),
        ({'prompt': CHAT[:1], 'label': '1'}, "field 'prompt' holds no user message"),
        ({'prompt': {'a': 1}, 'label': '1'}, "field 'prompt' is"),
        ({'problem': None, 'answer': '1'}, "field 'problem' is null"),
        ({'answer': '1'}, 'none of the fields problem'),
    ],
)
def test_what_is_no_question_is_refused_by_field(row, words):
    with pytest.raises(UserError, match=f'^f:1: .*{words}'):
        only(row)


@pytest.mark.parametrize(
    'asked',
    [
        'How many?\nRemember to put your answer on its own line after "Answer:".',
        'How many? Let\'s think step by step and output the final answer after "####".',
        "How many? Let's think step by step and output the final answer within \\boxed{}.",
    ],
)
def test_instructions_about_the_form_of_the_answer_go(asked):
    row = {'prompt': [{'role': 'user', 'content': asked}], 'reward_model': {'ground_truth': '1'}}
    assert only(row).question == QUESTION


@pytest.mark.skipif(not (SHARED / 'cases/turn2').is_dir(), reason='no shared cases')
def test_rows_that_people_met_are_read_or_refused():
    folder = SHARED / 'cases/turn2'
    for case in json.loads((folder / 'problems.json').read_text()):
        expected = case['expect']
        if 'read' in expected:
            found = [{'question': p.question, 'answer': p.answer} for p in problems.read(folder / case['file'])]
            assert found == expected['read'], case['file']
        else:
            with pytest.raises(UserError):
                problems.read(folder / case['file'])
            with pytest.raises(UserError, match='no problems in it .4 rows read.; the first that cannot be read'):
                problems.load(folder / case['file'], leave_out=True)


@pytest.mark.skipif(not SHARED.is_dir(), reason='no shared problem files')
def test_every_gold_answer_of_gsm8k_and_svamp_is_a_number():
    for name, rows in (('gsm8k_train.jsonl', 7473), ('gsm8k_test.jsonl', None), ('svamp.json', None)):
        read = problems.read(SHARED / 'data' / name)
        assert rows in (None, len(read)) and len({p.id for p in read}) == len(read)
        odd = [p.answer for p in read if answers.integer(p.answer) is None]
        assert all(re.fullmatch(r'-?\d+\.\d+', answer) for answer in odd) and len(odd) < len(read) / 50
        assert all(p.question.endswith('?') or len(p.question) > 40 for p in read)
