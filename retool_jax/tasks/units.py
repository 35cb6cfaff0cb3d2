r"""The closed list of units of measure and of money that may stand beside a number; every other word counts.

A unit is read into a name that does not depend on how it is written: `cm^2`, `sq cm` and `square centimeters`
are 'centimeter^2'; `km/h` and `kilometers per hour` are 'hour^-1 kilometer'.
"""

from __future__ import annotations

import re

ANY = 'unit'  # the word 'unit' itself stands for every unit

# Name: other spellings. Plurals and 'metre', 'litre' for 'meter', 'liter' are made below.
_SPELLINGS = """
nanometer: nm | micrometer: µm μm micron | millimeter: mm | centimeter: cm | decimeter: dm | meter: m
kilometer: km kms | inch: in inches | foot: ft feet | yard: yd yds | mile: mi
microgram: µg | milligram: mg | gram: g gm gms | kilogram: kg kgs kilo | ton: tonne | ounce: oz | pound: lb lbs
milliliter: ml mL cc | centiliter: cl cL | deciliter: dl dL | liter: l L | gallon: gal | quart: qt | pint: pt
cup: | teaspoon: tsp | tablespoon: tbsp | acre: | hectare: ha | millisecond: ms | second: s sec secs
minute: min mins | hour: h hr hrs | day: | week: wk wks | month: mo | year: yr yrs | decade: | century: centuries
degree: deg ° | radian: rad rads | celsius: °C | fahrenheit: °F | kelvin: K
newton: N | joule: J | kilojoule: kJ | watt: W | kilowatt: kW | volt: V | ampere: A amp | ohm: Ω | hertz: Hz
pascal: Pa | kilopascal: kPa | calorie: cal | kilocalorie: kcal | mole: mol | coulomb: | bit: | byte: | unit:
dollar: $ usd buck | cent: ¢ | euro: € eur | sterling: £ gbp | yen: ¥ jpy | yuan: rmb cny | rupee: ₹ Rs rs inr
"""
_COMPOUND = {'mph': 'mile/hour', 'kph': 'kilometer/hour', 'kmph': 'kilometer/hour', 'kmh': 'kilometer/hour',
             'fps': 'foot/second', 'kwh': 'kilowatt hour', 'sqft': 'foot^2', 'rpm': 'minute^-1'}  # fmt: skip
# Abbreviations that are units even without \text, where they follow a number: kilograms are no product k·g.
BARE = frozenset((
    'mm', 'cm', 'km', 'kms', 'kg', 'kgs', 'mg', 'ml', 'mL', 'ft', 'lb', 'lbs', 'oz', 'mph', 'kph', 'kmph', 'kmh', 'Hz',
    'kHz', 'kW', 'kJ', 'kPa',
))  # fmt: skip
SPACED = frozenset((
    'in', 'yd', 'yds', 'hr', 'hrs', 'mi', 'gal', 'sec', 'secs', 'min', 'mins', 'yr', 'yrs',
))  # fmt: skip  # the same behind a space


def _names() -> dict[str, str]:
    names = {}
    for entry in re.split(r'[|\n]', _SPELLINGS.strip()):
        name, _, others = entry.partition(':')
        name = name.strip()
        words = [name, name + ('es' if name.endswith(('inch', 'hertz')) else 's'), *others.split()]
        words += [w.replace('meter', 'metre').replace('liter', 'litre') for w in words[:2]]
        words += [w + 's' for w in others.split() if len(w) > 3 and w.islower() and not w.endswith('s')]
        for word in words:
            names[word] = name
            if len(word) > 2:
                names.setdefault(word.lower(), name)
    return names


NAMES = _names()
_WORD = re.compile(r'\s*(?:([A-Za-zµμΩ°$¢€£¥₹]+)\.?|(\^)\s*\{?\s*(-?\d)\s*\}?|([/*·-]))')
_BEFORE = {'square': 2, 'sq': 2, 'cubic': 3, 'cu': 3}
_BEHIND = {'squared': 2, 'cubed': 3}


def read(text: str) -> str | None:
    """The name of a unit ('hour^-1 mile'); None where a part of the text is no unit."""
    powers: dict[str, int] = {}
    sign, given, last, position = 1, 1, None, 0
    text = text.strip()
    if not text:
        return None
    while position < len(text):
        match = _WORD.match(text, position)
        if not match:
            return None
        position = match.end()
        word, hat, exponent, operator = match.groups()
        if hat:
            if last is None:
                return None
            powers[last] += powers[last] * (int(exponent) - 1)
        elif operator:
            sign = -1 if operator == '/' else sign
        elif word.lower() == 'per':
            sign = -1
        elif word.lower() in _BEFORE:
            given = _BEFORE[word.lower()]
        elif word.lower() in _BEHIND:
            if last is None:
                return None
            powers[last] *= _BEHIND[word.lower()]
        elif word.lower() in _COMPOUND:
            inner = read(_COMPOUND[word.lower()])
            for part in inner.split():
                name, _, power = part.partition('^')
                powers[name] = powers.get(name, 0) + int(power or 1)
            last = None
        else:
            name = NAMES.get(word) or (NAMES.get(word.lower()) if len(word) > 2 else None)
            if name is None:
                return None
            powers[name] = powers.get(name, 0) + sign * given
            last, given = name, 1
    if powers.keys() >= {'degree'} and powers.keys() & {'celsius', 'fahrenheit'}:
        powers.pop('degree')  # a degree of a scale is named by the scale
    return ' '.join(name if n == 1 else f'{name}^{n}' for name, n in sorted(powers.items()) if n) or None


def agree(a: str, b: str) -> bool:
    """Whether two sides may be one quantity: a unit is dropped where the other side has none or says 'units'."""
    return not a or not b or a == b or ANY in (a.split('^')[0], b.split('^')[0])
