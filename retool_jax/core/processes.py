"""Several processes, one run: joining them, and which of them writes."""

from __future__ import annotations

import os

import jax

PROCESSES = 'RETOOL_PROCESSES'  # environment variable: a number of processes, or 'auto' on TPU pods and under SLURM


def join() -> None:
    """Makes this process one of a run's, before JAX's first use; without RETOOL_PROCESSES it stays alone.

    RETOOL_PROCESSES=auto asks the cluster (TPU pods, SLURM, Open MPI). A number goes with
    RETOOL_COORDINATOR=host:port and RETOOL_PROCESS=0 … number − 1.

    Errors: ValueError naming the variable that is missing or wrong.
    """
    wanted = os.environ.get(PROCESSES, '')
    if not wanted or jax.distributed.is_initialized():
        return
    if wanted == 'auto':
        jax.distributed.initialize()
        return
    given = {name: os.environ.get(name, '') for name in ('RETOOL_COORDINATOR', 'RETOOL_PROCESS')}
    missing = next((name for name, value in given.items() if not value), None)
    if missing or not wanted.isdigit():
        raise ValueError(f'{missing or PROCESSES}: {PROCESSES}={wanted!r} is "auto", or a number that goes with '
                         'RETOOL_COORDINATOR=host:port and RETOOL_PROCESS=0, 1, …')
    jax.distributed.initialize(given['RETOOL_COORDINATOR'], int(wanted), int(given['RETOOL_PROCESS']))


def leads() -> bool:
    """Whether this process is the one that writes metrics, episodes and configuration."""
    return jax.process_index() == 0
