"""transformers' generate at the sizes of bench/rollout.py, in its environment: `python rollout_torch.py DIRECTORY`.

Reads one JSON object per line – rows, prompt, new – and answers each with the seconds of one call; the first line
is its version. The same weights, T = 1 with the log-probability of every token. Nothing of this package is imported.
"""

from __future__ import annotations

import json
import sys
import time


def main(directory: str) -> None:
    import torch
    import transformers

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype='auto').to(device).eval()
    print(json.dumps({'version': transformers.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = torch.randint(0, model.config.vocab_size, (asked['rows'], asked['prompt']), device=device)
        settings = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=asked['new'],
            min_new_tokens=asked['new'],
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with torch.inference_mode():
            began = time.perf_counter()
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
            new = out.sequences[:, asked['prompt'] :]
            # One step's logits at a time, as they came: no [rows, new, vocabulary] array beside them.
            logprobs = torch.stack(
                [
                    torch.log_softmax(x.float(), -1).gather(-1, new[:, i : i + 1])[:, 0]
                    for i, x in enumerate(out.logits)
                ],
                1,
            )
            total = float(logprobs.sum())
        seconds = time.perf_counter() - began
        print(json.dumps({'seconds': seconds, 'tokens': new.numel(), 'logprob': total / new.numel()}), flush=True)


if __name__ == '__main__':
    main(sys.argv[1])
