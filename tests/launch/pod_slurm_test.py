"""launch/pod_slurm.sh under a SLURM of this machine: one node, eight GPUs in name, every daemon the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retool_jax.core import metrics
from tests.launch import cloud
from tests.launch.stops_test import command
from tests.train import killable

ROOT = Path(__file__).parents[2]
SBIN = f'{os.environ["PATH"]}:/usr/sbin:/sbin'
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol', 'scancel')
ENDS_S = 600.0
GPUS = 8
CONF = """
ClusterName=one
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
NodeName={node} NodeAddr=127.0.0.1 CPUs={cores} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A node that takes jobs; `folder` holds what its daemons wrote."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *words: str | Path, cwd: Path | None = None, **more: str) -> str:
        """One of SLURM's commands: what it printed."""
        done = subprocess.run(words, env=self.environment | more, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stderr, self.tell())
        return done.stdout.strip()

    def submit(self, cwd: Path, *words: str, flags: tuple[str, ...] = (), **more: str) -> str:
        """The number of a job that runs launch/pod_slurm.sh with these words in a folder; its own output is job.out."""
        if not (cwd / '.venv').exists():
            (cwd / '.venv').symlink_to(ROOT / '.venv')
        submitted = ('sbatch', '--parsable', '--output=job.out', *flags, ROOT / 'launch/pod_slurm.sh', *words)
        return self.ask(*submitted, cwd=cwd, **more)

    def job(self, number: str) -> dict[str, str]:
        """What the scheduler says of a job: JobState, Restarts, ExitCode and so on."""
        return dict(re.findall(r'(\w+)=(\S*)', self.ask('scontrol', 'show', 'job', number)))

    def wait(self, number: str, ready: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """The job as it is once it is `ready`."""
        until = time.monotonic() + ENDS_S
        while not ready(job := self.job(number)):
            assert time.monotonic() < until, (job, self.tell())
            time.sleep(0.2)
        return job

    def end(self, number: str) -> dict[str, str]:
        """The job when it has ended and is not queued again."""
        return self.wait(number, lambda job: job['JobState'] in ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT'))

    def tell(self) -> str:
        return '\n'.join(f'{path.name}: {path.read_text()[-2000:]}' for path in self.folder.glob('slurm*.log'))


@pytest.fixture(scope='module')
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    if missing:
        pytest.skip(f'no SLURM here ({", ".join(missing)}): apt-get install slurm-wlm munge')
    if os.geteuid() != 0:
        pytest.skip('the daemons of SLURM run as root')
    if not (ROOT / '.venv/bin/python').exists():
        pytest.skip('jobs run this checkout by its .venv: make setup')
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='slurm')))
        folder.chmod(0o755)
        for name in ('state', 'spool'):
            (folder / name).mkdir()
        (folder / 'munge.key').touch(0o600)
        (folder / 'munge.key').write_bytes(os.urandom(1024))
        node, ports = socket.gethostname().partition('.')[0], []
        with contextlib.ExitStack() as held:
            for _ in range(2):
                listening = held.enter_context(socket.socket())
                listening.bind(('127.0.0.1', 0))
                ports.append(listening.getsockname()[1])
        for i in range(GPUS):
            (folder / f'gpu{i}').touch()
        (folder / 'gres.conf').write_text(f'NodeName={node} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n')
        (folder / 'slurm.conf').write_text(
            CONF.format(node=node, ports=ports, folder=folder, cores=os.cpu_count(), gpus=GPUS)
        )
        environment = os.environ | {'SLURM_CONF': f'{folder}/slurm.conf', 'PATH': SBIN}
        daemons = (
            ['munged', '--foreground', '--force', *(
                f'--{name}={folder}/munge.{end}'
                for name, end in (('socket', 'socket'), ('key-file', 'key'), ('pid-file', 'pid'),
                                  ('log-file', 'log'), ('seed-file', 'seed'))
            )],
            ['slurmctld', '-D', '-c', '-f', f'{folder}/slurm.conf'],
            ['slurmd', '-D', '-f', f'{folder}/slurm.conf'],
        )  # fmt: skip
        for daemon in daemons:
            process = subprocess.Popen(
                [*cloud.WITH_US, shutil.which(daemon[0], path=SBIN), *daemon[1:]],
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(lambda process=process: (process.terminate(), process.wait(30)))
            if daemon[0] == 'munged':
                while not (folder / 'munge.socket').exists() and process.poll() is None:
                    time.sleep(0.05)
        made = Cluster(folder, environment)
        asked = ['sinfo', '--noheader', '--format=%T']
        until = time.monotonic() + 60
        while subprocess.run(asked, env=environment, capture_output=True, text=True).stdout.strip() != 'idle':
            assert time.monotonic() < until, made.tell()
            time.sleep(0.2)
        stack.callback(end_jobs, environment)
        yield made


def end_jobs(environment: dict[str, str]) -> None:
    """Ends what a failed test has left running, so that its processes do not outlive the daemons."""
    subprocess.run(['scancel', '--user=root'], env=environment)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not subprocess.run(['squeue', '--noheader'], env=environment, capture_output=True).stdout:
            return
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize('tasks', [1, 2])
def test_a_run_that_is_stopped_in_its_first_rollout_is_queued_again_and_ends(cluster, tmp_path, tasks):
    files, run = tmp_path / 'files', tmp_path / 'files/run'
    killable.make_model(files)
    flags = ('--ntasks-per-node=2', '--gpus-per-node=2') if tasks == 2 else ()
    own = '--xla_force_host_platform_device_count=2 --xla_cpu_collective_timeout_seconds=3000'
    number = cluster.submit(tmp_path, *command(files, 'ppo', 'run'), flags=flags, XLA_FLAGS=own)
    logs = tmp_path / f'logs/retool-{number}'

    def rolls(job: dict[str, str]) -> bool:
        assert job['JobState'] in ('PENDING', 'RUNNING'), (job, cluster.tell())
        return (run / 'journal.jsonl').exists()

    cluster.wait(number, rolls)
    assert metrics.read(run) == []
    cluster.ask('scancel', '--signal=TERM', number)
    ended = cluster.end(number)
    written = [(logs / f'{task}.log').read_text() for task in range(tasks)]
    told = (tmp_path / 'job.out').read_text()
    assert (ended['JobState'], ended['Restarts'], ended['ExitCode']) == ('COMPLETED', '1', '0:0'), (told, written)
    assert told.count('exit status 143: queued again (restart 1 of 50)') == 1
    assert [line['step'] for line in metrics.read(run)] == list(range(5))
    assert (run / 'final/model.safetensors').exists() and (run / 'report.html').exists()
    for task, text in enumerate(written):
        assert text and all(line.startswith(f'{task}: ') for line in text.splitlines())
    assert 'stopped; the same command goes on' in written[0] and f'{run}' in written[0]
    assert len(re.findall(r'processes +2$', written[0], re.MULTILINE)) == (2 if tasks == 2 else 0)


@pytest.mark.slow
def test_one_process_a_node_has_all_its_gpus_and_a_cache_that_outlives_it(cluster, tmp_path):
    names = ('SLURM_NTASKS', 'JAX_LOCAL_DEVICE_IDS', 'RETOOL_PROCESSES', 'RETOOL_GRACE_S', 'JAX_COMPILATION_CACHE_DIR')
    code = f'import os; print(*(os.environ.get(name) for name in {names}))'
    environment = dict(JAX_COMPILATION_CACHE_DIR='')
    number = cluster.submit(tmp_path, '-c', code, **environment)
    assert cluster.end(number)['JobState'] == 'COMPLETED', cluster.tell()
    ids = ','.join(map(str, range(GPUS)))
    there = (tmp_path / f'logs/retool-{number}/0.log').read_text()
    assert there == f'0: 1 {ids} auto 300 {tmp_path}/.jax_cache\n'
    number = cluster.submit(tmp_path, '-c', code, flags=('--ntasks-per-node=2', '--gpus-per-node=2'), **environment)
    assert cluster.end(number)['JobState'] == 'COMPLETED', cluster.tell()
    for task in range(2):  # each takes the one of its number
        there = (tmp_path / f'logs/retool-{number}/{task}.log').read_text()
        assert there == f'{task}: 2 None auto 300 {tmp_path}/.jax_cache\n'


@pytest.mark.slow
@pytest.mark.parametrize('status, lives', [(134, 3), (75, 3), (2, 1), (1, 1)])
def test_a_job_is_queued_again_as_often_as_it_may_and_not_after_a_mistake(cluster, tmp_path, status, lives):
    number = cluster.submit(tmp_path, '-c', f'import os; os._exit({status})', RETOOL_RESTARTS='2')
    ended = cluster.end(number)
    assert (ended['JobState'], ended['ExitCode']) == ('FAILED', f'{status}:0'), cluster.tell()
    told = [line.partition(': ')[2] for line in (tmp_path / 'job.out').read_text().splitlines() if 'status' in line]
    again = [f'exit status {status}: queued again (restart {i} of 2)' for i in range(1, lives)]
    last = f'exit status {status}, and RETOOL_RESTARTS=2 are used up: not queued again'
    assert told == [*again, last if lives > 1 else f'exit status {status}: not queued again']
    assert int(ended['Restarts']) == lives - 1


@pytest.mark.parametrize(('words', 'job', 'told'), [
    ([], '1', 'which binary? launch/sft.py --config=...'),
    (['launch/ppo.py'], '', 'there is no job: give it to sbatch --nodes=1'),
    (['launch/ppo.py'], '1', 'no .venv in {}: submit from the checkout, after make setup EXTRA=cuda12'),
])  # fmt: skip
def test_without_a_command_a_job_or_an_environment_nothing_is_started(tmp_path, words, job, told):
    given = os.environ | {'SLURM_JOB_ID': job, 'SLURM_SUBMIT_DIR': str(tmp_path)}
    done = subprocess.run([ROOT / 'launch/pod_slurm.sh', *words], env=given, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f'pod_slurm.sh: {told.format(tmp_path)}\n' and not list(tmp_path.iterdir())
