"""A trace holds the steps that were asked for, and nothing of the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from retool_jax.core.profile import ProfileSettings, traced


def run(directory, steps, ends_at=4):
    """Steps 0 … 3, each under its name; returns which of them the traces name, trace by trace."""
    work = jax.jit(lambda x: jnp.sin(x @ x).sum())
    x = jnp.ones((64, 64))
    with traced(directory, steps) as begin:
        for step in range(4):
            begin(step, x)
            with jax.profiler.TraceAnnotation(f'work of step {step}'):
                x = x + work(x)
    files = sorted(directory.rglob('*.xplane.pb'))
    return [
        {event.name for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines
         for event in line.events if event.name.startswith('work of step')}
        for file in files
    ]  # fmt: skip


@pytest.mark.parametrize(('steps', 'expected'), [((), []), ((2,), [{'work of step 2'}]), ((3,), [{'work of step 3'}])])
def test_a_trace_holds_the_step_that_was_asked_for(tmp_path, steps, expected):
    assert run(tmp_path, steps) == expected
    assert bool(list(tmp_path.iterdir())) == bool(steps)


def test_steps_one_after_the_other_have_a_trace_each(tmp_path):
    names = run(tmp_path, (1, 2))
    assert set().union(*names) == {'work of step 1', 'work of step 2'} and all(len(found) == 1 for found in names)


def test_a_step_below_zero_is_refused():
    with pytest.raises(ValueError, match=r'steps\[1\]=-1 must lie in'):
        ProfileSettings(steps=(3, -1))
