"""Readers: every schema and format, what is left out, and errors that name the place."""

import json
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from retool_jax.core.records import Problem
from retool_jax.tasks import answers, arithmetic, problems

SHARED = pathlib.Path(__file__).parents[3] / 'shared/data'
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


def only(row):
    return problems.read_problem(row, 'f:1', 'f-0', 'f')


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.parquet', '.array_record'])
def test_every_format_gives_the_same_problems(tmp_path, suffix):
    read = problems.read(write(tmp_path / f'ten{suffix}', TEN))
    assert read == [Problem(r['id'], r['problem'], r['answer'], 'ten', '') for r in TEN]
    assert problems.read(tmp_path / f'ten{suffix}', limit=3) == read[:3]


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.parquet', '.array_record'])
def test_dapo_and_sft_rows_survive_every_format(tmp_path, suffix):
    (one,) = problems.read(write(tmp_path / f'd{suffix}', [dapo('What is 1+1?', '2')]))
    assert (one.id, one.question, one.answer, one.source) == ('u0', 'What is 1+1?', '2', 'math_dapo')
    sft = write(tmp_path / f's{suffix}', [retool('1+1?', r'It is \boxed{2}')])
    ((one, text),) = problems.read_traces(sft)
    assert (one.question, one.answer, text) == ('1+1?', '2', r'It is \boxed{2}')


@pytest.mark.parametrize(
    'row',
    [
        {'id': 7, 'problem': 'Q?', 'answer': '025'},
        {'Problem': 'Q?', 'Answer': 25},
        {'input': 'Q?', 'output': '25'},
        {'question': ' Q? \n', 'answer': 25.0},
        {'question': 'Q?', 'answer': ['25']},
        {'problem': 'Q?', 'solution': r'So \boxed{1+24} or \boxed{25}.'},
        {'prompt': 'Q?', 'answer': r'\boxed{25}'},
        {'prompt': 'Q?', 'answer': r'$\boxed{25}$'},
        dapo('Q?', '25'),
        retool('Q?', '<answer>\n\\boxed{25}\n</answer>'),
    ],
)
def test_aime_spellings_and_all_other_schemas_mean_the_same(row):
    problem = only(row)
    assert (problem.question, problem.answer) == ('Q?', '25')
    assert problem.id == {7: '7'}.get(row.get('id'), 'u0' if 'extra_info' in row else 'f-0')


def test_answers_that_are_not_integers_are_kept_as_they_stand():
    assert only({'problem': 'Q', 'answer': r'\left( 3, \frac{\pi}{2} \right)'}).answer == (
        r'\left( 3, \frac{\pi}{2} \right)'
    )
    assert only({'problem': 'Q', 'answer': 2.5}).answer == '2.5'
    assert only({'problem': 'Q', 'answer': r'\boxed{1} or \boxed{2}'}).answer == r'\boxed{1} or \boxed{2}'


def test_dapo_is_deduplicated_and_conflicting_answers_are_dropped_and_counted(tmp_path):
    block = [dapo(f'Q{i}', str(i), f'u{i}') for i in range(5)]
    block += [dapo('Q1', '7', 'v1'), dapo('Q2', '02', 'v2')]  # a conflict; the same answer spelled apart
    loaded = problems.load(write(tmp_path / 'dapo.parquet', block * 3))
    assert [p.question for p in loaded.problems] == ['Q0', 'Q2', 'Q3', 'Q4']
    assert (loaded.rows, loaded.repeated, loaded.conflicting) == (21, 15, 1)
    assert not any('Answer:' in p.question for p in loaded.problems)


def test_other_sets_are_never_thinned_and_equal_ids_are_told_apart(tmp_path):
    read = problems.read(write(tmp_path / 'a.jsonl', [TEN[0], TEN[0], TEN[1]]))
    assert len(read) == 3 and len({p.id for p in read}) == 3


def test_a_folder_is_read_file_by_file(tmp_path):
    write(tmp_path / 'b.jsonl', TEN[5:])
    write(tmp_path / 'a.parquet', TEN[:5])
    (tmp_path / 'README.md').write_text('not a problem file')
    assert [p.id for p in problems.read(tmp_path)] == [r['id'] for r in TEN]


def test_files_of_a_folder_that_are_read_together_are_told_with_their_counts(tmp_path):
    write(tmp_path / 'train.jsonl', TEN[:7])
    assert problems.load(tmp_path).remarks(tmp_path) == []
    write(tmp_path / 'test.parquet', TEN[7:])
    loaded = problems.load(tmp_path)
    assert loaded.files == {'test.parquet': 3, 'train.jsonl': 7}
    (line,) = loaded.remarks('set')
    assert line == 'set: 2 files are read together: test.parquet (3 rows), train.jsonl (7 rows)'


def test_dot_files_and_the_hubs_own_files_are_no_problems(tmp_path):
    write(tmp_path / 'a.jsonl', TEN)
    for name in ('.a.jsonl', '._a.jsonl', 'dataset_infos.json', 'state.json'):
        (tmp_path / name).write_text('{"default": {"splits": 1}}')
    (tmp_path / '.cache').mkdir()
    write(tmp_path / '.cache/b.jsonl', TEN)
    assert len(problems.read(tmp_path)) == 10


def test_a_folder_as_the_hub_hands_it_out_is_read_from_its_data(tmp_path):
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---')
    (tmp_path / 'data').mkdir()
    write(tmp_path / 'data/train-00000-of-00002.parquet', TEN[:5])
    write(tmp_path / 'data/train-00001-of-00002.parquet', TEN[5:])
    assert [p.id for p in problems.read(tmp_path)] == [r['id'] for r in TEN]
    (tmp_path / 'data').rename(tmp_path / 'main')
    assert len(problems.read(tmp_path)) == 10
    (tmp_path / 'socratic').mkdir()
    write(tmp_path / 'socratic/train.jsonl', TEN)
    with pytest.raises(ValueError, match='problem files lie in main, socratic; name one'):
        problems.read(tmp_path)


@pytest.mark.parametrize('content', [
    '\n'.join(map(json.dumps, TEN)), '\n\n'.join(map(json.dumps, TEN)) + '\n', json.dumps(TEN),
    json.dumps({'rows': TEN}), json.dumps({'version': 1, 'data': TEN}), json.dumps({'examples': TEN, 'license': 'mit'}),
    json.dumps({'features': [{'feature_idx': 0, 'name': 'problem'}], 'rows': [
        {'row_idx': i, 'row': row, 'truncated_cells': []} for i, row in enumerate(TEN)], 'num_rows_total': 10}),
    json.dumps({name: [row[name] for row in TEN] for name in TEN[0]}), '\ufeff' + json.dumps(TEN)])
def test_a_json_file_is_read_in_all_its_forms(tmp_path, content):
    (tmp_path / 'ten.json').write_text(content)
    assert problems.read(tmp_path / 'ten.json') == [Problem(r['id'], r['problem'], r['answer'], 'ten', '') for r in TEN]


def test_a_json_file_with_one_row_is_that_row(tmp_path):
    row = TEN[3] | {'generations': [{'text': 'x'}], 'tags': ['a']}
    (tmp_path / 'one.json').write_text(json.dumps(row, indent=2))
    assert [p.id for p in problems.read(tmp_path / 'one.json')] == ['p3']
    (tmp_path / 'one.json').write_text(json.dumps(dapo('Q?', '1')))
    assert [p.answer for p in problems.read(tmp_path / 'one.json')] == ['1']


@pytest.mark.parametrize('content, words', [
    ({'train': TEN, 'test': TEN}, 'it holds 2 lists of rows, train, test; keep one'),
    ({'features': [], 'rows': [{'row_idx': 0, 'row': TEN[0], 'truncated_cells': ['problem']}]}, r'record 1: .* cut'),
    ({'problem': ['Q'], 'answer': ['1', '2']}, "field 'problem' is"),
])
def test_a_json_file_that_holds_less_or_more_than_a_set_is_refused(tmp_path, content, words):
    (tmp_path / 'a.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        problems.read(tmp_path / 'a.json')


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.parquet', '.array_record'])
def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path, suffix):
    (tmp_path / f'a{suffix}').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 9\n')
    with pytest.raises(ValueError, match=rf'a\{suffix} is a pointer of Git LFS') as caught:
        problems.read(tmp_path / f'a{suffix}')
    assert '\n' not in str(caught.value)


def test_rows_that_cannot_be_read_may_be_left_out_and_listed(tmp_path):
    write(tmp_path / 'a.jsonl', [TEN[0], {'problem': 'Prove it.', 'answer': 'proof'}, TEN[1], {'problem': 'Q'}])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: field 'answer' is 'proof'"):
        problems.read(tmp_path / 'a.jsonl')
    loaded = problems.load(tmp_path / 'a.jsonl', leave_out=True)
    assert [p.id for p in loaded.problems] == ['p0', 'p1'] and len(loaded.unreadable) == 2
    (line,) = loaded.remarks('a')
    assert line.startswith('a: 2 of 4 rows cannot be read and are left out, the first: ') and "'proof'" in line


def test_traces_that_cannot_be_read_may_be_left_out_and_listed(tmp_path):
    rows = [retool('1+1?', r'\boxed{2}'), {'problem': 'Q', 'answer': 1}, retool('2+2?', r'\boxed{4}')]
    with pytest.raises(ValueError, match=r't\.jsonl:2: no worked answer'):
        problems.read_traces(write(tmp_path / 't.jsonl', rows))
    pairs, (line,) = problems.load_traces(tmp_path / 't.jsonl', leave_out=True)
    assert [problem.answer for problem, _ in pairs] == ['2', '4'] and 't.jsonl:2: no worked' in line
    assert '1 of 3 rows cannot be read' in line
    write(tmp_path / 'test.jsonl', rows[:1])
    pairs, lines = problems.load_traces(tmp_path, leave_out=True)
    assert len(pairs) == 3 and lines[0].endswith('2 files are read together: t.jsonl (3 rows), test.jsonl (1 rows)')


def test_an_id_that_looks_like_a_numbered_one_stays_apart(tmp_path):
    rows = [{'id': name, 'problem': f'Q{i}', 'answer': i} for i, name in enumerate(['a#2', 'a', 'a', 'a#2', 'a#2'])]
    read = problems.read(write(tmp_path / 'a.jsonl', rows))
    assert len({p.id for p in read}) == 5
    problems.write_array_record(tmp_path / 'a.array_record', [read[0]] * 3)
    assert len({p.id for p in problems.read(tmp_path / 'a.array_record')}) == 3


@pytest.mark.parametrize('gold', ['12', None])
def test_the_gold_of_a_trace_is_its_answer_column_where_there_is_one(tmp_path, gold):
    chat = [{'role': 'user', 'content': 'Q?'}, {'role': 'assistant', 'content': r'\boxed{13}'}]
    row = {'messages': chat, 'answer': gold}
    ((problem, text),) = problems.read_traces(write(tmp_path / 't.jsonl', [row]))
    assert (problem.question, problem.answer, text) == ('Q?', gold or '13', r'\boxed{13}')
    parts = {'prompt': chat[:1], 'completion': chat[1:], 'answer': gold}
    ((problem, text),) = problems.read_traces(write(tmp_path / 't.jsonl', [parts]))
    assert (problem.question, problem.answer, text) == ('Q?', gold or '13', r'\boxed{13}')


@pytest.mark.skipif(not SHARED.is_dir(), reason='no shared problem files')
def test_the_real_aime_and_math_files_are_read_whole():
    aime, math = (problems.read(SHARED / f'{name}.jsonl') for name in ('aime24', 'math500'))
    assert len(aime) == 30 and len(math) == 500
    assert all(answers.integer(p.answer) == p.answer and 0 <= int(p.answer) <= 999 for p in aime)
    assert len({p.id for p in math}) == 500 and {p.family for p in math} >= {'Precalculus', 'Algebra'}


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('a.jsonl', b'', r'a\.jsonl: no problems in it \(0 rows'),
        ('a.jsonl', b'{"problem": "Q", "answer": "1"}\n{"problem": ', r'a\.jsonl:2: malformed JSON'),
        ('a.jsonl', b'{"problem": "Q\xff", "answer": "1"}', r'a\.jsonl:1: not UTF-8'),
        ('a.jsonl', b'[1, 2]', r'a\.jsonl:1: \[1, 2\] where an object'),
        ('a.jsonl', b'[' * 100_000, r'a\.jsonl:1: malformed JSON'),
        ('a.jsonl', b'\n\n{"problem": "Q"}', r'a\.jsonl:3: none of the fields answer, .*found: problem'),
        ('a.jsonl', b'{"text": "Q", "answer": 1}', r'a\.jsonl:1: none of the fields problem, '),
        ('a.jsonl', b'{"problem": "Q", "answer": ""}', r"a\.jsonl:1: field 'answer' is empty"),
        ('a.jsonl', b'{"problem": "Q", "answer": null}', r"a\.jsonl:1: field 'answer' is null"),
        ('a.jsonl', b'{"problem": "Q", "answer": true}', r"a\.jsonl:1: field 'answer' is true"),
        ('a.jsonl', b'{"problem": "Q", "answer": NaN}', r"a\.jsonl:1: field 'answer' is nan"),
        ('a.jsonl', b'{"problem": "Q", "solution": "none"}', r"a\.jsonl:1: field 'solution' is 'none', which stands"),
        ('a.jsonl', b'{"problem": ["Q"], "answer": 1}', r"a\.jsonl:1: field 'problem' is \[\"Q\"\]"),
        ('a.jsonl', b'{"problem": " ", "answer": 1}', r'a\.jsonl:1: the question is empty'),
        ('a.jsonl', b'{"messages": [{"role": "user"}]}', r"a\.jsonl:1: field 'messages' holds no user"),
        ('a.json', b'{"a": 1', r'a\.json: malformed JSON'),
        ('a.json', b'[{"problem": "Q", "answer": 1}, 5]', r'a\.json: record 2: 5 where an object'),
        ('a.parquet', b'PAR1 no', r'a\.parquet: not a parquet file'),
        ('a.array_record', b'no', r'a\.array_record: no array_record file'),
        ('a.csv', b'problem,answer', r'a\.csv: cannot tell its format'),
    ],
)
def test_whatever_cannot_be_read_is_one_line_naming_file_place_and_field(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        problems.read(tmp_path / name)
    assert '\n' not in str(caught.value)


def test_missing_files_and_folders_without_problem_files_are_named(tmp_path):
    with pytest.raises(ValueError, match='does not exist'):
        problems.read(tmp_path / 'no.jsonl')
    with pytest.raises(ValueError, match='no file in this folder'):
        problems.read(tmp_path)


def test_traces_are_read_from_messages_or_a_rewritten_field(tmp_path):
    rows = [{**TEN[3], 'rewritten': r'\boxed{6}', 'text': 'other'}]
    ((problem, text),) = problems.read_traces(write(tmp_path / 't.jsonl', rows))
    assert (problem.answer, text) == ('6', r'\boxed{6}')
    with pytest.raises(ValueError, match=r'ten\.jsonl:1: no worked answer'):
        problems.read_traces(write(tmp_path / 'ten.jsonl', TEN))


def test_problems_survive_array_record_and_a_failed_write_leaves_no_file(tmp_path):
    whole = arithmetic.problems('train', 50, 0)
    path = tmp_path / 'new' / 'a.array_record'
    assert problems.write_array_record(path, whole) == 50
    assert problems.read(path) == whole

    def broken():
        yield whole[0]
        raise OSError('disk')

    with pytest.raises(OSError, match='disk'):
        problems.write_array_record(tmp_path / 'b.array_record', broken())
    assert [f.name for f in tmp_path.iterdir()] == ['new']
    with pytest.raises(ValueError, match=r'must end in \.array_record'):
        problems.write_array_record(tmp_path / 'b.jsonl', whole)


def test_tfds_builders_write_folders_that_are_read_again_without_tensorflow(tmp_path):
    script = f"""
import sys
from retool_jax.tasks import builders, problems
for builder, source in ((builders.Aime2024, 'ten.jsonl'), (builders.DapoMath17k, 'dapo.jsonl')):
    made = builder(path={str(tmp_path)!r} + '/' + source, data_dir={str(tmp_path / 'tfds')!r})
    made.download_and_prepare()
    assert problems.read(made.data_dir) == problems.read({str(tmp_path)!r} + '/' + source), source
made = builders.RetoolSft(path={str(tmp_path / 'sft.jsonl')!r}, data_dir={str(tmp_path / 'tfds')!r})
made.download_and_prepare()
assert problems.read_traces(made.data_dir) == problems.read_traces({str(tmp_path / 'sft.jsonl')!r})
assert 'tensorflow' not in sys.modules
"""
    write(tmp_path / 'ten.jsonl', TEN)
    write(tmp_path / 'dapo.jsonl', [dapo('Q é', '5', 'u1'), dapo('R', '6', 'u2')])
    write(tmp_path / 'sft.jsonl', [{'id': 'a', **retool('1+1?', r'It is \boxed{2}')}])
    run = subprocess.run(
        [sys.executable, '-c', script], cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_reading_problems_needs_neither_jax_nor_tfds():
    script = (
        'import sys, retool_jax.tasks.problems, retool_jax.tasks.arithmetic, retool_jax.tasks.answers\n'
        'assert not {"jax", "grain", "tensorflow_datasets", "transformers", "matplotlib"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', script], check=True, cwd=pathlib.Path(__file__).parents[2])
