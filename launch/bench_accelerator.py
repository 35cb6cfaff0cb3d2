"""Measures decode, extend and update on an accelerator, transformers beside them; the last line is one JSON object.

    bash launch/bench_accelerator.sh --out=runs/accelerator
    bash launch/bench_accelerator.sh --out=runs/accelerator --toy        # the same at sizes for a CPU

Eight minutes on an H100. It needs jax, flax, optax, numpy and absl alone (torch and transformers for the peer,
ml_collections for the plan's prediction of memory), so it has no configuration. Every result is in OUT/results.jsonl as
soon as it is known, what the processes said in OUT/children.log.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # on such a machine nothing is installed

from retool_jax.bench import accelerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='A folder for results.jsonl and children.log.')
    parser.add_argument('--seconds', type=float, default=470, help='After so long nothing new begins.')
    parser.add_argument('--toy', action='store_true', help='Sizes for a CPU: tests that all of it runs.')
    asked = parser.parse_args()
    say = lambda line: print(line, file=sys.stderr, flush=True)
    summary = accelerator.measure(asked.out, asked.toy, asked.seconds, say)
    print(accelerator.table(summary))
    print(json.dumps(summary), flush=True)


if __name__ == '__main__':
    main()
