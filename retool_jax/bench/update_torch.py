"""The update of bench/update.py in torch and transformers, for their own environment: `python update_torch.py JSON`.

The same shape, loss (clipped ratio, entropy computed as a metric), accumulation, clipping and AdamW; nothing of this
package is imported. The last line is a JSON object.
"""

from __future__ import annotations

import json
import sys
import time


def main(shape: dict) -> None:
    import torch
    import transformers

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    dtype = getattr(torch, shape['dtype'])

    def clock(work) -> float:
        began = time.perf_counter()
        work()
        if device == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - began

    n = 2048 if device == 'cpu' else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    clock(lambda: a @ b)
    rate = 2.0 * n**3 / min(clock(lambda: a @ b) for _ in range(shape['repeats']))

    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=shape['vocab'],
            hidden_size=shape['width'],
            intermediate_size=shape['mlp'],
            num_hidden_layers=shape['layers'],
            num_attention_heads=shape['heads'],
            num_key_value_heads=shape['kv_heads'],
            tie_word_embeddings=False,
            attn_implementation='sdpa',
            max_position_embeddings=shape['tokens'],
            use_cache=False,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)
    rows, t = shape['rows'], shape['tokens']
    tokens = torch.randint(0, shape['vocab'], (rows, t), device=device)
    acted = (torch.arange(1, t, device=device) >= t // 8).expand(rows, t - 1)
    advantage = torch.where(torch.arange(rows, device=device) % 2 == 0, 1.0, -1.0)[:, None]

    def logprobs(part):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=tokens[part]).logits[:, :-1].float()
        logp = torch.log_softmax(logits, -1)
        entropy = -(logp.exp() * logp).sum(-1).detach()
        return logp.gather(-1, tokens[part][:, 1:, None])[..., 0], entropy

    parts = [slice(i, i + shape['micro_rows']) for i in range(0, rows, shape['micro_rows'])]
    with torch.no_grad():
        old = [logprobs(part)[0] for part in parts]

    def step():
        optimizer.zero_grad(set_to_none=True)
        for part, before in zip(parts, old):
            now, _ = logprobs(part)
            ratio = torch.exp((now - before).clamp(-20, 20))
            loss = torch.maximum(-advantage[part] * ratio, -advantage[part] * ratio.clamp(0.8, 1.28))
            ((loss * acted[part]).sum() / acted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    clock(step)
    taken = sorted(clock(step) for _ in range(shape['repeats']))
    print(json.dumps({'update_s': taken[len(taken) // 2], 'matmul_gflops': rate / 1e9, 'version': torch.__version__}))


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
