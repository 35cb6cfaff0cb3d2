"""From settings to the parts of a run: model, learner, sampler, engine, sandbox, grader."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core import console, processes, sharding, storage
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.model import decoder, hf, lora
from retool_jax.model.config import ModelConfig
from retool_jax.model.lora import LoRASettings
from retool_jax.rollout import hosts
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.library import Model, load_model
from retool_jax.rollout.requests import Executor
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.rollout.turns import Budgets, Rules, TurnSettings
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.sandbox.guard import Guard
from retool_jax.sandbox.pool import Pool
from retool_jax.stages import embedded
from retool_jax.stages.config import (
    FineTuning,
    MeshSettings,
    ModelSettings,
    RewardSettings,
    Rollouts,
    SandboxBlock,
    require_path,
)
from retool_jax.tasks.grader import Grader
from retool_jax.text import tags
from retool_jax.text.template import common_ids
from retool_jax.text.tokenizer import Tokenizer
from retool_jax.train import sources
from retool_jax.train.learner import Learner
from retool_jax.train.ppo import PPOSettings, Progress
from retool_jax.train.residency import Residency
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.state import OptimizerSettings, add_critic, init_state, make_optimizer

if TYPE_CHECKING:
    from retool_jax.sandbox.http.client import Remote

type Sandbox = Pool | Remote

# Purposes: streams of randomness that must never meet under one seed.
TRAINING, EVALUATION = 1, 2
STALL_S = 60.0  # beyond all retries of a call, after which a silent sandbox is given up
REMOTE_S = 900.0  # beyond the HTTP client's own patience with servers that are gone
FINAL = 'final'  # folder of the trained model
ADAPTER = 'adapter'  # folder of its adapters


def open_model(settings: ModelSettings, directory: Path) -> Model:
    """The model that the settings name; without a path the embedded one, written below `directory`."""
    require_path(settings)
    if settings.path is None:
        if processes.leads():
            embedded.write_model(directory / 'model')
        processes.wait()
        if not (directory / 'model' / 'config.json').exists():  # a directory of this machine alone
            embedded.write_model(directory / 'model')
    return load_model(_files(settings, directory), settings.template, settings.tools, settings.instruction)


def _files(settings: ModelSettings, directory: Path) -> Path:
    """Where configuration and tokenizer of the model lie on this machine."""
    return storage.model_files('model.path', settings.path) if settings.path else directory / 'model'


def check_context(model: Model, tokens: int, key: str) -> None:
    """Refuses episodes longer than the positions that the weights know; `key` is what sets their length.

    Raises:
      UserError: they are.
    """
    context = model.config.context
    if tokens > context:
        scaling = model.config.rope_scaling
        trained = scaling.original_max_position_embeddings if scaling else context
        factor = -(-tokens // trained)
        raise UserError(
            f'{key}={tokens} exceeds the {context} positions of the model (max_position_embeddings in '
            f'config.json); lower it, or stretch them there with "rope_scaling": {{"rope_type": "yarn", '
            f'"factor": {factor}.0, "original_max_position_embeddings": {trained}}}'
        )


def load_policy(
    settings: ModelSettings, model: Model, seed: int, mesh: jax.sharding.Mesh, dtype: str = 'float32'
) -> Params:
    """Weights in the training layout, in `dtype` but for the gains of norms (f32): those of `model.path`, or random
    ones from `seed` without a path."""
    sizes = model.config
    if settings.path is None:
        first = lambda key: decoder.cast(embedded.init(sizes, key), jnp.dtype(dtype))
        return _random(first, seed, sizes, mesh, decoder.logical_axes(sizes))
    shardings = _shardings(sizes, mesh, decoder.logical_axes(sizes))
    with console.progress('loading weights', sum(len(leaf.names) for leaf in hf.leaves(sizes))) as advance:
        return hf.load(
            settings.path, sizes, shardings, jnp.dtype(dtype), lambda done, total: advance(), gains=jnp.float32
        )


def load_trained(stage: FineTuning | Rollouts, model: Model, mesh: jax.sharding.Mesh) -> tuple[Params | None, Params]:
    """(frozen weights, what is trained of the policy) in the training layout: None and all weights, or weights in
    forward.dtype, to which the trainer casts them in any case, and first adapters."""
    seed = stage.run.seed
    if not stage.lora.rank:
        return None, load_policy(stage.model, model, seed, mesh)
    first = lambda key: lora.init(model.config, stage.lora, key)
    adapters = _random(first, seed, model.config, mesh, lora.logical_axes(model.config, stage.lora))
    return load_policy(stage.model, model, seed, mesh, stage.forward.dtype), adapters


def _random(
    init: Callable[[jax.Array], Params], seed: int, sizes: ModelConfig, mesh: jax.sharding.Mesh, axes: dict
) -> Params:
    """`init` of a key, laid out over the mesh."""
    key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))  # plain numbers lie on no device
    run = lambda data: init(jax.random.wrap_key_data(data))
    return jax.jit(run, out_shardings=_shardings(sizes, mesh, axes))(key_data)


def _shardings(sizes: ModelConfig, mesh: jax.sharding.Mesh, axes: dict) -> Params:
    return sharding.shardings(mesh, axes, decoder.fit_rules(sizes, mesh, sharding.TRAIN_RULES))


def make_sampler(
    model: Model, sizes: SamplerSettings, turns: Budgets, mesh: jax.sharding.Mesh | None = None
) -> Sampler:
    """The compiled half of rollout: the engines on `mesh`, or on this process's part of it (rollout/hosts.py)."""
    table = make_table(model, turns.on_answer)
    build = lambda on: Sampler(model.config, sizes, table.next_state, table.stops, model.tokenizer.eos_ids, on)
    if mesh is None or mesh.size == 1:
        return build(None)
    if len(hosts.team(mesh)) == jax.process_count():
        return build(mesh)
    sampler = build(hosts.local_mesh(mesh))
    sampler.sync = hosts.make_sync(model.config, sizes.dtype, mesh, sizes.weights)
    return sampler


@functools.lru_cache(maxsize=4)
def table_of(tokenizer: Tokenizer, width: int, tools: bool, answer_ends: bool) -> tags.TagTable:
    """The tag automaton over `width` ids: `</code>` where there are tools, `</answer>` where it ends the episode."""
    stops = {
        tag: stop
        for tag, stop in tags.TAGS.items()
        if (stop == tags.CODE and tools) or (stop == tags.ANSWER and answer_ends)
    }
    table = tags.build_table(tokenizer.token_bytes, width, stops or tags.TAGS)
    return table if stops else dataclasses.replace(table, stops=np.zeros_like(table.stops))


def make_table(model: Model, on_answer: str) -> tags.TagTable:
    """The tag automaton of a model."""
    return table_of(model.tokenizer, model.config.vocab_size, model.template.tools, on_answer == 'end')


def make_engine(
    model: Model,
    sampler: Sampler,
    turns: Budgets,
    feedback: FeedbackSettings,
    sampling: SamplingSettings,
    executor: Executor | None,
    seed: int,
    purpose: int,
) -> Engine:
    """What makes episodes for one purpose (TRAINING, EVALUATION). Several may share a sampler.

    With several processes, each must make this call with the same arguments.
    """
    budgets = TurnSettings(tools=model.template.tools, **dataclasses.asdict(turns))
    rules = Rules(budgets, model.tokenizer, make_table(model, turns.on_answer), lambda result: render(result, feedback))
    team = hosts.team_of(sampler)
    kind = Engine if len(team) == jax.process_count() else hosts.Apart
    link = hosts.Lockstep(team) if len(team) > 1 else None
    engine = kind(sampler, rules, sampling, executor, seed, purpose, link)
    engine.common = common_ids(model.template, model.tokenizer)
    return engine


@functools.lru_cache(maxsize=1)
def make_tuner(
    forward: ForwardSettings,
    optimizer: OptimizerSettings,
    steps: int,
    adapters: LoRASettings,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
) -> Learner:
    """The learner of `steps` supervised steps; the same one where the same is asked for again."""
    return Learner(config, forward, make_optimizer(optimizer, steps), mesh, adapter_scale=adapters.scale)


def make_learner(stage: Rollouts, config: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Learner:
    """The learner of an RL stage: policy and critic with an optimizer each, loss and advantage.

    Stages of one process that differ in nothing but their folders share it, compiled as it is.
    """
    critic = stage.critic_optimizer if stage.ppo.critic != 'none' else None
    return _learner(
        stage.ppo,
        stage.optimizer,
        critic,
        stage.forward,
        stage.loss,
        stage.advantage,
        stage.train_sampling.temperature,
        stage.lora,
        config,
        mesh,
    )


@functools.lru_cache(maxsize=1)
def _learner(
    sizes: PPOSettings,
    policy: OptimizerSettings,
    critic: OptimizerSettings | None,
    forward: ForwardSettings,
    loss: LossSettings,
    advantage: AdvantageSettings,
    temperature: float,
    adapters: LoRASettings,
    config: ModelConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> Learner:
    updates = sizes.minibatches * sizes.epochs
    optimizer = make_optimizer(policy, sizes.steps * updates, critic, sizes.critic_warmup_steps * updates)
    return Learner(
        config,
        forward,
        optimizer,
        mesh,
        loss=loss,
        advantage=advantage,
        temperature=temperature,
        adapter_scale=adapters.scale,
    )


def begin(learner: Learner, critic: str, policy: Params) -> Progress:
    """Step 0 of an RL stage: what is trained of the policy, with its critic (PPOSettings.critic) and fresh moments."""
    return Progress(init_state(add_critic(learner.config, policy, critic), learner.optimizer))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an RL stage is made of before anything runs."""

    stage: Rollouts
    model: Model
    mesh: jax.sharding.Mesh
    learner: Learner
    progress: Progress
    residency: Residency

    def sampler(self) -> Sampler:
        return make_sampler(self.model, self.stage.sampler, self.stage.turns, self.mesh)

    def engine(self, sampler: Sampler, executor: Executor | None, sampling: SamplingSettings, purpose: int) -> Engine:
        return make_engine(
            self.model, sampler, self.stage.turns, self.stage.feedback, sampling, executor, self.stage.run.seed, purpose
        )

    def source(
        self,
        sampler: Sampler,
        executor: Executor | None,
        stream: sources.Problems,
        grader: Grader,
        journal: Journal | None = None,
        aside: Path | None = None,
    ) -> sources.Source:
        """Rollouts; aside: of `sources.sampled`."""
        engine = self.engine(sampler, executor, self.stage.train_sampling, TRAINING)
        return sources.sampled(
            engine, self.stage.ppo, stream, self.model.template, self.model.tokenizer, grader, journal, aside
        )

    def sync(self, sampler: Sampler) -> Callable[[Params], Params]:
        """From what is trained of the policy to the weights of the whole in the sampling layout."""
        return lambda policy: sampler.sync(self.learner.whole(policy))

    def export(self, directory: Path) -> None:
        """Writes the policy (`export`)."""
        export(self.stage, directory, self.model, self.learner, self.progress.state.params['policy'])


def build(stage: Rollouts, directory: Path) -> Parts:
    """Model, learner and first state; the embedded model's files are written below `directory`."""
    mesh = make_mesh(stage.mesh)
    model = open_model(stage.model, directory)
    check_context(model, stage.turns.max_tokens, 'turns.max_tokens')
    frozen, policy = load_trained(stage, model, mesh)
    reference = None
    if stage.loss.needs_reference:  # the frozen weights without adapters are one already
        reference = {} if stage.lora.rank else jax.tree.map(jnp.copy, policy)
    learner = make_learner(stage, model.config, mesh).over(frozen)
    return Parts(
        stage, model, mesh, learner, begin(learner, stage.ppo.critic, policy), Residency(stage.ppo.offload, reference)
    )


def export(stage: FineTuning | Rollouts, directory: Path, model: Model, learner: Learner, policy: Params) -> None:
    """Writes a trained policy below `directory` where it is not there yet: a Hugging Face directory, `final/`, into
    which its adapters are merged, and those alone as peft has them, `adapter/`."""
    base, sizes = _files(stage.model, directory), model.config
    if not processes.word((directory / FINAL).exists()):
        hf.save(directory / FINAL, sizes, learner.whole(policy), jnp.dtype(stage.forward.dtype), base)
    if (
        stage.lora.rank and stage.model.path and not processes.word((directory / ADAPTER).exists())
    ):  # random weights are nowhere
        lora.save(directory / ADAPTER, sizes, stage.lora, policy, stage.model.path)


def make_sandbox(sandbox: SandboxBlock) -> Sandbox:
    """A sandbox, not started: this machine's pool, or the servers at `addresses`."""
    if not sandbox.addresses:
        return Pool(sandbox)
    from retool_jax.sandbox.http.client import Remote, RemoteSettings  # of the extra `server`

    return Remote(
        RemoteSettings(  # the token comes from where config.json cannot hold it
            addresses=sandbox.addresses,
            token=os.environ.get('RETOOL_SANDBOX_TOKEN', ''),
            cpu_s=sandbox.cpu_s,
            wall_s=sandbox.wall_s,
            memory_mb=sandbox.memory_mb,
            queue=sandbox.queue,
        )
    )


@contextlib.contextmanager
def open_sandbox(settings: SandboxBlock) -> Iterator[Sandbox]:
    """`make_sandbox`, started; UserError with the reason where it cannot be had."""
    sandbox = make_sandbox(settings)
    try:
        sandbox.start()
    except RuntimeError as error:
        raise UserError(f'sandbox: {str(error).removeprefix("sandbox: ")}') from error
    try:
        yield sandbox
    finally:
        sandbox.close()


@contextlib.contextmanager
def open_guarded(settings: SandboxBlock, tools: bool) -> Iterator[Guard | None]:
    """A sandbox behind a guard that renews it, or None for a run without tools."""
    if not tools:
        yield None
        return
    with open_sandbox(settings) as sandbox:
        # Servers elsewhere are waited for by their client, which knows which of them are alive.
        stall_s = (1 + settings.retries) * settings.wall_s + STALL_S + (REMOTE_S if settings.addresses else 0.0)
        with Guard(sandbox, lambda: make_sandbox(settings), stall_s=stall_s) as guard:
            yield guard


@contextlib.contextmanager
def open_grader(reward: RewardSettings) -> Iterator[Grader]:
    """A grader, closed behind the block."""
    grader = Grader(
        style=reward.style, time_limit_s=reward.time_limit_s, memory_mb=reward.memory_mb, workers=reward.workers
    )
    try:
        yield grader
    finally:
        grader.close()


def make_mesh(mesh: MeshSettings) -> jax.sharding.Mesh:
    """The training mesh, over the devices of all processes of the run."""
    return sharding.make_mesh(dataclasses.asdict(mesh))
