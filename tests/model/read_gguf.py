"""What transformers makes of a GGUF file: logits, and the ids of strings. For .baselines/torch (make baselines).

    .baselines/torch/bin/python tests/model/read_gguf.py MODEL.gguf OUT STRINGS.json

writes OUT/golden.npz (tests/model/make_fixtures.py) and OUT/ids.json. Needs nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from make_fixtures import golden
from tokenizers import pre_tokenizers


def main() -> None:
    path, out, strings = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    out.mkdir(exist_ok=True)
    np.savez_compressed(out / 'golden.npz', **golden(model, seed=0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pre = gguf.GGUFReader(path).fields.get('tokenizer.ggml.pre')
    if pre is not None and pre.contents() == 'smollm':  # read as gpt-2; the model's own files cut digits first
        fast = tokenizer.backend_tokenizer
        fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), fast.pre_tokenizer])
    found = [tokenizer(text, add_special_tokens=False)['input_ids'] for text in json.loads(strings.read_text())]
    (out / 'ids.json').write_text(json.dumps(found))


if __name__ == '__main__':
    main()
