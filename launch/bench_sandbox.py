"""Measures the sandbox; the last line is one JSON object.

    python launch/bench_sandbox.py --seconds=10

Run it on an idle machine: it uses every core. About 6 × `seconds` in all.
"""

import json
import sys

from absl import flags

from retool_jax.bench.sandbox import measure
from retool_jax.core import cli, settings
from retool_jax.sandbox.settings import SandboxSettings

SECONDS = flags.DEFINE_float('seconds', 10.0, 'Length of each measurement.', lower_bound=0.5)
CLIENTS = flags.DEFINE_integer('clients', 64, 'Clients of the HTTP server at once.', lower_bound=1)


def main() -> None:
    block = cli.load_config('configs/evaluate.py:tiny').sandbox.to_dict()
    del block['addresses']
    pool = settings.build(SandboxSettings, block, 'sandbox')
    print(
        json.dumps(measure(pool, SECONDS.value, CLIENTS.value, lambda line: print(line, file=sys.stderr, flush=True)))
    )


if __name__ == '__main__':
    cli.run_plain(main)
