"""transformers' side of bench/accelerator.py: `python accelerator_torch.py CASES`, as accelerator_jax answers.

`generate` of the same shapes with random weights, a static batch: contexts as long as the longest, masked to the
lengths that our rows have, from a cache that is filled without a prefill (that of the largest batch would not fit).
Nothing of this package is imported.
"""

from __future__ import annotations

import gc
import json
import sys
import time


def main(cases: str) -> None:
    for case in json.loads(cases):
        began = time.perf_counter()
        try:
            found = decode(**{key: value for key, value in case.items() if key not in ('case', 'kind', 'limit')})
        except Exception as error:  # of any kind: the other cases go on
            print(f'{case["case"]}: {error}', file=sys.stderr, flush=True)
            found = {'error': f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0][:300]}'}
            error.__traceback__ = None
        gc.collect()
        found['took_s'] = round(time.perf_counter() - began, 2)
        print(json.dumps({'case': case['case']} | found), flush=True)


def decode(config: dict, lengths: list[int], new: int, calls: int, dtype: str) -> dict:
    import torch
    import transformers

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda':
        torch.cuda.empty_cache()
    settings = transformers.Qwen2Config(**config)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation='sdpa').eval()
    rows, longest = len(lengths), max(lengths)
    heads, size = settings.num_key_value_heads, settings.hidden_size // settings.num_attention_heads
    mask = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device)[:, None]
    mask = torch.cat([mask, mask.new_ones(rows, 1)], 1).long()  # padding left, and the token that begins
    tokens = torch.randint(0, settings.vocab_size, (rows, longest + 1), device=device)
    asked = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        min_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    taken = []
    for _ in range(1 + calls):
        cache = transformers.DynamicCache()
        for layer in range(settings.num_hidden_layers):
            kv = torch.randn(2, rows, heads, longest, size, device=device, dtype=getattr(torch, dtype))
            cache.update(kv[0], kv[1], layer)
            del kv
        if device == 'cuda':
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, past_key_values=cache, generation_config=asked)
        if device == 'cuda':
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
        if out.shape[1] != longest + 1 + new or cache.get_seq_length() != longest + new:
            raise RuntimeError(f'{tuple(out.shape)} after {longest + 1} tokens: not {new} new ones from the cache')
        del cache
    seconds = sorted(taken[1:])[calls // 2]
    return {
        'step_s': seconds / new,
        'tokens_per_s': rows * new / seconds,
        'version': transformers.__version__,
        'torch': torch.__version__,
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
    }


if __name__ == '__main__':
    main(sys.argv[1])
