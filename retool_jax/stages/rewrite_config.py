"""What launch/rewrite.py reads."""

from __future__ import annotations

import dataclasses

from retool_jax.core.checks import MANY, check, filled, local_path, one_of, refuse_store, within
from retool_jax.core.endpoint_settings import EndpointSettings
from retool_jax.core.errors import UserError
from retool_jax.model.lora import LoRASettings
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.rollout.turns import Budgets
from retool_jax.sandbox.feedback import FeedbackSettings
from retool_jax.stages.config import (
    PROBLEMS,
    MeshSettings,
    ModelSettings,
    RewardSettings,
    RunSettings,
    SandboxBlock,
    fit_cache,
    require_path,
)
from retool_jax.tasks import gym
from retool_jax.traces import asked, calculator, sampled
from retool_jax.traces.filters import FilterSettings
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.sft import SFTSettings
from retool_jax.train.state import OptimizerSettings

KINDS = (calculator.NAME, asked.NAME, sampled.NAME)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriterSettings:
    """Who rewrites, and how."""

    # 'calculator': arithmetic in the words becomes a snippet; 'endpoint': a model behind a server writes the trace
    # anew (P §2.2); 'self': the model at hand samples traces with the interpreter, whatever the words are
    kind: str
    candidates: int  # traces of each problem, of 'endpoint' and 'self'; 1 to 65,536. P does not say; H 4
    temperature: float  # of 'endpoint', whose answers to one request differ by it alone. P does not say; H 0.7
    max_tokens: int  # of an answer of 'endpoint', thoughts included; at least 1. H
    # whether 'endpoint' is asked to go on where an output differs from what a trace claims, from the real one; else
    # such a trace is dropped. H
    finish: bool
    # whether the server judges text traces too before they are rewritten, P's second verification; needs endpoint.url
    judge: bool
    hint: str  # of 'self': words that make the model think of the interpreter. START's idea, words H
    # of 'self': where the hint goes, in turn over a problem's candidates: 'think' (the beginning), 'wait' (behind that
    # word), 'answer' (before the answer); none: nowhere. START: wait and answer; CoRT: think
    places: tuple[str, ...]
    mattered: bool  # of 'self': whether problems are left out that the model solves as often without the tool. START
    rounds: int  # of 'self': samplings, with a fine-tuning on all that was kept before the next; 1 to 1,000. H

    def __post_init__(self):
        check(
            self,
            kind=one_of(KINDS),
            candidates=within(1, 2**16),
            temperature=within(0, 1e6),
            max_tokens=within(1, MANY),
            hint=filled(),
            places=one_of(sampled.PLACES),
            rounds=within(1, 1000),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite:
    """launch/rewrite.py."""

    run: RunSettings
    # a file of text traces in any schema (docs/guide.md), or a generator with worked solutions (reasoning_gym:NAME?…),
    # whose problems alone serve 'self'; None: the embedded task, for 'self'
    traces: str | None
    golds: str | None  # a problem file with the answers of traces that have none but their own last box
    problems: int  # traces, or problems of a generator or of the embedded task: at most so many, 1 to 10⁷
    rewriter: RewriterSettings
    endpoint: EndpointSettings
    filters: FilterSettings
    max_tokens: int  # longer traces are dropped; at least 1
    model: ModelSettings
    lora: LoRASettings
    mesh: MeshSettings
    sampler: SamplerSettings
    turns: Budgets
    sampling: SamplingSettings
    forward: ForwardSettings
    optimizer: OptimizerSettings
    sft: SFTSettings
    sandbox: SandboxBlock
    feedback: FeedbackSettings
    reward: RewardSettings

    def __post_init__(self):
        check(self, traces=local_path(), golds=local_path(), problems=within(1, PROBLEMS), max_tokens=within(1, MANY))
        refuse_store('run.dir', self.run.dir)
        refuse_store('model.path', self.model.path)
        own = self.rewriter.kind == sampled.NAME
        if self.traces is None and not (own and self.model.template == 'tiny'):
            raise UserError(
                'traces is missing: config.traces has to name a file of text traces, or a generator with worked '
                'solutions'
            )
        if self.golds is not None and (self.traces is None or gym.named(self.traces)):
            raise UserError(f'golds={self.golds!r} answers the traces of a file, and traces names none')
        if self.rewriter.kind == asked.NAME or self.rewriter.judge:
            self.endpoint.require()
        if own:
            require_path(self.model)
            fit_cache(self.turns, self.sampler)
            if not self.model.tools:
                raise UserError('model.tools=False: rewriter.kind=self samples with the interpreter; set it to True')
