"""What several slices exchange over the network between their hosts: the gradients of each micro-batch."""

from __future__ import annotations

import dataclasses

from retool_jax.plan.facts import BETWEEN_SLICES, Facts
from retool_jax.plan.programs import Run, per_device


def add(run: Run, fact: Facts) -> Facts:
    """A program with what a chip sends to other slices: its part of the gradients, in a ring of its counterparts.

    A compiled program's own exchanges hold them too, as if they went over the torus. Weights are the same in every
    slice, so the copy to the sampling layout is taken to stay in each.
    """
    slices, (kind, _, names) = run.slice.slices, fact.name.partition(' ')
    if slices == 1 or kind != 'update':
        return fact
    size = sum(per_device(run.gradients[name]) for name in names.split(' and '))
    return dataclasses.replace(fact, sent=fact.sent | {BETWEEN_SLICES: 2 * size * (slices - 1) / slices})
