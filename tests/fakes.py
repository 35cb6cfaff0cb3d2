"""Stand-ins for the two things a rollout test should not need: a trained tokenizer and a sandbox."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from retool_jax.core.records import ExecResult, Verdict
from retool_jax.text.tokenizer import Tokenizer

SPECIALS = {'<|endoftext|>': 256, '<|im_start|>': 257, '<|im_end|>': 258}


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of 259 ids: the 256 bytes, each its own id, and the three special tokens."""
    return Tokenizer(
        token_bytes=[bytes([b]) for b in range(256)] + [b''] * len(SPECIALS),
        special_ids=SPECIALS,
        eos_ids=(SPECIALS['<|im_end|>'], SPECIALS['<|endoftext|>']),
        pad_id=SPECIALS['<|endoftext|>'],
        encode_text=lambda text: list(text.encode()),
    )


class FakePool:
    """An executor that runs nothing: looks results up, or computes them with a function of the code.

    `results` maps code to an ExecResult, or to what the snippet prints, or is a function that returns
    either (or raises, which the future then carries). Code that a mapping lacks fails as a snippet would.
    `latency_s` is a number or a function of the code; 0 answers within `submit`. Every submitted code
    is kept in `codes`, in order.
    """

    def __init__(
        self,
        results: Mapping[str, ExecResult | str] | Callable[[str], ExecResult | str],
        latency_s: float | Callable[[str], float] = 0.0,
    ):
        self.results, self.latency_s = results, latency_s
        self.codes: list[str] = []

    def submit(self, code: str) -> Future[ExecResult]:
        self.codes.append(code)
        future: Future[ExecResult] = Future()
        wait = self.latency_s(code) if callable(self.latency_s) else self.latency_s
        if wait > 0:
            timer = threading.Timer(wait, self._answer, (future, code))
            timer.daemon = True
            timer.start()
        else:
            self._answer(future, code)
        return future

    def _answer(self, future: Future[ExecResult], code: str) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if callable(self.results):
                result = self.results(code)
            else:
                missing = ExecResult(Verdict.ERROR, '', 'NameError: not scripted\n', exit_code=1)
                result = self.results.get(code, missing)
            if isinstance(result, str):
                result = ExecResult(Verdict.OK, result, '', exit_code=0)
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)
