"""Problems on their way into a run: read, checked before anything starts, and told of where they are left out."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import grain

from retool_jax.core import console, processes, storage
from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.rollout.library import Model, Spoken
from retool_jax.tasks import gym, problems, stream
from retool_jax.tasks.child import Child
from retool_jax.text.template import prompt_ids

FILE = 'left_out.jsonl'  # in a run's folder
NAMED = 3  # problems that a line names; all stand in FILE


class Intake:
    """Reads problem files; what is left out of them is said and remembered."""

    def __init__(self, unreadable: str, parses: Callable[[str], bool], key: str = 'reward.unreadable'):
        """unreadable: what follows a row that cannot be read, or a gold answer that `parses` (`Grader.parses`) cannot
        read: 'refuse' or 'leave_out'; key: where the configuration says so."""
        self.key = key
        self.leaves_out = unreadable == 'leave_out'
        self.parses = functools.cache(parses)
        self.left: list[tuple[str, str]] = []  # a problem's id, or the place of a row, and why

    def read(
        self, path: str | Path, limit: int | None = None, child: Child | None = None, key: str = 'problems'
    ) -> list[Problem]:
        """The first `limit` problems of a file or a folder whose gold answers can be read; of a generator's the
        held-out ones, made by `child` (`gym.maker`) where several calls share one. key: where the configuration names
        the path.

        Raises: UserError, naming the row or the problem, for what cannot be read and is not left out.
        """
        if gym.named(path):
            return self._drawn(path, gym.EVALUATION, limit, child)
        loaded = problems.load(storage.local(key, str(path)), leave_out=self.leaves_out)
        for line in loaded.remarks(path):
            console.say(line)
        self.left += [('', text) for text in loaded.unreadable]
        (kept,) = self._sifted([grain.MapDataset.source(loaded.problems)], self._gold_fault)
        return list(stream.once(kept))[:limit]

    def open(self, sources: Sequence[stream.Source], child: Child | None = None) -> list[grain.MapDataset]:
        """The sources of a stream (`data.open_sources`), without unreadable gold answers.

        Raises:
          UserError: nothing is left of a source, or what `stream.open_sources` refuses.
        """
        with contextlib.nullcontext(child) if child else gym.maker() as child:
            read = lambda path: self.read(path, key='data.sources')
            training = lambda path: self._drawn(path, gym.TRAINING, child=child) if gym.named(path) else read(path)
            return self._sifted(stream.open_sources(sources, training), self._gold_fault)

    def worked[T](self, pairs: Sequence[tuple[Problem, T]]) -> list[tuple[Problem, T]]:
        """Worked answers, those of problems whose gold answers can be read.

        Raises:
          UserError: none is left, or one is unreadable and may not be left out.
        """
        found = [(pair, self._gold_fault(pair[0])) for pair in pairs]
        left = [(pair[0].id, text) for pair, text in found if text]
        self.left += left
        if len(left) == len(pairs) > 0:
            raise UserError(f'no worked answer is left: {describe(left)}')
        if left:
            console.say(f'{len(left)} of {len(pairs)} worked answers are left out: {describe(left)}')
        return [pair for pair, text in found if not text]

    def fit(self, datasets: Sequence[grain.MapDataset], model: Model, max_tokens: int) -> list[grain.MapDataset]:
        """The datasets without problems whose prompt leaves no room for an answer.

        Raises: UserError where a source has no other problems.
        """
        return self._sifted(datasets, lambda problem: overlong(problem, model, max_tokens))

    def write(self, directory: Path) -> None:
        """Lists what is left out in the run's folder, a line each."""
        if processes.leads() and self.left:
            lines = [json.dumps({'id': name, 'why': why}, ensure_ascii=False) + '\n' for name, why in self.left]
            (directory / FILE).write_text(''.join(lines))

    def _drawn(
        self, source: str | Path, split: str, limit: int | None = None, child: Child | None = None
    ) -> list[Problem]:
        """Problems of a generator."""
        drawn = gym.read(source, split, limit, child)
        for line in drawn.remarks:
            console.say(line)
        return drawn.problems

    def _sifted(self, datasets: Sequence[grain.MapDataset], fault: Callable[[Problem], str]) -> list[grain.MapDataset]:
        kept, found = stream.leave_out(datasets, fault)
        left = [(problem.id, text) for problem, text in found]
        self.left += left
        if not all(map(len, kept)):
            raise UserError(f'data: no problem of a source is left: {describe(left)}')
        if left:
            console.say(f'{len(left)} of {sum(map(len, datasets))} problems are left out: {describe(left)}')
        return kept

    def _gold_fault(self, problem: Problem) -> str:
        if problem.judge or self.parses(problem.answer):
            return ''
        text = f'answer {problem.answer[:80]!r} cannot be read as mathematics'
        if not self.leaves_out:
            raise UserError(
                f'problem {problem.id!r} of {problem.source}: {text}: correct it in the file, or set '
                f'{self.key}=leave_out'
            )
        return text


def overlong(problem: Problem, model: Model | Spoken, max_tokens: int) -> str:
    """What is wrong with a prompt that fills the budget of an episode, '' for one that leaves room for an answer."""
    frame = _frame(model)
    if frame + 3 * len(problem.question.encode('utf-8', 'surrogatepass')) < max_tokens:
        return ''  # a token is a byte at least, and normal form C makes three of one at most
    count = len(prompt_ids(model.template, model.tokenizer, problem.question))
    return '' if count < max_tokens else f'a prompt of {count} tokens leaves no room in turns.max_tokens={max_tokens}'


def tell_overlong(asked: Sequence[Problem], model: Model | Spoken, max_tokens: int) -> None:
    """Says which problems of an evaluation count as wrong because no answer fits behind their prompt."""
    found = [(problem.id, text) for problem in asked if (text := overlong(problem, model, max_tokens))]
    if found:
        console.say(f'warning: {len(found)} of {len(asked)} problems count as wrong: {describe(found)}')


def describe(left: Sequence[tuple[str, str]]) -> str:
    """The first of what is left out, by name, and how many more there are."""
    named = '; '.join(f'{name!r}: {why}' if name else why for name, why in left[:NAMED])
    return named + (f'; and {len(left) - NAMED} more' if len(left) > NAMED else '')


@functools.lru_cache(maxsize=4)
def _frame(model: Model | Spoken) -> int:
    return len(prompt_ids(model.template, model.tokenizer, ''))
