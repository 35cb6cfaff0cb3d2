"""The rewriter behind a server: a language model is asked for the trace with code, and to finish what went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from retool_jax.core.answers import FILTERED, REFUSED, Answer, Failure, Request
from retool_jax.core.endpoint import Endpoint
from retool_jax.traces import prompts, repair
from retool_jax.traces.drafts import Draft
from retool_jax.traces.intake import Pair, refuse
from retool_jax.traces.verification import Judged

NAME = 'endpoint'


@dataclasses.dataclass(frozen=True)
class Asked:
    """A server as a rewriter."""

    endpoint: Endpoint
    candidates: int  # answers per trace
    parameters: Mapping[str, float]  # what goes into every request: temperature, max_tokens

    def rewrite(self, pairs: Sequence[Pair]) -> list[Draft | Judged]:
        """`candidates` drafts of each trace, side by side; what the server does not answer is dropped."""
        asked = [(problem, words, n) for problem, words in pairs for n in range(self.candidates)]
        requests = (self._request(prompts.rewrite_messages(p, words), n) for p, words, n in asked)
        found: list[Draft | Judged] = []
        for (problem, words, n), answer in zip(asked, self.endpoint.answers(requests)):
            if fault := _fault(answer):
                found.append(refuse(problem, words, 'rewriter', fault, NAME, n))
            else:
                draft = repair.read(problem, prompts.unmarked(said(answer)))
                found.append(dataclasses.replace(draft, rewriter=NAME, candidate=n))
        return found

    def finish(self, cut: Sequence[tuple[Judged, str]]) -> list[Draft | None]:
        """Drafts of traces that were cut at an output that is not as claimed, (trace, its text trace), gone on with
        from there; None where there is no answer."""
        requests = (
            self._request(prompts.finish_messages(j.draft.problem, words, j.cut), j.draft.candidate) for j, words in cut
        )
        found: list[Draft | None] = []
        for (judged, _), answer in zip(cut, self.endpoint.answers(requests)):
            if _fault(answer):
                found.append(None)
                continue
            draft = repair.read(judged.draft.problem, judged.cut + prompts.unmarked(said(answer)))
            done = (*(name for name in judged.draft.repairs if name != 'finished'), *draft.repairs, 'finished')
            found.append(
                dataclasses.replace(
                    draft, repairs=tuple(dict.fromkeys(done)), rewriter=NAME, candidate=judged.draft.candidate
                )
            )
        return found

    def judge(self, pairs: Iterable[Pair]) -> tuple[list[Pair], list[Judged]]:
        """The traces that the model does not hold for wrong, and those that it does: the paper's second verification.

        What it gives no verdict on is kept.
        """
        pairs, kept, dropped = list(pairs), [], []
        requests = (self._request(prompts.judge_messages(problem, words), 0) for problem, words in pairs)
        for (problem, words), answer in zip(pairs, self.endpoint.answers(requests)):
            if not _fault(answer) and prompts.judged(said(answer)) is False:
                dropped.append(refuse(problem, words, 'verdict', f'{self.endpoint.settings.model} holds it for wrong'))
            else:
                kept.append((problem, words))
        return kept, dropped

    def _request(self, messages: Sequence[Mapping[str, str]], candidate: int) -> Request:
        return Request(messages=messages, parameters=self.parameters, candidate=candidate)


def said(answer: Answer) -> str:
    """What a model answered, without the thoughts that some servers leave before it."""
    return answer.text.rpartition('</think>')[2].strip()


def _fault(answer: Answer | Failure) -> str:
    """Why there is nothing to read in an answer; '' where there is."""
    if isinstance(answer, Failure):
        return f'no answer: {answer.reason}'
    if answer.finish in (FILTERED, REFUSED):
        return f'the model refused ({answer.finish})'
    return '' if said(answer) else 'an empty answer'
