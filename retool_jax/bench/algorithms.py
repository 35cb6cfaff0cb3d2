"""RL on the embedded task by several algorithms or settings: from one cold start each, steps and seconds until the
model is right so often."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from retool_jax.core import metrics
from retool_jax.core.errors import UserError
from retool_jax.stages import demo
from retool_jax.stages.config import Reinforcement, RunSettings
from retool_jax.stages.demo_config import Demo

BLOCKS = ('advantage', 'loss', 'ppo')  # where algorithms differ; all else is the demo's


def measure(
    stage: Demo,
    lines: Mapping[str, Mapping[str, object]],
    seeds: Sequence[int],
    target: float,
    say: Callable[[str], None],
) -> dict:
    """{line: {seed: figures}} of lines that start from the same fine-tuned model of a seed.

    lines: the blocks of each that are not the demo's (`algorithm`, `variant`).
    Figures: `sft` and `rl`, avg@k on the demo's held-out problems before and after; `steps` and `seconds` of RL
    until a step's fresh rollouts, which no one has trained on, are right in a share `target` (None: never), the
    first step's compilation within; `all_steps`, `all_seconds` of the whole. Run folders stand below stage.run.dir.
    """
    results: dict[str, dict[str, dict]] = {name: {} for name in lines}
    folder = Path(stage.run.dir)
    for seed in seeds:
        place = lambda name: RunSettings(dir=str(folder / f'{name}_{seed}'), seed=seed)  # noqa: B023
        with demo.opened(dataclasses.replace(stage, run=place('sft'))) as story:
            start = story.fine_tune(True, story.cold_start(True))
            before = story.score('sft', True, start, apart=False)['avg']
        for name, blocks in lines.items():
            with demo.opened(dataclasses.replace(stage, run=place(name), **blocks)) as story:
                learnt = story.reinforce(True, start)
                after = story.score('rl', True, learnt, apart=False)['avg']
            results[name][str(seed)] = {'sft': before, 'rl': after} | pace(story.directory, target)
            say(f'{name}, seed {seed}: {json.dumps(results[name][str(seed)])}')
    return results


def algorithm(stage: Reinforcement) -> dict[str, object]:
    """The blocks of an algorithm's own configuration."""
    return {block: getattr(stage, block) for block in BLOCKS}


def variant(stage: Demo, changes: str) -> dict[str, object]:
    """The demo's blocks with other values, 'BLOCK.KEY:VALUE,BLOCK.KEY:VALUE'.

    Raises:
      UserError: a key that the demo has not, or a value that is none of it.
    """
    blocks: dict[str, object] = {}
    for change in changes.split(','):
        key, _, value = change.partition(':')
        name, _, field = key.partition('.')
        try:
            block = blocks.get(name) or getattr(stage, name)
            blocks[name] = dataclasses.replace(block, **{field: type(getattr(block, field))(value)})
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f'{change!r}: expected BLOCK.KEY:VALUE of the demo ({error})') from None
    return blocks


def pace(directory: Path, target: float) -> dict:
    """How soon the rollouts of a run were right so often."""
    lines = [json.loads(line) for line in (directory / metrics.FILE).read_text().splitlines()]
    lines = [line for line in lines if line['phase'].startswith('ppo')]
    seconds = [line['time/step_s'] for line in lines]
    reached = next((i for i, line in enumerate(lines) if line['rollout/correct'] >= target), None)
    return {
        'steps': reached,
        'seconds': None if reached is None else sum(seconds[:reached]),
        'all_steps': len(lines),
        'all_seconds': sum(seconds),
    }
