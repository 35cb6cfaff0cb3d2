"""A search as numbers for programs and as a table for people, with what bounds each step."""

from __future__ import annotations

import collections
import dataclasses
import re
import shlex

from retool_jax.core import cli
from retool_jax.plan import page
from retool_jax.plan.memory import LIMIT, PHASES
from retool_jax.plan.plans import Keys, Plans, changed
from retool_jax.plan.search import Found
from retool_jax.stages.config import Reinforcement

CAUSES = 2  # of a step, that are named
RESOURCES = {'compute': 'compute', 'memory': 'bandwidth', 'links': 'links'}
NOTHING = 'Nothing was compiled, no compiler for GPUs is at hand: all of this is an ESTIMATE from shapes'
NONE = f'None fits: of those made in full none takes at most {LIMIT:.0%} of memory in each phase'
KEPT = ('forward', 'sampler')  # blocks whose dtypes are kept


def describe(found: Found, plans: Plans, stage: Reinforcement) -> dict:
    """As JSON types. stage: as it was given."""
    blocks = {block: getattr(stage, block) for block in KEPT}
    return {
        'keys': found.keys,
        'command': command(found.keys),
        'fits': found.plan['fits'],
        'estimated': found.plan['estimated'],
        'table': _rows(found, plans, stage),
        'candidates': len(found.candidates),
        'made': len(found.made),
        'kept': {
            f'{block}.{field.name}': getattr(settings, field.name)
            for block, settings in blocks.items()
            for field in dataclasses.fields(settings)
            if 'dtype' in field.name
        },
        'seconds': found.seconds,
    }


def command(keys: Keys) -> str:
    """This process's command line, without --search and with the keys."""
    words = [word for word in shlex.split(cli.command()) if not re.fullmatch(r'--?(no)?search(=.*)?', word)]
    return shlex.join([*words, *(f'--config.{key}={value}' for key, value in keys.items())])


def bounds(plan: dict) -> dict[str, float]:
    """What a step's seconds go to, the most first: a program and its slowest resource; of decoding also rows that wait
    for a tool, rows without an episode, and collectives.

    A step of decoding takes as long whatever its rows do, so each has its share of the rows; but a kernel that reads by
    length reads little of a row that stands still.
    """
    seconds = collections.Counter()
    for program in plan['programs']:
        kind, took, runs = program['name'].partition(' ')[0], program['seconds'], program['runs']
        total = runs * (took['total'] - took['waits'])
        seconds[f'{kind}: collectives'] += runs * took['waits']
        if kind == 'decode' and not program['tile']:
            rollout = plan['rollout']
            waiting = min(rollout['episodes'] * rollout['calls'] / (runs * rollout['rows']), 1 - rollout['busy'])
            seconds['decode: waiting for tools'] += total * waiting
            seconds['decode: empty rows'] += total * (1 - rollout['busy'] - waiting)
            total *= rollout['busy']
        seconds[f'{kind}: {RESOURCES[took["bound"]]}'] += total
    return {cause: took for cause, took in seconds.most_common() if took > 0}


def _rows(found: Found, plans: Plans, stage: Reinforcement) -> list[dict]:
    """What was made in full, and by shapes the best of every other mesh.tensor, and the best of all if memory were no
    matter."""
    made = sorted(found.made.items(), key=lambda item: (not item[1]['fits'], item[1]['step']['seconds']))
    rest, known = [], {c.tensor for c in found.candidates if c.name in found.made}
    total = lambda c: sum(c.seconds.values())
    for tensor in sorted({c.tensor for c in found.candidates} - known):
        of_it = [c for c in found.candidates if c.tensor == tensor]
        rest.append(min(of_it, key=lambda c: (not c.fits, total(c) if c.fits else max(c.shares.values()), c.name)))
    larger = [c for c in found.candidates if not c.fits and total(c) < found.plan['step']['seconds']]
    rest += [min(larger, key=lambda c: (total(c), c.name))] if larger else []
    shown = {c.name: c for c in rest if c.name not in found.made}
    return [_row(name, plan) for name, plan in made] + [
        _row(name, plans.guess(changed(stage, c.keys))) for name, c in shown.items()
    ]


def _row(name: str, plan: dict) -> dict:
    worst = max(plan['phases'], key=lambda phase: (bool(phase['refused']), phase['share']))
    step = plan['step']['seconds']
    return {
        'keys': name,
        'seconds': step,
        'phases': {phase['name']: phase['seconds'] for phase in plan['phases']},
        'memory': {'phase': worst['name'], 'share': worst['share'], 'refused': bool(worst['refused'])},
        'fits': plan['fits'],
        'bounds': {cause: seconds / step for cause, seconds in list(bounds(plan).items())[:CAUSES]},
        'estimated': plan['estimated'],
    }


def text(search: dict) -> str:
    """The same for people."""
    kept = ', '.join(f'{key}={value}' for key, value in search['kept'].items())
    shown = ' '.join(f'--config.{key}={value}' for key, value in search['keys'].items())
    how = 'by shapes' if search['estimated'] else 'compiled'
    rows = [
        [
            page.spell(row['seconds']), *map(page.spell, row['phases'].values()),
            f'{row["memory"]["share"]:.0%} ({row["memory"]["phase"]})',
            ', '.join(f'{cause} {share:.0%}' for cause, share in row['bounds'].items()) if row['fits'] else
            f'memory: {row["memory"]["phase"]}' + (', the compiler refuses' if row['memory']['refused'] else ''),
            'shapes' if row['estimated'] else 'compiler', row['keys'],
        ]
        for row in search['table']
    ]  # fmt: skip
    return '\n'.join([
        f'Search: {search["candidates"]:,} configurations by shapes, {search["made"]} in full, the least RL step first',
        *page.table(
            ['step s', *PHASES, 'memory', 'bound by', 'said by', 'keys'], rows), '',
        f'Kept as given, since they change what is computed: {kept}; give others to search with them',
        'ppo.offload: the plan knows no price of the way to the host and back; False where all fits',
        *([NOTHING] if search['estimated'] else []),
        *([] if search['fits'] else [NONE]),
        f'Found in {search["seconds"]:,.0f} s, {how}: ' + (shown or 'nothing better than the configuration as given'),
        search['command']])  # fmt: skip
