"""Episodes to arrays: several episodes share a row, told apart by segment ids.

Where attention allows it (`attention.shares`) a row holds a beginning that its episodes have in common once: the prompt
of a group's samples, or the instruction of all prompts.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Batch
from retool_jax.core.records import Episode


@dataclasses.dataclass(frozen=True)
class Beginnings:
    """What episodes have in common: a family begins alike."""

    family: Sequence[int]  # of each episode
    length: Sequence[int]  # of each family, tokens; 0: nothing


def beginnings(episodes: Sequence[Episode]) -> Beginnings:
    """What episodes share: their whole prompts where they are samples of the same ones, else what all prompts begin
    with, by which more tokens are saved.

    Each keeps the last token of its prompt: its own first token is predicted from it.
    """
    prompts = [tuple(e.tokens[: max(e.prompt_length - 1, 0)]) for e in episodes]
    counts = collections.Counter(prompts)
    whole = sum(len(prompt) * (count - 1) for prompt, count in counts.items())
    least, most = min(counts, default=()), max(counts, default=())  # what these begin with alike all others do
    common = next((i for i, (a, b) in enumerate(zip(least, most)) if a != b), len(least))
    if whole < common * (len(prompts) - 1):
        return Beginnings([0] * len(prompts), [common])
    several = {prompt: n for n, prompt in enumerate(p for p, count in counts.items() if count > 1)}
    # The family behind all others has nothing in common: its episodes fill what these leave of their rows.
    return Beginnings([several.get(p, len(several)) for p in prompts], [*map(len, several), 0])


def _nothing(count: int) -> Beginnings:
    return Beginnings([0] * count, [0])


def first_fit(lengths: Sequence[int], width: int, shared: Beginnings | None = None) -> list[list[int]]:
    """Deals episodes out to rows, family by family, longest first: lists of episode indices whose lengths, without the
    beginnings that lie there already, add up to at most `width`.

    The same lengths give the same rows in every process. Raises: UserError for an episode that is
    longer than a row.
    """
    shared = shared or _nothing(len(lengths))
    family, length = shared.family, shared.length
    rows: list[list[int]] = []
    room: list[int] = []
    held: list[set[int]] = []  # families
    for i in sorted(range(len(lengths)), key=lambda i: (family[i], -lengths[i], i)):
        if lengths[i] > width:
            raise UserError(f'pack: an episode has {lengths[i]} tokens, a row holds {width}; raise the row width')
        needed = lambda r, i=i: lengths[i] - length[family[i]] * (family[i] in held[r])
        row = next((r for r, free in enumerate(room) if free >= needed(r)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
            held.append(set())
        room[row] -= needed(row)
        rows[row].append(i)
        held[row].add(family[i])
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
    share: bool = False,
) -> Batch:
    """The batch of these episodes, numpy arrays of rows × `width`.

    rows: a micro-batch; the number of rows is rounded up to a multiple of it.
    segments: N, the most episodes a row may hold; rows with more are split.
    groups: one id per episode, equal for samples of one problem; default: each its own.
    baseline, update: which episodes count in their group's baseline, and which are trained on;
      default: all.
    share: whether beginnings that episodes of a row have in common lie there once (`beginnings`).
    An episode without a reward counts as 0 (supervised traces have none).
    """
    shared = beginnings(episodes) if share else _nothing(len(episodes))
    dealt = [
        part[i : i + segments]
        for part in first_fit([len(e.tokens) for e in episodes], width, shared)
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
        prefix_ids_BT=ints(count, width) if share else None,
    )

    def lay(r: int, start: int, segment: int, prefix: int, episode: Episode, first: int, last: int) -> int:
        """Lays tokens of an episode into a row; where they end."""
        at = np.s_[r, start : start + last - first]
        batch.tokens_BT[at] = episode.tokens[first:last]
        batch.segment_ids_BT[at] = segment
        batch.positions_BT[at] = np.arange(first, last)
        batch.acted_BT[at] = episode.acted[first:last]
        batch.sampler_logprob_BT[at] = episode.logprobs[first:last]
        if share:
            batch.prefix_ids_BT[at] = prefix
        return at[1].stop

    for r, members in enumerate(dealt):
        start, there = 0, {}  # families whose beginning lies in the row once → its segment
        held = collections.Counter(shared.family[i] for i in members)
        for n, i in enumerate(members):
            episode, family = episodes[i], shared.family[i]
            first = shared.length[family] if held[family] > 1 else 0
            if first and family not in there:
                there[family] = segments + 1 + len(there)
                start = lay(r, start, there[family], there[family], episode, 0, first)
            start = lay(r, start, n + 1, there.get(family, n + 1), episode, first, len(episode.tokens))
            batch.reward_BN[r, n] = episode.reward.value if episode.reward else 0.0
            batch.group_BN[r, n] = groups[i] if groups is not None else i
            batch.baseline_BN[r, n] = baseline[i] if baseline is not None else True
            batch.update_BN[r, n] = update[i] if update is not None else True
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
    width, segments, share = *batches[0].tokens_BT.shape[1:], batches[0].reward_BN.shape[1], batches[0].prefix_ids_BT
    empty = pack([], width=width, rows=total - ends[-1] or 1, segments=segments, share=share is not None)
    parts = [*batches, empty] if total > ends[-1] else list(batches)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), list(zip([0, *ends[:-1]], ends))
