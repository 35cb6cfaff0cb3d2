"""What lies in a chip's memory in each phase of an RL step, and what still fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from retool_jax.plan.facts import Facts
from retool_jax.plan.programs import Run, name_of, per_device
from retool_jax.train.residency import ON_DEVICE
from retool_jax.train.state import backbones

PHASES = ('sync', 'rollout', 'score', 'update')
LIMIT = 0.9  # share of a chip's memory that a run may fill: runtime and fragmentation take the rest


@dataclasses.dataclass(frozen=True)
class Phase:
    """Bytes on one chip."""

    name: str
    resident: dict[str, int]  # buffer → bytes, whatever program runs
    temporaries: int  # of the program that needs most
    worst: str  # its name
    refused: tuple[str, ...] = ()  # programs that the compiler found no room for

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + self.temporaries

    def fits(self, hbm: int) -> bool:
        return not self.refused and self.total <= LIMIT * hbm


def buffers(run: Run) -> dict[str, int]:
    """Every large buffer of a run, bytes on one chip."""
    state, cache = run.state, run.sample_state.cache
    buffers = {} if run.frozen is None else {'frozen weights': per_device(run.frozen)}
    buffers['policy'] = per_device(state.params['policy'])
    if 'critic' in state.params:
        buffers['critic'] = per_device(state.params['critic'])
    buffers['optimizer'] = per_device(state.opt_state)
    if run.loss.needs_reference and run.frozen is None:
        buffers['reference'] = buffers['policy']
    buffers['gradients'] = per_device(run.gradients)
    buffers['sampling weights'] = per_device(run.sampling_params)
    buffers['KV cache'] = per_device((cache.k, cache.v))
    buffers['rows'] = per_device(run.sample_state) - buffers['KV cache']  # logits, keys, lengths
    batch, scores = run.micro
    # The step's batch is split over data × fsdp as its micro-batches are; twice as many rows in the worst case.
    rows = run.sizes.problems_per_step * run.sizes.samples
    buffers['batch'] = per_device((batch, scores)) * math.ceil(rows / run.learner.forward.micro_rows)
    return buffers


def phases(run: Run, facts: Sequence[Facts]) -> list[Phase]:
    """The table of train/residency.py with sizes."""
    sizes, offload = buffers(run), run.sizes.offload
    waiting = {'policy', 'critic', 'optimizer', 'reference'}
    phases = []
    for name in PHASES:
        wanted = {'frozen weights', *(ON_DEVICE[name] if offload else waiting)}
        wanted |= {
            'sync': {'sampling weights'},
            'rollout': {'sampling weights', 'KV cache', 'rows'},
            'score': {'batch'},
            'update': {'batch', 'gradients'},
        }[name]
        resident = {key: size for key, size in sizes.items() if key in wanted}
        worst = max((f for f in facts if f.phase == name), key=lambda f: f.temporaries)
        refused = tuple(f.name for f in facts if f.phase == name and f.refused)
        phases.append(Phase(name, resident, worst.temporaries, worst.name, refused))
    return phases


def policy_update(run: Run, facts: Sequence[Facts]) -> int:
    """Bytes of the policy's own update: its weights, moments and gradients, frozen weights, and the program's
    temporaries."""
    params = next(params for params in backbones(run.params) if 'policy' in params)
    held = sum(per_device((params[part], run.state.opt_state[part], run.gradients[part])) for part in params)
    fact = next(f for f in facts if f.name == f'update {name_of(params)}')
    return held + per_device(run.frozen) + fact.temporaries


def tokens_that_fit(run: Run, phase: Phase, hbm: int) -> int:
    """KV slots × context, in tokens of one engine, that `LIMIT` of the memory leaves room for in rollout, beside what a
    decode call copies of them."""
    copies = run.copies
    a_token = (phase.resident['KV cache'] + copies) / (run.sampler.settings.rows * run.sampler.settings.slots)
    rest = phase.total - phase.resident['KV cache'] - (copies if phase.worst == 'decode' else 0)
    return max(int((LIMIT * hbm - rest) / a_token), 0)


def remedies(run: Run, phase: Phase, hbm: int) -> list[str]:
    """What to change where a phase does not fit, the cheapest first."""
    settings, remedies = run.sampler.settings, []
    if not run.sizes.offload and phase.name != 'update':
        remedies.append('ppo.offload=True (what a phase does not need waits on the host)')
    if phase.name == 'sync':
        return [*remedies, f'mesh.tensor={2 * run.mesh.shape["tensor"]} (weights over more chips)']
    if phase.name == 'rollout':
        rows = tokens_that_fit(run, phase, hbm) // settings.slots
        if phase.refused:  # what such a program needs is the compiler's guess
            rows = min(3 * rows // 4, settings.rows // 2)
        if rows >= 1:
            remedies.append(f'sampler.rows={rows} (now {settings.rows})')
        else:
            remedies.append(
                f'mesh.tensor={2 * run.mesh.shape["tensor"]} (weights over more chips), or a smaller '
                f'sampler.slots (now {settings.slots})'
            )
        if run.copies and phase.worst == 'decode' and phase.total - run.copies <= LIMIT * hbm:
            remedies.append(
                f'sampler.min_bound={settings.slots} (decode calls copy no rows, but all read every slot; now '
                f'{settings.min_bound})'
            )
        return remedies
    forward = run.learner.forward
    if forward.remat != 'full':
        remedies.append('forward.remat=full')
    if forward.micro_rows > run.mesh.shape['data'] * run.mesh.shape['fsdp']:
        remedies.append('forward.micro_rows=0 (one row for each device of data × fsdp)')
    if phase.name == 'update' and run.frozen is None:
        if phase.resident['optimizer'] > phase.resident['policy']:
            remedies.append('optimizer.kind=adamw_bf16 or adafactor (moments in half the memory, or next to none)')
        remedies.append('lora.rank=32 (adapters alone are trained, over frozen weights)')
    if phase.name == 'update' and run.sizes.critic == 'backbone':
        remedies.append('ppo.critic=head (no second backbone)')
    remedies.append(
        f'mesh.tensor={2 * run.mesh.shape["tensor"]} (rows over more chips), a smaller forward.row_width, '
        'or a larger slice'
    )
    return remedies
