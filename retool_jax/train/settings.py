"""The block `forward`."""

from __future__ import annotations

import dataclasses

from retool_jax.core.checks import check, one_of, within
from retool_jax.core.errors import UserError
from retool_jax.model import attention, decoder
from retool_jax.model.config import DTYPES
from retool_jax.model.kernels import LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardSettings:
    """How a training forward pass is computed."""

    dtype: str  # of activations: 'float32', 'bfloat16' or 'float16'; weights are f32. H bfloat16
    # In which gradients are taken and added up over micro-batches: 'float32', or `dtype`, in half the memory: what a
    # micro-batch adds is then rounded to it. H float32
    gradient_dtype: str
    # 'dense', 'blocked', 'splash' (TPU) or 'cudnn' (GPU; before Hopper rows of one episode); 'auto' takes dense up to
    # 1,024 tokens, beyond them splash on a TPU, cudnn in 16 bits on a GPU from Hopper on, blocked elsewhere. H auto
    attention: str
    # What the backward pass recomputes: 'none', 'full' layers, 'attention' all but fused attention's results,
    # 'dots_but_mlp' all but those and the projections' outside the MLP, 'dots' all but those and all matmul results,
    # 'offload' all but matmul results, which wait in the host's memory. H full
    remat: str
    unroll: int  # layers per step of the scan over layers; more compile slower, and run faster on CPUs. H 1
    # Positions that meet the vocabulary at a time, for each row of a device; divides row_width. Acted tokens alone are
    # scored: they are gathered to the front, and chunks that hold none are left out. H 2048
    logprob_chunk: int
    vocab_chunk: int  # vocabulary entries that meet a chunk of positions at a time. H 8192
    micro_rows: int  # rows of a micro-batch, over all devices of data × fsdp; 0: one for each device. H 0
    row_width: int  # tokens of a packed row, at least an episode's. P 16384, its longest sequence
    row_segments: int  # episodes that a packed row may hold. H 16

    def __post_init__(self):
        check(
            self,
            dtype=one_of(DTYPES),
            attention=one_of(attention.KINDS),
            remat=one_of(decoder.REMATS),
            unroll=within(1, 2**16),
            logprob_chunk=within(1, 2**24),
            vocab_chunk=within(1, 2**24),
            micro_rows=within(0, 2**20),
            row_width=within(1, 2**24),
            row_segments=within(1, 2**16),
        )
        if self.gradient_dtype not in ('float32', self.dtype):
            raise UserError(f'gradient_dtype={self.gradient_dtype!r}: expected float32 or ./dtype={self.dtype}')
        if self.row_width % min(self.logprob_chunk, self.row_width):
            raise UserError(
                f'logprob_chunk={self.logprob_chunk} does not divide row_width={self.row_width}; choose a divisor'
            )
        self._check_attention()

    @property
    def shares(self) -> bool:
        """Whether a row holds once what its episodes begin with alike."""
        return attention.shares(self.attention, self.row_width, self.dtype)

    def _check_attention(self):
        if self.attention == 'cudnn' and self.dtype == 'float32':
            raise UserError('attention=cudnn has no float32 kernel; set forward.dtype=bfloat16')
        kind = attention.resolve(self.attention, self.row_width, 'tpu')
        if kind in ('splash', 'blocked') and self.row_width % LANES:
            raise UserError(
                f'row_width={self.row_width} is no multiple of {LANES}, which attention={self.attention} '
                'needs; choose one'
            )
