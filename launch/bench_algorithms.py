"""Compares PPO, GRPO and DAPO on the embedded task, each from the same cold starts; the last line is one JSON object.

    python launch/bench_algorithms.py
    python launch/bench_algorithms.py --seeds=0 --algorithms=grpo --config.optimizer.lr=3e-4

Each takes its advantage, loss and ppo blocks from configs/NAME.py:tiny, all else from configs/demo.py. A seed takes
about a quarter of an hour on 2 CPU cores.
"""

import json
import os
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags

from retool_jax.core import cli, settings

NAMES = ('ppo', 'grpo', 'dapo')
ALGORITHMS = flags.DEFINE_list('algorithms', list(NAMES), 'Which to run.')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the whole story, cold start included.')
TARGET = flags.DEFINE_float('target', 0.9, 'Share of right answers whose time is taken.', 0.0, 1.0)


def main(stage) -> None:
    from retool_jax.bench import algorithms
    from retool_jax.stages.config import Reinforcement

    if unknown := set(ALGORITHMS.value) - set(NAMES):
        raise cli.UserError(f'--algorithms={",".join(sorted(unknown))}: choose of {", ".join(NAMES)}')
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise cli.UserError(f'--seeds={",".join(SEEDS.value)}: whole numbers, separated by commas')
    stages = {
        name: settings.build(Reinforcement, cli.load_config(f'configs/{name}.py:tiny')) for name in ALGORITHMS.value
    }
    say = lambda line: print(line, file=sys.stderr, flush=True)
    print(json.dumps(algorithms.measure(stage, stages, [int(s) for s in SEEDS.value], TARGET.value, say)))


if __name__ == '__main__':
    cli.run(main, 'retool_jax.stages.demo_config:Demo', default_config='configs/demo.py')
