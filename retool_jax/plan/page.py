"""A plan as numbers for programs and as tables for people."""

from __future__ import annotations

import dataclasses

from retool_jax.plan import engines, memory, roofline
from retool_jax.plan.facts import Facts
from retool_jax.plan.programs import Run
from retool_jax.plan.roofline import Assumptions, Sizes
from retool_jax.train.ppo import unscored

GIB = 2**30
PUBLISHED_MFU = 0.715  # MaxText's table of v5p results: 32B pretraining on v5p-128
REASONS = (
    'with forward.remat={remat} {needed:.0%} of the operations count, the others are done a second time',
    "rows of {width:,} tokens: {attention:.0%} of the work is attention, whose kernels run below the matmuls' rate",
    'gradients are added in f32 and weights gathered once per micro-batch of {rows} rows',
    'the estimate takes {matmul:.0%} of the peak for matmuls; the published figure is measured after tuning',
)


def make(run: Run, facts: list[Facts], assumptions: Assumptions, compile_s: float = 0.0, cpu_s: float = 0.0) -> dict:
    """Everything that is known of the plan, as JSON types; bytes are one chip's.

    compile_s, cpu_s: what making the facts took of the clock and of this machine's processors.
    """
    chip, count = run.slice.chip, run.slice.count
    rollout = engines.simulate(run, facts, assumptions)
    sizes = _sizes(run, rollout.ended)
    parts = {'decode': rollout.decode, 'extend': rollout.extend}
    programs, total = [], {phase: 0.0 for phase in memory.PHASES}
    for f in facts:
        if part := parts.get(f.name):
            runs, took = part.runs, part.one()
        else:
            t, runs = roofline.seconds(f, chip, assumptions), sizes.runs(f.name, assumptions)
            took = dataclasses.asdict(t) | {'total': t.total, 'bound': t.bound}
        total[f.phase] += runs * took['total']
        programs.append(
            dataclasses.asdict(f)
            | {
                'sent_total': f.sent_bytes,
                'seconds': took,
                'runs': runs,
            }
        )
    phases = []
    for phase in memory.phases(run, facts):
        fits = phase.fits(chip.hbm)
        phases.append(
            {
                'name': phase.name,
                'resident': phase.resident,
                'temporaries': phase.temporaries,
                'worst': phase.worst,
                'total': phase.total,
                'share': phase.total / chip.hbm,
                'fits': fits,
                'refused': phase.refused,
                'seconds': total[phase.name],
                'remedies': [] if fits else memory.remedies(run, phase, chip.hbm),
            }
        )
        if phase.name == 'rollout':
            fit = memory.tokens_that_fit(run, phase, chip.hbm)
    step = sum(total.values())
    forward = run.learner.forward
    update = next(p for p in programs if p['name'].startswith('update policy'))
    frozen = run.frozen is not None
    useful = roofline.model_flops(run.model, forward.micro_rows, forward.row_width, frozen)
    work = update['seconds']['total'] * count * chip.flops
    weights_only = (
        roofline.model_flops(run.model, forward.micro_rows, 0 if not forward.row_width else 1, frozen)
        * forward.row_width
    )
    policy = memory.policy_update(run, facts)
    return {
        'topology': run.slice.name,
        'chip': dataclasses.asdict(chip),
        'chips': count,
        'estimated': any(f.estimated for f in facts),
        'model': {'parameters': run.model.parameter_count(), 'type': run.model.model_type},
        'mesh': dict(run.mesh.shape),
        'sampler_mesh': dict(run.sampler_mesh.shape),
        'engines': rollout.engines,
        'abreast': rollout.abreast,
        'attention': forward.attention,
        'programs': programs,
        'phases': phases,
        'policy_update': {'bytes': policy, 'share': policy / chip.hbm},
        'rollout': dataclasses.asdict(rollout) | {'seconds': rollout.seconds},
        'kv_tokens_that_fit': fit,
        'kv_rows_that_fit': fit // run.sampler.settings.slots,
        'step': {
            'seconds': step,
            'chip_hours': step * count / 3600,
            'episodes': round(sizes.episodes),
            'asked': (asked := run.sizes.problems_per_step * run.sizes.samples),
            'seconds_asked': step * asked / sizes.episodes,  # of as many trained episodes, in steps of partial rollouts
            'micro_batches': sizes.micro_batches(assumptions),
        },
        'run': {
            'steps': run.sizes.steps,
            'hours': step * run.sizes.steps / 3600,
            'chip_hours': step * run.sizes.steps * count / 3600,
        },
        'mfu': {
            'update_policy': useful / work,
            'published': PUBLISHED_MFU,
            'reasons': [
                reason.format(
                    remat=forward.remat,
                    needed=useful / (update['flops'] * count),
                    width=forward.row_width,
                    attention=1 - weights_only / useful,
                    rows=forward.micro_rows,
                    matmul=assumptions.matmul,
                )
                for reason in REASONS
            ],
        },
        'assumptions': dataclasses.asdict(assumptions),
        'fits': all(p['fits'] for p in phases),
        'compile_s': compile_s,
        'cpu_s': cpu_s,
    }


def _sizes(run: Run, episodes: float) -> Sizes:
    f, sizes = run.learner.forward, run.sizes
    own = sizes.minibatches - unscored(sizes, run.loss, sizes.critic_warmup_steps)
    return Sizes(
        episodes=episodes,
        minibatches=sizes.minibatches,
        epochs=sizes.epochs,
        micro_rows=f.micro_rows,
        row_width=f.row_width,
        row_segments=f.row_segments,
        layers=run.model.num_hidden_layers,
        policy_scores=sizes.rescore * own / sizes.minibatches + run.loss.needs_reference,
    )


def text(plan: dict) -> str:
    """The same for people."""
    chip, gib = plan['chip'], lambda n: f'{n / GIB:.2f}'
    mesh = ' × '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
    lines = [
        f'{plan["topology"]}: {plan["chips"]} × {chip["name"]}, {chip["hbm"] / GIB:.0f} GiB, '
        f'{chip["flops"] / 1e12:,.0f} TFLOP/s bf16, {chip["hbm_bandwidth"] / 1e9:,.0f} GB/s'
        + (' – an ESTIMATE from shapes, nothing was compiled' if plan['estimated'] else ' – compiled'),
        f'{plan["model"]["parameters"] / 1e9:.1f} B parameters, training mesh {mesh}, '
        f'{plan["engines"]} engines of {plan["mesh"]["tensor"]} chips, {plan["abreast"]} side by side in a program, '
        f'attention {plan["attention"]}', '',
        'Programs, on one chip (one run; extend and decode with their longest reads, their seconds the mean)', *table(
            ['program', 'phase', 'arguments GiB', 'temporaries GiB', 'TFLOP', 'memory GB', 'links GB', 'seconds',
             'bound by', 'runs a step'],
            [[p['name'], p['phase'], gib(p['arguments']), gib(p['temporaries']), f'{p["flops"] / 1e12:.1f}',
              f'{p["moved"] / 1e9:.1f}', f'{p["sent_total"] / 1e9:.2f}', f'{p["seconds"]["total"]:.3g}',
              'does not fit' if p['refused'] else p['seconds']['bound'], f'{p["runs"]:,.0f}']
             for p in plan['programs']]), '',
        'Bytes sent by a chip, by kind of collective', *table(
            ['program', 'kind', 'GB'],
            [[p['name'], kind, f'{n / 1e9:.3f}'] for p in plan['programs'] for kind, n in sorted(p['sent'].items())]),
        '', 'Memory, on one chip', *table(
            ['phase', 'resident GiB', 'of which', 'temporaries GiB', 'share', 'fits', 'seconds a step'],
            [[p['name'], gib(sum(p['resident'].values())),
              ', '.join(f'{k} {gib(n)}' for k, n in p['resident'].items() if n / GIB >= 0.005),
              f'{gib(p["temporaries"])} ({p["worst"]})', f'{p["share"]:.0%}', 'yes' if p['fits'] else 'NO',
              f'{p["seconds"]:,.0f}'] for p in plan['phases']]), '',
        f'Policy update (all weights, moments, gradients, temporaries): {gib(plan["policy_update"]["bytes"])} GiB, '
        f'{plan["policy_update"]["share"]:.0%} of memory',
        f'KV slots × context that fit: {plan["kv_tokens_that_fit"]:,} tokens an engine, '
        f'{plan["kv_rows_that_fit"]:,} whole rows',
        f'RL step: {plan["step"]["seconds"]:,.0f} s, {plan["step"]["chip_hours"]:,.1f} chip-hours '
        f'({_episodes(plan)}, {plan["step"]["micro_batches"]} micro-batches)',
        f'{plan["run"]["steps"]} steps: {plan["run"]["hours"]:,.1f} hours, {plan["run"]["chip_hours"]:,.0f} chip-hours',
        f'Policy update: {plan["mfu"]["update_policy"]:.0%} model-FLOPs utilisation estimated; MaxText publishes '
        f'{plan["mfu"]["published"]:.1%} for pretraining 32B on v5p-128. Why less:',
        *(f'  - {reason}' for reason in plan['mfu']['reasons']),
        _lengths(plan['rollout'], plan['assumptions']['sigma']),
        'Assumed: ' + ', '.join(f'{name} {value:g}' for name, value in plan['assumptions'].items())
        + ' (see retool_jax/plan/roofline.py)',
        f'Compiled in {plan["compile_s"]:,.0f} s, {plan["cpu_s"]:,.0f} s of CPU time']  # fmt: skip
    for phase in plan['phases']:
        if not phase['fits']:
            lines.append(
                f'{phase["name"]} does not fit ({phase["share"]:.0%} of memory): set ' + '; or '.join(phase['remedies'])
            )
    return '\n'.join(lines)


def _episodes(plan: dict) -> str:
    """What a step is trained on, and with partial rollouts how long as many take as it asks for."""
    step = plan['step']
    if not plan['rollout']['quanta']:
        return f'{step["episodes"]:,} episodes'
    asked = f'{step["asked"]:,}'
    return f'{step["episodes"]:,} of {asked} episodes end in it, {asked} take {spell(step["seconds_asked"])} s'


def _lengths(r: dict, sigma: float) -> str:
    """What was assumed of the episodes, and what came of it."""
    works = f'for {r["quanta"]} decode calls each work on' if r['quanta'] else 'make'
    return (
        f'Lengths assumed: log-normal, sigma {sigma:g}, mean {r["mean"]:,.0f}, cut at {r["budget"]:,} tokens; '
        f'of {r["engines"]} engines the slowest {r["abreast"]} side by side {works} {r["episodes"]:,} episodes of '
        f'{r["calls"]} calls of tools on {r["rows"]} rows in {r["steps"]:,} decode steps, {r["busy"]:.0%} of their '
        'row-steps busy; '
        f'a step reads {r["read"]:,.0f} slots a row, of which {r["live"]:,.0f} hold tokens'
    )


def spell(seconds: float) -> str:
    """Whole seconds, or three digits of less than ten."""
    return f'{seconds:,.0f}' if seconds >= 10 else f'{seconds:.3g}'


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest entry."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    return [line(head), line(['-' * width for width in widths]), *map(line, rows)]
