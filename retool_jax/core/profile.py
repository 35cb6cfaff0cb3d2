"""Traces by JAX's profiler: what the time of a step goes into, on the host and on the devices."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from retool_jax.core.checks import MANY, check, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Traces, for TensorBoard's profiler or xprof."""

    # steps of which a trace is written below profile/ of the run's folder, a folder each; one that compiles is mostly
    # the compiler's. H none
    steps: tuple[int, ...]

    def __post_init__(self):
        check(self, steps=within(0, MANY))


@contextlib.contextmanager
def traced(directory: Path, steps: Sequence[int]) -> Iterator[Callable[[int, object], None]]:
    """Traces of `steps`, in a block: what it yields is called as a step begins, with the arrays that the step before
    leaves behind. They are waited for, so that a trace holds its step whole, and nothing of the next."""
    runs = False

    def begin(step: int, left: object) -> None:
        nonlocal runs
        if runs:
            jax.block_until_ready(left)
            jax.profiler.stop_trace()
        runs = step in steps
        if runs:
            jax.profiler.start_trace(directory / f'step_{step:05d}')

    try:
        yield begin
    finally:
        if runs:
            jax.profiler.stop_trace()
