"""Measures rollout against its peers, its floor and slow tools; the last line is one JSON object.

    python launch/bench_rollout.py
    python launch/bench_rollout.py --parts=cache --repeats=9
    python launch/bench_rollout.py --shape="{'rows': (1, 4), 'new': 16, 'layers': 2}"

Run it on an idle machine after `make baselines`: it uses every core, for an hour (50 minutes of it in `tools`).
"""

import ast
import json
import sys

from absl import flags

from retool_jax.core import cli, settings

REPEATS = flags.DEFINE_integer('repeats', 5, 'Rounds of every comparison; medians are reported.', lower_bound=1)
PARTS = flags.DEFINE_list('parts', ['peers', 'tools', 'cache'], 'What is measured.')
SHAPE = flags.DEFINE_string('shape', '{}', 'Fields of bench.rollout.Shape that differ from its defaults, as a dict.')


def main() -> None:
    import dataclasses

    from retool_jax.bench import rollout

    try:
        changes = ast.literal_eval(SHAPE.value)
    except (ValueError, SyntaxError) as error:
        raise cli.UserError(f'--shape={SHAPE.value}: no dict of numbers and names') from error
    unknown = set(PARTS.value) - {'peers', 'tools', 'cache'}
    if unknown:
        raise cli.UserError(f'--parts={",".join(sorted(unknown))}: choose of peers, tools, cache')
    shape = settings.build(rollout.Shape, dataclasses.asdict(rollout.Shape()) | changes, 'shape')
    say = lambda line: print(line, file=sys.stderr, flush=True)
    print(json.dumps(rollout.measure(shape, REPEATS.value, PARTS.value, say)))


if __name__ == '__main__':
    cli.run_plain(main)
