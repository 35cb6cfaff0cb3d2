"""Measures the update against plain matmuls (and torch, where `make baselines` ran); the last line is one JSON object.

    python launch/bench_update.py
    python launch/bench_update.py --shape="{'layers': 28, 'width': 1536, 'mlp': 8960, 'heads': 12, 'kv_heads': 2, \
        'vocab': 151936, 'tokens': 4096, 'dtype': 'bfloat16', 'attention': 'auto', 'remat': 'full', 'rows': 4, \
        'micro_rows': 1, 'vocab_chunk': 8192}"

Run it on an idle machine: it uses every core. The second line is Qwen2.5-1.5B's shape, for an accelerator.
"""

import ast
import json
import sys

from absl import flags

from retool_jax.core import cli, settings

REPEATS = flags.DEFINE_integer(
    'repeats', 7, 'Measured calls; medians of updates, the fastest of matmuls.', lower_bound=1
)
SHAPE = flags.DEFINE_string('shape', '{}', 'Fields of bench.update.Shape that differ from its defaults, as a dict.')


def main() -> None:
    import dataclasses

    from retool_jax.bench import update

    try:
        changes = ast.literal_eval(SHAPE.value)
    except (ValueError, SyntaxError) as error:
        raise cli.UserError(f'--shape={SHAPE.value}: no dict of numbers and names') from error
    shape = settings.build(update.Shape, dataclasses.asdict(update.Shape()) | changes, 'shape')
    say = lambda line: print(line, file=sys.stderr, flush=True)
    print(json.dumps(update.measure(shape, REPEATS.value, say)))


if __name__ == '__main__':
    cli.run_plain(main)
