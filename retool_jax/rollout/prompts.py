"""Which rows hold which prompt: the samples of one share its KV, and all share the beginning that all have."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

import jax

from retool_jax.rollout.requests import Request


class Prompts:
    """What the rows' caches hold of the prompts of one run. A row's slots stay as they are until others are written."""

    def __init__(self, requests: Sequence[Request], common: tuple[int, ...]):
        """common: ids that prompts begin with; those that begin otherwise, or with nothing else, are fed whole."""
        # Equal ids share a prefill, whatever their problems are called; a number stands for them, made once.
        number: dict[tuple[int, ...], int] = {}
        self.of = [number.setdefault(request.prompt, len(number)) for request in requests]  # request → its prompt
        self.common = common
        self.begun: set[int] = set()  # rows whose first slots hold `common`
        self.held: dict[int, tuple[int, jax.Array]] = {}  # prompt → row that holds it, logits behind it

    def deal(self, admitted: Mapping[int, int]) -> tuple[dict[int, int], dict[int, list[int]]]:
        """{prompt: the row that has to be fed it} and {prompt: the rows that copy it}, of {new row: its request}."""
        leaders: dict[int, int] = {}
        followers = collections.defaultdict(list)
        for r, index in admitted.items():
            prompt = self.of[index]
            if prompt in self.held or prompt in leaders:
                followers[prompt].append(r)
            else:
                leaders[prompt] = r
        return leaders, followers

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether ids that are to be fed go on behind the common beginning."""
        n = len(self.common)
        return 0 < n < len(ids) and tuple(ids[:n]) == self.common

    def place(self, r: int, begins: bool) -> None:
        """Notes whether the first slots of a row hold the common beginning, now that something is fed to it."""
        (self.begun.add if begins else self.begun.discard)(r)

    def leave(self, r: int, others: Mapping[int, int]) -> None:
        """A row is about to be overwritten: of its prompt another row that holds it takes its place, if one does.
        others: {row: its request} of those in use."""
        for prompt, (source, logits) in list(self.held.items()):
            if source == r:
                heir = next((i for i, index in others.items() if self.of[index] == prompt), None)
                del self.held[prompt]
                if heir is not None:
                    self.held[prompt] = (heir, logits)

    def keep(self, wanted: Iterable[int]) -> None:
        """Forgets the prompts that no request asks for any more."""
        wanted = set(wanted)
        self.held = {prompt: held for prompt, held in self.held.items() if prompt in wanted}
