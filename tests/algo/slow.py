"""The formulas again, slowly: plain Python floats, one episode and one token at a time, no arrays.

Also lays the same episodes out as arrays in any arrangement (one per row, packed, padded, permuted), so
that a test computes once by hand and compares every arrangement with it.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import numpy as np

FIELDS = (
    'logprob', 'old', 'sampler', 'reference', 'entropy', 'value', 'old_value', 'returns', 'advantage',
    'reward',
)  # fmt: skip


@dataclasses.dataclass
class Tale:
    """One episode as lists; `acted` has at least one True."""

    acted: list[bool]
    lists: dict[str, list[float]]
    score: float
    group: int
    baseline: bool = True
    update: bool = True

    def at(self, name: str) -> list[float]:
        """Values at the acted tokens."""
        return [x for x, m in zip(self.lists[name], self.acted) if m]


def tales(seed: int, count: int = 9, groups: int = 3, longest: int = 11) -> list[Tale]:
    """Random episodes: prompts, tool spans, trailing tool tokens, some outside baseline or update."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        length = rng.randint(3, longest)
        acted = [rng.random() < 0.6 for _ in range(length)]
        acted[0] = False
        acted[rng.randint(1, length - 1)] = True
        lists = {name: [rng.gauss(0, 1) for _ in range(length)] for name in FIELDS}
        lists['logprob'] = [-abs(x) - 0.1 for x in lists['logprob']]
        for name, width in (('old', 0.4), ('sampler', 0.3), ('reference', 0.8)):
            base = 'old' if name == 'sampler' else 'logprob'
            lists[name] = [x + rng.gauss(0, width) for x in lists[base]]
        lists['entropy'] = [abs(x) for x in lists['entropy']]
        made.append(Tale(acted, lists, rng.choice([-1.0, 1.0, 0.3]), i % groups, rng.random() < 0.85, True))
        made[-1].update = made[-1].baseline and rng.random() < 0.85
    made[0].baseline = made[0].update = True
    return made


@dataclasses.dataclass
class Layout:
    """Arrays of episodes: `rows` lists which episodes share a row, in order."""

    rows: list[list[int]]
    arrays: dict[str, np.ndarray]  # FIELDS, acted, segment_ids [B, T]; the other fields of Tale [B, N]
    spans: dict[int, tuple[int, slice]]

    def back(self, array_BT) -> dict[int, list[float]]:
        """The tokens of every episode, cut out of a [B, T] array."""
        array_BT = np.asarray(array_BT)
        return {i: array_BT[row, span].tolist() for i, (row, span) in self.spans.items()}

    def __getattr__(self, name: str) -> np.ndarray:
        return self.arrays[name]


def lay_out(episodes: list[Tale], rows: list[list[int]], width: int, segments: int, fill: float = 0.0) -> Layout:
    """Writes episodes into rows of `width` tokens; padding holds `fill` (NaN to see that nobody reads it)."""
    arrays = {name: np.full((len(rows), width), fill, np.float32) for name in FIELDS}
    arrays |= {'acted': np.zeros((len(rows), width), bool)}
    arrays |= {'segment_ids': np.zeros((len(rows), width), np.int32)}
    arrays |= {'score': np.zeros((len(rows), segments), np.float32)}
    arrays |= {'group': np.full((len(rows), segments), -1, np.int32)}
    arrays |= {name: np.zeros((len(rows), segments), bool) for name in ('baseline', 'update')}
    spans = {}
    for b, row in enumerate(rows):
        start = 0
        for n, i in enumerate(row):
            tale = episodes[i]
            span = slice(start, start + len(tale.acted))
            start, spans[i] = span.stop, (b, span)
            for name in FIELDS:
                arrays[name][b, span] = tale.lists[name]
            arrays['acted'][b, span], arrays['segment_ids'][b, span] = tale.acted, n + 1
            for name in ('score', 'group', 'baseline', 'update'):
                arrays[name][b, n] = getattr(tale, name)
    return Layout(rows, arrays, spans)


def arrangements(episodes: list[Tale]) -> dict[str, Layout]:
    """The same episodes in five arrangements. Numbers of padding differ, too."""
    n = len(episodes)
    alone = [[i] for i in range(n)]
    shuffled = random.Random(1).sample(range(n), n)
    packed = [shuffled[i : i + 4] for i in range(0, n, 4)]
    return {
        'plain': lay_out(episodes, alone, 11, 1),
        'padded': lay_out(episodes, [*alone, [], []], 19, 2, fill=math.nan),
        'permuted': lay_out(episodes, [[i] for i in shuffled], 11, 1),
        'packed': lay_out(episodes, packed, 44, 4, fill=math.nan),
        'packed and padded': lay_out(episodes, [[], *packed, []], 50, 5, fill=7.0),
    }


def gae(rewards, values, gamma, lam):
    """Plain GAE by its definition, a sum of discounted temporal differences; no masks."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def spread(tale: Tale, at_acted) -> list[float]:
    """Numbers of the acted tokens put back in their places, 0 elsewhere."""
    left = iter(at_acted)
    return [next(left) if m else 0.0 for m in tale.acted]


def group_advantage(kind: str, mine: float, rewards: list[float]) -> float:
    """`rewards` are the group's valid ones, mine among them."""
    n = len(rewards)
    if n == 1:
        return mine
    if len(set(rewards)) == 1:
        return 0.0
    if kind == 'rloo':
        return mine - (sum(rewards) - mine) / (n - 1)
    centred = mine - sum(rewards) / n
    return centred / (statistics.stdev(rewards) + 1e-6) if kind == 'grpo' else centred


def whitened(numbers: list[float]) -> list[float]:
    """By the statistics module; at least two numbers."""
    mean, variance = statistics.fmean(numbers), statistics.variance(numbers)
    return [(x - mean) / math.sqrt(variance + 1e-8) for x in numbers]


def advantages(settings, episodes: list[Tale]) -> list[list[float]]:
    """What `advantages.advantages` should give from the `reward` lists, per episode and token."""
    found = []
    for tale in episodes:
        rewards = tale.at('reward')
        if settings.kind == 'gae':
            at_acted = gae(rewards, tale.at('old_value'), settings.gamma, settings.lam)
        elif settings.kind == 'reinforce_pp':
            n = len(rewards)
            at_acted = [sum(settings.gamma ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]
        else:
            peers = [x for x in episodes if x.baseline and x.group == tale.group]
            peers = [sum(x.at('reward')) for x in peers]
            mine = sum(rewards)
            at_acted = [group_advantage(settings.kind, mine, peers) if tale.baseline else 0.0] * len(rewards)
        found.append(at_acted)
    if settings.whiten:
        flat = iter(whitened([a for tale, row in zip(episodes, found) if tale.update for a in row]))
        found = [[next(flat) for _ in row] if tale.update else row for tale, row in zip(episodes, found)]
    return [spread(tale, row if tale.update else [0.0] * len(row)) for tale, row in zip(episodes, found)]


def clip(x, low, high):
    """x, held in [low, high]."""
    return min(max(x, low), high)


def ratio(a, b):
    """exp(clamp(a − b, ±20))."""
    return math.exp(clip(a - b, -20, 20))


def policy_losses(s, tale: Tale, logprobs: list[float], frozen: list[float]) -> list[float]:
    """Policy loss at the acted tokens; `frozen` is the current logprob where no gradient flows."""
    olds, losses = tale.at('old'), []
    gap = statistics.fmean(x - o for x, o in zip(logprobs, olds))
    for x, fixed, o, a in zip(logprobs, frozen, olds, tale.at('advantage')):
        if s.kind == 'cispo':
            losses.append(-clip(ratio(fixed, o), 1 - s.clip_low, 1 + s.clip_high) * a * x)
            continue
        r = ratio(gap, 0.0) if s.kind == 'gspo' else ratio(x, o)
        loss = max(-a * r, -a * clip(r, 1 - s.clip_low, 1 + s.clip_high))
        losses.append(min(loss, -a * s.dual_clip) if s.dual_clip is not None and a < 0 else loss)
    return losses


def weights(s, tale: Tale) -> list[float]:
    """Sampler/trainer weights at the acted tokens."""
    gaps = [o - p for o, p in zip(tale.at('old'), tale.at('sampler'))]
    if s.correction == 'none':
        return [1.0] * len(gaps)
    if s.correction == 'token':
        return [min(ratio(g, 0.0), s.correction_cap) for g in gaps]
    mean = ratio(statistics.fmean(gaps), 0.0)
    kept = s.correction_low <= mean <= s.correction_high
    return [min(mean, s.correction_cap) if kept else 0.0] * len(gaps)


def kl(kind: str, x: float, reference: float) -> float:
    """The three estimators."""
    d = clip(x - reference, -20, 20)
    return {'k1': d, 'k2': d * d / 2, 'k3': math.exp(-d) + d - 1}[kind]


def total(s, per_episode: list[list[float]]) -> float:
    """Aggregates losses at the acted tokens of the episodes in the update."""
    tokens = sum(len(row) for row in per_episode)
    if s.aggregation == 'token-mean':
        return sum(sum(row) for row in per_episode) / tokens
    if s.aggregation == 'seq-mean-token-mean':
        return sum(sum(row) / len(row) for row in per_episode) / len(per_episode)
    return sum(sum(row) for row in per_episode) / (len(per_episode) * s.aggregation_constant)


def actor_loss(s, episodes: list[Tale], current: list[list[float]], frozen: list[list[float]]) -> float:
    """The whole actor loss, with ℓ (at acted tokens) given beside the episodes so that it can be nudged."""
    rows = []
    for tale, now, fixed in zip(episodes, current, frozen):
        if tale.update:
            policy = policy_losses(s, tale, now, fixed)
            row = [w * x for w, x in zip(weights(s, tale), policy)]
            row = [x - s.entropy_coef * h for x, h in zip(row, tale.at('entropy'))]
            if s.kl_in == 'loss':
                row = [x + s.kl_coef * kl(s.kl_kind, p, q) for x, p, q in zip(row, now, tale.at('reference'))]
            rows.append(row)
    return total(s, rows)


def actor_gradient(s, episodes: list[Tale], nudge: float = 1e-6) -> list[list[float]]:
    """Central differences of `actor_loss` in every acted ℓ."""
    frozen = [tale.at('logprob') for tale in episodes]
    current = [list(row) for row in frozen]
    found = []
    for row in current:
        found.append([])
        for t, x in enumerate(row):
            ends = []
            for end in (x + nudge, x - nudge):
                row[t] = end
                ends.append(actor_loss(s, episodes, current, frozen))
            row[t] = x
            found[-1].append((ends[0] - ends[1]) / (2 * nudge))
    return found


def critic_loss(s, episodes: list[Tale]) -> float:
    """½·mean of the larger square, over acted tokens, times value_coef."""
    found = []
    for tale in (t for t in episodes if t.update):
        for v, old, g in zip(tale.at('value'), tale.at('old_value'), tale.at('returns')):
            held = v if s.value_clip is None else clip(v, old - s.value_clip, old + s.value_clip)
            found.append(0.5 * max((v - g) ** 2, (held - g) ** 2))
    return s.value_coef * statistics.fmean(found)
