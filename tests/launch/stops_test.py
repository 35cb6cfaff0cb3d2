"""Two processes are told to stop, fail or die at some moment: all end, and the same command ends as undisturbed."""

from __future__ import annotations

import functools
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retool_jax.core import episode_files, metrics
from retool_jax.core.others import DIED
from tests import several
from tests.train import killable

ENDS_S = 60.0  # from the signal to the end of the last process
RL = {
    'ppo.steps': 5, 'ppo.problems_per_step': 4, 'ppo.samples': 2, 'ppo.minibatches': 2, 'checkpoints.every': 2,
    'turns.max_tokens': 96, 'turns.max_turn_tokens': 24, 'turns.max_turns': 3, 'turns.max_calls': 2,
    'sampler.rows': 1, 'sampler.slots': 96, 'sampler.chunk': 32, 'sampler.feed_rows': 1, 'sampler.quota': 8,
    'sampler.min_bound': 96, 'forward.unroll': 1, 'forward.row_width': 96, 'forward.logprob_chunk': 96,
    'forward.vocab_chunk': 264, 'forward.row_segments': 3, 'forward.micro_rows': 4, 'optimizer.lr': 1e-2,
    'watch.equal_rewards': 'ignore', 'watch.faults': 'ignore', 'sandbox.zygotes': 1, 'sandbox.spares': 1,
}  # fmt: skip
SFT = {
    'sft.steps': 40, 'sft.batch_tokens': 200, 'sft.evaluation_share': 0.0, 'checkpoints.every': 15,
    'forward.unroll': 1, 'forward.row_width': 96, 'forward.logprob_chunk': 96, 'forward.vocab_chunk': 264,
    'forward.row_segments': 3, 'forward.micro_rows': 4,
}  # fmt: skip
EVALUATE = {name: value for name, value in RL.items() if name.partition('.')[0] in ('turns', 'sampler', 'sandbox')}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A model that compiles in seconds, with problems and traces for it."""
    folder = tmp_path_factory.mktemp('stops') / 'files'
    killable.make_model(folder)
    killable.make_traces(folder)
    return folder


def command(files: Path, kind: str, name: str) -> list[str]:
    """The command line of a run: sft, ppo, quanta (of ppo) or evaluate."""
    problems = files / 'problems.jsonl'
    values = {
        'sft': SFT | {'traces': files / 'traces'},
        'ppo': RL | {'data.sources': (str(problems),)},
        'quanta': RL | {'data.sources': (str(problems),), 'ppo.quanta': 2},
        'evaluate': EVALUATE | {'problems': problems, 'samples': 3},
    }[kind] | {'model.path': files / 'model', 'run.dir': files / name}
    binary = {'quanta': 'ppo'}.get(kind, kind)
    return [
        str(several.ROOT / 'launch' / f'{binary}.py'),
        f'--config=configs/{binary}.py:tiny',
        *(f'--config.{key}={value}' for key, value in values.items()),
    ]


def result(directory: Path) -> dict:
    """All that a run leaves and that no clock is in."""
    clocks = ('time', 'rollout/', 'tools/wait', 'tools/seconds', 'val/')
    lines = [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in metrics.read(directory)]
    model = directory / 'final' / 'model.safetensors'
    episodes = directory / 'episodes'
    steps = [path.name for path in (directory / 'checkpoints').glob('*') if path.name.isdigit()]
    return {
        # An alarm may be of a process that was slow for a while.
        'files': sorted(path.name for path in directory.iterdir() if not path.name.startswith(('journal', 'alarms'))),
        'metrics': lines,
        'model': model.read_bytes() if model.exists() else b'',
        'last': max(map(int, steps), default=None),
        'episodes': {
            name: [
                (e.problem.id, e.sample, e.tokens, e.acted, e.logprobs, e.versions, e.reward)
                for e in episode_files.read(episodes, name)
            ]
            for name in episode_files.names(episodes)
        },
    }


def marks(moment: str, directory: Path) -> set[str]:
    """What changes in a run's folder when it updates or saves."""
    parts = {str(path) for path in (directory / 'episodes').glob('unfinished/*.jsonl.gz')}
    if moment == 'update':
        return parts | {str(line['step']) for line in metrics.read(directory)}
    return parts | {str(path) for path in (directory / 'checkpoints').glob('*')}


def disturb(files: Path, kind: str, name: str, number: int, victims: list[int], moment: str, delay_s: float):
    """One life of a run, struck so long after it has come to a moment: (exit statuses, what each wrote)."""
    directory = files / name
    with several.started(2, command(files, kind, name), devices=4) as (children, read):

        def wait(ready: Callable[[], bool]) -> None:
            while not ready() and None in [child.poll() for child in children]:
                time.sleep(0.02)

        owner = directory / 'owner.json'
        wait(lambda: owner.exists() and f'"pid": {children[0].pid},' in owner.read_text())  # then weights are loaded
        if moment != 'start':
            wait(lambda: 'processes  2' in read()[0])  # then all is compiled, and episodes are made
        if moment in ('update', 'save'):
            before = marks(moment, directory)
            wait(lambda: marks(moment, directory) - before)
        time.sleep(delay_s)
        for victim in victims:
            children[victim].send_signal(number)
        for child in children:
            child.wait(ENDS_S)
        return [child.returncode for child in children], read()


@pytest.fixture(scope='module')
def undisturbed(files):
    """What a run leaves that nothing befell, by kind."""

    @functools.cache
    def run(kind: str) -> dict:
        several.run(2, command(files, kind, f'whole_{kind}'), devices=4)
        return result(files / f'whole_{kind}')

    return run


def check(statuses: list[int], written: list[str], number: int, victims: list[int]) -> None:
    """Ends as they should be: of the signal in all, or of the death in the others."""
    text = '\n'.join(f'process {i}: {text[-3000:]}' for i, text in enumerate(written))
    if 0 in statuses:  # the run was quicker, and whoever ended with 0 says that it is whole
        assert set(statuses) <= {0, 128 + number, -number}, text
        return
    if number != signal.SIGKILL:
        assert statuses == [128 + number] * 2, text
        assert 'Traceback' not in text, text
        return
    (victim,) = victims
    assert statuses[victim] == -signal.SIGKILL
    if victim == 1:
        assert statuses[0] == DIED and 'process 1 on' in written[0].splitlines()[-1], text
    else:
        assert statuses[1] in (DIED, -signal.SIGABRT), text  # JAX's own end may be the quicker


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'number', 'victims', 'moment'), [
    ('sft', signal.SIGTERM, [1], 'update'),
    ('sft', signal.SIGKILL, [0], 'start'),
    ('ppo', signal.SIGTERM, [0], 'rollout'),
    ('ppo', signal.SIGKILL, [1], 'update'),
    ('quanta', signal.SIGINT, [0, 1], 'update'),
    ('evaluate', signal.SIGTERM, [1], 'rollout'),
])  # fmt: skip
def test_a_stopped_or_killed_run_of_two_processes_ends_and_goes_on(files, undisturbed, kind, number, victims, moment):
    name = f'{kind}_{number}_{moment}'
    check(*disturb(files, kind, name, number, victims, moment, 0.3), number, victims)
    several.run(2, command(files, kind, name), devices=4)
    assert result(files / name) == undisturbed(kind)


@pytest.mark.soak
@pytest.mark.parametrize('kind', ['sft', 'ppo', 'quanta', 'evaluate'])
def test_struck_at_every_kind_of_moment_a_run_of_two_processes_ends_and_goes_on(files, undisturbed, kind):
    rng, name = random.Random(kind), f'{kind}_struck'
    strikes = [
        (number, moment)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
        for moment in ('start', 'rollout', 'update', 'save')
    ]
    rng.shuffle(strikes)
    for number, moment in strikes:
        victims = [rng.randrange(2)]
        statuses, written = disturb(files, kind, name, number, victims, moment, rng.uniform(0, 3))
        check(statuses, written, number, victims)
        if 0 in statuses:
            assert result(files / name) == undisturbed(kind)
            name += '_again'
    several.run(2, command(files, kind, name), devices=4)
    assert result(files / name) == undisturbed(kind)


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_with_its_line(files, tmp_path):
    here, there = tmp_path / 'here', tmp_path / 'there'
    for place in (here, there):
        place.mkdir()
    (here / 'problems.jsonl').write_text((files / 'problems.jsonl').read_text())
    flags = [flag.replace(f'{files}/problems', 'problems') for flag in command(files, 'evaluate', 'failed')]
    with several.started(2, flags, devices=4, places=[here, there]) as (children, read):
        assert [child.wait(several.PATIENCE_S) for child in children] == [2, 2]
        first, second = (text.splitlines()[-1] for text in read())
    assert second.startswith('error: ') and "'problems.jsonl'" in second
    assert first == f'process 1 on {socket.gethostname()}: {second}'
    assert not (files / 'failed').exists()


@pytest.mark.slow
def test_processes_with_folders_of_their_own_are_refused_and_nothing_is_written(files, tmp_path):
    places = [tmp_path / 'here', tmp_path / 'there']
    for place in places:
        place.mkdir()
    flags = [flag.replace(f'={files}/apart', '=apart') for flag in command(files, 'sft', 'apart')]
    with several.started(2, flags, devices=4, places=places) as (children, read):
        assert [child.wait(several.PATIENCE_S) for child in children] == [2, 2]
        lines = [text.splitlines()[-1] for text in read()]
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"error: run.dir='apart' is another folder for process 1 on {socket.gethostname()}; ")
    assert not [path for place in places for path in place.iterdir()]
