"""Log-probabilities of given tokens without a [B, T, V] array: chunks of positions meet chunks of the vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from retool_jax.core import sharding
from retool_jax.core.pytrees import Params
from retool_jax.model.decoder import head_weight

if TYPE_CHECKING:  # names of annotations only: accelerator machines need not have jaxtyping
    from jaxtyping import Array, Bool, Float, Int

LANES = 128  # of an accelerator's vectors
FLOOR = -1e30  # below every logit, and finite: its exponential is 0, and 0 times it is 0


def token_logprobs(
    params: Params,
    hidden_BTD: Float[Array, 'B T D'],
    tokens_BT: Int[Array, 'B T'],
    *,
    wanted_BT: Bool[Array, 'B T'] | None = None,
    temperature: float = 1.0,
    chunk: int = 256,
    vocab_chunk: int = 1 << 16,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """log p(token t | tokens before t) and the entropy of that distribution, both f32 [B, T].

    Aligned to the token: entry t comes from hidden state t − 1, entry 0 is 0. B · `chunk` positions
    meet `vocab_chunk` entries of the vocabulary at a time, and once more in the backward pass: the
    largest array is B · chunk · vocab_chunk in f32. On a mesh each device sees its own rows and its
    own part of the vocabulary, and what is exchanged are four numbers a token.

    wanted_BT: tokens whose numbers are asked for, None for all; the others' are 0. A device takes its
    wanted positions first, and chunks in which there are none cost nothing.

    Raises:
      ValueError: T is no multiple of `chunk`.
    """
    t = hidden_BTD.shape[1]
    chunk = min(chunk, t)
    if t % chunk:
        raise ValueError(f'sequence length {t} is not a multiple of the logprob chunk {chunk}')
    wanted_BT = jnp.ones(tokens_BT.shape, bool) if wanted_BT is None else wanted_BT
    # Hidden state t predicts token t + 1; the last one predicts nothing.
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    target_BT, wanted_BT = ahead(tokens_BT), ahead(wanted_BT)
    run = functools.partial(_rows, temperature=temperature, chunk=chunk, vocab_chunk=vocab_chunk)
    mesh = jax.sharding.get_abstract_mesh()
    w_DV = sharding.gather(head_weight(params), hidden_BTD.dtype, 'embed', 'vocab')
    if mesh.empty:
        found = run(hidden_BTD, w_DV, target_BT, wanted_BT)
    else:
        rows = sharding.spec(('batch', None), sharding.TRAIN_RULES)
        found = jax.shard_map(
            functools.partial(run, over='tensor', across=rows[0]),
            mesh=mesh,
            out_specs=(rows, rows),
            in_specs=(sharding.spec(('batch', None, None), sharding.TRAIN_RULES), jax.P(None, 'tensor'), rows, rows),
        )(hidden_BTD, w_DV, target_BT, wanted_BT)
    back = lambda x: jnp.pad(jnp.where(wanted_BT, x, 0.0)[:, :-1], ((0, 0), (1, 0)))
    return back(found[0]), back(found[1])


def _rows(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    target_BT: jax.Array,
    wanted_BT: jax.Array,
    *,
    temperature: float,
    chunk: int,
    vocab_chunk: int,
    over: str | None = None,
    across: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Scores one device's rows against its part of the vocabulary.

    over: the mesh axis that splits the vocabulary; across: those that split the rows.
    """
    b, t, d = x_BTD.shape
    if over is not None:
        # What the devices exchange in the backward pass they exchange outside the branches below, which differ.
        w_DV = jax.lax.pcast(w_DV, across, to='varying')
        x_BTD = jax.lax.pcast(x_BTD, over, to='varying')
        target_BT = target_BT - jax.lax.axis_index(over) * w_DV.shape[1]
        # Tokens of another device's part become −1: their ids here could hit the zeros that fill the last chunk up.
        target_BT = jnp.where(target_BT < w_DV.shape[1], target_BT, -1)
    order_X = jnp.argsort(~wanted_BT.reshape(-1), stable=True)  # what is wanted first
    split = lambda x: x.reshape(b * t, *x.shape[2:]).at[order_X].get(unique_indices=True, mode='promise_in_bounds')
    x_CXD = split(x_BTD).reshape(t // chunk, b * chunk, d)
    target_CX, wanted_CX = (split(x).reshape(t // chunk, b * chunk) for x in (target_BT, wanted_BT))
    found = _scored(_Form(temperature, vocab_chunk, over), x_CXD, w_DV, target_CX, wanted_CX.any(axis=1))
    join = lambda x: jnp.zeros(b * t, x.dtype).at[order_X].set(x.reshape(-1), unique_indices=True).reshape(b, t)
    return join(found[0]), join(found[1])


@dataclasses.dataclass(frozen=True)
class _Form:
    """What does not change from call to call."""

    temperature: float
    vocab_chunk: int
    over: str | None  # the mesh axis that splits the vocabulary

    def logits(self, x: jax.Array, w: jax.Array, left: jax.Array) -> jax.Array:
        """f32 [X, W]; entries from `left` on, which fill the last piece up, are no part of the vocabulary."""
        logits = jnp.matmul(x, w, preferred_element_type=jnp.float32) / self.temperature
        return jnp.where(jnp.arange(w.shape[1]) < left, logits, FLOOR)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(form: _Form, x_CXD: jax.Array, w_DV: jax.Array, target_CX: jax.Array, any_C: jax.Array):
    """Logprobs of the targets and entropies, f32 [C, X]; chunks of positions without `any` keep what no logits give.

    The gradient is written out: by autodiff each piece would be computed three times, once more than needed, and the
    head's matmuls of the backward pass would run in f32.
    """
    return _sums_of_all(form, x_CXD, w_DV, target_CX, any_C)[0]


def _sums_of_all(form: _Form, x_CXD, w_DV, target_CX, any_C):
    """((logprob, entropy), log Σ exp z), f32 [C, X] each."""

    def piece(found, xs):
        w, first = xs

        def one(_, xs):
            x, target, any_wanted, found = xs
            add = lambda: _join(found, _sums(form.logits(x, w, w_DV.shape[1] - first), target - first))
            return None, jax.lax.cond(any_wanted, add, lambda: found)

        return jax.lax.scan(one, None, (x_CXD, target_CX, any_C, found))[1], None

    zeros_CX = 0.0 * target_CX  # a constant would not differ from device to device, as what is found does
    # A peak of FLOOR: the first piece of the vocabulary replaces the rest, the 1.0 keeps what none replaces finite.
    nothing = (zeros_CX + FLOOR, zeros_CX + 1.0, zeros_CX, zeros_CX)
    found, _ = jax.lax.scan(piece, nothing, _pieces(w_DV, form.vocab_chunk))
    found = found if form.over is None else _over_devices(found, form.over)
    return _finish(found), found[0] + jnp.log(found[1])


def _keep(form: _Form, x_CXD, w_DV, target_CX, any_C):
    """The pass forwards, with what the pass backwards needs."""
    *inputs, any_C = (primal.value for primal in (x_CXD, w_DV, target_CX, any_C))
    found, total_CX = _sums_of_all(form, *inputs, any_C)
    # A head that is not trained, adapters being, has no gradient; what is static is said by a tree without leaves.
    return found, (*inputs, any_C, total_CX, found[1], () if w_DV.perturbed else None)


def _gradients(form: _Form, kept, cotangents):
    """Of logits z with p = softmax(z): ∂ log p[target] = 1[target] − p, ∂H = −p·(log p + H). In the pass backwards, as
    forwards, matmuls take the hidden states' dtype and add up in f32."""
    x_CXD, w_DV, target_CX, any_C, total_CX, entropy_CX, trained = kept
    zeros_CX = 0.0 * target_CX
    logprob_CX, slope_CX = (zeros_CX if isinstance(c, SymbolicZero) else c + zeros_CX for c in cotangents)
    pieces = _pieces(w_DV, form.vocab_chunk)

    def piece(dx_CXD, xs):
        w, first = xs

        def one(dw, xs):
            x, target, any_wanted, total, entropy, logprob, slope, dx = xs

            def add():
                logp = form.logits(x, w, w_DV.shape[1] - first) - total[:, None]
                hit = (target - first)[:, None] == jnp.arange(w.shape[1])
                each = logprob[:, None] + slope[:, None] * (logp + entropy[:, None])
                dz = (jnp.where(hit, logprob[:, None], 0.0) - jnp.exp(logp) * each) / form.temperature
                dz = dz.astype(x.dtype)
                product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
                return dx + product(dz, w.T), dw if trained is None else dw + product(x.T, dz)

            dx, dw = jax.lax.cond(any_wanted, add, lambda: (dx, dw))
            return dw, dx

        nothing = None if trained is None else jnp.zeros(w.shape, jnp.float32) + zeros_CX[0, 0]
        dw, dx_CXD = jax.lax.scan(
            one, nothing, (x_CXD, target_CX, any_C, total_CX, entropy_CX, logprob_CX, slope_CX, dx_CXD)
        )
        return dx_CXD, dw

    dx_CXD, dw_PDV = jax.lax.scan(piece, jnp.zeros(x_CXD.shape, jnp.float32) + zeros_CX[..., None], pieces)
    dw_DV = None
    if trained is not None:
        dw_DV = jnp.moveaxis(dw_PDV, 0, 1).reshape(len(w_DV), -1)[:, : w_DV.shape[1]].astype(w_DV.dtype)
    return dx_CXD.astype(x_CXD.dtype), dw_DV, None, None


_scored.defvjp(_keep, _gradients, symbolic_zeros=True)


def _pieces(w_DV: jax.Array, vocab_chunk: int) -> tuple[jax.Array, jax.Array]:
    """The output matrix as [pieces, D, width], filled up with zeros, and the first entry of each."""
    d, v = w_DV.shape
    if v <= vocab_chunk:
        return w_DV[None], jnp.zeros(1, jnp.int32)
    # Widths are multiples of 128. One that divides V is preferred, unless it were below vocab_chunk ÷ 4.
    widths = [w for w in range(vocab_chunk // LANES * LANES, vocab_chunk // 4, -LANES) if v % w == 0]
    count = -(-v // vocab_chunk)
    even = -(-v // count)  # rounded up, as below
    width = widths[0] if widths else min(-(-even // LANES) * LANES, vocab_chunk)
    count = -(-v // width)
    padded = jnp.pad(w_DV, ((0, 0), (0, count * width - v))) if count * width > v else w_DV
    return jnp.moveaxis(padded.reshape(d, count, width), 1, 0), jnp.arange(count) * width


def _sums(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
    """Partial sums of the softmax over one vocabulary chunk: (peak, Σe, Σe·(z − peak), z[target] or 0).

    peak is the largest z of the chunk, e = exp(z − peak).
    """
    peak = logits.max(axis=-1)
    z = logits - peak[..., None]
    e = jnp.exp(z)
    hit = target[..., None] == jnp.arange(logits.shape[-1])
    return peak, e.sum(axis=-1), (e * z).sum(axis=-1), jnp.where(hit, logits, 0.0).sum(axis=-1)


def _join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The partial sums of two chunks together."""
    peak = jnp.maximum(a[0], b[0])
    (total_a, mean_a), (total_b, mean_b) = _rebase(a, peak), _rebase(b, peak)
    return peak, total_a + total_b, mean_a + mean_b, a[3] + b[3]


def _rebase(sums: tuple[jax.Array, ...], peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second and third sum relative to a larger peak."""
    shift = sums[0] - peak
    scale = jnp.exp(shift)
    return scale * sums[1], scale * (sums[2] + jnp.where(scale > 0, shift, 0.0) * sums[1])


def _over_devices(sums: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    """The partial sums of all devices' parts of the vocabulary together."""
    peak = jax.lax.pmax(sums[0], axis)
    total, mean = _rebase(sums, peak)
    return peak, *(jax.lax.psum(x, axis) for x in (total, mean, sums[3]))


def _finish(sums: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """log softmax(z)[target] and the entropy logsumexp(z) − Σ softmax(z)·z."""
    peak, total, mean, hit = sums
    log_total = jnp.log(total)
    return (hit - peak) - log_total, log_total - mean / total


def score(
    logits: Float[Array, '*rows V'],
    target: Int[Array, '*rows'],
) -> tuple[Float[Array, '*rows'], Float[Array, '*rows']]:
    """log softmax(z)[target] and the entropy of softmax(z) over the last axis."""
    return _finish(_sums(logits, target))
