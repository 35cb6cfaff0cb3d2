"""What a language model's server is asked and what it said, kept on disk by the hash of the request.

One file an answer, not one file of all: it takes its name when it is whole, so a killed run leaves no torn line; what
lies on disk does not depend on the order in which answers came; and several processes may write at once. A file costs
a block of the disk, which a generated answer is worth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FILTERED, REFUSED = 'content_filter', 'refusal'  # values of Answer.finish besides 'stop' and 'length'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One answer that is wanted: to a chat (`messages`), or the continuation of a text (`prompt`); one of the two."""

    messages: Sequence[Mapping[str, str]] | None = None  # {'role': …, 'content': …}, in order
    prompt: str | Sequence[int] | None = None  # text, or the ids of the server's tokenizer
    # what goes into the request as it is: max_tokens, temperature, top_p, stop, …, and what only some servers know
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidate: int = 0  # tells answers to the same request apart; it is not sent

    def __post_init__(self):
        if (self.messages is None) == (self.prompt is None):
            raise ValueError('a request has either messages or a prompt')

    def name(self, model: str) -> str:
        """Hash of all that is sent to `model`, and the candidate's number: 'DIGEST-NUMBER'."""
        said = {'messages': list(self.messages)} if self.prompt is None else {'prompt': self.prompt}
        content = {'model': model, 'parameters': dict(self.parameters), **said}
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=list)
        return f'{hashlib.sha256(text.encode()).hexdigest()[:40]}-{self.candidate}'


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server said to its end. Empty and refused answers are answers like others."""

    text: str
    finish: str  # the server's word: 'stop', 'length', 'content_filter', …; 'refusal' where the model refused
    # what ended it, where the server tells (vLLM, SGLang): a stop string, the id of an end token, or '' for no stop
    # string; None: it does not tell
    stopped_by: str | int | None = None
    # as the server counted them; where it tells nothing four characters are a token, and so is a piece of the stream
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str = ''  # what a server with a reasoning parser keeps apart from the text


@dataclasses.dataclass(frozen=True)
class Failure:
    """No answer. It is not kept, so the same request of a later run is sent again."""

    reason: str
    asked: bool = True  # False: the budget was used up before


class Store:
    """A folder of answers."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)

    def path(self, name: str) -> Path:
        """Where the answer of that name lies: 256 folders, so that none grows long."""
        return self.directory / name[:2] / f'{name}.json'

    def get(self, name: str) -> Answer | None:
        """The answer of that name, None where there is none, or none that can be read: it is asked for again."""
        return _read(self.path(name))

    def put(self, name: str, answer: Answer) -> None:
        """Keeps an answer, on the disk when this returns."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f'.{path.name}.new')
        with open(new, 'w', encoding='utf-8') as file:
            json.dump(dataclasses.asdict(answer), file, ensure_ascii=True, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())  # before it has its name: a machine that loses power has it whole or not at all
        os.replace(new, path)

    def __len__(self) -> int:
        return sum(1 for _ in self.directory.glob('??/*.json'))

    def __iter__(self) -> Iterator[Answer]:
        """All that can be read, in the order of their names."""
        return (answer for path in sorted(self.directory.glob('??/*.json')) if (answer := _read(path)) is not None)


def _read(path: Path) -> Answer | None:
    try:
        return Answer(**json.loads(path.read_text(encoding='utf-8')))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # damaged: by another program, or by a disk
        return None
