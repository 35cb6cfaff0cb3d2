"""The tag automaton: one state per row finds `</code>` and `</answer>` in a stream of token ids.

A tag is several tokens, its ends merge with neighbours (`>\\n`, `><`), and a token may hold part of
a character. So tags are matched as bytes: an Aho-Corasick automaton over the tags' bytes, lifted
once to tokens, `next_state[state, token]`, which the decode loop reads with one gather a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

START = 0  # the state of an empty row, and after every special or fed-back token
NONE, CODE, ANSWER = 0, 1, 2  # values of TagTable.stops
TAGS = {'</code>': CODE, '</answer>': ANSWER}
SPOKEN = ('<code>', '</code>', '<interpreter>', '</interpreter>', '<answer>', '</answer>')  # all that anyone writes


@dataclasses.dataclass(frozen=True, eq=False)
class TagTable:
    """The lifted automaton: S states, V ids of the model's padded vocabulary.

    A state with `stops[state] != 0` is reached exactly by tokens that complete a tag; of a token that
    completes two, the first counts. Bytes of that token after the tag are not lost: such states come
    in pairs (tag, prefix of a next tag begun by those bytes), so a row that goes on continues exactly.
    """

    next_state: np.ndarray  # int32 [S, V]
    stops: np.ndarray  # int8 [S]: NONE, CODE or ANSWER
    prefix: np.ndarray  # int16 [S]: the byte automaton's state behind each state
    byte_next: np.ndarray  # int16 [N, 256]: byte automaton; after a whole tag it starts anew
    byte_stop: np.ndarray  # int8 [N, 256]: the tag that this byte completes

    @property
    def states(self) -> int:
        """Number of states S."""
        return self.next_state.shape[0]

    def walk(self, ids: Iterable[int], state: int = START) -> int:
        """The state after `ids` (host side; the device does the same with a gather a step)."""
        for i in ids:
            state = int(self.next_state[state, i])
        return state


def build_table(token_bytes: Sequence[bytes], width: int, tags: Mapping[str, int] = TAGS) -> TagTable:
    """Lifts the automaton of `tags` (string → stop number) to tokens.

    `width` is V, the model's vocabulary; ids without bytes (special, padding) lead to START. Tags left
    out are not looked for: a text-only rollout passes `</answer>` alone. Raises: ValueError if V is
    smaller than the tokenizer, or if one tag could hide another.
    """
    if width < len(token_bytes):
        raise ValueError(f'model vocabulary {width} is smaller than the tokenizer ({len(token_bytes)} ids)')
    byte_next, byte_stop = _byte_automaton(tags)
    n = len(byte_next)

    lengths = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
    order = np.argsort(-lengths, kind='stable')  # longest first: at byte j a leading slice is still alive
    spelled = np.frombuffer(b''.join(token_bytes[i] for i in order), np.uint8)
    starts = np.concatenate([[0], np.cumsum(lengths[order])])[:-1]
    alive = np.searchsorted(-lengths[order], -np.arange(1, lengths.max(initial=0) + 1), side='right')

    at = np.repeat(np.arange(n, dtype=np.int16)[:, None], len(order), axis=1)  # [N, V]
    hit = np.zeros_like(at, dtype=np.int8)
    for j, m in enumerate(alive):
        byte = spelled[starts[:m] + j]
        done = byte_stop[at[:, :m], byte]
        hit[:, :m] = np.where(hit[:, :m] == NONE, done, hit[:, :m])
        at[:, :m] = byte_next[at[:, :m], byte]
    at[:, lengths[order] == 0] = START

    # States: the byte automaton's own, then the pairs (tag, prefix) that some token reaches. Each tag's
    # pair with the empty prefix is always there, so that the numbering starts alike for every vocabulary.
    reached = {(int(h), 0) for h in tags.values()}
    key = hit.astype(np.int32) * n + at
    reached |= {divmod(int(k), n) for k in np.unique(key[hit != NONE])}
    number = np.zeros((max(tags.values()) + 1) * n, np.int32)
    number[:n] = np.arange(n)
    pairs = sorted(reached)
    for state, (stop, prefix) in enumerate(pairs, start=n):
        number[stop * n + prefix] = state

    rows = np.full((n, width), START, np.int32)
    rows[:, order] = number[key]
    prefix = np.array([*range(n), *(p for _, p in pairs)], np.int16)
    stops = np.array([NONE] * n + [stop for stop, _ in pairs], np.int8)
    return TagTable(rows[prefix], stops, prefix, byte_next, byte_stop)


def overshoot(table: TagTable, token_bytes: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """Bytes of the last id that lie after the tag it completes; `ids` are what the model wrote since START.

    Raises: ValueError if the last id completes no tag.
    """
    state = int(table.prefix[table.walk(ids[:-1])])
    last = token_bytes[ids[-1]] if ids and ids[-1] < len(token_bytes) else b''
    for n, byte in enumerate(last, start=1):
        if table.byte_stop[state, byte]:
            return last[n:]
        state = table.byte_next[state, byte]
    raise ValueError('the last token completes no tag')


def _byte_automaton(tags: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Aho-Corasick over the tags' bytes: next state int16 [N, 256] and completed tag int8 [N, 256]."""
    spelled = {tag.encode(): stop for tag, stop in tags.items()}
    if not spelled or b'' in spelled or min(spelled.values()) <= NONE:
        raise ValueError(f'tags {dict(tags)!r}: at least one, none empty, stop numbers above 0')
    for tag in spelled:
        if any(tag != other and tag in other for other in spelled):
            raise ValueError(f'tag {tag.decode()!r} lies inside another tag, which it would hide')

    prefixes = sorted({tag[:k] for tag in spelled for k in range(len(tag))}, key=lambda p: (len(p), p))
    number = {prefix: i for i, prefix in enumerate(prefixes)}  # number[b''] == START
    byte_next = np.zeros((len(prefixes), 256), np.int16)
    byte_stop = np.zeros((len(prefixes), 256), np.int8)
    for prefix, i in number.items():
        for byte in range(256):
            read = prefix + bytes([byte])
            # The tag that ends here, if any (no tag lies inside another, so at most one does).
            stop = next((spelled[read[k:]] for k in range(len(read)) if read[k:] in spelled), NONE)
            byte_stop[i, byte] = stop
            if stop == NONE:
                suffixes = (read[k:] for k in range(len(read) + 1))
                byte_next[i, byte] = next(number[s] for s in suffixes if s in number)
    return byte_next, byte_stop
