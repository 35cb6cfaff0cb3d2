"""What a server streams, gathered into one answer, and how long it asks to be left alone."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from typing import Any

from retool_jax.core.answers import REFUSED, Answer, Request

STOPPED_BY = ('stop_reason', 'matched_stop')  # fields of vLLM and of SGLang: a stop string, or an end token's id
THOUGHTS = ('reasoning_content', 'reasoning')  # fields of servers with a reasoning parser


class Reply:
    """The events of one streamed answer, of chats or of continued texts; the attributes say what came until now."""

    def __init__(self):
        self.finish: str | None = None  # None: it is not through
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._stopped_by, self._refused, self._usage, self._pieces = None, False, None, 0

    def take(self, event: Any) -> None:
        """Takes one event; what it lacks is passed over, since servers differ in what they leave out."""
        self._usage = getattr(event, 'usage', None) or self._usage
        for choice in getattr(event, 'choices', None) or ():
            self._pieces += 1
            delta = getattr(choice, 'delta', None)
            if delta is None:
                self._texts.append(_first(choice, 'text') or '')
            else:
                refusal = _first(delta, 'refusal') or ''
                self._refused |= bool(refusal)
                self._texts.append((_first(delta, 'content') or '') + refusal)
                self._thoughts.append(_first(delta, *THOUGHTS) or '')
            self.finish = _first(choice, 'finish_reason') or self.finish
            if self.finish is not None and any(hasattr(choice, name) for name in STOPPED_BY):
                found = _first(choice, *STOPPED_BY)
                self._stopped_by = '' if found is None else found

    def answer(self, request: Request) -> Answer:
        """The whole of it, once `finish` is there."""
        asked = request.prompt if request.prompt is not None else ''.join(str(m) for m in request.messages)
        guess = len(asked) // 4 if isinstance(asked, str) else len(asked)
        return Answer(
            text=_join(self._texts),
            finish=REFUSED if self._refused else str(self.finish),
            stopped_by=self._stopped_by,
            prompt_tokens=_count(self._usage, 'prompt_tokens', guess),
            completion_tokens=_count(self._usage, 'completion_tokens', self._pieces),
            reasoning=_join(self._thoughts),
        )


def wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After, which gives a number or a date; None where there is none that can be read."""
    text = headers.get('retry-after', '').strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _first(part: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(part, name, None)) is not None), None)


def _count(usage: Any, name: str, otherwise: int) -> int:
    told = _first(usage, name)
    return otherwise if told is None else int(told)


def _join(parts: list[str]) -> str:
    # Half a pair of surrogates is no text, and could not be written as UTF-8.
    return ''.join(parts).encode('utf-8', 'replace').decode()
