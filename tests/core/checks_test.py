"""Rules say what they want in one line that begins with the field."""

from __future__ import annotations

import dataclasses
import math

import pytest

from retool_jax.core.checks import above, below, check, filled, local_path, one_of, within
from retool_jax.core.errors import UserError


@dataclasses.dataclass
class Holder:
    x: object


@pytest.mark.parametrize('rule, good, bad, words', [
    (within(0, 1), (0, 1, 0.5), (-0.1, 1.1, math.nan, math.inf), 'must lie in [0, 1]'),
    (above(0, 10), (1e-9, 10), (0, 11, math.nan), 'must lie in (0, 10]'),
    (below(0, 1), (0, 0.999), (1, -1, math.nan), 'must lie in [0, 1)'),
    (one_of(('a', 'b')), ('a',), ('c', '', 'A'), 'is unknown; choose one of a, b'),
    (filled(), ('a',), ('', ' '), 'must not be empty'),
    (local_path(), ('runs/a', '/a b', './gs', 'a:b', 'C:/x'), ('', ' ', 'gs://b/c', 's3:/b', 'file:///x', 'a\0b'),
     'must be a path of this machine'),
])  # fmt: skip
def test_what_holds_passes_and_what_does_not_is_said(rule, good, bad, words):
    for value in (*good, None, good, ()):
        check(Holder(value), x=rule)
    for value in bad:
        with pytest.raises(UserError) as refused:
            check(Holder(value), x=rule)
        assert str(refused.value).startswith(f'x={value!r} {words}')
        with pytest.raises(UserError) as refused:
            check(Holder((*good, value)), x=rule)
        assert str(refused.value).startswith(f'x[{len(good)}]={value!r} {words}')
