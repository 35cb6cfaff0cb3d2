"""Episodes to arrays: several episodes share a row, told apart by segment ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Batch
from retool_jax.core.records import Episode


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Deals episodes out to rows, longest first: lists of episode indices whose lengths add up to at most `width`.

    The same lengths give the same rows in every process. Raises: UserError for an episode that is
    longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > width:
            raise UserError(f'pack: an episode has {lengths[i]} tokens, a row holds {width}; raise the row width')
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(width)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack(
    episodes: Sequence[Episode],
    *,
    width: int,
    rows: int,
    segments: int,
    groups: Sequence[int] | None = None,
    baseline: Sequence[bool] | None = None,
    update: Sequence[bool] | None = None,
) -> Batch:
    """The batch of these episodes, numpy arrays of rows × `width`.

    rows: a micro-batch; the number of rows is rounded up to a multiple of it.
    segments: N, the most episodes a row may hold; rows with more are split.
    groups: one id per episode, equal for samples of one problem; default: each its own.
    baseline, update: which episodes count in their group's baseline, and which are trained on;
      default: all.
    An episode without a reward counts as 0 (supervised traces have none).
    """
    dealt = [
        part[i : i + segments]
        for part in first_fit([len(e.tokens) for e in episodes], width)
        for i in range(0, len(part), segments)
    ]
    count = max(rows, -(-len(dealt) // rows) * rows)
    ints = lambda *shape: np.zeros(shape, np.int32)
    batch = Batch(
        tokens_BT=ints(count, width),
        segment_ids_BT=ints(count, width),
        positions_BT=ints(count, width),
        acted_BT=np.zeros((count, width), bool),
        sampler_logprob_BT=np.zeros((count, width), np.float32),
        reward_BN=np.zeros((count, segments), np.float32),
        group_BN=np.full((count, segments), -1, np.int32),
        baseline_BN=np.zeros((count, segments), bool),
        update_BN=np.zeros((count, segments), bool),
    )
    for r, members in enumerate(dealt):
        start = 0
        for n, i in enumerate(members):
            episode, end = episodes[i], start + len(episodes[i].tokens)
            batch.tokens_BT[r, start:end] = episode.tokens
            batch.segment_ids_BT[r, start:end] = n + 1
            batch.positions_BT[r, start:end] = np.arange(end - start)
            batch.acted_BT[r, start:end] = episode.acted
            batch.sampler_logprob_BT[r, start:end] = episode.logprobs
            batch.reward_BN[r, n] = episode.reward.value if episode.reward else 0.0
            batch.group_BN[r, n] = groups[i] if groups is not None else i
            batch.baseline_BN[r, n] = baseline[i] if baseline is not None else True
            batch.update_BN[r, n] = update[i] if update is not None else True
            start = end
    return batch


def join(batches: Sequence[Batch], rows: int = 1) -> tuple[Batch, list[tuple[int, int]]]:
    """One batch of all rows, filled up with empty ones, and the (first, last + 1) rows of each part.

    rows: a micro-batch, as in `pack`. The whole has rows × 2^k of them: few shapes are ever compiled, and whatever
    number of devices divides a micro-batch divides the whole.
    """
    ends = np.cumsum([len(b.tokens_BT) for b in batches]).tolist()
    total = rows
    while total < ends[-1]:
        total *= 2
    empty = pack(
        [], width=batches[0].tokens_BT.shape[1], rows=total - ends[-1] or 1, segments=batches[0].reward_BN.shape[1]
    )
    parts = [*batches, empty] if total > ends[-1] else list(batches)
    fields = {f: np.concatenate([getattr(b, f) for b in parts]) for f in batches[0].__dataclass_fields__}
    return Batch(**fields), list(zip([0, *ends[:-1]], ends))
