"""What ends a turn and what follows: the rules between the sampler and the sandbox.

Pure host logic over one Episode. `advance` takes what the policy just wrote, `resume` what the tool
returned; both say what happens next. Tokens are appended, never encoded again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from retool_jax.core.checks import MANY, check, one_of, within
from retool_jax.core.records import Episode, ExecResult, Stop, ToolCall, Verdict
from retool_jax.rollout.sampler import STOP_ANSWER, STOP_CODE, STOP_EOS, STOP_NONE
from retool_jax.text import tags, template
from retool_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets:
    """How much an episode may write, and what ends it."""

    max_tokens: int  # tokens of an episode, prompt and tool output included. P 16384; R 2,048 of prompt + 16,384
    max_turn_tokens: int  # tokens that the policy may write in one turn. H as max_tokens; O 16384
    max_turns: int  # turns of the policy in an episode. P does not say; R 8
    max_calls: int  # `</code>`, executed or refused. P does not say; H 7, which leaves the last turn for the answer
    on_cap: str  # past max_calls: 'answer' says so once and goes on, 'end' ends the episode. P does not say; H answer
    on_answer: str  # at `</answer>`: 'end' ends the episode, 'eos' lets it go on to EOS. P does not say; H end; O eos

    def __post_init__(self):
        check(
            self,
            max_tokens=within(1, MANY),
            max_turn_tokens=within(1, MANY),
            max_turns=within(1, MANY),
            max_calls=within(0, MANY),
            on_cap=one_of(('answer', 'end')),
            on_answer=one_of(('end', 'eos')),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnSettings(Budgets):
    """The budgets of a model with or without tools."""

    tools: bool  # False: text only, `</code>` is plain text and nothing is executed


@dataclasses.dataclass(frozen=True)
class Sample:
    """Goes on sampling: at most `allowance` tokens until the next stop."""

    allowance: int


@dataclasses.dataclass(frozen=True)
class Run:
    """Waits for the executor."""

    code: str


@dataclasses.dataclass(frozen=True)
class Feed:
    """Feeds ids that the policy did not write and the episode holds already, then goes on sampling."""

    ids: list[int]
    allowance: int


@dataclasses.dataclass(frozen=True)
class End:
    """The episode is finished."""

    stop: Stop


Next = Sample | Run | Feed | End


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of one run: budgets, tokenizer, tag automaton and how feedback is rendered."""

    settings: TurnSettings
    tokenizer: Tokenizer
    table: tags.TagTable
    render: Callable[[ExecResult], str]  # what the model sees of a result, without the tags

    def allowance(self, episode: Episode, written: int = 0) -> int:
        """Tokens the policy may still write in this turn, of which it has written `written`."""
        s = self.settings
        return min(s.max_turn_tokens - written, s.max_tokens - len(episode.tokens))

    def advance(self, episode: Episode, tokens, logprobs, stop: int, version: int) -> Next:
        """Takes the policy's new tokens; `stop` is the sampler's STOP_* (STOP_NONE: still in the turn)."""
        episode.append(tokens, acted=True, logprobs=logprobs, version=version)
        turn = self.turn_ids(episode)
        if stop == STOP_NONE:
            return Sample(self.allowance(episode, len(turn)))
        episode.turns += 1
        if stop == STOP_CODE:
            return self._close_call(episode, turn)
        episode.void |= template.is_void(self.tokenizer.decode(turn))
        return End({STOP_EOS: Stop.EOS, STOP_ANSWER: Stop.ANSWER}.get(stop, Stop.LENGTH))

    def resume(self, episode: Episode, code: str, result: ExecResult) -> Next:
        """Takes the executor's result of the call that `advance` asked for."""
        if result.verdict == Verdict.SANDBOX_ERROR:
            self._record(episode, code, result, '')
            return End(Stop.FAULT)
        return self._feed(episode, code, result, self.render(result))

    def turn_ids(self, episode: Episode) -> list[int]:
        """What the policy has written since it was last fed."""
        acted = episode.acted
        start = len(acted)
        while start > episode.prompt_length and acted[start - 1]:
            start -= 1
        return episode.tokens[start:]

    def _close_call(self, episode: Episode, turn: list[int]) -> Next:
        s = self.settings
        snippet = template.extract_snippet(self.tokenizer.decode(turn))
        if snippet is None:
            episode.void = True
        if len(episode.calls) >= s.max_calls:
            told = any(call.verdict == Verdict.CAP for call in episode.calls)
            if s.on_cap == 'end' or told:
                return End(Stop.TURNS)
            return self._feed(episode, '', _refused(Verdict.CAP), template.CAP_FEEDBACK)
        if snippet is None:
            return self._feed(episode, '', _refused(Verdict.FORMAT), template.FORMAT_FEEDBACK)
        return Run(snippet.code)

    def _feed(self, episode: Episode, code: str, result: ExecResult, text: str) -> Next:
        self._record(episode, code, result, text)
        if episode.turns >= self.settings.max_turns:
            return End(Stop.TURNS)
        over = tags.overshoot(self.table, self.tokenizer.token_bytes, self.turn_ids(episode))
        ids = self.tokenizer.encode(template.wrap_feedback(text, over.decode('utf-8', 'replace')))
        if len(episode.tokens) + len(ids) >= self.settings.max_tokens:  # no room to answer it
            return End(Stop.LENGTH)
        episode.append(ids, acted=False)
        return Feed(ids, self.allowance(episode))

    def _record(self, episode: Episode, code: str, result: ExecResult, text: str) -> None:
        episode.calls.append(
            ToolCall(
                turn=episode.turns - 1,
                code=code,
                verdict=result.verdict,
                stdout=result.stdout,
                stderr=result.stderr,
                feedback=template.neutralise(text),
                position=len(episode.tokens),
                wall_s=result.wall_s,
                fault=result.fault,
            )
        )


def _refused(verdict: Verdict) -> ExecResult:
    return ExecResult(verdict=verdict, stdout='', stderr='')
