"""launch/sandbox.k8s.yaml holds together: its flags exist, its ports meet, its memory is enough for what it allows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip('yaml')


@pytest.fixture(scope='module')
def documents():
    """The manifest's documents by kind."""
    return {d['kind']: d for d in yaml.safe_load_all((ROOT / 'launch/sandbox.k8s.yaml').read_text())}


@pytest.fixture
def container(documents):
    return documents['StatefulSet']['spec']['template']['spec']['containers'][0]


@pytest.fixture
def given(container):
    """Flags with their values."""
    return dict(argument.removeprefix('--').split('=') for argument in container['args'])


def test_every_flag_is_one_of_the_server(given):
    known = set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", (ROOT / 'launch/sandbox_server.py').read_text()))
    assert given.keys() <= known


def test_what_prometheus_is_told_is_open_to_it_and_to_it_alone(documents, container, given):
    ports = {port['name']: port['containerPort'] for port in container['ports']}
    notes = documents['StatefulSet']['spec']['template']['metadata']['annotations']
    assert notes['prometheus.io/scrape'] == 'true'
    assert int(notes['prometheus.io/port']) == int(given['metrics_port']) == ports['metrics'] != ports['http']
    rules = {rule['ports'][0]['port']: rule['from'] for rule in documents['NetworkPolicy']['spec']['ingress']}
    assert rules.keys() == {'http', 'metrics'} and all(len(sources) == 1 for sources in rules.values())
    assert rules['http'][0]['podSelector']['matchLabels'] == {'role': 'trainer'}
    assert rules['metrics'][0]['namespaceSelector']['matchLabels']


def test_memory_is_enough_for_all_snippets_at_once_and_pods_outlive_their_drain(documents, container, given):
    memory_gb = int(container['resources']['limits']['memory'].removesuffix('Gi'))
    assert memory_gb >= int(given['concurrency']) * int(given['max_memory_mb']) / 1024 + 2
    assert int(given['max_memory_mb']) >= 1024  # what verl's clients ask for
    grace_s = documents['StatefulSet']['spec']['template']['spec']['terminationGracePeriodSeconds']
    assert grace_s > int(given['drain_s']) >= int(given['max_timeout_s'])
