"""A supervised run from traces to `final/`: held-out loss, the best checkpoint, and a stop in between."""

import signal
from unittest import mock

import pytest

from retool_jax.core import cli, episode_files, metrics, settings
from retool_jax.core.checkpoint import Checkpoints
from retool_jax.core.errors import UserError
from retool_jax.model import hf
from retool_jax.model.config import load_config
from retool_jax.stages import parts, sft
from retool_jax.stages.config import FineTuning
from retool_jax.train.learner import Learner
from retool_jax.train.sft import HELD_OUT, hold_out, packed
from tests.train import killable, small

VALUES = {
    'sft.steps': 7, 'sft.batch_tokens': 200, 'sft.evaluation_share': 0.3, 'checkpoints.every': 3,
    'checkpoints.keep_last': 1, 'forward.unroll': 1, 'forward.row_width': 96, 'forward.logprob_chunk': 96,
    'forward.vocab_chunk': 264, 'forward.row_segments': 3, 'forward.micro_rows': 4,
    'optimizer.lr': 1.0, 'optimizer.warmup_steps': 6,
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finetune') / 'files'
    killable.make_model(folder)
    killable.make_traces(folder)
    return folder


def run(folder, name, stop_at=None, **values):
    """A run in this process, told to stop when it writes step `stop_at`; (metrics lines, model file)."""
    values = VALUES | {'traces': folder / 'traces', 'model.path': folder / 'model', 'run.dir': folder / name} | values
    write = metrics.Metrics.write

    def stopping(self, step, metrics):
        write(self, step, metrics)
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    with (
        mock.patch.object(metrics.Metrics, 'write', stopping),
        mock.patch.object(parts, 'make_mesh', lambda sizes: small.one_device()),
    ):
        sft.run(
            settings.build(
                FineTuning,
                cli.parse_config(
                    [
                        'sft',
                        '--config=configs/sft.py:tiny',
                        *(f'--config.{key}={value}' for key, value in values.items()),
                    ]
                ),
            )
        )
    lines = [{k: v for k, v in line.items() if k != 'time'} for line in metrics.read(folder / name)]
    return lines, (folder / name / 'final' / 'model.safetensors').read_bytes()


@pytest.mark.slow  # sft_test.py has the same on states that are numbers
def test_the_checkpoint_of_the_lowest_held_out_loss_is_the_model_also_of_a_stopped_run(folder):
    whole = run(folder, 'whole')
    losses = {line['step'] + 1: line[HELD_OUT] for line in whole[0] if HELD_OUT in line}
    best = min(losses, key=losses.get)
    assert list(losses) == [3, 6, 7] and best < 7  # the learning rate rises until it does harm
    with Checkpoints(folder / 'whole' / 'checkpoints', 1, 'score') as checkpoints:
        assert checkpoints.steps() == [best, 7] and checkpoints.best() == best  # kept beside the last
    config = load_config(folder / 'whole' / 'final')
    forward = small.make_forward(row_width=96, logprob_chunk=96, vocab_chunk=264, micro_rows=4)
    learner = Learner(config, forward, small.recording(), small.one_device())
    apart = packed(hold_out(episode_files.read(folder / 'traces'), 0.3)[1], forward)
    loss = learner.sft_loss({'policy': hf.load(folder / 'whole' / 'final', config)}, apart)
    assert loss == pytest.approx(losses[best], rel=1e-5)

    for stop_at in (0, 3):  # the step in flight is saved as well
        with pytest.raises(KeyboardInterrupt, match='the same command goes on'):
            run(folder, 'stopped', stop_at)
        with Checkpoints(folder / 'stopped' / 'checkpoints', 1, 'score') as checkpoints:
            assert checkpoints.latest() == len(metrics.read(folder / 'stopped')) > stop_at
    assert run(folder, 'stopped') == whole


@pytest.mark.parametrize('share', [0.001, 0.999])
def test_a_share_that_leaves_nothing_on_one_side_is_refused_before_anything_is_written(folder, share):
    with pytest.raises(cli.UserError, match=f'sft.evaluation_share={share} holds out .* choose a share'):
        run(folder, 'refused', **{'sft.evaluation_share': share})
    assert not (folder / 'refused').exists()


def test_traces_replaced_under_a_run_are_refused(folder, tmp_path):
    traces = episode_files.read(folder / 'traces', 'cold_start')
    episode_files.write(tmp_path / 'traces', 'cold_start', traces, lambda ids: '')
    with pytest.raises(KeyboardInterrupt):
        run(folder, 'bound', stop_at=2, traces=tmp_path / 'traces')
    episode_files.write(tmp_path / 'traces', 'cold_start', traces[1:], lambda ids: '')
    with pytest.raises(UserError, match=r"^traces='.*' is not what the run .* began with \(20 entries then, 19 now"):
        run(folder, 'bound', traces=tmp_path / 'traces')
    episode_files.write(tmp_path / 'traces', 'cold_start', traces, lambda ids: '')
    assert len(run(folder, 'bound', traces=tmp_path / 'traces')[0]) == 7
