"""Blocks become frozen dataclasses, or one line that names the key."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict, config_dict

from retool_jax.core import settings
from retool_jax.core.errors import UserError


class Style(enum.StrEnum):
    PAPER = 'paper'
    FULL = 'full'


@dataclasses.dataclass(frozen=True)
class Clip:
    low: float
    high: float
    c: float | None


@dataclasses.dataclass(frozen=True)
class Ppo:
    clip: Clip
    style: Style
    mode: Literal['token', 'sequence']
    sizes: tuple[int, ...]
    rules: dict[str, str | None]
    steps: int
    whiten: bool

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f'steps={self.steps}: give at least 1')


def block(**changes):
    config = ConfigDict(
        dict(
            clip=dict(low=0.2, high=1, c=config_dict.placeholder(float)),
            style='paper', mode='token', sizes=(1, 2), steps=3, whiten=True,
            rules=dict(embed='fsdp', seq=config_dict.placeholder(str)),
        )
    )  # fmt: skip
    with config.ignore_type():
        config.update(ConfigDict(changes))
    return config


def test_a_block_becomes_a_frozen_dataclass_with_its_nested_ones():
    ppo = settings.build(Ppo, block(), 'ppo')
    assert ppo.clip == Clip(0.2, 1.0, None) and isinstance(ppo.clip.high, float)
    assert ppo.style is Style.PAPER and ppo.sizes == (1, 2) and ppo.rules == {'embed': 'fsdp', 'seq': None}
    with pytest.raises(dataclasses.FrozenInstanceError):
        ppo.steps = 4


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(stepz=4), r"unknown config key 'ppo\.stepz' \(did you mean steps\?\)"),
        (dict(clip=dict(lo=1.0)), r"unknown config key 'ppo\.clip\.lo' \(did you mean low\?\)"),
        (dict(steps='3'), r"ppo\.steps='3': expected int, got str"),
        (dict(steps=True), r'ppo\.steps=True: expected int, got bool'),
        (dict(steps=2.0), r'ppo\.steps=2\.0: expected int, got float'),
        (dict(whiten=1), r'ppo\.whiten=1: expected bool, got int'),
        (dict(clip=dict(high='x')), r"ppo\.clip\.high='x': expected float, got str"),
        (dict(clip=dict(c='x')), r"ppo\.clip\.c='x': expected float"),
        (dict(style='poem'), r"ppo\.style='poem': expected one of 'paper', 'full'"),
        (dict(mode='word'), r"ppo\.mode='word': expected one of 'token', 'sequence'"),
        (dict(sizes=(1, 'b')), r"ppo\.sizes\[1\]='b': expected int, got str"),
        (dict(steps=0), r'^ppo\.steps=0: give at least 1'),
    ],
)  # fmt: skip
def test_a_wrong_block_is_refused_with_the_dotted_key(changes, message):
    with pytest.raises(UserError, match=message):
        settings.build(Ppo, block(**changes), 'ppo')


def test_a_required_placeholder_left_empty_is_asked_for():
    config = block()
    del config['steps']
    config.steps = config_dict.required_placeholder(int)
    with pytest.raises(UserError, match=r'ppo\.steps must be given: --config\.ppo\.steps=VALUE'):
        settings.build(Ppo, config, 'ppo')


def test_a_missing_key_is_refused_even_where_the_dataclass_could_fill_it():
    @dataclasses.dataclass(frozen=True)
    class Small:
        a: int
        b: int = 3

    with pytest.raises(UserError, match="config key 'x.b' is missing"):
        settings.build(Small, {'a': 1}, 'x')


def test_the_plain_form_survives_json_and_shows_no_difference():
    config = block()
    plain = settings.to_json(config)
    again = json.loads(json.dumps(plain))
    assert again == plain and again['sizes'] == [1, 2] and again['clip']['c'] is None
    assert settings.differences(again, config) == {}
    assert settings.to_json(settings.build(Ppo, config)) == plain
    assert settings.to_json(Path('a/b')) == 'a/b'
    with pytest.raises(TypeError):
        settings.to_json({'a': {1, 2}})


def test_differences_are_named_by_dotted_key_with_both_values():
    a, b = settings.to_json(block()), settings.to_json(block(steps=4))
    b['clip']['low'] = 0.3
    del b['rules']['seq']
    b['extra'] = {'x': float('nan')}
    found = settings.differences(a, b)
    nan = found.pop('extra.x')
    assert nan[0] == settings.ABSENT and nan[1] != nan[1]
    assert found == {'steps': (3, 4), 'clip.low': (0.2, 0.3), 'rules.seq': (None, settings.ABSENT)}
    assert settings.differences(a, b, ignore=['clip', 'rules', 'extra', 'steps']) == {}
    assert settings.differences({'a': True}, {'a': 1}) == {'a': (True, 1)}
    assert settings.differences({'a': float('nan')}, {'a': float('nan')}) == {}
    assert settings.describe({'steps': (3, 4)}) == 'steps: 3, now 4'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """Words of a field stand beside it."""

    rows: int  # episodes in flight
    silent: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived(Base):
    """Those of a base class are read there."""

    # A long story, of more
    # lines than one.
    quota: int  # decode steps
    # '#' in a string is no comment:
    sign: str = '# none'


def test_the_words_of_a_field_are_the_comments_beside_and_above_it():
    assert settings.words(Derived) == {
        'rows': 'episodes in flight',
        'silent': '',
        'quota': 'A long story, of more lines than one. decode steps',
        'sign': "'#' in a string is no comment:",
    }
