"""Tokenizers out of a GGUF file's metadata: the files that a Hugging Face directory has instead.

Byte-level BPE (`tokenizer.ggml.model` = gpt2) names the way it cuts text before merging, SentencePiece's BPE (llama)
gives a score to every piece and cuts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from retool_jax.core.errors import UserError
from retool_jax.text.tokenizer import load_tokenizer

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # kinds of tokens in tokenizer.ggml.token_type

# Cuts in turn, as the models' own tokenizer.json files have them: a pattern, or one of the two names.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_QWEN2, _LLAMA3 = (_WORDS + r'\p{N}' + _REST,), (_WORDS + r'\p{N}{1,3}' + _REST,)
_CJK = '[一-龥ࠀ-一가-퟿]+'
PRE_TOKENIZERS = {
    'default': ('words of gpt-2',), 'gpt-2': ('words of gpt-2',),
    'smollm': ('digits', 'words of gpt-2'), 'starcoder': ('digits', 'words of gpt-2'),
    'qwen2': _QWEN2, 'deepseek-r1-qwen': _QWEN2, 'megrez': _QWEN2,
    'llama-bpe': _LLAMA3, 'llama3': _LLAMA3, 'llama-v3': _LLAMA3,
    'deepseek-llm': (r'[\r\n]', r'\s?[\p{Lu}\p{Ll}\p{Lt}]+', r'\s?[!-/:-~！-／：-～‘-‟　-。]+', r'\s+$', _CJK,
                     'digits'),
    'deepseek-coder': (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', _CJK, 'digits'),
}  # fmt: skip
WHOLE_WORDS = ('llama-bpe', 'llama3', 'llama-v3')  # a word that is a token is not merged


def save(metadata: Mapping[str, object], directory: Path, where: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and a config.json with the special ids.

    metadata: a GGUF file's keys and values. where: the file, for messages.

    Raises: UserError for a vocabulary of another kind, a pre-tokenizer that is not known by name, or a tokenizer that
    loses bytes of the text.
    """
    get = lambda key, default=None: metadata.get(f'tokenizer.ggml.{key}', default)
    tokens, kind = get('tokens'), get('model')
    if kind not in ('gpt2', 'llama') or not tokens:
        raise UserError(
            f'{where}: tokenizer.ggml.model={kind} is not supported; supported are gpt2 (byte-level BPE) '
            'and llama (SentencePiece)'
        )
    kinds = get('token_type') or [1] * len(tokens)
    try:
        made = _byte_level(get, tokens, kinds, where) if kind == 'gpt2' else _sentencepiece(get, tokens, kinds)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'{where}: its tokenizer cannot be read: {str(error).splitlines()[0]}') from None
    _add_tokens(made, tokens, kinds)
    name = lambda key: tokens[get(key)] if isinstance(get(key), int) and 0 <= get(key) < len(tokens) else None
    ids = {key: get(key) for key in ('bos_token_id', 'eos_token_id') if name(key) is not None}
    ends = [get(key) for key in ('eos_token_id', 'eot_token_id', 'eom_token_id') if name(key) is not None]
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'add_bos_token': bool(get('add_bos_token', kind == 'llama')),
        'bos_token': name('bos_token_id'),
        'eos_token': name('eos_token_id'),
        'pad_token': name('padding_token_id'),
        'unk_token': name('unknown_token_id'),
        'clean_up_tokenization_spaces': False,
        'model_max_length': int(metadata.get(f'{metadata.get("general.architecture")}.context_length', 1_000_000)),
    }
    if 'tokenizer.chat_template' in metadata:
        config['chat_template'] = metadata['tokenizer.chat_template']
    write = lambda file, record: (directory / file).write_text(json.dumps(record, indent=2, ensure_ascii=False) + '\n')
    (directory / 'tokenizer.json').write_text(made.to_str())
    write('tokenizer_config.json', config)
    write('generation_config.json', ids | {'eos_token_id': list(dict.fromkeys(ends))} if ends else ids)
    write('config.json', ids)
    try:
        load_tokenizer(directory)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def _byte_level(get, tokens: list[str], kinds: list[int], where: str):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    name = get('pre', 'default')
    if name not in PRE_TOKENIZERS:
        raise UserError(f'{where}: tokenizer.ggml.pre={name} is not known; known are {", ".join(PRE_TOKENIZERS)}')
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    merges = [tuple(merge.split(' ')) for merge in get('merges') or ()]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE_WORDS))
    cuts = PRE_TOKENIZERS[name]
    parts = [
        pre_tokenizers.Digits(individual_digits=True)
        if cut == 'digits'
        else pre_tokenizers.Split(tokenizers.Regex(cut), behavior='isolated')
        for cut in cuts
        if cut != 'words of gpt-2'
    ]
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex='words of gpt-2' in cuts)
    made.pre_tokenizer = pre_tokenizers.Sequence([*parts, words])
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(get, tokens: list[str], kinds: list[int]):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == UNKNOWN), None)
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, get('scores')),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = get('add_space_prefix', True)
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement='▁', prepend_scheme='first' if prefix else 'never', split=False
    )
    strip = [decoders.Strip(content=' ', left=1, right=0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best score first: the order in which SentencePiece joins neighbours."""
    found = [
        (scores[i], len(piece[:cut]), piece[:cut], piece[cut:])
        for piece, i in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    found.sort(key=lambda merge: merge[:2], reverse=True)
    return [(left, right) for _, _, left, right in found]


def _add_tokens(made, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are found whole in a text, whatever surrounds them: control tokens, and those a user defined."""
    from tokenizers import AddedToken

    made.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds)
            if kind in (CONTROL, UNKNOWN)
        ]
    )
    made.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, kind in zip(tokens, kinds)
            if kind == USER_DEFINED
        ]
    )
