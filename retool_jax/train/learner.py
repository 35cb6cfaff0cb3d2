"""The update: forward, loss and gradient of a micro-batch, sums over micro-batches, one AdamW step.

A mini-batch is cut into micro-batches of fixed shape whose gradients add up in forward.gradient_dtype.
Denominators come from the whole mini-batch, so any cut gives the same gradient.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from retool_jax.algo import aggregation, losses, segments, tallies
from retool_jax.algo.advantages import advantages, reward_on_last_acted
from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Batch, Params, Scores, TrainState
from retool_jax.model import decoder, lora
from retool_jax.model.config import ModelConfig
from retool_jax.model.logprobs import token_logprobs
from retool_jax.train.pack import join
from retool_jax.train.settings import ForwardSettings
from retool_jax.train.state import backbones, lowered


class Learner:
    """Owns the compiled programs of training; states and batches are passed in."""

    def __init__(
        self,
        config: ModelConfig,
        forward: ForwardSettings,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh,
        *,
        loss: LossSettings | None = None,
        advantage: AdvantageSettings | None = None,
        temperature: float = 1.0,
        adapter_scale: float = 1.0,
    ):
        """loss and advantage are None for supervised training; temperature is the sampler's; adapter_scale is that of
        adapters over frozen weights (`over`).

        Raises:
          UserError: sizes of `forward` that do not divide over the mesh.
        """
        ways = mesh.shape['data'] * mesh.shape['fsdp']
        if forward.micro_rows % ways:
            raise UserError(
                f'forward.micro_rows={forward.micro_rows} does not divide over data × fsdp = {ways} '
                'devices; choose a multiple, or 0 for one row each'
            )
        forward = dataclasses.replace(forward, micro_rows=forward.micro_rows or ways)
        if forward.row_width % mesh.shape['tensor']:
            raise UserError(
                f'forward.row_width={forward.row_width} does not divide over '
                f'tensor={mesh.shape["tensor"]}; choose a multiple'
            )
        self.config, self.forward, self.optimizer, self.mesh = config, forward, optimizer, mesh
        self.loss, self.advantage, self.temperature = loss, advantage, temperature
        self.adapter_scale, self.frozen = adapter_scale, None
        self._lowered = functools.partial(lowered, dtype=forward.gradient_dtype)
        self.rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))  # of everything with a leading batch axis
        self._cut = jax.jit(
            lambda tree, row: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, forward.micro_rows), tree),
            out_shardings=self.rows,
        )
        self._make_zeros, self._appliers = {}, {}  # compiled for shardings when they are first seen
        self._sft = jax.jit(self._add_sft, donate_argnames=('gradients',))
        self._ppo = jax.jit(self._add_ppo, donate_argnames=('gradients',))
        self._held = jax.jit(self._add_held, donate_argnames=('gradients',))
        self._score = jax.jit(self._evaluate)
        self._advantages = jax.jit(self._estimate, static_argnames=('num_groups',))
        self._denominators = jax.jit(self._count)

    def over(self, frozen: Params | None) -> Learner:
        """The same programs where what is trained are adapters over `frozen` weights (model/lora.py)."""
        learner = copy.copy(self)
        learner.frozen, learner._make_zeros, learner._appliers = frozen, {}, {}
        return learner

    def whole(self, params: Params) -> Params:
        """The weights of a model of which `params` are trained, as the sampler and exports read them."""
        return lora.over(self.frozen, params, self.adapter_scale)

    def sft_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step of −mean log p over the acted tokens of `batch` (numpy)."""
        stop, batch = len(batch.tokens_BT), self.put(self._whole(batch))
        denominator = self._denominators(batch, 0, stop)[0]
        gradients, found = self._zeros(state.params), []
        for micro in self._micro(batch, 0, stop):
            gradients, metrics = self._sft(
                params=state.params, gradients=gradients, micro=micro, denominator=denominator, frozen=self.frozen
            )
            found.append(metrics)
        state, norms = self.applier(state)(state=state, gradients=gradients)
        return state, _merge(found) | norms

    def sft_loss(self, params: Params, batch: Batch) -> float:
        """Mean −log p over the acted tokens of `batch`, without a step."""
        stop, total, count = len(batch.tokens_BT), 0.0, 0.0
        for micro in self._micro(self.put(self._whole(batch)), 0, stop):
            logprob_BT, _, _ = self._score(params=params, micro=micro, frozen=self.frozen)
            total -= float(jnp.where(micro.acted_BT, logprob_BT, 0.0).sum())
            count += float(micro.acted_BT.sum())
        return total / max(count, 1.0)

    def score(
        self, params: Params, batch: Batch, rows: int, reference: Params | None, num_groups: int, fresh: int = 0
    ) -> Scores:
        """Old logprobs, values, advantages and returns of the first `rows` rows of the global batch, which
        `put` has moved to the devices. num_groups is static: give it the same number every step.

        fresh: first rows of which the policy's own logprobs and entropies are left out (zeros), for `ppo_step` under
        these same weights has them of its own pass; 0 where the critic is a head on the policy's trunk.

        Raises:
          ValueError: the loss needs a reference, and there is none.
        """
        zeros_BT, total = jnp.zeros_like(batch.sampler_logprob_BT), batch.tokens_BT.shape[0]

        def scored(model: Params, first: int) -> list[jax.Array]:
            """logprob, entropy and value of the rows from `first` on, zeros in all others."""
            found = [self._score(params=model, micro=m, frozen=self.frozen) for m in self._micro(batch, first, rows)]
            join_rows = lambda xs: jnp.pad(jnp.concatenate(xs), ((first, total - rows), (0, 0)))
            return [join_rows(xs) for xs in zip(*found)] or [zeros_BT] * 3

        parts = [scored(model, fresh if 'policy' in model else 0) for model in backbones(params)]
        logprob_BT, entropy_BT, value_BT = (sum(xs[1:], xs[0]) for xs in zip(*parts))
        reference_BT = zeros_BT
        if self.loss.needs_reference:
            if reference is None:
                raise ValueError(f'loss.kl_coef is {self.loss.kl_coef} but there is no reference policy')
            reference_BT = scored({'policy': reference}, 0)[0]
        advantage_BT, return_BT = self._advantages(batch, logprob_BT, reference_BT, value_BT, num_groups=num_groups)
        return Scores(logprob_BT, entropy_BT, reference_BT, value_BT, advantage_BT, return_BT)

    def trust(self, batch: Batch, num_groups: int) -> Scores:
        """`score` without a forward pass: the sampler's logprobs are the old ones. There are no entropies, values or
        reference then, and nothing may read them (`ppo.check`)."""
        zeros_BT = jnp.zeros_like(batch.sampler_logprob_BT)
        advantage_BT, return_BT = self._advantages(
            batch, batch.sampler_logprob_BT, zeros_BT, zeros_BT, num_groups=num_groups
        )
        return Scores(
            logprob_BT=batch.sampler_logprob_BT,
            entropy_BT=zeros_BT,
            reference_logprob_BT=zeros_BT,
            value_BT=zeros_BT,
            advantage_BT=advantage_BT,
            return_BT=return_BT,
        )

    @property
    def quiet_groups(self) -> bool:
        """Whether groups of equal rewards have no part in the policy's gradient: every advantage in them is 0, and so
        is whatever else the loss is made of."""
        compares = self.advantage.needs_groups and not self.advantage.whiten
        return compares and not self.loss.entropy_coef and not self.loss.needs_reference

    def ppo_step(
        self,
        state: TrainState,
        batch: Batch,
        scores: Scores,
        rows: tuple[int, int],
        held: bool = False,
        counted: tuple[int, int] | None = None,
        fresh: bool = False,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step over one mini-batch: rows first … last + 1 of a scored batch.

        fresh: these rows were left out by `score`, and the weights have not moved since: ℓₒ is the pass's own ℓ.
        counted: rows that belong to it and have no gradient: they are in its means, and no pass is made over them.
        held: the critic alone takes a step. Nothing is differentiated by the policy, and neither its weights nor its
        moments change; its metrics are those of the scored batch, with a ratio of 1.
        """
        denominators = self._denominators(batch, *rows)
        if counted:
            denominators = jax.tree.map(jnp.add, denominators, self._denominators(batch, *counted))
        gradients, merged = {}, {}
        add, models = (self._held, [state.params]) if held else (self._ppo, backbones(state.params))
        for params in models:
            added, found = self._zeros({'critic': params['critic']} if held else params), []
            given = {'params': params, 'denominators': denominators, 'frozen': self.frozen}
            given |= {} if held else {'fresh': np.bool_(fresh)}
            for micro, scored in self._micro((batch, scores), *rows):
                added, metrics = add(gradients=added, micro=micro, scores=scored, **given)
                found.append(metrics)
            gradients, merged = gradients | added, merged | _merge(found)
        state, norms = self.applier(state)(state=state, gradients=gradients)
        return state, {'actor/grad_norm': np.float32(0)} | merged | norms

    def put(self, tree):
        """Moves host arrays with a leading batch axis onto the mesh; each process reads its own rows of them."""
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), self.rows, lambda index: np.asarray(x)[index]), tree
        )

    def _whole(self, batch: Batch) -> Batch:
        """A batch with as many rows as the devices divide."""
        return join([batch], self.forward.micro_rows)[0]

    def _zeros(self, params: Params) -> Params:
        """Gradients to add to, laid out as the parameters are."""
        if tuple(params) not in self._make_zeros:
            self._make_zeros[tuple(params)] = jax.jit(
                lambda params: jax.tree.map(jnp.zeros_like, self._lowered(params)),
                out_shardings=jax.tree.map(lambda x: x.sharding, params),
            )
        return self._make_zeros[tuple(params)](params)

    def _micro(self, tree, start: int, stop: int) -> Iterator:
        for row in range(start, stop, self.forward.micro_rows):
            yield self._cut(tree, np.int32(row))

    def _evaluate(
        self, params: Params, micro: Batch, frozen: Params | None = None, logprobs: bool = True
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """logprob and entropy of every acted token, value of every token, [B, T] each; zeros where `params` lacks the
        part, and for the first two without `logprobs`."""
        f, whole = self.forward, lambda trained: lora.over(frozen, trained, self.adapter_scale)
        rows = (micro.tokens_BT, micro.positions_BT, micro.segment_ids_BT, micro.prefix_ids_BT)
        run = lambda weights: decoder.forward(
            self.config,
            weights,
            *rows,
            dtype=jnp.dtype(f.dtype),
            attend=f.attention,
            segments=f.row_segments,
            remat=f.remat,
            unroll=f.unroll,
        )
        logprob_BT = entropy_BT = value_BT = jnp.zeros(micro.tokens_BT.shape, jnp.float32)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            if 'policy' in params:
                policy = whole(params['policy'])
                hidden_BTD = run(policy)
                if logprobs:
                    logprob_BT, entropy_BT = token_logprobs(
                        policy,
                        hidden_BTD,
                        micro.tokens_BT,
                        wanted_BT=micro.acted_BT,
                        temperature=self.temperature,
                        chunk=f.logprob_chunk,
                        vocab_chunk=f.vocab_chunk,
                    )
            if 'critic' in params:
                critic = params['critic']
                if 'backbone' in critic:
                    hidden_BTD = run(whole(critic['backbone']))
                value_BT = (hidden_BTD.astype(jnp.float32) @ critic['head']['weight'] + critic['head']['bias'])[..., 0]
                value_BT = jnp.pad(value_BT[:, :-1], ((0, 0), (1, 0)))  # V(state before token t)
        return logprob_BT, entropy_BT, value_BT

    def _estimate(self, batch: Batch, logprob_BT, reference_BT, value_BT, num_groups: int):
        reward_BT = reward_on_last_acted(batch.reward_BN, batch.acted_BT, batch.segment_ids_BT)
        reward_BT = losses.reward_less_kl(self.loss, reward_BT, logprob_BT, reference_BT, batch.acted_BT)
        return advantages(
            self.advantage,
            reward_BT,
            batch.acted_BT,
            batch.segment_ids_BT,
            baseline_BN=batch.baseline_BN,
            update_BN=batch.update_BN,
            value_BT=value_BT,
            group_BN=batch.group_BN,
            num_groups=num_groups,
        )

    def _mask(self, batch: Batch) -> jax.Array:
        return segments.in_update(batch.acted_BT, batch.update_BN, batch.segment_ids_BT)

    def _count(self, batch: Batch, start, stop) -> tuple[jax.Array, jax.Array]:
        """Denominators of the mini-batch: of the policy loss, and acted tokens (supervised and value loss)."""
        row = jnp.arange(batch.tokens_BT.shape[0])[:, None]
        mask_BT, n = self._mask(batch) & (row >= start) & (row < stop), self.forward.row_segments
        tokens = aggregation.denominator('token-mean', mask_BT, batch.segment_ids_BT, n)
        if self.loss is None:
            return tokens, tokens
        return aggregation.denominator(
            self.loss.aggregation, mask_BT, batch.segment_ids_BT, n, self.loss.aggregation_constant
        ), tokens

    def _add_sft(self, params, gradients, micro: Batch, denominator, frozen=None):
        def objective(params):
            logprob_BT, entropy_BT, _ = self._evaluate(params, micro, frozen)
            mask_BT = self._mask(micro)
            loss = -jnp.where(mask_BT, logprob_BT, 0.0).sum() / jnp.maximum(denominator, 1.0)
            return loss, {
                'sft/loss': tallies.mean_over(-logprob_BT, mask_BT),
                'sft/entropy': tallies.mean_over(entropy_BT, mask_BT),
            }

        found, metrics = jax.grad(objective, has_aux=True)(self._lowered(params))
        return jax.tree.map(jnp.add, gradients, found), metrics

    def _add_ppo(self, params, gradients, micro: Batch, scores: Scores, denominators, fresh, frozen=None):
        def objective(params):
            logprob_BT, entropy_BT, value_BT = self._evaluate(params, micro, frozen)
            loss, metrics = jnp.float32(0), {}
            if 'policy' in params:
                old_BT = jnp.where(fresh, jax.lax.stop_gradient(logprob_BT), scores.logprob_BT)
                loss, metrics = self._actor_loss(logprob_BT, entropy_BT, old_BT, micro, scores, denominators[0])
            if 'critic' in params:
                value_loss, more = self._critic_loss(value_BT, micro, scores, denominators[1])
                loss, metrics = loss + value_loss, metrics | more
            return loss, metrics

        found, metrics = jax.grad(objective, has_aux=True)(self._lowered(params))
        return jax.tree.map(jnp.add, gradients, found), metrics

    def _add_held(self, params, gradients, micro: Batch, scores: Scores, denominators, frozen=None):
        trunk = {} if 'backbone' in params['critic'] else {'policy': params['policy']}

        def objective(critic):
            value_BT = self._evaluate(trunk | {'critic': critic}, micro, frozen, logprobs=False)[2]
            return self._critic_loss(value_BT, micro, scores, denominators[1])

        found, metrics = jax.grad(objective, has_aux=True)(self._lowered(params['critic']))
        old_BT = scores.logprob_BT
        _, more = self._actor_loss(old_BT, scores.entropy_BT, old_BT, micro, scores, denominators[0])
        return jax.tree.map(jnp.add, gradients, {'critic': found}), metrics | more

    def _actor_loss(self, logprob_BT, entropy_BT, old_logprob_BT, micro: Batch, scores: Scores, denominator):
        return losses.actor_loss(
            self.loss,
            logprob_BT=logprob_BT,
            entropy_BT=entropy_BT,
            old_logprob_BT=old_logprob_BT,
            sampler_logprob_BT=micro.sampler_logprob_BT,
            advantage_BT=scores.advantage_BT,
            mask_BT=self._mask(micro),
            segment_ids_BT=micro.segment_ids_BT,
            num_segments=self.forward.row_segments,
            denominator=denominator,
            reference_logprob_BT=scores.reference_logprob_BT,
        )

    def _critic_loss(self, value_BT, micro: Batch, scores: Scores, denominator):
        return losses.critic_loss(
            self.loss,
            value_BT=value_BT,
            old_value_BT=scores.value_BT,
            return_BT=scores.return_BT,
            mask_BT=self._mask(micro),
            denominator=denominator,
        )

    def applier(self, state: TrainState):
        """The optimizer's step, compiled; every array of `state` lies afterwards where it lay."""
        lies = jax.tree.map(lambda x: x.sharding, state)
        key = tuple(jax.tree.leaves(lies))
        if key not in self._appliers:
            step = jax.jit(self._apply_gradients, donate_argnames=('state',), out_shardings=(lies, None))
            self._appliers[key] = step
        return self._appliers[key]

    def _apply_gradients(self, state: TrainState, gradients: Params):
        gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        names = {'policy': 'actor/grad_norm', 'critic': 'critic/grad_norm'}
        norms = {names[part]: optax.tree.norm(g) for part, g in gradients.items()}
        moved = {part: optax.apply_updates(state.params[part], changes) for part, changes in updates.items()}
        return TrainState(step=state.step + 1, params=state.params | moved, opt_state=opt_state), norms


def _merge(found: list) -> dict[str, jax.Array]:
    total = found[0]
    for metrics in found[1:]:
        total = tallies.merge(total, metrics)
    return tallies.results(total)


def mean_metrics(step: int, steps: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Fetches the metrics of several optimizer steps: their mean; the maximum for names ending in _max.

    Raises: UserError naming `step` where a loss or a gradient is not finite; nothing of it must be saved.
    """
    host = jax.device_get(steps)
    reduce = lambda name: np.max if name.endswith('_max') else np.mean
    found = {name: float(reduce(name)([m[name] for m in host])) for name in (host[0] if host else {})}
    broken = [name for name, x in found.items() if name.endswith(('loss', 'grad_norm')) and not np.isfinite(x)]
    if broken:
        raise UserError(
            f'step {step}: {broken[0]} is {found[broken[0]]}; the last checkpoint is intact: go on from '
            'it with a lower optimizer.lr or a lower optimizer.grad_clip'
        )
    return found
