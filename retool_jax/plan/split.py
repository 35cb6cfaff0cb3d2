"""Rollout and training each on one half of a slice, a step apart, beside all chips in turns. An estimate from shapes.

While one half trains on the episodes of a step, the other makes those of the next with weights that are one step old.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from retool_jax.core.errors import UserError
from retool_jax.plan import page
from retool_jax.plan.chips import Slice
from retool_jax.plan.memory import LIMIT
from retool_jax.plan.plans import Plans, changed
from retool_jax.plan.programs import Run
from retool_jax.plan.roofline import Assumptions
from retool_jax.stages.config import Reinforcement

ROLLOUTS = ('sampling weights', 'KV cache', 'rows')  # buffers of the half that makes episodes


def compare(plans: Plans, stage: Reinforcement) -> dict:
    """Seconds of a step both ways and what fills the memory of each half, as JSON types; 'refused' says why there are
    no halves.

    The half that trains sends what it trained, a part from each chip, in sampler.dtype; what each engine needs of it is
    gathered within the other half, which is in its rollout as it is in turns.
    """
    try:
        half, axes = _half(plans.slice), {}
        if -1 not in (stage.mesh.data, stage.mesh.fsdp, stage.mesh.tensor):
            axes = {'mesh.fsdp': -1}
        halved = changed(stage, axes)
        run = Run(halved, plans.model, half, plans.process_chips)
        apart = Plans(plans.model, half, plans.tokens, plans.process_chips).guess(halved)
    except UserError as error:
        return {'refused': str(error)}
    whole = dataclasses.replace(plans.slice, devices=None)
    rollout, score, update = apart['phases'][-3:]
    training = score['seconds'] + update['seconds']
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.params['policy']))
    size = weights * jnp.dtype(stage.sampler.dtype).itemsize
    rate, link = _rate(plans.slice, Assumptions(**apart['assumptions']))
    own = sum(rollout['resident'][name] for name in ROLLOUTS) + rollout['temporaries']
    shares = {'rollout': own / half.chip.hbm, 'training': max(score['share'], update['share'])}
    return {
        'chips': half.count,
        'mesh': apart['mesh'],
        'turns_s': Plans(plans.model, whole, plans.tokens, plans.process_chips).guess(stage)['step']['seconds'],
        'rollout_s': rollout['seconds'],
        'training_s': training,
        'weights': size,
        'link': link,
        'weights_s': size / rate,
        'seconds': max(rollout['seconds'], training) + size / rate,
        'shares': shares,
        'fits': max(shares.values()) <= LIMIT,
        'correction': stage.loss.correction,
    }


def _half(slice: Slice) -> Slice:
    """Raises: UserError where a slice, or a number of slices, has no half."""
    if slice.count % 2 or (slice.slices > 1 and slice.slices % 2):
        raise UserError(f'{slice.name} has no two halves')
    slices = max(slice.slices // 2, 1)
    return dataclasses.replace(slice, name=f'half of {slice.name}', count=slice.count // 2, devices=None, slices=slices)


def _rate(slice: Slice, a: Assumptions) -> tuple[float, str]:
    """Bytes a second from one half to the other, and over what they go."""
    chip, chips = slice.chip, slice.count // 2
    if slice.slices > 1:
        return chips * chip.dcn * a.links, 'the network between slices'
    if chip.platform == 'tpu':  # cut across the longest axis, of which the wrap around the torus is left out
        longest = max(int(n) for n in slice.name.partition(':')[2].split('x'))
        return slice.count // longest * chip.link / 2 * a.links, 'the links of the torus'
    if slice.count <= chip.host:
        return chips * chip.link * a.links, 'the links of the host'
    return chips * chip.dcn * a.links, 'the network between hosts'


def text(split: dict) -> str:
    """The same for people."""
    if 'refused' in split:
        return f'Split: {split["refused"]}'
    saved, spell = 1 - split['seconds'] / split['turns_s'], page.spell
    rollout, training = (f'{share:.0%} of memory' for share in split['shares'].values())
    old = ', which loss.correction=none takes for those of the current ones' if split['correction'] == 'none' else ''
    return '\n'.join([
        'Split, an ESTIMATE from shapes: rollout and training each on half the slice, a step apart',
        f'  in turns on {2 * split["chips"]} chips: {spell(split["turns_s"])} s a step',
        f'  on {split["chips"]} chips each: rollout {spell(split["rollout_s"])} s ({rollout}), '
        f'training {spell(split["training_s"])} s ({training}), '
        f'weights {split["weights"] / 1e9:,.1f} GB over {split["link"]} {spell(split["weights_s"])} s: '
        f'{spell(split["seconds"])} s a step, {abs(saved):.0%} {"less" if saved > 0 else "more"}'
        + ('' if split['fits'] else '; it does not fit'),
        f'  episodes are of weights one step old{old}; in turns they are of the current ones'])  # fmt: skip
