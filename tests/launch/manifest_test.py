"""launch/k8s/ and the Dockerfiles hold together: flags and files exist, labels, names, ports and sizes meet, and every
object is one that Kubernetes takes."""

from __future__ import annotations

import ast
import copy
import math
import re
from pathlib import Path

import pytest
from absl import flags

from retool_jax.core import cli

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip('yaml')
TRAINERS = ('tpu', 'gpu')
VERSIONS = ('1.31', '1.34')  # of Kubernetes; policies of failures are stable since the first

# The fields of JobSet that the manifests use, after its API reference, jobset.x-k8s.io/v1alpha2 (the JobSetSpec,
# ReplicatedJob, FailurePolicy and FailurePolicyRule of jobset_types.go); what a template holds is a Job's.
JOBSET = {
    'type': 'object',
    'additionalProperties': False,
    'required': ['apiVersion', 'kind', 'metadata', 'spec'],
    'properties': {
        'apiVersion': {'const': 'jobset.x-k8s.io/v1alpha2'},
        'kind': {'const': 'JobSet'},
        'metadata': {'type': 'object', 'required': ['name']},
        'spec': {
            'type': 'object',
            'additionalProperties': False,
            'required': ['replicatedJobs'],
            'properties': {
                'network': {
                    'type': 'object',
                    'additionalProperties': False,
                    'properties': {
                        'enableDNSHostnames': {'type': 'boolean'},
                        'subdomain': {'type': 'string'},
                        'publishNotReadyAddresses': {'type': 'boolean'},
                    },
                },
                'failurePolicy': {
                    'type': 'object',
                    'additionalProperties': False,
                    'properties': {
                        'maxRestarts': {'type': 'integer', 'minimum': 0},
                        'rules': {
                            'type': 'array',
                            'items': {
                                'type': 'object',
                                'additionalProperties': False,
                                'required': ['name', 'action'],
                                'properties': {
                                    'name': {'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
                                    'action': {
                                        'enum': ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']
                                    },
                                    'onJobFailureReasons': {
                                        'type': 'array',
                                        'uniqueItems': True,
                                        'items': {
                                            'enum': [
                                                'BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes',
                                                'MaxFailedIndexesExceeded', 'PodFailurePolicy',
                                            ]
                                        },
                                    },
                                    'targetReplicatedJobs': {'type': 'array', 'items': {'type': 'string'}},
                                },
                            },
                        },
                    },
                },
                'replicatedJobs': {
                    'type': 'array',
                    'minItems': 1,
                    'items': {
                        'type': 'object',
                        'additionalProperties': False,
                        'required': ['name', 'template'],
                        'properties': {
                            'name': {'type': 'string'},
                            'replicas': {'type': 'integer', 'minimum': 1},
                            'template': {
                                'type': 'object',
                                'additionalProperties': False,
                                'required': ['spec'],
                                'properties': {'metadata': {'type': 'object'}, 'spec': {'type': 'object'}},
                            },
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def read(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / f'launch/k8s/{name}.yaml').read_text()))


@pytest.fixture(scope='module')
def documents():
    """The sandbox's documents by kind."""
    return {document['kind']: document for document in read('sandbox')}


@pytest.fixture
def container(documents):
    return documents['StatefulSet']['spec']['template']['spec']['containers'][0]


@pytest.fixture
def given(container):
    """Flags with their values."""
    return dict(argument.removeprefix('--').split('=') for argument in container['args'])


class Trainer:
    """A trainer's manifest and the parts of it that are looked at."""

    def __init__(self, name: str):
        (self.whole,) = read(f'trainer-{name}')
        (self.replicated,) = self.whole['spec']['replicatedJobs']
        self.job = self.replicated['template']['spec']
        self.pod = self.job['template']['spec']
        (self.container,) = self.pod['containers']
        self.environment = {item['name']: item for item in self.container['env']}

    def value(self, name: str) -> str:
        return self.environment[name]['value']


@pytest.fixture(params=TRAINERS)
def trainer(request) -> Trainer:
    return Trainer(request.param)


def core_objects() -> dict[str, dict]:
    """All that Kubernetes itself knows, by a name: objects, and the jobs that a JobSet makes."""
    found = {f'{name}: {one["kind"]}': one for name in ('sandbox', 'runs', 'files') for one in read(name)}
    for name in TRAINERS:
        job = Trainer(name).job
        found[f'{name}: Job'] = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}, 'spec': job}
    return found


@pytest.mark.parametrize('version', VERSIONS)
def test_every_object_is_one_that_kubernetes_takes(version):
    kubernetes_validate = pytest.importorskip('kubernetes_validate')
    objects = core_objects()
    assert {name.partition(': ')[2] for name in objects} == {
        'Service', 'StatefulSet', 'PodDisruptionBudget', 'NetworkPolicy', 'PersistentVolumeClaim', 'Job', 'Pod'
    }  # fmt: skip
    for document in objects.values():
        kubernetes_validate.validate(document, version, strict=True)
    wrong = copy.deepcopy(objects['tpu: Job'])
    wrong['spec']['template']['spec']['terminationGracePeriod'] = 300
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_a_jobset_has_the_fields_of_its_api(trainer):
    jsonschema = pytest.importorskip('jsonschema')
    jsonschema.validate(trainer.whole, JOBSET)
    for path, value in (
        (('failurePolicy', 'maxRestarts'), '50'),
        (('failurePolicy', 'restarts'), 50),
        (('failurePolicy', 'rules'), [{'name': 'a', 'action': 'Fail'}]),
        (('replicatedJobs',), []),
    ):
        wrong = copy.deepcopy(trainer.whole)
        block = wrong['spec']
        for key in path[:-1]:
            block = block[key]
        block[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, JOBSET)


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
    assert rules['metrics'][0]['namespaceSelector']['matchLabels']


def test_the_policy_lets_the_trainers_in_and_nobody_else_and_the_sandbox_nowhere(documents, trainer):
    policy = documents['NetworkPolicy']['spec']
    (asked,) = [rule['from'] for rule in policy['ingress'] if rule['ports'][0]['port'] == 'http']
    labels = trainer.job['template']['metadata']['labels']
    assert asked == [{'podSelector': {'matchLabels': labels}}]  # of the policy's own namespace
    assert policy['egress'] == [] and set(policy['policyTypes']) == {'Ingress', 'Egress'}
    own = documents['StatefulSet']['spec']['template']['metadata']['labels']
    assert own != labels and policy['podSelector']['matchLabels'] == own


def test_what_selects_the_sandbox_selects_its_pods(documents):
    own = documents['StatefulSet']['spec']['template']['metadata']['labels']
    pod = documents['StatefulSet']['spec']['template']['spec']
    selectors = [
        documents['StatefulSet']['spec']['selector']['matchLabels'],
        documents['Service']['spec']['selector'],
        documents['PodDisruptionBudget']['spec']['selector']['matchLabels'],
        documents['NetworkPolicy']['spec']['podSelector']['matchLabels'],
        pod['topologySpreadConstraints'][0]['labelSelector']['matchLabels'],
    ]
    assert selectors == [own] * 5
    assert documents['PodDisruptionBudget']['spec']['maxUnavailable'] < documents['StatefulSet']['spec']['replicas']
    ((key, value),) = pod['nodeSelector'].items()  # a pool that others are kept from
    assert pod['tolerations'] == [{'key': key, 'operator': 'Equal', 'value': value, 'effect': 'NoSchedule'}]


def test_memory_is_enough_for_all_snippets_at_once_and_pods_outlive_their_drain(documents, container, given):
    memory_gb = int(container['resources']['limits']['memory'].removesuffix('Gi'))
    assert memory_gb >= int(given['concurrency']) * int(given['max_memory_mb']) / 1024 + 2
    assert int(given['max_memory_mb']) >= 1024  # what verl's clients ask for
    grace_s = documents['StatefulSet']['spec']['template']['spec']['terminationGracePeriodSeconds']
    assert grace_s > int(given['drain_s']) >= int(given['max_timeout_s'])


def test_a_trainer_asks_the_sandbox_that_is_there_with_its_token(documents, container, trainer):
    script, *arguments = trainer.container['args']
    assert (ROOT / script).is_file()
    config = cli.parse_config([script, *arguments])
    flags.FLAGS.unparse_flags()
    replicas, service = documents['StatefulSet']['spec']['replicas'], documents['Service']
    (port,) = [port['port'] for port in service['spec']['ports'] if port['name'] == 'http']
    name, of = documents['StatefulSet']['metadata']['name'], documents['StatefulSet']['spec']['serviceName']
    assert of == service['metadata']['name']
    assert config.sandbox.addresses == tuple(f'http://{name}-{i}.{of}:{port}' for i in range(replicas))
    token = {'name': 'RETOOL_SANDBOX_TOKEN'}
    server, client = (
        [item for item in one['env'] if item['name'] == token['name']] for one in (container, trainer.container)
    )
    assert server == client and len(client) == 1 and client[0]['valueFrom'].keys() == {'secretKeyRef'}
    told = re.search(
        r'create secret generic (\S+) --from-literal=(\w+)=', (ROOT / 'launch/k8s/sandbox.yaml').read_text()
    )
    assert client[0]['valueFrom']['secretKeyRef'] == {'name': told[1], 'key': told[2]}
    (sources,) = [ast.literal_eval(a.partition('=')[2]) for a in arguments if a.startswith('--config.data.sources')]
    kept = [mount['mountPath'] for mount in trainer.container['volumeMounts'] if mount['name'] == 'runs']
    for path in (config.run.dir, config.model.path, trainer.value('JAX_COMPILATION_CACHE_DIR'), *sources):
        assert [path.startswith(f'{folder}/') for folder in kept] == [True], path
    (claim,) = [one['metadata']['name'] for one in read('runs')]
    assert {'name': 'runs', 'persistentVolumeClaim': {'claimName': claim}} in trainer.pod['volumes']


def test_the_pod_of_files_sees_what_trainers_see_as_the_user_that_they_are(trainer):
    (pod,) = read('files')
    (container,) = pod['spec']['containers']
    assert pod['metadata']['labels'] == trainer.job['template']['metadata']['labels']  # or the sandbox refuses it
    assert container['image'].partition(':')[0] == trainer.container['image'].partition(':')[0]
    for key in ('securityContext', 'automountServiceAccountToken', 'enableServiceLinks'):
        assert pod['spec'][key] == trainer.pod[key]
    assert container['securityContext'] == trainer.container['securityContext']
    assert container['volumeMounts'][0] in trainer.container['volumeMounts']
    assert pod['spec']['volumes'][0] in trainer.pod['volumes']
    (token,) = [item for item in container['env'] if 'valueFrom' in item]
    assert token == trainer.environment['RETOOL_SANDBOX_TOKEN']


def test_a_trainer_has_the_time_to_save_and_is_started_again_but_not_after_a_mistake(trainer):
    assert int(trainer.value('RETOOL_GRACE_S')) == trainer.pod['terminationGracePeriodSeconds'] == 300
    assert trainer.whole['spec']['failurePolicy']['maxRestarts'] > 0 == trainer.job['backoffLimit']
    (rule,) = trainer.job['podFailurePolicy']['rules']
    assert rule['onExitCodes'] == {'containerName': trainer.container['name'], 'operator': 'In', 'values': [1, 2]}
    (rule,) = trainer.whole['spec']['failurePolicy']['rules']
    assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
    assert trainer.pod['restartPolicy'] == 'Never'  # or no policy of failures is taken


def test_the_pods_of_a_slice_are_its_hosts():
    trainer = Trainer('tpu')
    chips = math.prod(map(int, trainer.pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')))
    limits, requests = trainer.container['resources']['limits'], trainer.container['resources']['requests']
    assert limits['google.com/tpu'] == requests['google.com/tpu']
    assert trainer.job['parallelism'] == trainer.job['completions'] == chips // limits['google.com/tpu'] > 1
    assert trainer.value('RETOOL_PROCESSES') == 'auto'


def test_the_pods_of_gpus_know_each_other_by_name():
    trainer = Trainer('gpu')
    count = int(trainer.value('RETOOL_PROCESSES'))
    assert trainer.job['parallelism'] == trainer.job['completions'] == count
    limits, requests = trainer.container['resources']['limits'], trainer.container['resources']['requests']
    ids = trainer.value('JAX_LOCAL_DEVICE_IDS').split(',')
    assert len(ids) == limits['nvidia.com/gpu'] == requests['nvidia.com/gpu']
    own = trainer.whole['metadata']['name']
    host, _, port = trainer.value('RETOOL_COORDINATOR').partition(':')
    assert host == f'{own}-{trainer.replicated["name"]}-0-0.{own}' and int(port)
    process = trainer.environment['RETOOL_PROCESS']['valueFrom']['fieldRef']['fieldPath']
    assert trainer.job['completionMode'] == 'Indexed' and 'job-completion-index' in process


DOCKERFILES = ('sandbox', 'trainer')


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, lines joined."""
    text = re.sub(r'\\\n\s*', '', (ROOT / f'launch/{name}.Dockerfile').read_text())
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line and not line.startswith('#')]


@pytest.mark.parametrize('name', DOCKERFILES)
def test_what_an_image_copies_is_there(name):
    copied = [rest.split() for word, rest in instructions(name) if word == 'COPY']
    assert copied and all((ROOT / source).exists() for *sources, _ in copied for source in sources)
    (entry,) = [yaml.safe_load(rest) for word, rest in instructions(name) if word == 'ENTRYPOINT']
    (command,) = [yaml.safe_load(rest) for word, rest in instructions(name) if word == 'CMD' and '"--' in rest]
    (script,) = [word for word in (*entry, *command) if word.startswith('launch/')]
    assert (ROOT / script).is_file() and 'python' in entry


def test_a_trainers_image_is_an_ordinary_users_and_takes_every_accelerator(trainer):
    told = dict(instructions('trainer'))
    assert int(told['USER']) == trainer.pod['securityContext']['runAsUser'] > 0
    assert trainer.pod['securityContext']['runAsNonRoot'] and 'privileged' not in trainer.container['securityContext']
    (choice,) = [re.search(r'in ([\w|]+)\)', rest)[1] for word, rest in instructions('trainer') if 'in tpu' in rest]
    extras = set(re.findall(r"^    '(\w+)': \[", (ROOT / 'setup.py').read_text(), re.MULTILINE))
    assert {*choice.split('|'), 'server'} <= extras and told['ARG'].partition('=')[2] in choice.split('|')
    assert trainer.container['image'].partition(':')[2] in choice.split('|')
    assert any('[$ACCELERATOR,server]' in rest for word, rest in instructions('trainer') if word == 'RUN')


def test_the_sandbox_alone_is_privileged(documents, container, trainer):
    assert container['securityContext'] == {'privileged': True}
    pods = [documents['StatefulSet']['spec']['template']['spec'], trainer.pod]
    assert [pod['automountServiceAccountToken'] for pod in pods] == [False, False]
    assert trainer.container['securityContext'] == {'allowPrivilegeEscalation': False}
