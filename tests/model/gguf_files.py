"""GGUF files of small models for tests: random blocks of any kind, tokenizers trained on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import sentencepiece
import tokenizers
from gguf import GGMLQuantizationType as Kind
from tokenizers import models, pre_tokenizers, trainers

from retool_jax.model import hf
from retool_jax.model.config import ModelConfig, YarnScaling
from retool_jax.text import vocabulary
from tests.model.sizes import make_config, make_params

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
TEXTS = [
    f"def f{i}(x):\n    return x * {i} + {i % 7}\n\nThe answer to {i} + {i} is {2 * i}, isn't it? "
    f'naïve café 数学 {"".join(chr(0x400 + (i * 7 + k) % 64) for k in range(6))}'
    for i in range(400)
]


def wide(model_type: str, **changes) -> ModelConfig:
    """Rows of 256 numbers, the length of a block of the K-quants."""
    return make_config(
        model_type,
        **(
            dict(
                hidden_size=256,
                intermediate_size=256,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=32,
                vocab_size=600,
            )
            | changes
        ),
    )


def random_blocks(shape: tuple[int, int], kind: Kind, seed: int) -> np.ndarray:
    """Random bytes as `kind` stores a matrix of `shape`, with scales that leave its numbers near 0.05, uint8."""
    rng, (size, length) = np.random.default_rng(seed), gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, length), np.uint8)
    scale = lambda largest: rng.uniform(0.2, 1, blocks.shape[:2]).astype(np.float16)[..., None] * np.float16(largest)
    halves = {
        Kind.Q8_0: {0: 1e-3},
        Kind.Q4_0: {0: 1e-2},
        Kind.Q4_1: {0: 1e-2, 2: -0.08},
        Kind.Q6_K: {208: 3e-5},
        Kind.Q4_K: {0: 3e-4, 2: 2e-3},
    }[kind]
    for offset, largest in halves.items():
        blocks[..., offset : offset + 2] = scale(largest).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write(
    path: Path, config: ModelConfig, vocab: dict, kinds: tuple[Kind, ...] = (Kind.F32,), *, seed: int = 0, change=None
) -> dict[str, np.ndarray]:
    """Writes a model whose matrices are stored as `kinds` in turn; returns what was stored, {Hugging Face name: array}.

    vocab: metadata `tokenizer.*`. change(metadata, tensors): a last touch. Llama's q and k go in as llama.cpp has them.
    """
    writer = gguf.GGUFWriter(path, config.model_type)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == config.model_type), config.num_hidden_layers
    )
    params, stored, tensors = make_params(config, seed), {}, {}
    flat = {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    count = 0
    for leaf in hf.leaves(config):
        for i, name in enumerate(leaf.names):
            array = np.asarray(flat[leaf.path][i] if leaf.stacked else flat[leaf.path])
            array = array.transpose(leaf.order).reshape(leaf.theirs)
            kind = Kind.F32
            if array.ndim == 2:
                kind, count = kinds[count % len(kinds)], count + 1
            if kind in (Kind.F32, Kind.F16, Kind.BF16):
                data = gguf.quantize(array, kind)
            else:
                data = random_blocks(array.shape, kind, seed + count)
            stored[name] = (data, kind)
            heads = {'q_proj': config.num_attention_heads, 'k_proj': config.num_key_value_heads}.get(leaf.path[-2])
            if heads and config.model_type == 'llama':  # a head's halves, row about
                data = data.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(data.shape)
            tensors[names.get_name(name, ('.weight', '.bias'))] = (np.ascontiguousarray(data), kind)
    metadata = _metadata(config) | vocab
    if change:
        change(metadata, tensors)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _metadata(config: ModelConfig) -> dict:
    kind = config.model_type
    found = {
        f'{kind}.{key}': value
        for key, value in {
            'context_length': config.max_position_embeddings,
            'embedding_length': config.hidden_size,
            'block_count': config.num_hidden_layers,
            'feed_forward_length': config.intermediate_size,
            'attention.head_count': config.num_attention_heads,
            'attention.head_count_kv': config.num_key_value_heads,
            'attention.layer_norm_rms_epsilon': config.rms_norm_eps,
            'rope.freq_base': config.rope_theta,
            'rope.dimension_count': config.head_dim,
            'attention.key_length': config.head_dim,
            'attention.value_length': config.head_dim,
            'vocab_size': config.vocab_size,
        }.items()
    }
    if isinstance(config.rope_scaling, YarnScaling):
        found |= {
            f'{kind}.rope.scaling.type': 'yarn',
            f'{kind}.rope.scaling.factor': config.rope_scaling.factor,
            f'{kind}.rope.scaling.original_context_length': config.rope_scaling.original_max_position_embeddings,
        }
    return {'general.name': 'small'} | found


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)


def byte_level(pre: str, size: int = 600) -> dict:
    """Metadata of a byte-level BPE trained on text cut as `pre` cuts it; a third of the control tokens at the end."""
    made = tokenizers.Tokenizer(models.BPE())
    cuts = vocabulary.PRE_TOKENIZERS.get(pre, ('words of gpt-2',))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex='words of gpt-2' in cuts)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Digits(True)
                if cut == 'digits'
                else pre_tokenizers.Split(tokenizers.Regex(cut), 'isolated')
                for cut in cuts
                if cut != 'words of gpt-2'
            ),
            words,
        ]
    )
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=size - 2,
            special_tokens=SPECIALS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokens = sorted(made.get_vocab(), key=made.get_vocab().get)
    tokens += ['<tool_call>'] + [f'[PAD{i}]' for i in range(len(tokens) + 1, size)]
    kinds = [3 if t in SPECIALS else 4 if t == '<tool_call>' else 5 if t.startswith('[PAD') else 1 for t in tokens]
    merges = [' '.join(merge) for merge in json.loads(made.to_str())['model']['merges']]
    return {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': pre,
        'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': kinds,
        'tokenizer.ggml.merges': merges,
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.padding_token_id': 0,
        'tokenizer.ggml.add_bos_token': False,
        'tokenizer.chat_template': CHATML,
    }


def sentence_pieces(size: int = 600, **changes) -> dict:
    """Metadata of a SentencePiece BPE with byte fallback, as llama.cpp writes those of Llama 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type='bpe',
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        minloglevel=2,
        character_coverage=0.9995,
    )
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kind = lambda i: 2 if found.is_unknown(i) else 3 if found.is_control(i) else 6 if found.is_byte(i) else 1
    ids = range(found.get_piece_size())
    return {
        'tokenizer.ggml.model': 'llama',
        'tokenizer.ggml.tokens': [found.id_to_piece(i) for i in ids],
        'tokenizer.ggml.scores': [float(found.get_score(i)) for i in ids],
        'tokenizer.ggml.token_type': [kind(i) for i in ids],
        'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.unknown_token_id': 0,
    } | changes
