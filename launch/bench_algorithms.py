"""Compares algorithms and settings of RL on the embedded task, all from the same cold starts; the last line is JSON.

    python launch/bench_algorithms.py
    python launch/bench_algorithms.py --seeds=0 --algorithms=grpo --config.optimizer.lr=3e-4
    python launch/bench_algorithms.py --algorithms=ppo --variant=small=optimizer.kind:adafactor

An algorithm takes its advantage, loss and ppo blocks from configs/NAME.py:tiny, all else from configs/demo.py, and a
variant only what it names. A seed takes about a quarter of an hour on 2 CPU cores.
"""

import json
import os
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags

from retool_jax.core import cli, settings

NAMES = ('ppo', 'grpo', 'dapo')
ALGORITHMS = flags.DEFINE_list('algorithms', list(NAMES), 'Which to run.')
VARIANTS = flags.DEFINE_multi_string('variant', [], 'NAME=BLOCK.KEY:VALUE,…: the demo with these values, beside them.')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the whole story, cold start included.')
TARGET = flags.DEFINE_float('target', 0.9, 'Share of right answers whose time is taken.', 0.0, 1.0)


def main(stage) -> None:
    from retool_jax.bench import algorithms
    from retool_jax.stages.config import Reinforcement

    if unknown := set(ALGORITHMS.value) - set(NAMES):
        raise cli.UserError(f'--algorithms={",".join(sorted(unknown))}: choose of {", ".join(NAMES)}')
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise cli.UserError(f'--seeds={",".join(SEEDS.value)}: whole numbers, separated by commas')
    read = lambda name: settings.build(Reinforcement, cli.load_config(f'configs/{name}.py:tiny'))
    lines = {name: algorithms.algorithm(read(name)) for name in ALGORITHMS.value}
    for given in VARIANTS.value:
        name, _, changes = given.partition('=')
        lines[name] = algorithms.variant(stage, changes)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    print(json.dumps(algorithms.measure(stage, lines, [int(s) for s in SEEDS.value], TARGET.value, say)))


if __name__ == '__main__':
    cli.run(main, 'retool_jax.stages.demo_config:Demo', default_config='configs/demo.py')
