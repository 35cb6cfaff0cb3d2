"""Rows of small sets, and files of them in every format."""

import json

import pyarrow
import pyarrow.parquet

TEN = [{'id': f'p{i}', 'problem': f'What is {i}+{i}?', 'answer': str(2 * i)} for i in range(10)]


def dapo(question, gold, index='u0'):
    before = (
        'Solve the following math problem step by step. The last line of your response should be of the '
        'form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n'
    )
    after = '\n\nRemember to put your answer on its own line after "Answer:".'
    return {
        'data_source': 'math_dapo',
        'prompt': [{'role': 'user', 'content': before + question + after}],
        'ability': 'MATH',
        'reward_model': {'ground_truth': gold, 'style': 'rule-lighteval/MATH_v2'},
        'extra_info': {'index': index},
    }


def retool(question, reply):
    prompt = (
        'Solve the following problem step by step. You may write Python in <code></code>, and so on.\n\n'
        '*user question:*\nAnswer the following Math Problem and put the answer in the format of '
        f'\\boxed{{answer}}\n\n{question}\n\n\nRemember to place the final answer in the last part using '
        "the format: \n<answer>\n\\boxed{'The final answer goes here.'}\n</answer>"
    )
    return {'messages': [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': reply}]}


def write(path, rows):
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == '.json':
        path.write_text(json.dumps(rows))
    elif path.suffix == '.array_record':
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), 'group_size:1')
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return path
