"""Stands in for gcloud, where the hosts of a slice are SSH servers of this machine: what launch/pod_tpu.sh asks of it.

The folder in STAND_IN holds `cloud.json`: ports and key of the servers, and how queued resources fare:
{"ports": [22001, 22002], "key": "/…/key", "name": "my-slice", "states": ["ACTIVE"], "node": "READY"}. Each look at the
resources takes the next of `states`, the last one stays; a request makes them those in `fate`. Every command line is
noted in `calls`. Flags are those of gcloud's own definitions (surface/compute/tpus of its SDK); others are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

SSH = [
    '-F', '/dev/null', '-o', 'StrictHostKeyChecking=no', '-o', 'UserKnownHostsFile=/dev/null', '-o', 'LogLevel=ERROR',
    '-o', 'IdentitiesOnly=yes',
]  # fmt: skip
# Before a server's command: it ends with the tests, however they end.
WITH_US = ['setpriv', '--pdeathsig', 'KILL', '--']
FLAGS = {  # a command's flags, with whether they take a value, and its arguments
    'queued-resources list': ({'filter': True, 'format': True}, []),
    'queued-resources create': (
        {'node-id': True, 'accelerator-type': True, 'runtime-version': True, 'spot': False},
        ['name'],
    ),
    'queued-resources delete': ({'force': False, 'quiet': False}, ['name']),
    'tpu-vm list': ({'filter': True, 'format': True}, []),
    'tpu-vm ssh': ({'worker': True, 'command': True}, ['name']),
    'tpu-vm scp': ({'worker': True}, ['source', 'target']),
}


def main() -> int:
    folder = Path(os.environ['STAND_IN'])
    with open(folder / 'calls', 'a') as file:
        file.write(json.dumps(sys.argv[1:]) + '\n')
    assert sys.argv[1:3] == ['compute', 'tpus'], sys.argv
    command = ' '.join(sys.argv[3:5])
    flags, names = FLAGS[command]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, valued in (flags | {'zone': True, 'project': True}).items():
        parser.add_argument(f'--{name}', **({} if valued else {'action': 'store_true'}))
    for name in names:
        parser.add_argument(name)
    given = parser.parse_args(sys.argv[5:])
    assert given.zone == 'us-east5-a'
    if (folder / 'broken').exists():
        print('ERROR: (gcloud) Your current active account does not have any valid credentials', file=sys.stderr)
        return 1
    cloud = json.loads((folder / 'cloud.json').read_text())
    status = {'ssh': ssh, 'scp': scp}.get(command.split()[1], resources)(command, given, cloud)
    (folder / 'cloud.json').write_text(json.dumps(cloud))
    return status


def resources(command: str, given: argparse.Namespace, cloud: dict) -> int:
    """Queued resources, and the node that comes of them."""
    states = cloud['states']
    if command.endswith('list'):
        assert given.filter == f'name~/{cloud["name"]}$'
        if command.startswith('queued-resources'):
            assert given.format == 'value(state.state)'
            print(*states[:1])
            del states[: len(states) > 1]
        else:
            assert given.format == 'value(state)'
            print(cloud['node'])
        return 0
    assert given.name == cloud['name']
    if command.endswith('create'):
        assert not states and given.node_id == cloud['name'] and given.accelerator_type and given.runtime_version
        cloud['states'], cloud['node'] = cloud['fate'], 'READY'
    else:
        assert given.force and given.quiet  # a question would be asked, and nodes be left
        cloud['states'] = []
    return 0


def workers(given: argparse.Namespace, cloud: dict) -> list[int]:
    """The ports of the workers that are named."""
    return cloud['ports'] if given.worker == 'all' else [cloud['ports'][int(given.worker)]]


def together(commands: list[list[str]]) -> int:
    children = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
    return max(child.wait() for child in children)


def ssh(command: str, given: argparse.Namespace, cloud: dict) -> int:
    there = [*SSH, '-T', '-i', cloud['key'], '127.0.0.1', given.command]  # without a terminal, as gcloud does
    return together([['ssh', '-p', str(port), *there] for port in workers(given, cloud)])


def scp(command: str, given: argparse.Namespace, cloud: dict) -> int:
    name, _, path = given.target.partition(':')
    assert name == cloud['name'] and path
    there = [*SSH, '-i', cloud['key'], given.source, f'127.0.0.1:{path}']
    return together([['scp', '-q', '-P', str(port), *there] for port in workers(given, cloud)])


if __name__ == '__main__':
    sys.exit(main())
