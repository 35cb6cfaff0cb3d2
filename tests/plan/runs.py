"""The tiny configuration as the plan sees it."""

from __future__ import annotations

from retool_jax.core import cli, settings
from retool_jax.model.config import TINY, ModelConfig
from retool_jax.plan import chips
from retool_jax.plan.programs import Run
from retool_jax.stages.config import Reinforcement


def make_run(
    *overrides: str, topology: str | chips.Slice = 'h100:8', model: ModelConfig = TINY, process_chips: int = 0
) -> Run:
    stage = settings.build(Reinforcement, cli.parse_config(['plan', '--config=configs/ppo.py:tiny', *overrides]))
    slice = chips.open_slice(topology) if isinstance(topology, str) else topology
    return Run(stage, model, slice, process_chips)
