"""The report of a rewriting: what became of its traces, as summary.json has it."""

import re

from retool_jax.report import yields

SUMMARY = {
    'counts': {'kept': 3, 'format': 0, 'execution': 1},
    'answers': {'verified': 3, 'own': 0},
    'repairs': {'fence': 2},
    'yield': [{'source': 'a<b', 'rewriter': '', 'traces': 4, 'kept': 3, 'dropped': {'execution': 1}}],
    'statistics': {'traces': 3, 'with_code': 2 / 3, 'calls': 1.25, 'length_max': 1200},
}


def test_every_number_of_the_summary_stands_in_the_tables():
    text = yields.section(SUMMARY)
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in re.findall(r'<tr>(.*?)</tr>', text)]
    assert ['kept', '3', '75.0%'] in rows and not any(row[1:2] == ['0'] for row in rows)
    assert ['a&lt;b', '–', '4', '3', '1 execution'] in rows
    assert ['a fence around the script that was missing or left open', '2'] in rows
    assert ['traces with code', '66.7%'] in rows and ['calls of a trace', '1.25'] in rows
    assert ['tokens of the longest', '1,200'] in rows


def test_a_run_without_traces_has_no_such_section():
    assert yields.section({}) == '' and yields.section({'counts': 5}) == ''
    assert yields.section({'counts': {'kept': 1}, 'answers': {}}) == ''  # a cold start of an earlier version
