"""Formats, folders, and what they hold that is no row."""

import json

import pytest

from retool_jax.core.records import Problem
from retool_jax.tasks import problems
from tests.tasks.rows import TEN, dapo, write


def test_a_folder_is_read_file_by_file(tmp_path):
    write(tmp_path / 'b.jsonl', TEN[5:])
    write(tmp_path / 'a.parquet', TEN[:5])
    (tmp_path / 'README.md').write_text('not a problem file')
    assert [p.id for p in problems.read(tmp_path)] == [r['id'] for r in TEN]


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
    json.dumps({name: [row[name] for row in TEN] for name in TEN[0]}), '\ufeff' + json.dumps(TEN)])  # fmt: skip
def test_a_json_file_is_read_in_all_its_forms(tmp_path, content):
    (tmp_path / 'ten.json').write_text(content)
    assert problems.read(tmp_path / 'ten.json') == [Problem(r['id'], r['problem'], r['answer'], 'ten', '') for r in TEN]


def test_a_json_file_with_one_row_is_that_row(tmp_path):
    row = TEN[3] | {'generations': [{'text': 'x'}], 'tags': ['a']}
    (tmp_path / 'one.json').write_text(json.dumps(row, indent=2))
    assert [p.id for p in problems.read(tmp_path / 'one.json')] == ['p3']
    (tmp_path / 'one.json').write_text(json.dumps(dapo('Q?', '1')))
    assert [p.answer for p in problems.read(tmp_path / 'one.json')] == ['1']


@pytest.mark.parametrize(
    'content, words',
    [
        ({'train': TEN, 'test': TEN}, 'it holds 2 lists of rows, train, test; keep one'),
        (
            {'features': [], 'rows': [{'row_idx': 0, 'row': TEN[0], 'truncated_cells': ['problem']}]},
            r'record 1: .* cut',
        ),
        ({'problem': ['Q'], 'answer': ['1', '2']}, "field 'problem' is"),
    ],
)
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


def test_missing_files_and_folders_without_problem_files_are_named(tmp_path):
    with pytest.raises(ValueError, match='does not exist'):
        problems.read(tmp_path / 'no.jsonl')
    with pytest.raises(ValueError, match='no file in this folder'):
        problems.read(tmp_path)
