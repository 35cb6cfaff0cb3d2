"""Host-side records: what a problem, a tool call and an episode are.

Read this first: every room speaks in these nouns. Standard library only, so that light
child processes (sandbox, grader) may import it.
"""

from __future__ import annotations

import dataclasses
import enum


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer."""

    id: str  # unique within its data set, stable over runs
    question: str  # plain words, no prompt wrapping
    answer: str  # gold answer, bare (no \boxed)
    source: str  # data set and split, e.g. 'arithmetic/new_operands'
    family: str  # kind of problem within the source; '' where there is none
    judge: str = ''  # who judges answers: '' mathematics, 'text' equal words, else a generator's verifier (tasks.gym)


class Verdict(enum.StrEnum):
    """How a tool call ended. The first seven come from the executor, the last two from the turn rules."""

    OK = 'ok'
    ERROR = 'error'  # exit status other than 0
    SIGNAL = 'signal'
    TIMEOUT = 'timeout'
    OOM = 'oom'
    OUTPUT_LIMIT = 'output_limit'
    SANDBOX_ERROR = 'sandbox_error'  # our fault, after retries; never shown to the model
    FORMAT = 'format'  # `</code>` without a well-formed snippet: nothing was executed
    CAP = 'cap'  # the call cap was reached: nothing was executed


class Fault(enum.StrEnum):
    """What failed where the verdict is SANDBOX_ERROR; nothing here can be brought about by a snippet."""

    WORKER = 'worker'  # the process that ran it died, again and again
    LIMITS = 'limits'  # a control group or a limit could not be set
    HANDLING = 'handling'  # an exception of ours in the handling of this one
    POOL = 'pool'  # the whole sandbox broke or was closed
    FULL = 'full'  # too many snippets wait
    SILENCE = 'silence'  # the sandbox said nothing in time
    SERVER = 'server'  # no server of a remote sandbox gave an answer


@dataclasses.dataclass(frozen=True, slots=True)
class ExecResult:
    """What the executor reports of one snippet. Text is valid Unicode (invalid bytes replaced)."""

    verdict: Verdict
    stdout: str
    stderr: str
    exit_code: int | None = None  # None where the process was killed
    signal: int | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0  # from the first guest instruction; queueing is not billed
    peak_mb: float = 0.0
    truncated: bool = False  # output beyond the byte limit was dropped
    fault: Fault | None = None  # with SANDBOX_ERROR alone


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """One `</code>` of an episode."""

    turn: int  # 0 for the first turn
    code: str  # '' where there was no well-formed snippet
    verdict: Verdict
    stdout: str
    stderr: str
    feedback: str  # the text between the interpreter tags, as the model saw it
    position: int  # tokens in the episode when the call was made
    wall_s: float
    fault: Fault | None = None  # with SANDBOX_ERROR alone


class Stop(enum.StrEnum):
    """Why an episode ended."""

    ANSWER = 'answer'
    EOS = 'eos'
    LENGTH = 'length'  # token budget, or feedback that would overflow it
    TURNS = 'turns'  # turn budget or call cap
    FAULT = 'fault'  # the sandbox itself failed, after retries: the episode leaves the update


@dataclasses.dataclass(frozen=True, slots=True)
class Reward:
    """The grader's opinion of an episode's final text."""

    value: float
    correct: bool  # boxed answer equivalent to gold
    exact: bool  # boxed answer equal to gold as a string
    lenient: bool  # the authors' rule: the last box of all that was said, or the last integer of its last line
    answer: str  # what was in the last box, '' without one
    late: bool = False  # the judge needed more than its time, so the answer counts as wrong


@dataclasses.dataclass(slots=True)
class Episode:
    """A whole trajectory: the only trace format (cold start, rollout, evaluation).

    tokens, acted, logprobs and versions have one entry per token, prompt included.
    `acted` is True where the policy wrote the token (the loss mask); it is set by whoever wrote
    the token and never found again from text. Logprobs are the sampler's, at the sampling
    temperature, and 0.0 where not acted. Versions name the weights that wrote the token (-1 where
    not acted). They are lists while the episode is written, and read alike once it is whole
    (core/columns.py).
    """

    problem: Problem
    sample: int  # index among the samples of this problem
    step: int  # training step that asked for the episode
    tokens: list[int] = dataclasses.field(default_factory=list)
    acted: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    prompt_length: int = 0
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    turns: int = 0  # completed turns of the policy
    stop: Stop | None = None
    void: bool = False  # some turn held neither a snippet nor an answer
    reward: Reward | None = None

    def append(self, tokens, acted: bool, logprobs=None, version: int = -1) -> None:
        """Appends tokens with one author; `logprobs` is given exactly when `acted`.

        Raises:
          ValueError: not one logprob for each acted token, or any for others.
        """
        n = len(tokens)
        if acted == (logprobs is None) or (acted and len(logprobs) != n):
            raise ValueError('acted tokens carry one logprob each; others carry none')
        self.tokens.extend(int(t) for t in tokens)
        self.acted.extend([acted] * n)
        self.logprobs.extend((float(x) for x in logprobs) if acted else [0.0] * n)
        self.versions.extend([version] * n)

    @property
    def acted_count(self) -> int:
        """Tokens the policy wrote."""
        return sum(self.acted)

    def segments(self) -> list[tuple[bool, list[int]]]:
        """Maximal runs of tokens with one author, in order: [(acted, ids), ...]. The prompt is its own run."""
        runs: list[tuple[bool, list[int]]] = []
        for i, (token, acted) in enumerate(zip(self.tokens, self.acted)):
            if runs and runs[-1][0] == acted and i != self.prompt_length:
                runs[-1][1].append(token)
            else:
                runs.append((acted, [token]))
        return runs
