"""Settings of a pool where a test names only what it is about."""

from __future__ import annotations

from configs import base
from retool_jax.sandbox.settings import SandboxSettings

LIMITS = dict(cpu_s=1.0, wall_s=3.0, memory_mb=256, processes=64, scratch_mb=16, scratch_inodes=512)


def tiny(**changes) -> SandboxSettings:
    """The tiny configuration's sandbox with changes."""
    block = base.sandbox('tiny').to_dict()
    del block['addresses']
    return SandboxSettings(**block | changes)
