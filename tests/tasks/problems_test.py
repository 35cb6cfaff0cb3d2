"""Readers: every schema and format, what is left out, and errors that name the place."""

import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.core.records import Problem
from retool_jax.tasks import answers, arithmetic, problems
from tests.tasks.rows import TEN, dapo, retool, write

SHARED = Path(__file__).parents[3] / 'shared/data'


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


def test_files_of_a_folder_that_are_read_together_are_told_with_their_counts(tmp_path):
    write(tmp_path / 'train.jsonl', TEN[:7])
    assert problems.load(tmp_path).remarks(tmp_path) == []
    write(tmp_path / 'test.parquet', TEN[7:])
    loaded = problems.load(tmp_path)
    assert loaded.files == {'test.parquet': 3, 'train.jsonl': 7}
    (line,) = loaded.remarks('set')
    assert line == 'set: 2 files are read together: test.parquet (3 rows), train.jsonl (7 rows)'


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


def test_reading_problems_needs_neither_jax_nor_tfds():
    script = (
        'import sys, retool_jax.tasks.problems, retool_jax.tasks.arithmetic, retool_jax.tasks.answers\n'
        'assert not {"jax", "grain", "tensorflow_datasets", "transformers", "matplotlib"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', script], check=True, cwd=Path(__file__).parents[2])
