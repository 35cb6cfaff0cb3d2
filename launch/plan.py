"""Proves that a PPO run fits a slice of accelerators, and what it would cost, on a machine without any.

    python launch/plan.py --config=configs/ppo.py:qwen2_5_32b --topology=v5p:4x4x4
    python launch/plan.py --config=configs/ppo.py:qwen2_5_7b --topology=h100:8 --json  # or --search, --split

TPU: the run's own programs are compiled with the TPU compiler (bash launch/baselines.sh plan). GPU: an
estimate from shapes. Exit status 1 where a phase does not fit; the last lines say what to change.
"""

import json
import os
import sys

from absl import flags

os.environ['JAX_PLATFORMS'] = 'cpu'  # JAX itself runs on the host

from retool_jax.core import cli

TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5p:4x4x4', 'KIND:SHAPE: v5e, v5p, v6e, tpu7x; rtx4090, l40s, a100_40, a100, h100, h200, b200.'
)
SLICES = flags.DEFINE_integer(
    'slices', 0, 'Slices of that topology, joined by the network between hosts. 0: config.mesh.slices.', lower_bound=0
)
TOKENS = flags.DEFINE_integer(
    'tokens', None, 'Mean tokens of an episode (the paper: 10,400 falling to 2,400); none: 6,144 or 3/8 of a budget.'
)
PROCESS_CHIPS = flags.DEFINE_integer('process_chips', 0, 'Chips of one process. 0: those of a host.', lower_bound=0)
SEARCH = flags.DEFINE_bool('search', False, 'Finds the mesh, rows and recomputation with which an RL step takes least.')
SPLIT = flags.DEFINE_bool('split', False, 'Says what rollout and training on two halves of the slice would take.')
JSON = flags.DEFINE_bool('json', False, 'Prints one JSON object instead of tables.')


def main(stage):
    from retool_jax.plan import chips, models, page, plans, search, search_page, split

    model = models.sizes(stage.model.path, stage.model.name)
    slice = chips.open_slice(TOPOLOGY.value, SLICES.value or stage.mesh.slices or 1)
    made, sections = plans.Plans(model, slice, TOKENS.value, PROCESS_CHIPS.value), {}
    if SEARCH.value:
        found = search.search(made, stage)
        plan, sections['search'] = found.plan, search_page.describe(found, made, stage)
        stage = plans.changed(stage, found.keys)
    else:
        plan = made.make(stage)
    if SPLIT.value:
        sections['split'] = split.compare(made, stage)
    told = {'search': search_page.text, 'split': split.text}
    texts = (page.text(plan), *(told[name](section) for name, section in sections.items()))
    print(json.dumps(plan | sections) if JSON.value else '\n\n'.join(texts))
    sys.exit(0 if plan['fits'] else 1)


def run() -> None:
    cli.run(main, 'retool_jax.stages.config:Reinforcement')


if __name__ == '__main__':
    run()
