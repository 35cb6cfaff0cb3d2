"""What the text tests share: traces to train small tokenizers on, and where the real one lies."""

import io
from pathlib import Path

import sentencepiece

QWEN = Path(__file__).resolve().parents[3] / 'shared/data/qwen2_5_tokenizer'
TRACES = [
    f'What is {a} * {b}?\n<code>\n```python\nprint({a} * {b})\n```\n</code>\n<interpreter>\n{a * b}\n'
    f'</interpreter>\n\n<answer>\n\\boxed{{{a * b}}}\n</answer>'
    for a in range(11, 41)
    for b in range(3, 9)
]
EXACT = {
    'normalization_rule_name': 'identity',
    'add_dummy_prefix': False,
    'remove_extra_whitespaces': False,
    'byte_fallback': True,
}


def train_sentencepiece(directory: Path, control: tuple[str, ...] = (), **settings) -> Path:
    """A small SentencePiece model trained on the traces and saved as tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRACES),
        model_writer=model,
        model_type='bpe',
        vocab_size=400,
        control_symbols=['<|im_end|>', *control],
        user_defined_symbols=['<|user|>'],
        split_by_unicode_script=False,
        split_by_whitespace=False,
        minloglevel=2,
        **settings,
    )
    (directory / 'tokenizer.model').write_bytes(model.getvalue())
    return directory
