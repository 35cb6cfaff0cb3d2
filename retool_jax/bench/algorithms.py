"""RL algorithms on the embedded task: from one cold start each, steps and seconds until the model is right so often."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from retool_jax.core import metrics
from retool_jax.stages import demo
from retool_jax.stages.config import Reinforcement, RunSettings
from retool_jax.stages.demo_config import Demo

BLOCKS = ('advantage', 'loss', 'ppo')  # where algorithms differ; all else is the demo's


def measure(
    stage: Demo,
    algorithms: Mapping[str, Reinforcement],
    seeds: Sequence[int],
    target: float,
    say: Callable[[str], None],
) -> dict:
    """{algorithm: {seed: figures}} of algorithms that start from the same fine-tuned model of a seed.

    Figures: `sft` and `rl`, avg@k on the demo's held-out problems before and after; `steps` and `seconds` of RL
    until a step's fresh rollouts, which no one has trained on, are right in a share `target` (None: never), the
    first step's compilation within; `all_steps`, `all_seconds` of the whole. Run folders stand below stage.run.dir.
    """
    results: dict[str, dict[str, dict]] = {name: {} for name in algorithms}
    folder = Path(stage.run.dir)
    for seed in seeds:
        place = lambda name: RunSettings(dir=str(folder / f'{name}_{seed}'), seed=seed)  # noqa: B023
        with demo.opened(dataclasses.replace(stage, run=place('sft'))) as story:
            start = story.fine_tune(True, story.cold_start(True))
            before = story.score('sft', True, start, apart=False)['avg']
        for name, changes in algorithms.items():
            blocks = {block: getattr(changes, block) for block in BLOCKS}
            with demo.opened(dataclasses.replace(stage, run=place(name), **blocks)) as story:
                learnt = story.reinforce(True, start)
                after = story.score('rl', True, learnt, apart=False)['avg']
            results[name][str(seed)] = {'sft': before, 'rl': after} | pace(story.directory, target)
            say(f'{name}, seed {seed}: {json.dumps(results[name][str(seed)])}')
    return results


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
