"""A pool without a configuration has the values of configs/base.py, and each is explained."""

from __future__ import annotations

import dataclasses

import pytest

from retool_jax.core import settings
from retool_jax.sandbox import guest
from retool_jax.sandbox.feedback import FeedbackSettings
from retool_jax.sandbox.settings import SandboxSettings
from tests.sandbox.given import tiny


@pytest.mark.parametrize('kind', [SandboxSettings, FeedbackSettings])
def test_each_field_is_explained_beside_it(kind):
    assert all(len(text) > 10 for text in settings.words(kind).values())


def test_a_pool_without_a_configuration_has_the_values_of_the_tiny_one():
    assert SandboxSettings() == tiny()


def test_a_guest_root_that_is_built_ahead_is_the_one_that_the_configuration_asks_for():
    assert tiny().packages == guest.PACKAGES


def test_settings_come_back_from_their_fields_without_those_of_a_subclass():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(SandboxSettings):
        more: str

    given = tiny(concurrency=3)
    assert SandboxSettings(**given.fields()) == given
    assert Wider(**given.fields(), more='x').fields() == given.fields()
