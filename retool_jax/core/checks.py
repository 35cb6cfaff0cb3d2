"""Which values a key may have: rules for the `__post_init__` of settings, each with the words of its one line.

check(self, steps=within(1, MANY), lr=above(0, 100), dtype=one_of(DTYPES), path=local_path())
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from retool_jax.core.errors import UserError

MANY = 2**31 - 1  # the largest int32: steps, tokens and rows are counted in compiled programs
STORE = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')  # how the address of a store begins: gs://, s3://
NO_STORE = 'must be a path of this machine; a store (gs://, s3://, …) has to be mounted or copied first'
READ, WRITTEN = ('gs', 's3', 'az', 'memory'), ('gs',)  # stores that models and data come from, that hold runs


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds of a value, and what is said where it does not."""

    holds: Callable[[Any], bool]
    words: str


def check(settings: object, **rules: Rule) -> None:
    """Tests each named field of a dataclass by its rule, a tuple entry by entry; None passes where a field may be
    absent.

    Raises:
      UserError: the first field that breaks its rule, as NAME=VALUE and the rule's words; `settings.build` puts
        the name of the block before it.
    """
    for name, rule in rules.items():
        value = getattr(settings, name)
        many = isinstance(value, tuple)
        for i, entry in enumerate(value if many else (value,)):
            if entry is not None and not rule.holds(entry):
                raise UserError(f'{name}{f"[{i}]" if many else ""}={entry!r} {rule.words}')


def within(low: float, high: float) -> Rule:
    """A number of [low, high]; NaN lies in no interval."""
    return Rule(lambda x: low <= x <= high, f'must lie in [{low:.10g}, {high:.10g}]')


def above(low: float, high: float) -> Rule:
    """A number of (low, high]."""
    return Rule(lambda x: low < x <= high, f'must lie in ({low:.10g}, {high:.10g}]')


def below(low: float, high: float) -> Rule:
    """A number of [low, high)."""
    return Rule(lambda x: low <= x < high, f'must lie in [{low:.10g}, {high:.10g})')


def one_of(choices: Iterable[str]) -> Rule:
    """One of a few words."""
    choices = tuple(choices)
    return Rule(lambda x: x in choices, f'is unknown; choose one of {", ".join(choices)}')


def filled() -> Rule:
    """Text that is not empty."""
    return Rule(lambda x: bool(x.strip()), 'must not be empty')


def local_path() -> Rule:
    """A path of a file system of this machine: stores such as gs:// and s3:// are neither read nor written."""
    return Rule(lambda x: bool(x.strip()) and '\0' not in x and not STORE.match(x), NO_STORE)


def refuse_store(key: str, value: str | None) -> None:
    """Raises a UserError where a key holds no path of this machine; None passes."""
    if value is not None and not local_path().holds(value):
        raise UserError(f'{key}={value!r} {NO_STORE}')


def address(kinds: Iterable[str] = READ) -> Rule:
    """A path of a file system of this machine, or an address in a store of these kinds."""
    begin = re.compile(rf'({"|".join(kinds)})://[^/\s]')
    known = ', '.join(f'{kind}://' for kind in kinds)
    return Rule(
        lambda x: local_path().holds(x) or ('\0' not in x and begin.match(x) is not None),
        f'must be a path of this machine or an address of {known}; another store has to be mounted or copied first',
    )
