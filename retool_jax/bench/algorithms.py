"""RL algorithms on the embedded task: from one cold start each, steps and seconds until the model is right so often."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from retool_jax.core import metrics
from retool_jax.stages import demo as demo_stage

BLOCKS = ('advantage', 'loss', 'ppo')  # where algorithms differ; all else is the demo's


def measure(demo: ConfigDict, algorithms: Mapping[str, ConfigDict], seeds: Sequence[int], target: float,
            say: Callable[[str], None]) -> dict:
    """{algorithm: {seed: figures}} of algorithms that start from the same fine-tuned model of a seed.

    Figures: `sft` and `rl`, avg@k on the demo's held-out problems before and after; `steps` and `seconds` of RL
    until a step's fresh rollouts, which no one has trained on, are right in a share `target` (None: never), the
    first step's compilation within; `all_steps`, `all_seconds` of the whole. Run folders stand below demo.run.dir.
    """
    results: dict[str, dict[str, dict]] = {name: {} for name in algorithms}
    folder = Path(demo.run.dir)
    for seed in seeds:
        config = demo.copy_and_resolve_references()
        config.run.seed, config.run.dir = seed, str(folder / f'sft_{seed}')
        with demo_stage.opened(config) as story:
            start = story.sft(True, story.traces(True), story.random_model())
            before = story.score('sft', True, start, apart=False)['avg']
        for name, changes in algorithms.items():
            config = config.copy_and_resolve_references()
            config.run.dir = str(folder / f'{name}_{seed}')
            config.update({block: changes[block] for block in BLOCKS})
            with demo_stage.opened(config) as story:
                learnt = story.reinforce(True, jax.tree.map(jnp.copy, start))  # a step takes its memory
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
    return {'steps': reached, 'seconds': None if reached is None else sum(seconds[:reached]),
            'all_steps': len(lines), 'all_seconds': sum(seconds)}
