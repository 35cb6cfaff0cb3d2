"""Clocks of the benches: sides of a comparison in turns, and what was compiled meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np


def compilations() -> list[str]:
    """A list to which every compilation of this process is added from now on."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith('backend_compile_duration') else None
    )
    return compiled


def in_turns(
    sides: dict[str, Callable[[int], float]], repeats: int, warm: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each side: all once to warm up, then one after the other, `repeats` times."""
    for work in sides.values():
        work(0)
    warm()
    seconds = {name: [] for name in sides}
    for i in range(1, repeats + 1):
        for name, work in sides.items():
            seconds[name].append(work(i))
    return {name: float(np.median(taken)) for name, taken in seconds.items()}


def clock(work: Callable, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work(*arguments))
    return time.perf_counter() - began
