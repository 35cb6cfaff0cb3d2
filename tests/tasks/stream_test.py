"""The stream of problems: its state is one integer, and hosts share one global batch."""

import dataclasses
import json

import pytest

from retool_jax.tasks import arithmetic, problems, stream

A = arithmetic.problems('train', 60, 0)
B = arithmetic.problems('new_wording', 24, 0)


@pytest.fixture
def path(tmp_path):
    problems.write_array_record(tmp_path / 'a.array_record', A)
    return tmp_path / 'a.array_record'


def test_every_epoch_holds_each_problem_once_in_a_new_order():
    dataset = stream.stream([A], None, 3)
    epochs = []
    for epoch in range(3):
        batch, cursor = stream.next_batch(dataset, epoch * len(A), len(A))
        assert sorted(p.id for p in batch) == sorted(p.id for p in A) and cursor == (epoch + 1) * len(A)
        epochs.append([p.id for p in batch])
    assert len({tuple(e) for e in epochs}) == 3


def test_a_resumed_stream_goes_on_from_its_cursor(path):
    whole, _ = stream.next_batch(stream.stream([path, B], [3, 1], 5), 0, 200)
    first, cursor = stream.next_batch(stream.stream([path, B], [3, 1], 5), 0, 96)
    rest, _ = stream.next_batch(stream.stream([path, B], [3, 1], 5), cursor, 104)
    assert first + rest == whole
    assert stream.next_batch(stream.stream([path, B], [3, 1], 6), 0, 200)[0] != whole


@pytest.mark.parametrize('hosts', [1, 2, 4, 8])
def test_hosts_share_one_global_batch_whatever_their_number(hosts):
    dataset = stream.stream([A, B], [1, 1], 0)
    whole, _ = stream.next_batch(dataset, 40, 16)
    shares = [stream.next_batch(dataset, 40, 16, host, hosts)[0] for host in range(hosts)]
    assert [shares[i % hosts][i // hosts] for i in range(16)] == whole


def test_mixtures_follow_their_weights_and_default_to_equal_shares_of_problems():
    def share(weights):
        batch, _ = stream.next_batch(stream.stream([A, B], weights, 0), 0, 840)
        return sum(p.source == 'arithmetic/train' for p in batch) / 840

    assert abs(share([3, 1]) - 0.75) < 0.01
    assert abs(share(None) - 60 / 84) < 0.01


def test_array_record_files_and_lists_give_the_same_stream(path, tmp_path):
    lists, files = stream.stream([A], None, 1), stream.stream([path], None, 1)
    assert stream.next_batch(lists, 0, 30)[0] == stream.next_batch(files, 0, 30)[0]


def test_array_record_files_of_other_schemas_are_read_too(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / 'b.array_record'), 'group_size:1')
    for i in range(4):
        writer.write(json.dumps({'problem': f'Q{i}', 'answer': i}).encode())
    writer.close()
    batch, _ = stream.next_batch(stream.stream([tmp_path / 'b.array_record'], None, 0), 0, 4)
    assert sorted(p.answer for p in batch) == ['0', '1', '2', '3']


def write(path, count, offset=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        ''.join(json.dumps({'id': i, 'problem': f'{offset}+{i}?', 'answer': offset + i}) + '\n' for i in range(count))
    )
    return path


def test_ids_are_unique_over_sources_whatever_their_files_say(tmp_path):
    files = [write(tmp_path / 'gsm8k/train.jsonl', 5), write(tmp_path / 'math/train.jsonl', 5, 100)]
    (tmp_path / 'folder').mkdir()
    problems.write_array_record(tmp_path / 'folder/a.array_record', problems.read(files[0]))
    problems.write_array_record(tmp_path / 'b.array_record', problems.read(files[0]))
    sources = [*files, tmp_path / 'folder', tmp_path / 'b.array_record', problems.read(files[1])]
    batch, _ = stream.next_batch(stream.stream(sources, None, 0), 0, 25)
    assert len({p.id for p in batch}) == 25
    assert {p.id for p in batch} >= {'gsm8k/train.jsonl/0', 'math/train.jsonl/4'}
    assert all(int(p.question.partition('+')[0]) == 100 for p in batch if p.id.startswith(('math', '4/')))


def test_a_single_source_keeps_its_ids_and_one_named_twice_holds_the_same_problems(tmp_path):
    file = write(tmp_path / 'train.jsonl', 4)
    alone, _ = stream.next_batch(stream.stream([file], None, 0), 0, 4)
    assert sorted(p.id for p in alone) == list('0123')
    twice, _ = stream.next_batch(stream.stream([file, str(file)], None, 0), 0, 8)
    assert sorted(p.id for p in twice) == sorted(2 * [f'train.jsonl/{i}' for i in range(4)])


@pytest.mark.parametrize(
    'sources, expected',
    [
        (['a.jsonl', 'b.jsonl'], ['a.jsonl', 'b.jsonl']),
        (['x/a.jsonl', 'y/a.jsonl'], ['x/a.jsonl', 'y/a.jsonl']),
        (['x/z/a.jsonl', 'y/z/a.jsonl', 'b.parquet'], ['x/z/a.jsonl', 'y/z/a.jsonl', None]),
        (['a.jsonl', './a.jsonl', 'b.jsonl'], ['a.jsonl', 'a.jsonl', 'b.jsonl']),
        ([A, B], ['0', '1']),
        ([A, 'a.jsonl'], ['0', 'a.jsonl']),
    ],
)
def test_sources_are_named_by_as_much_of_their_paths_as_tells_them_apart(sources, expected):
    assert all(name == wanted for name, wanted in zip(stream.names(sources), expected) if wanted)


def test_what_is_left_out_is_returned_and_the_rest_is_streamed_whole(path):
    fault = lambda problem: 'odd' if int(problem.id.rpartition('-')[2]) % 2 else ''
    sources = stream.open_sources([path, B])
    kept, left = stream.leave_out(sources, fault)
    assert {text for _, text in left} == {'odd'} and len(left) + sum(map(len, kept)) == len(A) + len(B)
    batch, _ = stream.next_batch(stream.stream(kept, None, 0), 0, sum(map(len, kept)))
    assert {p.id for p in batch} == {p.id for d in sources for p in stream.once(d)} - {p.id for p, _ in left}
    assert stream.leave_out(sources, lambda problem: '') == (sources, [])


def test_a_fingerprint_follows_every_field_and_the_order(path):
    whole = stream.fingerprint(stream.open_source(A))
    assert whole == stream.fingerprint(stream.open_source(path))
    changed = [[dataclasses.replace(A[0], answer='7'), *A[1:]], A[1:], [*reversed(A)]]
    assert len({whole, *(stream.fingerprint(stream.open_source(c)) for c in changed)}) == 4


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: stream.stream([], None, 0), 'no source'),
        (lambda: stream.stream([[]], None, 0), 'without problems'),
        (lambda: stream.stream([A, B], [1], 0), r'weights \[1\]'),
        (lambda: stream.stream([A, B], [1, 0], 0), r'weights \[1, 0\]'),
        (lambda: stream.stream(['no/such.jsonl'], None, 0), 'does not exist'),
        (lambda: stream.next_batch(stream.stream([A], None, 0), 0, 10, 0, 4), 'batch of 10 .* of 4'),
        (lambda: stream.next_batch(stream.stream([A], None, 0), -1, 10), 'cursor -1'),
    ],
)
def test_bad_input_names_the_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
