"""The tag automaton against a text search, token by token."""

import random
import re

import numpy as np
import pytest

from retool_jax.text import tags
from retool_jax.text.tokenizer import load_tokenizer, train_bpe
from tests import fakes
from tests.text.corpus import EXACT, QWEN, TRACES, train_sentencepiece

SEARCH = re.compile(rb'</code>|</answer>')
STOP = {b'</code>': tags.CODE, b'</answer>': tags.ANSWER}
PREFIXES = sorted({tag[:k] for tag in STOP for k in range(len(tag))})


class TextSearch:
    """The oracle: looks for whole tags in the bytes written since the last reset."""

    def __init__(self):
        self.written, self.seen = b'', 0

    def read(self, token: bytes) -> tuple[int, bytes]:
        """What a token completes (the first tag of it) and the bytes of it after that tag."""
        if not token:
            self.written, self.seen = b'', 0
            return tags.NONE, b''
        self.written += token
        first = None
        while found := SEARCH.search(self.written, self.seen):
            first = first or found
            self.seen = found.end()
        return (STOP[first[0]], self.written[first.end() :]) if first else (tags.NONE, b'')


def check_stream(token_bytes, table, ids, resets=frozenset()) -> int:
    """Asserts that automaton and search agree at every token; returns how many tags there were."""
    state, oracle, own, tags_seen = tags.START, TextSearch(), [], 0
    for n, i in enumerate(ids):
        if n in resets:  # fed-back tokens came in between
            state, oracle, own = tags.START, TextSearch(), []
        own.append(i)
        state = int(table.next_state[state, i])
        stop, after = oracle.read(token_bytes[i] if i < len(token_bytes) else b'')
        assert table.stops[state] == stop, (n, [token_bytes[j] for j in own[-8:]])
        if stop:
            tags_seen += 1
            assert tags.overshoot(table, token_bytes, own) == after
    return tags_seen


def substring_vocabulary(rng, text=b'</code></answer>\n<</co<></a</answ </code', n=400):
    """Random pieces of tag-like text as tokens: whole tags, two tags in one, every split and overshoot."""
    pieces = {bytes([b]) for b in text} | {b'</code></code>', b'e></answer></', b'\xe4\xb8', b'\xad'}
    while len(pieces) < n:
        i = rng.randrange(len(text))
        pieces.add((text * 2)[i : i + rng.randint(1, 14)])
    return [b'', *sorted(pieces)]


@pytest.fixture(scope='module', params=['bytes', 'substrings', 'tiny', 'sentencepiece', 'qwen'])
def token_bytes(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == 'substrings':
        return substring_vocabulary(random.Random(1))
    if request.param == 'bytes':
        return fakes.byte_tokenizer().token_bytes
    if request.param == 'tiny':
        return train_bpe(TRACES + ['a></code><b></answer></c'] * 99, 512, directory).token_bytes
    if request.param == 'sentencepiece':
        return load_tokenizer(train_sentencepiece(directory, **EXACT)).token_bytes
    if not QWEN.is_dir():
        pytest.skip('the real Qwen2.5 tokenizer is not here')
    return load_tokenizer(QWEN).token_bytes


@pytest.fixture(scope='module')
def table(token_bytes):
    return tags.build_table(token_bytes, len(token_bytes) + 399)


def random_spelling(rng, text, by_first):
    """Ids that spell `text`, cut at random: any token that fits may come next, the last may overshoot."""
    ids = []
    while text:
        fits = [(i, t) for i, t in by_first.get(text[:1], ()) if text.startswith(t) or t.startswith(text)]
        if not fits:
            text = text[1:]
            continue
        i, token = rng.choice(fits)
        ids.append(i)
        text = text[len(token) :]
    return ids


def test_automaton_and_text_search_agree_on_random_streams(token_bytes, table):
    rng = random.Random(2)
    by_first = {}
    for i, token in enumerate(token_bytes):
        if token and all(b in b'</>codeansw\n \xe4\xb8\xad' for b in token):
            by_first.setdefault(token[:1], []).append((i, token))
    specials = [i for i, token in enumerate(token_bytes) if not token] + [len(token_bytes) + 5]
    pieces = [
        b'</code>', b'</answer>', b'</co', b'</', b'<', b'>', b'</code', b'</answer', b'\n', b'e>',
        b'</code></code>', b'</co</code>', b'<</answer>', b'</answ</code>er>',
        '中'.encode(), b'\xe4\xb8', b'code', b'nswer>',
    ]  # fmt: skip
    seen = 0
    for _ in range(150):
        ids = []
        while len(ids) < 100:
            kind = rng.random()
            if kind < 0.8:
                ids += random_spelling(rng, b''.join(rng.choices(pieces, k=rng.randint(1, 4))), by_first)
            elif kind < 0.98:
                ids.append(rng.randrange(table.next_state.shape[1]))
            else:
                ids.append(rng.choice(specials))
        seen += check_stream(token_bytes, table, ids, resets={n for n in range(len(ids)) if rng.random() < 0.02})
    assert seen > 500


def test_every_token_after_every_prefix_agrees_with_a_text_search(token_bytes, table):
    """Exhaustive: V tokens × every proper prefix of a tag, with what the token leaves begun."""
    state_of = {}
    for prefix in PREFIXES:
        state = tags.START
        for byte in prefix:
            state = int(table.byte_next[state, byte])
        state_of[prefix] = state
    assert sorted(state_of.values()) == list(range(len(PREFIXES)))
    for prefix, state in state_of.items():
        row = table.next_state[state]
        stops, prefixes = table.stops[row].tolist(), table.prefix[row].tolist()
        for i, token in enumerate(token_bytes):
            text, stop = prefix + token, tags.NONE
            if not token:
                text = b''
            elif b'>' in token:
                while found := SEARCH.search(text):
                    stop = stop or STOP[found[0]]
                    text = text[found.end() :]
            begun = text[text.rfind(b'<') :] if b'<' in text else b''  # tags have `<` in front only
            assert stops[i] == stop and prefixes[i] == state_of.get(begun, tags.START), (prefix, token)


@pytest.mark.parametrize('text, expected', [
    (b'</co</code>', [tags.CODE]),
    (b'</code</code>', [tags.CODE]),
    (b'<<</answer>', [tags.ANSWER]),
    (b'</answ</code>er></answer>', [tags.CODE, tags.ANSWER]),
    (b'</code></code>', [tags.CODE, tags.CODE]),
    (b'</code></answer>\n</code>', [tags.CODE, tags.ANSWER, tags.CODE]),
    (b'</ code>', []),
    (b'</CODE>', []),
    (b'<code>', []),
    (b'</code', []),
])  # fmt: skip
def test_nested_and_repeated_tags_byte_by_byte(text, expected):
    table = tags.build_table(fakes.byte_tokenizer().token_bytes, 259)
    state, seen = tags.START, []
    for byte in text:
        state = int(table.next_state[state, byte])
        seen += [int(table.stops[state])] if table.stops[state] else []
    assert seen == expected


def test_a_tag_is_found_in_each_of_its_splits():
    """All 2⁸ ways to cut `</answer>` into tokens, each with and without overshoot."""
    tag, afters = b'</answer>', (b'', b'\n', b'<', b'></code')
    inner = {tag[a:b] for a in range(len(tag)) for b in range(a + 1, len(tag))}
    token_bytes = sorted(inner | {tag[a:] + after for a in range(len(tag)) for after in afters})
    number = {token: i for i, token in enumerate(token_bytes)}
    table = tags.build_table(token_bytes, len(token_bytes))
    for after in afters:
        for cuts in range(1 << (len(tag) - 1)):
            ends = [k + 1 for k in range(len(tag) - 1) if cuts >> k & 1] + [len(tag)]
            pieces = [tag[a:b] for a, b in zip([0, *ends], ends)]
            pieces[-1] += after
            ids = [number[piece] for piece in pieces]
            state, seen = tags.START, []
            for i in ids:
                state = int(table.next_state[state, i])
                seen.append(int(table.stops[state]))
            assert seen == [tags.NONE] * (len(pieces) - 1) + [tags.ANSWER]
            assert tags.overshoot(table, token_bytes, ids) == after


def test_a_row_that_goes_on_after_a_tag_continues_with_the_bytes_beyond_it():
    token_bytes = [b'</answer', b'></', b'code>', b'x']
    table = tags.build_table(token_bytes, 4)
    state = table.walk([0, 1])
    assert table.stops[state] == tags.ANSWER
    assert table.stops[table.walk([2], state)] == tags.CODE
    assert table.stops[table.walk([3, 2], state)] == tags.NONE


def test_special_and_padding_ids_reset_every_state():
    tokenizer = fakes.byte_tokenizer()
    table = tags.build_table(tokenizer.token_bytes, 300)
    assert table.next_state.shape == (table.states, 300) and table.next_state.dtype == np.int32
    assert (table.next_state[:, 256:] == tags.START).all()
    assert not (table.next_state[:, :256] == tags.START).all()


def test_tags_left_out_are_not_looked_for():
    tokenizer = fakes.byte_tokenizer()
    table = tags.build_table(tokenizer.token_bytes, 259, {'</answer>': tags.ANSWER})
    assert set(table.stops.tolist()) == {tags.NONE, tags.ANSWER}
    assert table.stops[table.walk(tokenizer.encode('</code>'))] == tags.NONE
    assert table.stops[table.walk(tokenizer.encode('</code></answer>'))] == tags.ANSWER


@pytest.mark.skipif(not QWEN.is_dir(), reason='the real Qwen2.5 tokenizer is not here')
def test_in_qwens_vocabulary_almost_every_end_of_a_tag_overshoots():
    tokenizer = load_tokenizer(QWEN)
    table = tags.build_table(tokenizer.token_bytes, 152_064)
    before = table.walk(tokenizer.encode('</code'))
    ends = np.flatnonzero(table.stops[table.next_state[before]] == tags.CODE)
    exact = [i for i in ends if tokenizer.token_bytes[i] == b'>']
    assert (len(ends), len(exact)) == (266, 1)
    assert table.states < 32
    ids = tokenizer.encode('so </code>\n')
    assert table.stops[table.walk(ids)] == tags.CODE and tags.overshoot(table, tokenizer.token_bytes, ids) == b'\n'


def test_overshoot_of_ids_that_end_no_tag_is_refused():
    tokenizer = fakes.byte_tokenizer()
    table = tags.build_table(tokenizer.token_bytes, 259)
    for text in ('', '</code', '</code> '):
        with pytest.raises(ValueError, match='completes no tag'):
            tags.overshoot(table, tokenizer.token_bytes, tokenizer.encode(text))


@pytest.mark.parametrize('given, message', [
    ({'</a>': 1, 'x</a>y': 2}, 'inside another tag'),
    ({'': 1}, 'none empty'),
    ({}, 'at least one'),
    ({'</a>': 0}, 'above 0'),
])  # fmt: skip
def test_tags_that_cannot_be_told_apart_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        tags.build_table([b'a'], 1, given)


def test_a_model_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match='model vocabulary 2 is smaller than the tokenizer'):
        tags.build_table([b'a', b'b', b'c'], 2)
