"""Tokenizers: byte-exactness, special ids, refusals."""

import json
import random
import unicodedata

import pytest

from retool_jax.text import tags, template
from retool_jax.text.tokenizer import PROBES, load_tokenizer, train_bpe
from tests import fakes
from tests.text.corpus import EXACT, QWEN, TRACES, train_sentencepiece


@pytest.fixture(scope='module', params=['tiny', 'sentencepiece', 'qwen', 'bytes'])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == 'tiny':
        return train_bpe(TRACES, 512, directory)
    if request.param == 'sentencepiece':
        return load_tokenizer(train_sentencepiece(directory, **EXACT))
    if request.param == 'bytes':
        return fakes.byte_tokenizer()
    if not QWEN.is_dir():
        pytest.skip('the real Qwen2.5 tokenizer is not here')
    return load_tokenizer(QWEN)


def test_ids_spell_the_text_they_encode(tokenizer):
    rng = random.Random(0)
    alphabet = [chr(c) for c in (*range(128), 0xE9, 0x4E2D, 0x1F642, 0x2028, 0x2581, 0xFEFF)]
    for _ in range(200):
        text = unicodedata.normalize('NFC', ''.join(rng.choices(alphabet, k=rng.randint(0, 40))))
        ids = tokenizer.encode(text)
        assert tokenizer.spell(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.size for i in ids)


def test_the_string_of_a_special_token_in_a_text_stays_text(tokenizer):
    names = list(tokenizer.special_ids)
    assert names
    specials = set(tokenizer.special_ids.values())
    for name in names:
        text = f'x{name} {name}{name}\n'
        assert not specials.intersection(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_templates_may_write_special_tokens(tokenizer):
    name, i = max(tokenizer.special_ids.items(), key=lambda item: item[1])
    ids = tokenizer.encode(f'a{name}\nb', specials=True)
    assert ids == [*tokenizer.encode('a'), i, *tokenizer.encode('\nb')]
    assert tokenizer.decode(ids) == 'a\nb'
    assert tokenizer.decode(ids, specials=True) == f'a{name}\nb'


def test_special_ids_and_ids_of_the_padded_vocabulary_spell_nothing(tokenizer):
    outside = [*tokenizer.special_ids.values(), tokenizer.size, tokenizer.size + 300]
    assert tokenizer.spell(outside) == b''
    assert set(tokenizer.eos_ids) <= set(tokenizer.special_ids.values())
    assert tokenizer.pad_id in tokenizer.special_ids.values()


def test_bytes_that_are_no_text_decode_to_the_replacement_mark(tokenizer):
    spell = {b: i for i, b in enumerate(tokenizer.token_bytes)}
    if b'\xf0' in spell and b'\x9f' in spell:
        assert tokenizer.decode([spell[b'\xf0'], spell[b'\x9f']]) == '\ufffd'
    assert tokenizer.decode([]) == ''


@pytest.mark.skipif(not QWEN.is_dir(), reason='the real Qwen2.5 tokenizer is not here')
def test_qwen_ids_are_those_of_transformers():
    from transformers import PreTrainedTokenizerFast

    ours, theirs = load_tokenizer(QWEN), PreTrainedTokenizerFast.from_pretrained(QWEN)
    assert ours.size == 151_665
    assert ours.eos_ids == tuple(theirs.convert_tokens_to_ids(['<|im_end|>', '<|endoftext|>']))
    assert ours.pad_id == theirs.convert_tokens_to_ids('<|endoftext|>')
    assert ours.special_ids['<|fim_pad|>'] == theirs.convert_tokens_to_ids('<|fim_pad|>')  # unflagged there
    for text in (
        *(p for p in PROBES if '<|im_end|>' not in p),
        *TRACES[:5],
        'e\u0301 <tool_call> 123 </code><answer>',
    ):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_a_trained_bpe_holds_every_byte_and_splits_digits(tmp_path):
    tokenizer = train_bpe(TRACES, 400, tmp_path)
    assert tokenizer.size <= 400
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.token_bytes)
    assert [tokenizer.token_bytes[i] for i in tokenizer.encode('1234')] == [b'1', b'2', b'3', b'4']
    assert not any(len(t) > 1 and any(c in b'0123456789' for c in t) for t in tokenizer.token_bytes)
    assert len(tokenizer.encode(TRACES[0])) < len(TRACES[0]) / 2
    assert set(tokenizer.special_ids) == {'<|endoftext|>', '<|im_start|>', '<|im_end|>'}
    assert tokenizer.eos_ids[0] == tokenizer.special_ids['<|im_end|>']
    assert tokenizer.pad_id == tokenizer.special_ids['<|endoftext|>']


def test_training_a_bpe_twice_gives_the_same_files(tmp_path):
    for name in ('a', 'b'):
        train_bpe(iter(TRACES), 400, tmp_path / name)
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()


def test_transformers_reads_a_trained_bpe(tmp_path):
    from transformers import PreTrainedTokenizerFast

    ours = train_bpe(TRACES, 400, tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eos_ids[0] and theirs.pad_token_id == ours.pad_id
    assert theirs.encode(TRACES[7]) == ours.encode(TRACES[7])
    assert theirs.decode(ours.encode(TRACES[7])) == TRACES[7]


def test_a_bpe_smaller_than_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match='size 200 is too small: use at least 259'):
        train_bpe(TRACES, 200, tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'neither tokenizer\.json nor tokenizer.model'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize('file', ['tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'])
def test_an_unreadable_file_is_named_in_one_line(tmp_path, file):
    (tmp_path / file).write_text('{"not": ')
    with pytest.raises(ValueError, match=f'{file}.*cannot be read') as caught:
        load_tokenizer(tmp_path)
    assert '\n' not in str(caught.value)


def test_a_tokenizer_in_which_nothing_ends_a_turn_is_refused(tmp_path):
    train_bpe(TRACES, 300, tmp_path)
    text = (tmp_path / 'tokenizer.json').read_text()
    (tmp_path / 'tokenizer.json').write_text(text.replace('im_end', 'im_mid').replace('endoftext', 'midoftext'))
    with pytest.raises(ValueError, match='no end-of-turn token'):
        load_tokenizer(tmp_path)


def test_end_of_turn_is_also_read_from_generation_config(tmp_path):
    tokenizer = train_bpe(TRACES, 300, tmp_path)
    start = tokenizer.special_ids['<|im_start|>']
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [start, 70]}))
    assert load_tokenizer(tmp_path).eos_ids == (*tokenizer.eos_ids, start)


def test_an_eos_token_may_be_a_record(tmp_path):
    tokenizer = train_bpe(TRACES, 300, tmp_path)
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    config['eos_token'] = {'content': '<|im_start|>', 'special': True}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_ids[0] == tokenizer.special_ids['<|im_start|>']


def test_a_tokenizer_that_lowercases_is_refused(tmp_path):
    train_bpe(TRACES, 300, tmp_path)
    data = json.loads((tmp_path / 'tokenizer.json').read_text())
    data['normalizer'] = {'type': 'Lowercase'}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(data))
    with pytest.raises(ValueError, match='not byte-exact'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize('setting, value', [
    ('normalization_rule_name', 'nmt_nfkc'),
    ('add_dummy_prefix', True),
    ('remove_extra_whitespaces', True),
    ('byte_fallback', False),
])  # fmt: skip
def test_a_sentencepiece_model_with_a_lossy_setting_is_refused_and_the_settings_named(tmp_path, setting, value):
    settings = EXACT | {setting: value}
    if setting == 'byte_fallback':
        settings['hard_vocab_limit'] = False
    train_sentencepiece(tmp_path, **settings)
    with pytest.raises(ValueError, match=r'not byte-exact.*identity.*add_dummy_prefix=false') as caught:
        load_tokenizer(tmp_path)
    assert '\n' not in str(caught.value)


def test_chat_marks_shipped_without_the_special_flag_are_still_special(tmp_path):
    # As in DeepSeek-R1-Distill's files: <｜User｜> is an added token, not flagged special; <think> is a word.
    train_bpe(TRACES, 300, tmp_path)
    data = json.loads((tmp_path / 'tokenizer.json').read_text())
    size = max(data['model']['vocab'].values()) + 1
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    data['added_tokens'] += [
        {'id': size + n, 'content': name, **plain}
        for n, name in enumerate(['<｜User｜>', '<｜Assistant｜>', '<think>'])
    ]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids['<｜User｜>'] == size and '<think>' not in tokenizer.special_ids
    assert (
        size not in tokenizer.encode('<｜User｜>') and tokenizer.decode(tokenizer.encode('<｜User｜>')) == '<｜User｜>'
    )
    assert tokenizer.encode('<think>\n')[0] == size + 2
    assert tokenizer.token_bytes[size + 2] == b'<think>'


def edited(tmp_path, source, change):
    """A copy of a tokenizer with its tokenizer.json changed."""
    for file in source.iterdir():
        if file.suffix == '.json':
            (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / 'tokenizer.json').read_text())
    change(content)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


TRUNCATION = {'direction': 'Right', 'max_length': 16, 'strategy': 'LongestFirst', 'stride': 0}
PADDING = {
    'strategy': {'Fixed': 64},
    'direction': 'Right',
    'pad_to_multiple_of': None,
    'pad_id': 0,
    'pad_type_id': 0,
    'pad_token': '<|endoftext|>',
}


@pytest.mark.parametrize(
    'settings',
    [
        {'truncation': TRUNCATION},
        {'truncation': TRUNCATION | {'direction': 'Left', 'strategy': 'OnlyFirst'}},
        {'padding': PADDING},
        {'padding': PADDING | {'strategy': 'BatchLongest', 'pad_to_multiple_of': 8}},
        {'truncation': TRUNCATION, 'padding': PADDING},
        {'model': {'dropout': 0.5}},
    ],
)
def test_truncation_and_padding_of_another_program_are_switched_off(tmp_path, settings):
    plain = train_bpe(TRACES, 300, tmp_path / 'plain')
    (tmp_path / 'edited').mkdir()
    ours = edited(
        tmp_path / 'edited',
        plain.directory,
        lambda content: content.update(
            {name: content['model'] | value if name == 'model' else value for name, value in settings.items()}
        ),
    )
    for text in ('', 'a', 'What is the sum? ' * 400):
        assert ours.encode(text) == plain.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.skipif(not QWEN.is_dir() or not (QWEN.parents[1] / 'cases/turn2').is_dir(), reason='no shared cases')
def test_qwens_tokenizer_with_settings_that_people_met_spells_long_texts(tmp_path):
    for number, case in enumerate(json.loads((QWEN.parents[1] / 'cases/turn2/tokenizer_edits.json').read_text())):
        (tmp_path / str(number)).mkdir()
        ours = edited(tmp_path / str(number), QWEN, lambda content: content.update(case['set']))  # noqa: B023
        text = case['text'] * case['times']
        assert ours.decode(ours.encode(text)) == text, case['name']


@pytest.mark.parametrize('flags', [{}, {'lstrip': True, 'rstrip': True}, {'normalized': True, 'single_word': True}])
@pytest.mark.parametrize('names', [tags.SPOKEN, ('</code>',), tags.SPOKEN[:4]])
def test_tags_added_as_special_tokens_close_a_call_and_are_what_is_encoded(tmp_path, names, flags):
    plain = train_bpe(['no tags here'], 259, tmp_path / 'plain')
    size = plain.size
    token = {'special': True, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False} | flags
    (tmp_path / 'edited').mkdir()
    ours = edited(
        tmp_path / 'edited',
        plain.directory,
        lambda content: content['added_tokens'].extend(
            {'id': size + n, 'content': name, **token} for n, name in enumerate(names)
        ),
    )
    added = {name: size + n for n, name in enumerate(names)}
    table = tags.build_table(ours.token_bytes, ours.size)
    assert table.stops[table.walk([added['</code>']])] == tags.CODE
    if '</answer>' in added:
        assert table.stops[table.walk([added['</answer>']])] == tags.ANSWER
    text = 'x <code>\n```python\nprint(1)\n```\n</code>'
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode(text)[-1] == added['</code>']
    assert not set(added) & set(ours.special_ids)
    feedback = ours.encode(template.wrap_feedback('</code> <|im_end|>'))
    assert feedback.count(added['</code>']) == 0 and not set(feedback) & set(ours.special_ids.values())


def test_tags_that_are_control_pieces_of_sentencepiece_close_a_call(tmp_path):
    directory = train_sentencepiece(tmp_path, control=('</code>', '</answer>'), **EXACT)
    ours = load_tokenizer(directory)
    table = tags.build_table(ours.token_bytes, ours.size)
    stop = [i for i, spelled in enumerate(ours.token_bytes) if spelled == b'</code>']
    assert stop and all(table.stops[table.walk([i])] == tags.CODE for i in stop)
    assert ours.decode(ours.encode('a </code>')) == 'a </code>'


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'])
def test_a_pointer_in_the_place_of_a_tokenizers_file_is_named(tmp_path, name):
    if name != 'tokenizer.model':
        train_bpe(TRACES, 300, tmp_path)
    (tmp_path / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 11421896\n')
    with pytest.raises(ValueError, match=rf'{name} is a pointer of Git LFS') as caught:
        load_tokenizer(tmp_path)
    assert '\n' not in str(caught.value)
