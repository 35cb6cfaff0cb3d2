"""Times from published figures: a program is as slow as its slowest resource, a step the sum of its programs."""

from __future__ import annotations

import dataclasses
import math

from retool_jax.model.config import ModelConfig
from retool_jax.plan.chips import Chip
from retool_jax.plan.facts import BETWEEN_SLICES, Facts

RESOURCES = ('compute', 'memory', 'links')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the published figures do not say. Every one is printed beside the result."""

    matmul: float = 0.75  # share of the bf16 peak that large matmuls and fused attention reach
    memory: float = 0.80  # share of the HBM's bandwidth that a read of weights or KV reaches
    links: float = 0.80  # share of the links' rate along one axis of the torus; exchanges overlap with work
    collective_s: float = 1e-5  # of each collective of a decode step, beside its bytes: it is short, and waited for
    packing: float = 0.95  # share of a packed row that is no padding
    feeds: int = 8  # chunks fed per episode, its prompt and tools' answers; fewer where there are fewer turns
    sigma: float = 0.6  # standard deviation of the logarithm of an episode's length
    tokens: int  # mean length of an episode, prompt and tool output included


@dataclasses.dataclass(frozen=True)
class Seconds:
    """How long a program takes by each resource; `bound` names the slowest."""

    compute: float
    memory: float
    links: float
    waits: float = 0.0  # of collectives, for one another; they come on top

    @property
    def total(self) -> float:
        return max(getattr(self, name) for name in RESOURCES) + self.waits

    @property
    def bound(self) -> str:
        return max(RESOURCES, key=lambda name: getattr(self, name))


def seconds(facts: Facts, chip: Chip, a: Assumptions) -> Seconds:
    """One run of a program."""
    return Seconds(
        facts.flops / (chip.flops * a.matmul),
        facts.moved / (chip.hbm_bandwidth * a.memory),
        facts.sent_bytes / (chip.link * a.links) + facts.sent.get(BETWEEN_SLICES, 0.0) / (chip.dcn * a.links),
        facts.exchanges * a.collective_s if facts.name == 'decode' else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much work an RL step is, beside its rollout (plan/engines.py)."""

    episodes: float  # that are trained on, in the mean
    minibatches: int
    epochs: int
    micro_rows: int
    row_width: int
    row_segments: int
    layers: int
    policy_scores: float  # passes over a step's episodes for logprobs: of the policy, of its reference

    def micro_batches(self, a: Assumptions) -> int:
        """Micro-batches of a pass over the step's episodes."""
        rows = max(self.episodes * a.tokens / (self.row_width * a.packing), self.episodes / self.row_segments)
        return self.minibatches * math.ceil(rows / self.minibatches / self.micro_rows)

    def runs(self, name: str, a: Assumptions) -> float:
        """How often an RL step runs a program."""
        if name.startswith('score'):
            return self.micro_batches(a) * (self.policy_scores if name == 'score policy' else 1)
        if name == 'sync layer':
            return self.layers
        if name == 'apply':
            return self.minibatches * self.epochs
        if name.startswith('update'):
            return self.micro_batches(a) * self.epochs
        return 1.0


def model_flops(config: ModelConfig, rows: int, width: int, frozen: bool = False) -> float:
    """Floating-point operations that a gradient of `rows` full rows needs: 6 a weight and token, 4 where the weights
    are frozen, and causal attention forwards and twice backwards; what is recomputed does not count."""
    weights = config.parameter_count()
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # the table is looked up, not multiplied
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * width / 2
    return rows * width * ((4.0 if frozen else 6.0) * weights + 3 * scores)
