"""Several processes, one run: joining them, waiting and telling each other, and which of them writes."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax._src import distributed

from retool_jax.core import columns, ring, signals
from retool_jax.core.cli import explain
from retool_jax.core.errors import UserError
from retool_jax.core.others import Others

PROCESSES = 'RETOOL_PROCESSES'  # environment variable: a number of processes, or 'auto' on TPU pods and under SLURM
START_S = 1800  # seconds for all processes to start: the hosts of a pod are minutes apart, as on a loaded machine
SILENT_S = 50  # without a sign of life a process counts as dead, and the others end too
PATIENCE_S = 7 * 24 * 3600  # seconds of `wait`: others may be at tools, validation or reports; silence tells a dead one
LATE_S = 30  # from the end of a line between processes to the news of why: on a loaded machine

_others: list[Others] = []  # what hears of the other processes, to this one's very end
_rings: dict[tuple[int, ...], ring.Ring] = {}  # of `gather`, by their processes, once they have met
_words = itertools.count()  # that `word` has asked for


def join() -> None:
    """Makes this process one of a run's, before JAX's first use; without RETOOL_PROCESSES it stays alone.

    RETOOL_PROCESSES=auto asks the cluster (TPU pods, SLURM, Open MPI). A number goes with
    RETOOL_COORDINATOR=host:port and RETOOL_PROCESS=0 … number − 1.

    Raises: UserError naming the variable that is missing or wrong.
    """
    wanted = os.environ.get(PROCESSES, '')
    if not wanted or jax.distributed.is_initialized():
        return
    jax.config.update('jax_enable_preemption_service', False)  # it takes SIGTERM for itself
    patience = dict(initialization_timeout=START_S, heartbeat_timeout_seconds=SILENT_S)
    if wanted == 'auto':
        try:
            jax.distributed.initialize(**patience)
        except ValueError as error:
            raise UserError(
                f'{PROCESSES}=auto finds no cluster here ({error}); unset it, or give a number with '
                'RETOOL_COORDINATOR=host:port and RETOOL_PROCESS=0, 1, …'
            ) from None
    else:
        given = {name: os.environ.get(name, '') for name in ('RETOOL_COORDINATOR', 'RETOOL_PROCESS')}
        missing = next((name for name, value in given.items() if not value), None)
        if missing or not wanted.isdigit():
            raise UserError(
                f'{missing or PROCESSES}: {PROCESSES}={wanted!r} is "auto", or a number that goes with '
                'RETOOL_COORDINATOR=host:port and RETOOL_PROCESS=0, 1, …'
            )
        jax.distributed.initialize(given['RETOOL_COORDINATOR'], int(wanted), int(given['RETOOL_PROCESS']), **patience)
    state = distributed.global_state
    if signals.watch is not None and state.num_processes > 1:
        _others.append(Others(state.client, state.process_id, state.num_processes, state.coordinator_address, wait))
        _others[0].attend()


def refuse(what: str) -> None:
    """Raises a UserError where several processes are asked for, for work that one does alone."""
    wanted = os.environ.get(PROCESSES, '')
    if wanted not in ('', '1'):
        raise UserError(f'{PROCESSES}={wanted}: {what} is made by one process; start it once, without {PROCESSES}')


def leads() -> bool:
    """Whether this process is the one that writes metrics, episodes and configuration."""
    return jax.process_index() == 0


def count() -> int:
    """How many processes make the run."""
    return jax.process_count()


def wait() -> None:
    """Blocks until every process of the run has called it as often; a process alone returns at once.

    It is no collective of the devices: on CPU those give up after half a minute, and there may be no device yet.
    """
    if jax.process_count() == 1:
        return
    failed: list[Exception] = []

    def block() -> None:
        try:
            distributed.global_state.client.wait_at_barrier('retool_jax', PATIENCE_S * 1000)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=block, daemon=True)  # the main one still hears Ctrl-C
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def gather(item: object, members: tuple[int, ...] = ()) -> list:
    """The `item` of every process, in the order of the processes; each has to make the call.

    members: those that make the call and get each other's items, where these are not all; they have to `meet` before.
    It goes from host to host (`ring`), arrays as they lie (`columns`): no device has to have room for it. Those of one
    other process are in memory until none of them is used any more.
    """
    members = members or tuple(range(jax.process_count()))
    if len(members) == 1:
        return [item]
    meet(members)
    try:
        found = _rings[members].gather(columns.split(item))
    except RuntimeError:  # another one has ended, and why is on its way here
        for others in _others:
            others.hear(LATE_S)
        raise
    return [columns.join(found[i]) if i in found else item for i in members]


def meet(members: tuple[int, ...]) -> None:
    """Makes the lines between some processes (`gather`); all of the run have to make the call at once, each with those
    that it belongs to, of which each has as many."""
    if len(members) > 1 and members not in _rings:
        state, process = distributed.global_state, jax.process_index()
        names = ring.addresses(state.coordinator_address, state.process_id == 0)
        _rings[members] = ring.Ring(state.client, process, members, names, wait)


def peaks() -> tuple[float | None, float]:
    """The most bytes that one of this process's devices has held, None where they do not say, and the process itself in
    the host's memory."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = all('peak_bytes_in_use' in s for s in stats)
    fullest = max(s['peak_bytes_in_use'] for s in stats) if known else None
    return fullest, _resident_peak()


def _resident_peak() -> float:
    """The most bytes that this program has held in memory."""
    try:
        # `getrusage` would begin with what the process held that started this one: Linux keeps it over fork and exec.
        return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024.0
    except OSError:  # macOS, whose `getrusage` counts bytes and starts anew
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def word[T](value: T) -> T:
    """The `value` of the process that leads, in every process; plain (JSON).

    It goes through the store of the coordination service: no device is waited for, unlike in `gather`. Each process
    has to make the call, as often as the others.
    """
    if jax.process_count() == 1:
        return value
    client, key = distributed.global_state.client, f'retool_jax_words/{next(_words)}'
    if leads():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, PATIENCE_S * 1000))


def agree(numbers: Sequence[int]) -> None:
    """Raises `signals.stop` where any process was told to; the same in every process that has all their numbers."""
    if number := max(numbers):
        raise signals.stop(number)


def first[T](work: Callable[[], T]) -> T:
    """Calls `work` in the process that leads; all return its result, or raise the user's error that it raised.

    Raises:
      UserError: that of `work`, in every process.
    """
    result, refused = None, None
    if leads():
        try:
            result = work()
        except (UserError, OSError) as error:
            if jax.process_count() == 1:
                raise
            refused = explain(error) or str(error)
    result, refused = gather((result, refused))[0]
    if refused is not None:
        raise UserError(refused)
    return result
