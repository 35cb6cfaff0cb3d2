"""Tokenizers out of GGUF metadata: cuts by name, special tokens, what ends a turn, refusals."""

from __future__ import annotations

import json

import pytest
import tokenizers

from retool_jax.core.errors import UserError
from retool_jax.text import vocabulary
from retool_jax.text.tokenizer import Tokenizer, load_tokenizer
from tests.model import gguf_files
from tests.text.strings import make_strings


@pytest.fixture(scope='module')
def trained():
    return {name: gguf_files.byte_level(name) for name in vocabulary.PRE_TOKENIZERS}


def load(metadata, directory) -> Tokenizer:
    vocabulary.save(metadata, directory, 'model.gguf')
    return load_tokenizer(directory)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


@pytest.mark.parametrize('name', vocabulary.PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_gives_a_byte_exact_tokenizer(trained, tmp_path, name):
    tokenizer = load(trained[name], tmp_path)
    for text in make_strings(500, seed=1):
        assert tokenizer.spell(tokenizer.encode(text)) == text.encode()


CUTS = {
    'gpt-2': ['a', ' 12', ' ', ' 345', "'s", '\n', '\n', 'ﬁ'],
    'default': ['a', ' 12', ' ', ' 345', "'s", '\n', '\n', 'ﬁ'],
    'smollm': ['a', ' ', '1', '2', '  ', '3', '4', '5', "'s", '\n', '\n', 'ﬁ'],
    'qwen2': ['a', ' ', '1', '2', ' ', ' ', '3', '4', '5', "'s", '\n\n', 'ﬁ'],
    'llama-bpe': ['a', ' ', '12', ' ', ' ', '345', "'s", '\n\n', 'ﬁ'],
    'deepseek-llm': ['a', ' ', '1', '2', '  ', '3', '4', '5', "'", 's', '\n', '\n', 'ﬁ'],
}


@pytest.mark.parametrize('name', CUTS)
def test_text_is_cut_as_the_models_of_that_name_cut_it(trained, tmp_path, name):
    load(trained[name], tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    text = "a 12  345's\n\nﬁ"
    found = [text[start:stop] for _, (start, stop) in made.pre_tokenizer.pre_tokenize_str(text)]
    assert [part for part in found if part] == CUTS[name]


def test_control_tokens_are_special_user_tokens_are_text_and_padding_is_left_out(trained, tmp_path):
    metadata = trained['qwen2']
    tokenizer = load(metadata, tmp_path)
    tokens = metadata['tokenizer.ggml.tokens']
    assert tokenizer.special_ids == {name: tokens.index(name) for name in gguf_files.SPECIALS}
    assert tokenizer.encode('a<tool_call>b')[1] == tokens.index('<tool_call>')
    assert tokenizer.encode('<|im_end|>', specials=True) == [2] and len(tokenizer.encode('<|im_end|>')) > 1
    assert tokenizer.size == tokens.index('<tool_call>') + 1 and tokens[tokenizer.size].startswith('[PAD')


def test_every_end_that_the_file_names_ends_a_turn(trained, tmp_path):
    metadata = trained['qwen2'] | {
        'tokenizer.ggml.eos_token_id': 0,
        'tokenizer.ggml.eot_token_id': 2,
        'tokenizer.ggml.eom_token_id': 1,
    }
    assert load(metadata, tmp_path).eos_ids == (0, 2, 1)
    assert json.loads((tmp_path / 'generation_config.json').read_text())['eos_token_id'] == [0, 2, 1]
    assert json.loads((tmp_path / 'tokenizer_config.json').read_text())['chat_template'] == gguf_files.CHATML


def test_words_that_are_tokens_are_not_merged_in_llama_3(trained, tmp_path):
    # A token that no two tokens make: without the rule its text falls into pieces.
    metadata = trained['llama-bpe']
    tokens = [*metadata['tokenizer.ggml.tokens'], 'zzzz']
    kinds = [*metadata['tokenizer.ggml.token_type'], 1]
    changed = metadata | {'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': kinds}
    assert load(changed, tmp_path).encode('zzzz') == [len(tokens) - 1]
    (tmp_path / 'other').mkdir()
    assert len(load(changed | {'tokenizer.ggml.pre': 'qwen2'}, tmp_path / 'other').encode('zzzz')) > 1


@pytest.mark.parametrize('prefix', [True, False])
def test_pieces_of_sentencepiece_join_by_score_and_no_space_is_added(tmp_path, prefix):
    metadata = gguf_files.sentence_pieces() | {'tokenizer.ggml.add_space_prefix': prefix}
    tokenizer = load(metadata, tmp_path)
    assert tokenizer.special_ids.keys() == {'<unk>', '<s>', '</s>'}
    assert tokenizer.eos_ids == (2,)
    for text in make_strings(500, seed=2):
        assert tokenizer.spell(tokenizer.encode(text)) == text.encode()
    # What SentencePiece's own library makes of the same pieces.
    scores = dict(zip(metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.scores']))
    best = max((scores[piece], piece) for piece in scores if len(piece) == 2 and piece.isalpha())[1]
    assert pieces(tokenizer, best) == [best]
    written = json.loads((tmp_path / 'tokenizer.json').read_text())
    assert written['pre_tokenizer']['prepend_scheme'] == ('first' if prefix else 'never')


@pytest.mark.parametrize(
    'change, message',
    [
        ({'tokenizer.ggml.pre': 'viking'}, 'tokenizer.ggml.pre=viking is not known; known are default, gpt-2'),
        ({'tokenizer.ggml.model': 't5'}, 'tokenizer.ggml.model=t5 is not supported'),
        ({'tokenizer.ggml.tokens': None}, 'tokenizer.ggml.model=gpt2 is not supported'),
        ({'tokenizer.ggml.merges': ['x yzzy']}, 'its tokenizer cannot be read'),
        ({'tokenizer.ggml.merges': ['x']}, 'its tokenizer cannot be read'),
    ],
)
def test_what_is_not_known_is_refused_by_name(trained, tmp_path, change, message):
    with pytest.raises(UserError, match=f'^model.gguf: .*{message}') as caught:
        vocabulary.save(trained['qwen2'] | change, tmp_path, 'model.gguf')
    assert '\n' not in str(caught.value)


def test_a_vocabulary_that_loses_bytes_is_refused(trained, tmp_path):
    tokens = list(trained['qwen2']['tokenizer.ggml.tokens'])
    tokens[tokens.index('p')] = '[gone]'
    with pytest.raises(UserError, match=r'^model.gguf: .*(not byte-exact|cannot be read)'):
        vocabulary.save(trained['qwen2'] | {'tokenizer.ggml.tokens': tokens}, tmp_path, 'model.gguf')


def test_tokens_outside_the_alphabet_of_bytes_keep_their_ids(trained, tmp_path):
    # DeepSeek's marks are full-width, and stand in the file as they are.
    metadata = trained['deepseek-r1-qwen']
    marks = ['<｜begin▁of▁sentence｜>', '<｜User｜>', '<｜end▁of▁sentence｜>', '<think>']
    tokens = [*metadata['tokenizer.ggml.tokens'], *marks]
    tokenizer = load(
        metadata
        | {
            'tokenizer.ggml.tokens': tokens,
            'tokenizer.ggml.token_type': [*metadata['tokenizer.ggml.token_type'], 3, 3, 3, 4],
            'tokenizer.ggml.eos_token_id': len(tokens) - 2,
        },
        tmp_path,
    )
    assert tokenizer.encode(''.join(marks), specials=True) == [*range(len(tokens) - 4, len(tokens))]
    assert tokenizer.eos_ids[0] == len(tokens) - 2 and tokenizer.size == len(tokens)
    assert tokenizer.decode([len(tokens) - 1]) == '<think>'
