"""Which rows hold which prompt: the samples of one share its KV, and all share the beginning that all have.

What rows of one engine hold, those of another have no use of.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from retool_jax.rollout.requests import Request

type Key = tuple[int, int]  # an engine, and a prompt


class Prompts:
    """What the rows' caches hold of the prompts of one run. A row's slots stay as they are until others are written."""

    def __init__(self, requests: Sequence[Request], common: tuple[int, ...], each: int):
        """common: ids that prompts begin with; those that begin otherwise, or with nothing else, are fed whole. each:
        rows of an engine."""
        # Equal ids share a prefill, whatever their problems are called; a number stands for them, made once.
        number: dict[tuple[int, ...], int] = {}
        self.of = [number.setdefault(request.prompt, len(number)) for request in requests]  # request → its prompt
        self.common, self.each = common, each
        self.begun: set[int] = set()  # rows whose first slots hold `common`
        self.held: dict[Key, tuple[int, jax.Array]] = {}  # the row that holds a prompt, logits behind it

    def deal(self, admitted: Mapping[int, int]) -> tuple[dict[Key, int], dict[Key, list[int]]]:
        """{prompt: the row that has to be fed it} and {prompt: the rows that copy it}, of {new row: its request}."""
        leaders: dict[Key, int] = {}
        followers = collections.defaultdict(list)
        for r, index in admitted.items():
            key = self._key(r, index)
            if key in self.held or key in leaders:
                followers[key].append(r)
            else:
                leaders[key] = r
        return leaders, followers

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether ids that are to be fed go on behind the common beginning."""
        n = len(self.common)
        return 0 < n < len(ids) and tuple(ids[:n]) == self.common

    def first(self, rows: Iterable[int]) -> list[int]:
        """Of rows that are to begin with `common` those that have to be fed it: the first of each engine that holds it
        nowhere."""
        holding = {r // self.each for r in self.begun}
        firsts: dict[int, int] = {}
        for r in rows:
            if r // self.each not in holding:
                firsts.setdefault(r // self.each, r)
        return list(firsts.values())

    def sources(self, rows: Iterable[int]) -> dict[int, list[int]]:
        """{a row that holds `common`: the rows of its engine, out of `rows`}."""
        holding = {r // self.each: r for r in reversed(list(self.begun))}
        found = collections.defaultdict(list)
        for r in rows:
            found[holding[r // self.each]].append(r)
        return found

    def place(self, r: int, begins: bool) -> None:
        """Notes whether the first slots of a row hold the common beginning, now that something is fed to it."""
        (self.begun.add if begins else self.begun.discard)(r)

    def leave(self, r: int, others: Mapping[int, int]) -> None:
        """A row is about to be overwritten: of its prompt another row that holds it takes its place, if one does.
        others: {row: its request} of those in use."""
        for key, (source, logits) in list(self.held.items()):
            if source == r:
                heir = next((i for i, index in others.items() if self._key(i, index) == key), None)
                del self.held[key]
                if heir is not None:
                    self.held[key] = (heir, logits)

    def hold(
        self, fed: Mapping[Key, int], wanted: Callable[[Key], bool], logits_of: Callable[[int], jax.Array]
    ) -> None:
        """Notes which rows were fed a prompt, and forgets the prompts that nobody asks for any more."""
        held = self.held | {key: (r, logits_of(r)) for key, r in fed.items() if wanted(key)}
        self.held = {key: found for key, found in held.items() if wanted(key)}

    def _key(self, r: int, index: int) -> Key:
        return r // self.each, self.of[index]
