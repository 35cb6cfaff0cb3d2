"""Checkpoints of a run: orbax underneath, plain nested dicts of arrays on disk.

One directory per step holds `state` (the arrays) and `meta` (JSON: data cursor, version, whatever
else a step is resumed from). A step exists once its directory has its final name; a killed save
leaves nothing that `latest` would name.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import temporary_paths

from retool_jax.core import mirror, processes
from retool_jax.core.errors import UserError

_TREE, _META = 'state', 'meta'


def _clear(directory: Any) -> None:
    """Removes what killed saves have left below a folder; in a thread, since a notebook's own has an event loop."""
    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(temporary_paths.cleanup_temporary_paths(directory))).result()


class Checkpoints:
    """The checkpoints below one directory; at most one save is in flight.

    Args:
      directory: made where it is missing.
      keep_last: how many of the newest steps stay.
      keep_best_metric: a number in `meta`; the step where it was highest stays too.

    Raises:
      UserError: keep_last below 1.
    """

    def __init__(self, directory: str | os.PathLike, keep_last: int, keep_best_metric: str | None = None):
        if keep_last < 1:
            raise UserError(f'keep_last={keep_last}: at least the newest checkpoint has to stay')
        self.directory = mirror.place(Path(directory).absolute())
        self._best = keep_best_metric
        logging.get_absl_logger().addFilter(_not_of_orbax)
        kept = [ocp.training.preservation_policies.LatestN(keep_last)]
        if keep_best_metric is not None:
            best = ocp.training.preservation_policies.BestN(
                get_metric_fn=lambda metrics: metrics[keep_best_metric], n=1, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=_META)
        # Orbax itself clears away what killed saves have left while all processes list the folder; and in a store a
        # folder that this empties is not there any more, of which the others' lists make an error.
        processes.first(lambda: _clear(self.directory))
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            context=context,
            save_decision_policy=_Always(),
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(kept),
        )
        self._saving: Any = None

    def steps(self) -> list[int]:
        """Steps that are complete, ascending."""
        self.wait()
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest(self) -> int | None:
        """The newest complete step, None without one."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest `keep_best_metric` (the newest of equals), None without one."""
        self.wait()
        scored = [(c.metrics[self._best], c.step) for c in self._orbax.checkpoints if c.metrics]
        return max(scored)[1] if scored else None

    def save(self, step: int, tree: Any, meta: dict[str, Any], wait: bool = False) -> None:
        """Saves any pytree of arrays with its JSON `meta`, in the background unless `wait`.

        Waits for the save before it, whose failure is raised here. The arrays may be donated as soon
        as this returns. A step that is already there is left as it is.

        Raises:
          TypeError: `meta` holds what JSON does not.
          OSError: the disk is full or may not be written.
        """
        if step in self.steps():
            return
        metrics = {self._best: float(meta[self._best])} if self._best in meta else None
        parts = {_TREE: _nest(_flatten(tree)), _META: json.loads(json.dumps(meta))}  # written later: a copy
        try:
            self._saving = self._orbax.save_checkpointables_async(step, parts, metrics=metrics)
        except Exception as error:
            raise _disk_error(error, self.directory) from error
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is in flight; raises what made the last save fail."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except Exception as error:
                raise _disk_error(error, self.directory) from error

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON half of a step. Raises: UserError for a step that is not there."""
        self._require(step)
        return self._orbax.load_checkpointables(step, {_META: None})[_META]

    def restore(self, step: int, like_tree: Any) -> tuple[Any, dict[str, Any]]:
        """Returns (tree, meta) of a step; structure, dtypes and shardings are those of `like_tree`.

        `like_tree` holds arrays or ShapeDtypeStructs (with `.sharding` where it matters).

        Raises:
          UserError: no such step, or a checkpoint of another architecture (the entries are named).
        """
        self._require(step)
        wanted = _flatten(like_tree, abstract=True)
        # The shardings of the save are left out: they may name devices of processes that this run does not have.
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        saved = _flatten(jax.tree.map(shape, self._orbax.checkpointables_metadata(step).metadata[_TREE]), abstract=True)
        _compare(saved, wanted, self.directory / str(step))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = {
            path: leaf if leaf.sharding is not None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for path, leaf in wanted.items()
        }  # without it orbax takes the devices of the run that saved
        loaded = self._orbax.load_checkpointables(step, {_TREE: _nest(placed), _META: None})
        return _unflatten(like_tree, _flatten(loaded[_TREE])), loaded[_META]

    def close(self) -> None:
        """Waits for the save in flight and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _require(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            there = ', '.join(map(str, steps)) or 'none'
            raise UserError(f'{self.directory}: no checkpoint of step {step}; there are: {there}')


def _not_of_orbax(record) -> bool:
    # Orbax's threads log a failure with a traceback, several times; `wait` raises it once.
    return f'{os.sep}orbax{os.sep}' not in record.pathname


class _Always:
    """Saves whenever asked: the trainer decides when."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        return True


def _flatten(tree: Any, abstract: bool = False) -> dict[tuple[str, ...], Any]:
    """{path: leaf}; paths are made of dict keys, field names and indices, as strings."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if _is_key(leaf):  # typed PRNG keys are stored as their words
            leaf = jax.eval_shape(jax.random.key_data, leaf) if abstract else jax.random.key_data(leaf)
        elif abstract:
            sharding = getattr(leaf, 'sharding', None)
            if not isinstance(sharding, jax.sharding.Sharding):
                sharding = None
            leaf = leaf if hasattr(leaf, 'shape') else np.asarray(leaf)
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        leaves[tuple(_word(entry) for entry in path)] = leaf
    return leaves


def _word(entry: Any) -> str:
    for field in ('key', 'name', 'idx'):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    raise TypeError(f'a pytree entry without a name: {entry!r}')


def _nest(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for word in path[:-1]:
            node = node.setdefault(word, {})
        node[path[-1]] = leaf
    return tree


def _unflatten(like_tree: Any, leaves: dict[tuple[str, ...], Any]) -> Any:
    paths, structure = jax.tree_util.tree_flatten_with_path(like_tree)
    ordered = []
    for path, like in paths:
        leaf = leaves[tuple(_word(entry) for entry in path)]
        if _is_key(like):
            leaf = jax.random.wrap_key_data(jnp.asarray(leaf), impl=_key_impl(like))
        ordered.append(leaf)
    return structure.unflatten(ordered)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(like: Any) -> Any:
    implementations = []
    jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), like)  # takes abstract keys too
    return implementations[0]


def _compare(saved: dict, wanted: dict, where: Path) -> None:
    wrong = [f'{".".join(p)} is not in it' for p in wanted if p not in saved]
    wrong += [f'{".".join(p)} is not in this run' for p in saved if p not in wanted]
    for path in wanted:
        if path in saved:
            has, needs = saved[path], wanted[path]
            if has.shape != needs.shape or has.dtype != needs.dtype:
                wrong.append(f'{".".join(path)} is {_type(has)}, this run has {_type(needs)}')
    if wrong:
        more = f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''
        raise UserError(f'{where}: a checkpoint of another architecture: {"; ".join(wrong[:3])}{more}')


def _type(leaf: Any) -> str:
    return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _disk_error(error: Exception, directory: Path) -> Exception:
    """Tensorstore reports the operating system's refusals as ValueErrors in its own words."""
    text = ' '.join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if re.search(re.escape(os.strerror(number)), text) or getattr(error, 'errno', None) == number:
            return OSError(number, f'{os.strerror(number)} (saving a checkpoint)', str(directory))
    return error
