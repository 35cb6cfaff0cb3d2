"""launch/pod_tpu.sh makes slices, and keeps runs on their hosts, which are SSH servers of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retool_jax.core import metrics
from tests.launch import cloud
from tests.launch.stops_test import command
from tests.train import killable

ROOT = Path(__file__).parents[2]
SSHD = shutil.which('sshd', path=f'{os.environ["PATH"]}:/usr/sbin')
ENDS_S = 600.0
SECRET = 'a-token-that-no-command-line-shows'
SERVICE = """
import os, signal, sys, time
print(*sys.argv[1:], os.environ['RETOOL_PROCESSES'], os.environ['RETOOL_PROCESS'], os.environ['RETOOL_GRACE_S'])
print(os.environ.get('RETOOL_SANDBOX_TOKEN'), os.environ['JAX_COMPILATION_CACHE_DIR'])
if sys.argv[1] in '12':
    sys.exit(int(sys.argv[1]))
save = lambda *_: (time.sleep(0.5), print('saved'), sys.exit(143))
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == 'deaf' else save)
while sys.argv[1] != 'short':
    time.sleep(0.1)
"""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A stand-in for Google Cloud, with the homes of its hosts."""

    folder: Path
    homes: list[Path]
    project: Path = ROOT  # whose checkout is pushed

    def __call__(self, *words: str, **more: str) -> subprocess.CompletedProcess:
        """launch/pod_tpu.sh with these words, and further variables."""
        own = {'POD': 'my-slice', 'ZONE': 'us-east5-a', 'POLL_S': '0.05', 'STAND_IN': str(self.folder)}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(('RETOOL_', 'JAX_', 'XLA_'))}
        return subprocess.run(
            [self.project / 'launch/pod_tpu.sh', *words],
            env=kept | own | {'PATH': f'{self.folder}:{os.environ["PATH"]}'} | more,
            cwd='/',
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ENDS_S,
        )

    def set(self, **values) -> None:
        path = self.folder / 'cloud.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def calls(self) -> list[str]:
        """All that gcloud was called with."""
        return [' '.join(json.loads(line)[2:]) for line in (self.folder / 'calls').read_text().splitlines()]


def make_slice(folder: Path, **values) -> Slice:
    (folder / 'gcloud').write_text(f'#!/bin/sh\nexec {sys.executable} {cloud.__file__} "$@"\n')
    (folder / 'gcloud').chmod(0o755)
    start = {'name': 'my-slice', 'states': [], 'fate': ['WAITING_FOR_RESOURCES', 'ACTIVE'], 'node': ''}
    (folder / 'cloud.json').write_text(json.dumps(start | values))
    return Slice(folder, [])


UP = ('up', '--accelerator-type=v5p-16', '--runtime-version=v2-alpha-tpuv5', '--spot')
MADE = 'queued-resources create my-slice --node-id=my-slice {} {} {} --zone=us-east5-a'.format(*UP[1:])
GONE = 'queued-resources delete my-slice --force --quiet --zone=us-east5-a'


@pytest.mark.parametrize(('states', 'node', 'changes'), [
    ([], '', [MADE]),
    (['PROVISIONING', 'ACTIVE'], 'READY', []),
    (['ACTIVE'], 'READY', []),
    (['SUSPENDING', 'SUSPENDED'], '', [GONE, MADE]),
    (['ACTIVE'], 'PREEMPTED', [GONE, MADE]),
    (['ACTIVE'], '', [GONE, MADE]),
    (['FAILED'], '', [GONE, MADE]),
])  # fmt: skip
def test_up_asks_for_a_slice_and_makes_a_preempted_one_again(tmp_path, states, node, changes):
    pod = make_slice(tmp_path, states=states, node=node)
    done = pod(*UP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'pod_tpu.sh: my-slice is ACTIVE READY'
    assert [call for call in pod.calls() if ' list ' not in call] == changes


def test_a_slice_that_is_refused_is_asked_for_once_and_a_failing_gcloud_never(tmp_path):
    pod = make_slice(tmp_path, fate=['PROVISIONING', 'FAILED'])
    done = pod(*UP)
    assert done.returncode == 2 and 'gcloud compute tpus queued-resources describe my-slice' in done.stderr
    assert [call for call in pod.calls() if ' list ' not in call] == [MADE]
    (tmp_path / 'broken').touch()
    (tmp_path / 'calls').unlink()
    for words in (UP, ('wait',), ('down',), ('start', 'launch/ppo.py')):
        assert pod(*words).returncode != 0
    assert not any('create' in call or 'scp' in call for call in pod.calls())


def test_down_gives_the_slice_back_and_what_is_missing_is_one_line(tmp_path):
    pod = make_slice(tmp_path, states=['ACTIVE'], node='READY')
    assert pod('down').returncode == 0 and pod.calls() == [GONE]
    for words, more, line in (
        (('up',), {}, 'up: --accelerator-type=… --runtime-version=…, --spot if it may be taken away'),
        (('start',), {}, 'start: which binary? launch/sft.py --config=…'),
        (('each',), {}, "each: which command? 'make setup EXTRA=tpu'"),
        (('begin',), {}, 'begin: expected up, push, each, first, start, status, logs, stop, wait or down'),
        (('status',), {'POD': ''}, 'POD and ZONE: name the slice and its zone'),
        (('start', 'x'), {'HF_TOKEN': 'a\nb'}, 'HF_TOKEN has more than one line'),
        (('start', 'x'), {'RETOOL_GRACE_S': '5 minutes'}, "RETOOL_GRACE_S='5 minutes': expected seconds"),
    ):
        done = pod(*words, **more)
        assert (done.returncode, done.stderr) == (2, f'pod_tpu.sh: {line}\n')
    assert pod.calls() == [GONE]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(('127.0.0.1', port)) == 0


@contextlib.contextmanager
def servers(folder: Path, count: int, **variables: str) -> Iterator[Slice]:
    """A slice of so many hosts: SSH servers on loopback, each with a home and a name of its own."""
    if SSHD is None:
        pytest.skip('no sshd here: apt-get install openssh-server')
    if os.geteuid() == 0:
        Path('/run/sshd').mkdir(mode=0o755, exist_ok=True)  # where Debian's gives up its rights
    for name in ('key', 'host_key'):
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', folder / name], check=True)
    homes, ports = [folder / f'home_{i}' for i in range(count)], [free_port() for _ in range(count)]
    with contextlib.ExitStack() as stack:
        for i, (home, port) in enumerate(zip(homes, ports)):
            home.mkdir()
            own = {'HOME': home, 'HOSTNAME': f'worker-{i}', 'RETOOL_PROCESS': i, 'SYSTEMD': 'no'} | variables
            lines = [
                f'Port {port}', 'ListenAddress 127.0.0.1', f'HostKey {folder}/host_key', 'PidFile none',
                f'AuthorizedKeysFile {folder}/key.pub', 'StrictModes no', 'UsePAM no', 'PasswordAuthentication no',
                f'Subsystem sftp internal-sftp -d {home}',
                'SetEnv ' + ' '.join(f'{name}={value}' for name, value in own.items()),
            ]  # fmt: skip
            (folder / f'sshd_{i}').write_text('\n'.join(lines) + '\n')
            server = subprocess.Popen(
                [*cloud.WITH_US, SSHD, '-D', '-e', '-f', folder / f'sshd_{i}'], stderr=subprocess.DEVNULL
            )
            stack.callback(lambda server=server: (server.kill(), server.wait()))
            until = time.monotonic() + 30
            while not answers(port) and time.monotonic() < until:
                time.sleep(0.05)
        made = make_slice(folder, ports=ports, key=str(folder / 'key'), states=['ACTIVE'], node='READY')
        stack.callback(sweep, homes)
        yield dataclasses.replace(made, homes=homes)


def sweep(homes: list[Path]) -> None:
    """Ends what a failed test has left running."""
    for home in homes:
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int((home / '.retool/pid').read_text()), signal.SIGKILL)


@pytest.fixture
def pod(tmp_path) -> Iterator[Slice]:
    """Two hosts with a checkout that holds one command, which is no JAX program."""
    with servers(tmp_path, 2) as made:
        for path in ('repo/launch', 'repo/.venv/bin'):
            (tmp_path / path).mkdir(parents=True)
        shutil.copy(ROOT / 'launch/pod_worker.sh', tmp_path / 'repo/launch')
        (tmp_path / 'repo/launch/serve.py').write_text(SERVICE)
        (tmp_path / 'repo/.venv/bin/python').symlink_to(sys.executable)
        yield made


def lines_of(done: subprocess.CompletedProcess) -> list[str]:
    """What the hosts said, in their order."""
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_a_run_outlives_the_shell_and_ends_when_it_is_stopped(pod, tmp_path):
    repo = {'REPO': str(tmp_path / 'repo')}
    assert lines_of(pod('status', **repo)) == [f'worker-{i}: nothing was started' for i in range(2)]
    words = ['long', 'two words', "quo'te", '$HOME']
    done = pod('start', 'launch/serve.py', *words, RETOOL_SANDBOX_TOKEN=SECRET, **repo)
    assert [line.partition(' since')[0] for line in lines_of(done)] == ['worker-0: runs', 'worker-1: runs']
    for words in (('start', 'launch/serve.py', 'long'), ('push',)):  # and what the run was given stays
        again = pod(*words, **repo)
        assert again.returncode == 1 and again.stderr.count('a run is going on already; stop it first') == 2
        assert again.stderr.count(': runs since') == 2
        assert all(SECRET in (home / '.retool/environment').read_text() for home in pod.homes)
    for home in pod.homes:
        given = home / '.retool/environment'
        assert stat.S_IMODE(given.stat().st_mode) == 0o600 and stat.S_IMODE(given.parent.stat().st_mode) == 0o700
    assert [': runs since ' in line for line in lines_of(pod('status', **repo))] == [True, True]
    stopped = [line.partition(' at ')[0] for line in lines_of(pod('stop', **repo))]
    assert stopped == [f'worker-{i}: ended with exit status 143' for i in range(2)]
    for i in range(2):
        log = [line.removeprefix(f'worker-{i}: ') for line in lines_of(pod('logs', str(i), '-n', '9', **repo))]
        assert len(log) == 5 and sum(line.startswith('== ') for line in log) == 2 and 'saved' in log
        assert f"long two words quo'te $HOME auto {i} 300" in log
        assert f'{SECRET} {pod.homes[i]}/.retool/compiled' in log
    assert SECRET not in ' '.join(pod.calls())
    both = lines_of(pod('logs', '-n', '1', **repo))  # of all hosts where none is named
    assert [line.partition(' ')[0] for line in both] == ['worker-0:', 'worker-1:']
    assert [line.partition(' at ')[0] for line in lines_of(pod('status', **repo))] == stopped
    assert [line.partition(' at ')[0] for line in lines_of(pod('stop', **repo))] == stopped  # nothing runs
    assert pod('wait', **repo).returncode == 75  # it was stopped: the same `start` goes on


@pytest.mark.parametrize(('what', 'status'), [('short', 0), ('1', 2), ('2', 2)])
def test_wait_tells_what_is_done_from_what_the_user_has_to_mend(pod, tmp_path, what, status):
    repo = {'REPO': str(tmp_path / 'repo')}
    assert pod('start', 'launch/serve.py', what, **repo).returncode == 0
    assert pod('wait', **repo).returncode == status
    pod.set(node='PREEMPTED')
    assert pod('wait', **repo).returncode == 75


@pytest.mark.slow
def test_wait_gives_up_on_hosts_that_do_not_answer(pod, tmp_path):
    pod.set(ports=[free_port(), free_port()])
    gone = pod('wait', REPO=str(tmp_path / 'repo'))
    assert (gone.returncode, gone.stdout) == (1, '') and 'Connection refused' in gone.stderr


def test_a_run_that_was_killed_is_named_and_another_can_start(pod, tmp_path):
    repo = {'REPO': str(tmp_path / 'repo')}
    assert pod('start', 'launch/serve.py', 'long', **repo).returncode == 0
    sweep(pod.homes)
    until = time.monotonic() + 30
    while 'runs since' in pod('status', **repo).stdout and time.monotonic() < until:
        time.sleep(0.1)
    assert all(line.endswith('was killed, or the machine was restarted') for line in lines_of(pod('status', **repo)))
    assert pod('start', 'launch/serve.py', 'short', **repo).returncode == 0


@pytest.mark.slow
def test_what_does_not_end_in_its_grace_is_killed(pod, tmp_path):
    repo = {'REPO': str(tmp_path / 'repo')}
    assert pod('start', 'launch/serve.py', 'deaf', RETOOL_GRACE_S='1', **repo).returncode == 0
    groups = [int((home / '.retool/pid').read_text()) for home in pod.homes]
    told = lines_of(pod('stop', **repo))
    assert sum(line.endswith('has not ended within its grace: killed') for line in told) == 2
    until = time.monotonic() + 30
    for group in groups:
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < until:  # until the machine's first process has taken note of it
                os.killpg(group, 0)
                time.sleep(0.1)
    assert all(line.endswith('was killed, or the machine was restarted') for line in lines_of(pod('status', **repo)))


def test_push_brings_the_checkout_as_committed_and_each_runs_in_it(tmp_path):
    project, repo = tmp_path / 'project', {'REPO': str(tmp_path / 'there')}
    (project / 'launch').mkdir(parents=True)
    for name in ('pod_tpu.sh', 'pod_worker.sh'):
        shutil.copy(ROOT / 'launch' / name, project / 'launch')
    (project / 'old name.py').touch()
    git = ['git', '-C', project, '-c', 'user.name=a', '-c', 'user.email=a@b']
    commit = lambda: [subprocess.run([*git, *words], check=True, stdout=subprocess.DEVNULL) for words in (
        ['add', '--all'], ['commit', '--quiet', '--message=all'])]  # fmt: skip
    subprocess.run([*git, 'init', '--quiet'], check=True)
    commit()
    with servers(tmp_path, 2) as pod:
        pod = dataclasses.replace(pod, project=project)
        early = pod('status', **repo)
        assert early.returncode == 1 and early.stderr.count(f'no checkout in {repo["REPO"]}: push it first') == 2
        assert lines_of(pod('push', **repo)) == []
        (tmp_path / 'there/made').write_text('of the hosts')
        (project / 'old name.py').rename(project / 'new.py')
        commit()
        (project / 'later.py').touch()
        assert lines_of(pod('push', **repo)) == ['pod_tpu.sh: 1 changed files are not committed, and stay here']
        assert lines_of(pod('each', 'ls', **repo)) == ['launch', 'launch', 'made', 'made', 'new.py', 'new.py']
        assert lines_of(pod('first', 'echo', '$HOSTNAME', **repo)) == ['worker-0']
        for words, told in (
            (['launch/ppo.py'], f'no file launch/ppo.py in {repo["REPO"]}'),
            (['new.py'], 'run: make setup EXTRA=tpu'),
        ):
            refused = pod('start', *words, **repo)
            assert refused.returncode == 1 and refused.stderr.count(told) == 2


@pytest.mark.slow
def test_training_on_two_hosts_goes_on_without_a_shell_and_is_stopped_with_all_saved(tmp_path):
    if not (ROOT / '.venv/bin/python').exists():
        pytest.skip('the hosts run this checkout by its .venv: make setup')
    files, run = tmp_path / 'files', tmp_path / 'files/run'
    killable.make_model(files)
    here = {name: os.environ[name] for name in os.environ if name.startswith(('JAX_PER', 'HF_', 'TOKEN', 'MPL'))}
    with servers(tmp_path, 2, JAX_PLATFORMS='cpu', **here) as pod:
        shared = {
            'REPO': str(ROOT),
            'RETOOL_PROCESSES': '2',
            'RETOOL_COORDINATOR': f'127.0.0.1:{free_port()}',
            'JAX_COMPILATION_CACHE_DIR': os.environ['JAX_COMPILATION_CACHE_DIR'],
            'XLA_FLAGS': '--xla_force_host_platform_device_count=2 --xla_cpu_collective_timeout_seconds=3000 '
            '--xla_cpu_collective_call_terminate_timeout_seconds=3000',
        }
        words = [*command(files, 'ppo', 'run'), '--config.ppo.steps=12']
        assert pod('start', *words, **shared).returncode == 0  # and the shell is closed
        until = time.monotonic() + ENDS_S
        while not (steps := metrics.read(run) if (run / 'metrics.jsonl').exists() else []):
            logs = pod('logs', **shared).stdout
            assert 'ended with exit status' not in logs and time.monotonic() < until, logs
            time.sleep(0.5)
        assert [': runs since ' in line for line in lines_of(pod('status', **shared))] == [True, True]
        stopped = [line.partition(' at ')[0] for line in lines_of(pod('stop', **shared))]
        assert stopped == [f'worker-{i}: ended with exit status 143' for i in range(2)]
        saved = max(int(path.name) for path in (run / 'checkpoints').iterdir() if path.name.isdigit())
        assert saved >= len(steps)  # of the steps that were whole, not of the last that was due
        # The same command goes on; a port may be held for a minute after its server's end.
        assert pod('start', *words, **shared | {'RETOOL_COORDINATOR': f'127.0.0.1:{free_port()}'}).returncode == 0
        ended = pod('wait', **shared)
        assert ended.returncode == 0, (ended.stdout, pod('logs', **shared).stdout)
        assert [line['step'] for line in metrics.read(run)] == list(range(12))
        assert (run / 'final/model.safetensors').exists() and not list((run / 'stopped').glob('*'))
        for i in range(2):
            log = pod('logs', str(i), '-n', '+1', **shared).stdout
            assert all(line.startswith(f'worker-{i}: ') for line in log.splitlines())
            assert [word in log for word in ('exit status 143', 'exit status 0')] == [True, True]
        leaders = pod('logs', '0', '-n', '+1', **shared).stdout
        assert f'goes on at step {saved}' in leaders
