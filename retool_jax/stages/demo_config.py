"""What the demo reads: the blocks of a reinforcement-learning stage, and those that make a story of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from retool_jax.algo.settings import AdvantageSettings
from retool_jax.core.checks import MANY, Rule, below, check, local_path, one_of, refuse_store, within
from retool_jax.core.errors import UserError
from retool_jax.stages.config import (
    PROBLEMS,
    CheckpointSettings,
    DataSettings,
    Mix,
    Rollouts,
    fit_mix,
    require_path,
)
from retool_jax.stages.pretrained import PackageSettings
from retool_jax.tasks import gym
from retool_jax.train import ppo
from retool_jax.train.ppo import PPOSettings
from retool_jax.train.state import OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """What the demo scores its models on, where it does not learn the embedded task."""

    headline: str | None  # a generator, whose held-out problems they are, or a problem file; None: the embedded task
    apart: Mapping[str, str | None]  # further sets by name, each scored apart; None: left out

    def __post_init__(self):
        check(self, headline=local_path())
        for name, source in self.apart.items():
            refuse_store(f'apart.{name}', source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Sizes of the demo."""

    problems_seen: int  # problems that the tool model's cold start is made from, 1 to 10⁷. H
    sft_steps: int  # optimizer steps of each fine-tuning, at least 1. H
    lead_steps: int  # the first of them, without mental traces of families that need the tool; 0 to sft_steps. H
    sft_batch_tokens: int  # tokens of an optimizer step, padding not counted; at least 1. H
    # share of the traces' problems that fine-tuning leaves out: the loss on them is measured five times; 0 to 1. H
    evaluation_share: float
    problems: int  # held-out problems of the headline score, 1 to 10⁷. H
    apart_problems: int  # of each set scored apart (new wordings, larger operands), 1 to 10⁷. H
    samples: int  # answers per problem in evaluation, 1 to 65,536. H

    def __post_init__(self):
        check(
            self,
            problems_seen=within(1, PROBLEMS),
            sft_steps=within(1, MANY),
            lead_steps=within(0, MANY),
            evaluation_share=below(0, 1),
            sft_batch_tokens=within(1, MANY),
            problems=within(1, PROBLEMS),
            apart_problems=within(1, PROBLEMS),
            samples=within(1, 2**16),
        )
        if self.lead_steps > self.sft_steps:
            raise UserError(
                f'lead_steps={self.lead_steps} are the first of recipe.sft_steps={self.sft_steps}; choose fewer'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLine:
    """What the text-only model has of its own; all else is the other's."""

    # of its cold start. H: two ways of working, worked and said at once, so that RL learns when to work, as the other
    # model learns when to call
    mix: Mix
    needy: (
        float  # share of the embedded problems needing the tool that it is made from, of four times as many; 0 to 1. H
    )
    lead_steps: int  # its recipe.lead_steps, without answers said at once too. H
    optimizer: OptimizerSettings  # of its RL
    advantage: AdvantageSettings  # of its RL
    critic: str  # its ppo.critic

    def __post_init__(self):
        check(self, needy=within(0, 1), lead_steps=within(0, MANY), critic=one_of(ppo.CRITICS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Rollouts):
    """launch/demo.py."""

    package: PackageSettings
    data: DataSettings
    held_out: HeldOutSettings
    sft_optimizer: OptimizerSettings
    checkpoints: CheckpointSettings
    mix: Mix
    recipe: RecipeSettings
    text: TextLine

    def __post_init__(self):
        super().__post_init__()
        refuse_store('run.dir', self.run.dir)
        refuse_store('model.path', self.model.path)
        try:
            ppo.check(self.text_ppo(), self.text.advantage, self.loss, self.train_sampling, self.sampler.weights)
        except UserError as error:
            ours = re.sub(r'\bppo\.(?=critic)|\b(?=advantage\.)', 'text.', str(error))
            raise UserError(ours) from error
        if self.text.lead_steps > self.recipe.sft_steps:
            raise UserError(
                f'text.lead_steps={self.text.lead_steps} are the first of recipe.sft_steps={self.recipe.sft_steps}; '
                'choose fewer'
            )
        if self.package.requirement is None:
            require_path(self.model)
        if bool(self.data.sources) != (self.held_out.headline is not None):
            raise UserError(
                f'data.sources={self.data.sources} and held_out.headline={self.held_out.headline!r} belong '
                'together; give both, or none for the embedded task'
            )
        if self.data.sources:
            check(self.data, sources=Rule(gym.named, f'must be a generator: {gym.PREFIX}NAME'))
            fit_mix(self.mix)
            fit_mix(self.text.mix)

    def text_ppo(self) -> PPOSettings:
        """The block ppo of the text-only model."""
        return dataclasses.replace(self.ppo, critic=self.text.critic)
