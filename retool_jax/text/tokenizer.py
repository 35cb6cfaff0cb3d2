"""Tokenizers as plain data: every token's bytes, the special ids, and one function from text to ids.

The rest of the project relies on three properties, all checked when a tokenizer is loaded:
ids spell exactly the bytes of the text they encode; no text, whoever wrote it, becomes a special
id (those enter through templates only); and at least one id ends a turn.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from retool_jax.core import pointers
from retool_jax.core.errors import UserError
from retool_jax.text import tags

# Chat and control tokens by shape. Some model families ship them unflagged (DeepSeek-R1-Distill's
# user and assistant marks, Qwen's fill-in-the-middle marks): left alone, a tool that prints one
# would put a real chat token into the context.
CONTROL = re.compile(r'<[|｜][^<>\s]+[|｜]>')

# What ends a turn besides the eos_token that the tokenizer's own files name.
TURN_ENDS = ('<|im_end|>', '<|eot_id|>', '<|endoftext|>', '<｜end▁of▁sentence｜>', '</s>')

# Already in normal form C: Qwen's tokenizer composes characters, which is no loss of ours to report.
PROBES = (
    'a',
    ''.join(map(chr, range(0x20, 0x7F))),
    ' a',
    'two  spaces, trailing ',
    'line\n\nline\r\n\ttab\n    indented\n',
    '<code>\n```python\nprint("x")\n```\n</code>\n<interpreter>\n12345\n</interpreter>\n\n',
    r'<answer>\boxed{\frac{1}{2}}</answer>',
    'éüß ﬁ ² ½ Ⅷ ™ ａｂ 中文 日本語 한국어 العربية 🙂 𝔸 e',
    '\x00\x01\x1b\x7f\x80\xa0\u200b\u200d\ufeff\ufffd',
    '<|im_end|><s></s>',
    '▁ ▁▁',  # SentencePiece's own sign for a space
)

SENTENCEPIECE_REMEDY = (
    'train it with normalization_rule_name=identity, add_dummy_prefix=false, '
    'remove_extra_whitespaces=false, byte_fallback=true'
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-exact tokenizer; `token_bytes[i]` are the bytes of id i, b'' for special ids and gaps."""

    token_bytes: Sequence[bytes]
    special_ids: Mapping[str, int]  # chat and control tokens: never made from text
    eos_ids: tuple[int, ...]  # every id that ends a turn; the first is the family's own
    pad_id: int
    encode_text: Callable[[str], list[int]]  # plain text to ids, no special ids
    directory: Path | None = None  # where it was loaded from

    @property
    def size(self) -> int:
        """Ids in use: 0 … size − 1. A model's vocabulary may be padded to more."""
        return len(self.token_bytes)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Ids of `text`; strings of special tokens stay plain text unless `specials` (for templates)."""
        if not specials:
            return self.encode_text(text)
        ids: list[int] = []
        for piece in self.split(text):
            ids.extend([piece] if isinstance(piece, int) else self.encode_text(piece))
        return ids

    def split(self, text: str) -> list[str | int]:
        """Cuts text at the strings of special tokens: plain runs as str, special tokens as their ids."""
        pieces = self._special_pattern.split(text) if self.special_ids else [text]
        return [self.special_ids.get(piece, piece) for piece in pieces if piece]

    def spell(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids; special ids and ids beyond the vocabulary spell nothing."""
        table, size = self.token_bytes, len(self.token_bytes)
        return b''.join(table[i] if 0 <= i < size else b'' for i in ids)

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Text of ids, invalid UTF-8 replaced; special tokens are left out unless `specials`."""
        if not specials:
            return self.spell(ids).decode('utf-8', errors='replace')
        names, table, size = self._special_names, self.token_bytes, len(self.token_bytes)
        spelled = (names.get(i) or (table[i] if 0 <= i < size else b'') for i in ids)
        return b''.join(spelled).decode('utf-8', errors='replace')

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')')

    @functools.cached_property
    def _special_names(self) -> dict[int, bytes]:
        return {i: name.encode() for name, i in self.special_ids.items()}


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads `tokenizer.json`, else a SentencePiece `tokenizer.model`, and checks it.

    Raises: UserError, one line, if files are missing or unreadable, if no id ends a turn, or if
    encoding loses bytes of the text.
    """
    directory = Path(directory)
    config = _read_json(directory / 'tokenizer_config.json')
    if (directory / 'tokenizer.json').is_file():
        token_bytes, special_ids, encode_text = _open_huggingface(directory / 'tokenizer.json')
        remedy = 'its normalizer or pre-tokenizer drops bytes; use a byte-level or byte-fallback tokenizer'
    elif (directory / 'tokenizer.model').is_file():
        token_bytes, special_ids, encode_text = _open_sentencepiece(directory / 'tokenizer.model')
        remedy = SENTENCEPIECE_REMEDY
    else:
        raise UserError(
            f'tokenizer directory {str(directory)!r} holds neither tokenizer.json nor tokenizer.model: '
            'give the directory of a model or a tokenizer'
        )

    eos_ids = _find_eos(directory, config, special_ids)
    if not eos_ids:
        raise UserError(
            f'tokenizer {str(directory)!r} has no end-of-turn token: name one as eos_token in '
            f'tokenizer_config.json, or add one of {", ".join(TURN_ENDS)} as a special token'
        )
    pad = special_ids.get(_content(config.get('pad_token')))
    if pad is None:
        pad = special_ids.get('<|endoftext|>', eos_ids[0])
    tokenizer = Tokenizer(token_bytes, special_ids, eos_ids, pad, encode_text, directory)
    check_exact(tokenizer, remedy)
    return tokenizer


def check_exact(tokenizer: Tokenizer, remedy: str = 'use a byte-exact tokenizer') -> None:
    """Raises UserError unless every probe encodes to ids that spell it and hold no special id."""
    specials = set(tokenizer.special_ids.values())
    for probe in (*PROBES, *tokenizer.special_ids):
        ids = tokenizer.encode(probe)
        spelled = tokenizer.spell(ids)
        if spelled != probe.encode():
            raise UserError(
                f'tokenizer {str(tokenizer.directory)!r} is not byte-exact: {probe[:24]!r} comes back as '
                f'{spelled.decode(errors="replace")[:24]!r}; {remedy}'
            )
        if specials.intersection(ids):
            raise UserError(
                f'tokenizer {str(tokenizer.directory)!r}: the plain text {probe[:24]!r} becomes a special id'
            )


def train_bpe(texts: Iterable[str], size: int, directory: str | Path) -> Tokenizer:
    """Trains a byte-complete, digit-splitting byte-level BPE of at most `size` ids and saves it in HF's form.

    The same texts give the same files. All 256 bytes and three special tokens are in it, so `size`
    is at least 259; small corpora may give fewer ids. Raises: ValueError if `size` is too small.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    if size < 256 + len(specials):
        raise ValueError(f'tokenizer size {size} is too small: use at least {256 + len(specials)}')
    # Digits stand alone, so that arithmetic sees aligned columns. Tags, fences and TeX commands may
    # become one id each, which halves a short trace. They and a run of signs take the newlines after
    # them, as in Qwen's vocabulary, so that small models meet the same overshoot at tag ends.
    pattern = tokenizers.Regex(r'</?\p{L}+>\n*|`+\p{L}*\n*|\\\p{L}+\{| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s+')
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior='isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'tokenizer.json').write_text(bpe.to_str(pretty=True))  # its own `save` hides the system's errors
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'add_bos_token': False,
        'bos_token': None,
        'eos_token': '<|im_end|>',
        'pad_token': '<|endoftext|>',
        'unk_token': None,
        'clean_up_tokenization_spaces': False,
        'model_max_length': 1_000_000,
        'chat_template': (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        ),
    }
    (directory / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
    return load_tokenizer(directory)


def _open_huggingface(path: Path):
    import tokenizers  # imported here: light children import this package without it

    pointers.refuse(path)
    try:
        fast = tokenizers.Tokenizer.from_str(_made_exact(path.read_text(encoding='utf-8')))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'tokenizer file {str(path)!r} cannot be read: {_first_line(error)}') from None
    fast.no_truncation()  # settings of another program's batches: a prompt is encoded whole and alone
    fast.no_padding()
    if getattr(fast.model, 'dropout', None):
        fast.model.dropout = None  # or a text would have other ids each time
    added = fast.get_added_tokens_decoder()
    control = [token for token in added.values() if token.special or CONTROL.fullmatch(token.content)]
    fast.add_special_tokens(control)  # flags the unflagged; no new ids, all are in the vocabulary
    fast.encode_special_tokens = True  # their strings in a text are text
    vocabulary = fast.get_vocab(with_added_tokens=True)

    byte_level = 'ByteLevel' in str(fast.decoder)
    to_bytes = _byte_level_bytes if byte_level else _sentencepiece_bytes
    token_bytes = [b''] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        token_bytes[i] = token.encode() if i in added else to_bytes(token)
    special_ids = {token.content: vocabulary[token.content] for token in control}
    for i in special_ids.values():
        token_bytes[i] = b''

    def encode_text(text: str) -> list[int]:
        return fast.encode(text, add_special_tokens=False).ids

    return token_bytes, special_ids, encode_text if byte_level else _keep_block(encode_text, token_bytes)


def _made_exact(text: str) -> str:
    """tokenizer.json in which a tag that was added as a special token is an ordinary one, and that puts no space of its
    own before a text.

    As an ordinary token a tag spells its bytes, so that the model's one id closes a call, and what is encoded of a tag
    is that id too. The space that SentencePiece's models put before their whole input stands after no special token,
    and every text here follows one, or other text.
    """
    if not any(json.dumps(tag) in text for tag in tags.SPOKEN) and not re.search('"(prepend|add_prefix_space)', text):
        return text
    content = json.loads(text)
    for key in ('normalizer', 'pre_tokenizer'):
        content[key] = _without_prefix(content.get(key))
    for token in content.get('added_tokens') or ():
        if token.get('content') in tags.SPOKEN and token.get('special'):
            token.update(special=False, normalized=False, lstrip=False, rstrip=False, single_word=False)
    return json.dumps(content, ensure_ascii=False)


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer of tokenizer.json without the steps that put a space before the text."""
    if not part or part.get('type') == 'Prepend':
        return None
    for key in ('normalizers', 'pretokenizers'):
        if key in part:
            part = part | {key: [kept for inner in part[key] if (kept := _without_prefix(inner))]}
    off = {'add_prefix_space': False, 'prepend_scheme': 'never'}
    return part | {key: value for key, value in off.items() if key in part}


def _open_sentencepiece(path: Path):
    import sentencepiece

    pointers.refuse(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise UserError(f'tokenizer file {str(path)!r} cannot be read: {_first_line(error)}') from None
    token_bytes, special_ids, matched = [], {}, []
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        plain = piece in tags.SPOKEN or not (model.is_control(i) or model.is_unknown(i) or CONTROL.fullmatch(piece))
        token_bytes.append(_sentencepiece_bytes(piece, model.is_byte(i)) if plain else b'')
        if not plain:
            special_ids[piece] = i
            if not model.is_control(i) and not model.is_unknown(i):
                matched.append(piece)  # a user-defined symbol: the library finds it inside any text

    def encode_text(text: str) -> list[int]:
        # Cutting a symbol after its first character keeps the library from recognising it.
        parts = cut.split(text) if cut else [text]
        return [i for part in parts for i in model.encode(part)]

    cuts = '|'.join(f'(?<={re.escape(piece[0])})(?={re.escape(piece[1:])})' for piece in matched)
    cut = re.compile(cuts) if cuts else None
    return token_bytes, special_ids, _keep_block(encode_text, token_bytes)


def _keep_block(encode_text: Callable[[str], list[int]], token_bytes: list[bytes]) -> Callable[[str], list[int]]:
    """SentencePiece writes a space as U+2581, so that sign itself goes in as its three bytes."""
    block = '▁'.encode()
    if not all(bytes([b]) in token_bytes for b in block):
        return encode_text
    ids = [token_bytes.index(bytes([b])) for b in block]

    def encode(text: str) -> list[int]:
        first, *rest = text.split('▁')
        return encode_text(first) + [i for part in rest for i in (*ids, *encode_text(part))]

    return encode


def _find_eos(directory: Path, config: dict, special_ids: Mapping[str, int]) -> tuple[int, ...]:
    names = (_content(config.get('eos_token')), *TURN_ENDS)
    found = [special_ids[name] for name in names if name in special_ids]
    generation = _read_json(directory / 'generation_config.json').get('eos_token_id')
    if generation is not None:
        listed = generation if isinstance(generation, list) else [generation]
        found += [i for i in listed if i in set(special_ids.values())]
    return tuple(dict.fromkeys(found))


def _content(token) -> str:
    """The string of a token in tokenizer_config.json, which may be a string, a record or null."""
    return (token.get('content', '') if isinstance(token, dict) else token) or ''


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    pointers.refuse(path)
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f'tokenizer file {str(path)!r} cannot be read: {_first_line(error)}') from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 is itself, other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {chr(b): b for b in printable}
    others = (b for b in range(256) if chr(b) not in symbols)
    return symbols | {chr(0x100 + n): b for n, b in enumerate(list(others))}


def _byte_level_bytes(token: str) -> bytes:
    symbols = _byte_of_symbol()
    if all(c in symbols for c in token):
        return bytes(symbols[c] for c in token)
    return token.encode()


def _sentencepiece_bytes(piece: str, is_byte: bool | None = None) -> bytes:
    if is_byte is None:
        is_byte = re.fullmatch(r'<0x[0-9A-F]{2}>', piece) is not None
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace('▁', ' ').encode()
