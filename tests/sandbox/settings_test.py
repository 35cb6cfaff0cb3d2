"""The values of a pool stand in configs/base.py; what cannot read them there agrees with them."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from retool_jax.sandbox import doctor, guest
from retool_jax.sandbox.feedback import FeedbackSettings
from retool_jax.sandbox.settings import SandboxSettings
from tests.sandbox.given import tiny


@pytest.mark.parametrize('kind', [SandboxSettings, FeedbackSettings])
def test_no_field_has_a_default_and_each_is_explained_beside_it(kind):
    source = inspect.getsource(kind)
    for field in dataclasses.fields(kind):
        assert field.default is field.default_factory is dataclasses.MISSING
        assert re.search(rf'^    {field.name}: [\w\[\], .]+  # \S.{{10,}}$', source, re.MULTILINE), field.name


def test_the_doctor_examines_the_pool_of_the_configuration_in_less_time():
    assert tiny(cpu_s=0.5, wall_s=2.0) == doctor.EXAMINATION


def test_a_guest_root_that_is_built_ahead_is_the_one_that_the_configuration_asks_for():
    assert tiny().packages == guest.PACKAGES


def test_settings_come_back_from_their_fields_without_those_of_a_subclass():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(SandboxSettings):
        more: str

    given = tiny(concurrency=3)
    assert SandboxSettings(**given.fields()) == given
    assert Wider(**given.fields(), more='x').fields() == given.fields()
