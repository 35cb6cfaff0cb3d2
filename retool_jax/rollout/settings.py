"""The blocks `sampler` and `sampling`: sizes of the compiled programs, and how tokens are drawn.

An engine is `mesh.tensor` devices, which hold the sampling weights once; a process drives as many as its devices make.
"""

from __future__ import annotations

import dataclasses

from retool_jax.core.checks import MANY, above, check, one_of, within
from retool_jax.core.errors import UserError
from retool_jax.model.config import DTYPES, WEIGHTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Sizes of the compiled programs; numbers of rows are those of one engine."""

    rows: int  # episodes that an engine (mesh.tensor devices) holds at a time, one a row. H 64, from 7B on 32
    slots: int  # KV positions of a row: tokens of an episode, prompt included. P 16384, its longest sequence
    chunk: int  # tokens of a row that one extend call takes in; longer prompts and tool outputs take several. H 256
    feed_rows: int  # rows of an engine that one extend call takes. H 8
    quota: int  # steps of one decode call; a row that stops in it stands still until its end. H 64
    # Rows of an engine in one decode call, the others wait; 0: all. Fewer than `rows` pay where most rows wait for slow
    # tools. H 0
    decode_rows: int
    # KV positions that a call reads at least; the bound doubles up to `slots` as rows grow. Some backends round a
    # matmul by its extent: `slots` here makes replays equal to the last bit on those too. H 256
    min_bound: int
    dtype: str  # of activations and sampling weights: 'float32', 'bfloat16' or 'float16'. H bfloat16
    # 'float': sampling weights in `dtype`; 'int8': matrices of layers and head in 8 bits, a scale per output channel.
    # Then tokens are drawn from another distribution than the trainer's, which loss.correction weighs. H float
    weights: str
    cache_dtype: str  # of keys and values: as `dtype`, or 'int8' with a scale per slot and head. H bfloat16

    def __post_init__(self):
        check(
            self,
            rows=within(1, 2**16),
            slots=within(1, 2**24),
            chunk=within(1, 2**16),
            feed_rows=within(1, 2**16),
            quota=within(1, 2**16),
            min_bound=within(1, 2**24),
            dtype=one_of(DTYPES),
            weights=one_of(WEIGHTS),
            cache_dtype=one_of((*DTYPES, 'int8')),
        )
        if self.weights == 'int8' and self.dtype == 'float16':
            raise UserError(
                "weights='int8' adds up products of integers, which may exceed the 65,504 at which ./dtype='float16' "
                'ends; set ./dtype=bfloat16 or float32'
            )
        if not 0 <= self.decode_rows <= self.rows:
            raise UserError(f'decode_rows={self.decode_rows} must be from 1 to rows={self.rows}, or 0 for all rows')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn."""

    temperature: float  # what logits are divided by; 0 takes the largest. P 1 in evaluation; R 1 in training
    # The most probable tokens whose probability adds up to this are kept, in (0, 1]; 1: all. P 0.7 in evaluation
    # (R 0.6); R 1 in training, where truncation would renormalise the sampler's distribution and not the trainer's
    top_p: float
    top_k: int  # so many most probable tokens are kept; 0: all. H 0
    min_p: float  # tokens below this share of the largest probability are dropped, in [0, 1]; 0: none. H 0

    def __post_init__(self):
        check(self, temperature=within(0, 1e6), top_p=above(0, 1), top_k=within(0, MANY), min_p=within(0, 1))

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0
