"""The closed list of units: every spelling has one name, and no other word is a unit."""

import pytest

from retool_jax.tasks import units


@pytest.mark.parametrize(
    'spellings, name',
    [
        (('cm^2', 'sq cm', 'sq. cm.', 'square centimeters', 'centimetres squared', 'cm^{2}'), 'centimeter^2'),
        (('mph', 'miles per hour', 'mi/h', 'mile/hour'), 'hour^-1 mile'), (('$', 'dollars', 'USD'), 'dollar'),
        (('m/s^2', 'meters per second squared', 'm s^{-2}'), 'meter second^-2'), (('°C', 'degrees Celsius'), 'celsius'),
        (('inches', 'in.', 'inch'), 'inch'), (('kWh',), 'hour kilowatt'), (('units', 'unit'), 'unit'),
        (('Rs.',), 'rupee'),
    ],
)  # fmt: skip
def test_every_spelling_of_a_unit_has_one_name(spellings, name):
    assert {units.read(spelling) for spelling in spellings} == {name}


@pytest.mark.parametrize('text', ['north', 'apples', 'p.m.', 'x', '', '^2', 'cm north', 'more', 'students', '5'])
def test_other_words_are_no_units(text):
    assert units.read(text) is None


def test_a_unit_is_dropped_where_the_other_side_has_none():
    assert units.agree('', 'meter') and units.agree('meter', 'meter') and units.agree('unit^2', 'meter^2')
    assert not units.agree('meter', 'meter^2') and not units.agree('dollar', 'cent')
