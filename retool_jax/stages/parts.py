"""From configuration blocks to the parts of a run: model, rules, engine, executor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from ml_collections import ConfigDict

from retool_jax.core import console, processes, settings, sharding
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.model import decoder, hf
from retool_jax.rollout import hosts
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.library import Model, load_model
from retool_jax.rollout.requests import Executor, SamplingSettings
from retool_jax.rollout.sampler import Sampler, SamplerSettings
from retool_jax.rollout.turns import Budgets, Rules, TurnSettings
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.sandbox.pool import Pool
from retool_jax.sandbox.settings import SandboxSettings
from retool_jax.stages import embedded
from retool_jax.tasks.grader import Grader
from retool_jax.text import tags
from retool_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from retool_jax.sandbox.http.client import Remote

type Sandbox = Pool | Remote

# Purposes: streams of randomness that must never meet under one seed.
TRAINING, EVALUATION = 1, 2


def open_model(config: ConfigDict, directory: pathlib.Path) -> Model:
    """The model that block `model` names; without a path the embedded one, written below `directory`."""
    if config.path is None:
        if config.template != 'tiny':
            raise UserError('model.path is missing; give a Hugging Face model directory')
        if processes.leads():
            embedded.write_model(directory / 'model')
        processes.wait()
        if not (directory / 'model' / 'config.json').exists():  # a directory of this machine alone
            embedded.write_model(directory / 'model')
    return load_model(config.path or directory / 'model', config.template, config.tools, config.instruction)


def check_context(model: Model, tokens: int, key: str) -> None:
    """Refuses episodes longer than the positions that the weights know; `key` is what sets their length."""
    context = model.config.context
    if tokens > context:
        scaling = model.config.rope_scaling
        trained = scaling.original_max_position_embeddings if scaling else context
        factor = -(-tokens // trained)
        raise UserError(f'{key}={tokens} exceeds the {context} positions of the model (max_position_embeddings in '
                        f'config.json); lower it, or stretch them there with "rope_scaling": {{"rope_type": "yarn", '
                        f'"factor": {factor}.0, "original_max_position_embeddings": {trained}}}')


def load_policy(config: ConfigDict, model: Model, seed: int, mesh: jax.sharding.Mesh) -> Params:
    """f32 weights in the training layout: those of `model.path`, or random ones from `seed` without a path."""
    sizes = model.config
    rules = decoder.fit_rules(sizes, mesh, sharding.TRAIN_RULES)
    shardings = sharding.shardings(mesh, decoder.logical_axes(sizes), rules)
    if config.path is None:
        key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))  # plain numbers lie on no device
        return jax.jit(lambda data: embedded.init(sizes, jax.random.wrap_key_data(data)),
                       out_shardings=shardings)(key_data)
    with console.progress('loading weights', sum(len(leaf.names) for leaf in hf.leaves(sizes))) as advance:
        return hf.load(config.path, sizes, shardings, progress=lambda done, total: advance())


def make_sampler(model: Model, config: ConfigDict, tools: bool, mesh: jax.sharding.Mesh | None = None) -> Sampler:
    """The compiled half of rollout, from blocks `sampler` and (for `</answer>`) `turns`; over `mesh` where it has
    more than one device. Of several processes each has its own, over its part of `mesh`, unless the weights need
    the devices of more than one."""
    sizes = settings.build(SamplerSettings, config.sampler, 'sampler')
    table = make_table(model, tools, config.turns.on_answer)
    build = lambda on: Sampler(model.config, sizes, table.next_state, table.stops, model.tokenizer.eos_ids, on)
    if mesh is None or mesh.size == 1:
        return build(None)
    if jax.process_count() == 1 or hosts.spans(mesh):
        return build(mesh)
    sampler = build(hosts.local_mesh(mesh))
    sampler.sync = hosts.make_sync(model.config, sizes.dtype, mesh)
    return sampler


@functools.lru_cache(maxsize=4)
def _table(tokenizer: Tokenizer, width: int, tools: bool, answer_ends: bool) -> tags.TagTable:
    stops = {tag: stop for tag, stop in tags.TAGS.items()
             if (stop == tags.CODE and tools) or (stop == tags.ANSWER and answer_ends)}
    table = tags.build_table(tokenizer.token_bytes, width, stops or tags.TAGS)
    return table if stops else dataclasses.replace(table, stops=np.zeros_like(table.stops))


def make_table(model: Model, tools: bool, on_answer: str) -> tags.TagTable:
    """The tag automaton: `</code>` where there are tools, `</answer>` where it ends the episode."""
    return _table(model.tokenizer, model.config.vocab_size, tools, on_answer == 'end')


def make_engine(model: Model, sampler: Sampler, config: ConfigDict, sampling: ConfigDict, tools: bool,
                executor: Executor | None, seed: int, purpose: int) -> Engine:
    """The engine of one purpose; engines may share a sampler. Of several processes all call it alike."""
    turns = TurnSettings(tools=tools, **dataclasses.asdict(settings.build(Budgets, config.turns, 'turns')))
    feedback = settings.build(FeedbackSettings, config.feedback, 'feedback')
    rules = Rules(turns, model.tokenizer, make_table(model, tools, turns.on_answer),
                  lambda result: render(result, feedback))
    draws = settings.build(SamplingSettings, sampling, 'sampling')
    if sampler.table.is_fully_addressable:
        kind = Engine if jax.process_count() == 1 else hosts.Apart
        return kind(sampler, rules, draws, executor, seed, purpose)
    return Engine(sampler, rules, draws, executor, seed, purpose, link=hosts.Lockstep())


def make_sandbox(config: ConfigDict) -> Sandbox:
    """A sandbox from block `sandbox`, not started: this machine's pool, or the servers at `addresses`."""
    if not config.addresses:
        return Pool(settings.build(SandboxSettings, {k: v for k, v in config.items() if k != 'addresses'}, 'sandbox'))
    from retool_jax.sandbox.http.client import Remote, RemoteSettings  # of the extra `server`

    return Remote(RemoteSettings(  # the token comes from where config.json cannot hold it
        addresses=tuple(config.addresses), token=os.environ.get('RETOOL_SANDBOX_TOKEN', ''), cpu_s=config.cpu_s,
        wall_s=config.wall_s, memory_mb=config.memory_mb, queue=config.queue))


@contextlib.contextmanager
def open_sandbox(config: ConfigDict) -> Iterator[Sandbox]:
    """`make_sandbox`, started; UserError with the reason where it cannot be had."""
    sandbox = make_sandbox(config)
    try:
        sandbox.start()
    except RuntimeError as error:
        raise UserError(f'sandbox: {str(error).removeprefix("sandbox: ")}') from error
    try:
        yield sandbox
    finally:
        sandbox.close()


def open_executor(config: ConfigDict, tools: bool) -> contextlib.AbstractContextManager[Sandbox | None]:
    """`open_sandbox`, or nothing for a model without tools."""
    return open_sandbox(config) if tools else contextlib.nullcontext()


@contextlib.contextmanager
def open_grader(config: ConfigDict) -> Iterator[Grader]:
    """A grader from block `reward`."""
    grader = Grader(style=config.style, time_limit_s=config.time_limit_s, memory_mb=config.memory_mb,
                    workers=config.workers)
    try:
        yield grader
    finally:
        grader.close()


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The training mesh from block `mesh`, over the devices of all processes of the run."""
    return sharding.make_mesh(config.to_dict())
