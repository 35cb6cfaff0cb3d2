"""One trainer, many algorithms: each is chosen by values of the configuration and takes two real steps."""

import re
import shutil

import numpy as np
import pytest

from configs import base
from retool_jax.algo.settings import AdvantageSettings, LossSettings
from retool_jax.core import cli, episode_files, metrics, settings
from retool_jax.core.records import Reward
from retool_jax.report import pages
from retool_jax.stages import parts, ppo
from retool_jax.stages.alarms import WatchSettings
from retool_jax.stages.config import CheckpointSettings, HalvesSettings, Reinforcement
from retool_jax.train import grading
from retool_jax.train.ppo import PPOSettings
from retool_jax.train.state import OptimizerSettings
from tests.train import killable

NO_CRITIC = {'ppo.critic': 'none', 'advantage.whiten': False}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('algorithms') / 'files'
    killable.make_model(folder)
    return folder


@pytest.fixture(autouse=True)
def some_answers_are_right(monkeypatch):
    """A random model solves nothing, so that groups would never differ."""

    def grade(episodes, grader, tokenizer):
        for e in episodes:
            right = sum(e.tokens) % 3 == 0
            e.reward = Reward(1.0 if right else -1.0, right, right, right, '1' if right else '')

    monkeypatch.setattr(grading, 'grade', grade)


def run(folder, name, algorithm='ppo', **values):
    stage = killable.make_stage(folder, name, algorithm, **{'ppo.steps': 2, 'checkpoints.every': 2} | values)
    with killable.tiny_world(folder, name):
        ppo.run(stage)
    lines = metrics.read(folder / name)
    assert [line['step'] for line in lines] == [0, 1] and (folder / name / 'final').is_dir()
    assert all(np.isfinite(x) for line in lines for x in line.values() if isinstance(x, float))
    assert any(line['actor/grad_norm'] > 0 for line in lines)
    assert all(abs(line['mismatch/logprob_abs_max']) < 1e-4 for line in lines)
    return lines, stage


def test_grpo_takes_groups_without_a_critic(folder):
    lines, stage = run(folder, 'grpo', 'grpo', **{'ppo.samples': 4})
    assert not any(name.startswith('critic/') for name in lines[0]) and stage.advantage.kind == 'grpo'
    episodes = episode_files.read(folder / 'grpo' / 'episodes', 'train_00000')
    assert len(episodes) == 12 and {e.sample for e in episodes} == {0, 1, 2, 3}
    summary = ppo.summarise(stage, folder / 'grpo')
    assert summary['steps'] == 2 and summary['correct']['first'] == lines[0]['rewards/correct']
    assert pages.write(folder / 'grpo').stat().st_size > 5000


def test_dapo_replaces_groups_of_equal_rewards_and_penalises_length(folder):
    lines, _ = run(folder, 'dapo', 'dapo', **{'ppo.samples': 3, 'ppo.minibatches': 2})
    assert any(line['rollout/rounds'] > 1 for line in lines)
    assert lines[1]['data/cursor'] > lines[0]['data/cursor'] >= 3
    for step, line in enumerate(lines):
        episodes = episode_files.read(folder / 'dapo' / 'episodes', f'train_{step:05d}')
        groups = [episodes[i : i + 3] for i in range(0, len(episodes), 3)]
        assert len(groups) == line['rollout/groups_taken'] > 0
        assert all(len({e.reward.correct for e in group}) == 2 for group in groups)


@pytest.mark.parametrize('name', ['ppo', 'grpo', 'dapo'])
def test_every_size_of_every_algorithm_agrees_with_itself(name):
    for arg in base.MODELS:
        config = cli.load_config(f'configs/{name}.py:{arg}')
        assert config.run.dir == f'runs/{name}_{arg}'
        block = lambda kind, key: settings.build(kind, config[key], key)  # noqa: B023
        sizes, advantage = block(PPOSettings, 'ppo'), block(AdvantageSettings, 'advantage')
        settings.build(Reinforcement, config)
        assert advantage.needs_groups == (sizes.samples > 1 and sizes.critic == 'none')
        assert sizes.problems_per_step * sizes.samples % sizes.minibatches == 0
        for kind, key in (
            (LossSettings, 'loss'),
            (WatchSettings, 'watch'),
            (HalvesSettings, 'halves'),
            (CheckpointSettings, 'checkpoints'),
            (OptimizerSettings, 'optimizer'),
        ):
            block(kind, key)
    assert f'python launch/ppo.py --config=configs/{name}.py:tiny' in (cli.ROOT / f'configs/{name}.py').read_text()


VALUES = {  # of a 32B, as the sources that configs/ name have them
    'ppo': {'optimizer.lr': 1e-6, 'critic_optimizer.lr': 2e-6, 'loss.clip_low': 0.2, 'loss.clip_high': 0.28,
            'loss.dual_clip': 10.0, 'loss.value_clip': 0.5, 'loss.value_coef': 1.0, 'loss.kl_coef': 0.0,
            'advantage.gamma': 1.0, 'advantage.lam': 1.0, 'ppo.steps': 400, 'ppo.problems_per_step': 1024,
            'ppo.samples': 1, 'ppo.minibatches': 2, 'ppo.critic_warmup_steps': 20, 'optimizer.weight_decay': 0.01},
    'grpo': {'ppo.problems_per_step': 512, 'ppo.samples': 16, 'ppo.minibatches': 8, 'loss.clip_high': 0.2,
             'loss.aggregation': 'seq-mean-token-mean', 'ppo.critic_warmup_steps': 0},
    'dapo': {'ppo.problems_per_step': 512, 'ppo.samples': 16, 'ppo.minibatches': 16, 'optimizer.warmup_steps': 320,
             'optimizer.weight_decay': 0.1, 'loss.clip_high': 0.28, 'loss.aggregation': 'token-mean',
             'ppo.overlong_buffer': 4096},
    'sft': {'sft.epochs': 2, 'optimizer.lr': 1e-5, 'optimizer.schedule': 'cosine', 'optimizer.warmup_steps': 12,
            'optimizer.b2': 0.95, 'optimizer.weight_decay': 0.01, 'sft.batch_tokens': 32 * 4096},
}  # fmt: skip


@pytest.mark.parametrize('name', VALUES)
def test_the_real_sizes_have_the_values_of_the_sources_that_they_name(name):
    found = {}
    for arg in ('qwen2_5_32b', 'qwen2_5_7b'):
        config = cli.load_config(f'configs/{name}.py:{arg}')
        for key in VALUES[name]:
            block, field = key.split('.')
            found[key] = config[block][field]
        assert found == VALUES[name]


@pytest.mark.parametrize('name', [*VALUES, 'evaluate', 'cold_start'])
def test_scores_stand_beside_keys_that_exist(name):
    text = (cli.ROOT / f'configs/{name}.py').read_text().split('"""')[1]
    flags = re.findall(r'--config\.[\w.]+=[^\s,;]+', text)
    spec = f'configs/{name}.py:qwen2_5_32b'
    for flag in flags:
        cli.parse_config([name, f'--config={spec}', flag.replace('"', '')])
    assert flags


VARIANTS = {
    'dr_grpo': {'advantage.kind': 'dr_grpo', 'loss.aggregation': 'seq-mean-token-sum',
                'loss.aggregation_constant': 48.0},
    'rloo and cispo': {'advantage.kind': 'rloo', 'loss.kind': 'cispo', 'loss.correction': 'sequence'},
    'reinforce_pp and kl in the reward': {'advantage.kind': 'reinforce_pp', 'advantage.whiten': True,
                                          'loss.kl_coef': 0.1, 'loss.kl_in': 'reward', 'loss.kl_kind': 'k1'},
    'gspo and void turns': {'advantage.kind': 'grpo', 'loss.kind': 'gspo', 'loss.aggregation': 'seq-mean-token-mean',
                            'ppo.drop_void': True, 'ppo.mask_truncated': True},
    'baseline, kl in the loss, verl rewards': {
        'advantage.kind': 'reinforce_pp_baseline', 'advantage.whiten': True, 'loss.kl_coef': 0.1,
        'loss.kl_kind': 'k2', 'reward.style': 'verl', 'loss.entropy_coef': 0.01},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIANTS)
def test_every_algorithm_is_a_choice_of_values(folder, name):
    lines, stage = run(
        folder, name.replace(' ', '_').replace(',', ''), **NO_CRITIC | {'ppo.samples': 4} | VARIANTS[name]
    )
    assert ('actor/kl' in lines[0]) == (stage.loss.kl_coef > 0)


@pytest.mark.slow
def test_a_critic_with_a_backbone_warms_up_and_waits_on_the_host(folder):
    lines, _ = run(
        folder,
        'backbone',
        **{
            'ppo.critic': 'backbone',
            'ppo.critic_warmup_steps': 1,
            'ppo.offload': True,
            'loss.value_clip': 0.2,
            'ppo.epochs': 2,
        },
    )
    assert abs(lines[0]['actor/ppo_kl']) < 1e-6 < abs(lines[1]['actor/ppo_kl'])  # held while the critic warms up
    assert all(line['critic/vf_loss'] > 0 for line in lines)


@pytest.mark.slow
def test_a_warm_up_that_is_broken_off_goes_on_as_the_whole_one(folder):
    def run_to(name, *ends):
        for end in ends:  # ppo.steps may change between two starts
            stage = killable.make_stage(
                folder, name, **{'ppo.steps': end, 'checkpoints.every': 1, 'ppo.critic_warmup_steps': 2}
            )
            with killable.tiny_world(folder, name):
                ppo.run(stage)
            if end < ends[-1]:
                shutil.rmtree(folder / name / 'final')
        lines = metrics.read(folder / name)
        assert [line['actor/grad_norm'] > 0 for line in lines] == [False, False, True]
        assert all(line['critic/grad_norm'] > 0 and line['actor/entropy'] > 0 for line in lines)
        return (folder / name / 'final' / 'model.safetensors').read_bytes(), [line['critic/vf_loss'] for line in lines]

    whole = run_to('warm', 3)
    assert run_to('broken_off', 1, 3) == whole


def test_rollouts_alone_are_kept_and_trained_on_alone(folder):
    flags = {'ppo.steps': 2, 'checkpoints.every': 2}
    stage = killable.make_stage(folder, 'rolls', **flags, **{'halves.train': False})
    with killable.tiny_world(folder, 'rolls'):
        ppo.run(stage)
    assert episode_files.names(folder / 'rolls' / 'episodes') == ['train_00000', 'train_00001']
    assert not (folder / 'rolls' / 'final').exists()
    assert [line['phase'] for line in metrics.read(folder / 'rolls')] == ['rollout'] * 2
    with killable.tiny_world(folder, 'rolls'):  # nothing is left to do
        ppo.run(stage)
    assert len(metrics.read(folder / 'rolls')) == 2

    stage = killable.make_stage(folder, 'trained', **flags, **{'halves.episodes': folder / 'rolls' / 'episodes'})
    with killable.tiny_world(folder, 'trained'), pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, 'make_sampler', lambda *args: pytest.fail('a sampler was made'))
        ppo.run(stage)
    lines = metrics.read(folder / 'trained')
    assert [line['phase'] for line in lines] == ['ppo'] * 2 and lines[0]['actor/grad_norm'] > 0
    assert lines[0]['mismatch/logprob_abs_max'] < 1e-4 < lines[1]['mismatch/logprob_abs_max']  # off-policy by a step


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'ppo.critic': 'none'}, "ppo.critic='none' contradicts advantage.kind='gae'"),
        ({'advantage.kind': 'grpo'}, "ppo.critic='head' contradicts advantage.kind='grpo'"),
        ({'ppo.dynamic_rounds': 2, 'ppo.samples': 1}, 'dynamic_rounds=2 compares the samples'),
        ({'watch.faults': 'shout'}, "watch.faults='shout' is unknown; choose one of ignore, warn, stop"),
        ({'train_sampling.top_p': 0.9}, 'train_sampling.top_p=0.9, .* set top_p=1'),
        ({'train_sampling.temperature': 0.0}, 'train_sampling.temperature=0.0 .* above 0'),
        (
            NO_CRITIC | {'advantage.kind': 'grpo', 'ppo.samples': 1},
            "advantage.kind='grpo' compares the samples of a problem, .* set ppo.samples=2",
        ),
        ({'ppo.quanta': 4, 'loss.correction': 'none'}, 'ppo.quanta=4 trains on tokens of older weights'),
        ({'halves.episodes': '/kept', 'loss.correction': 'none'}, "halves.episodes='/kept' trains on tokens of other"),
        ({'ppo.critic': 'none', 'ppo.critic_warmup_steps': 1}, 'ppo.critic_warmup_steps=1 holds the policy'),
        ({'ppo.quanta': 4, 'halves.train': False}, 'ppo.quanta=4 carries episodes over .* set ppo.quanta=0'),
        ({'halves.episodes': '/nowhere'}, "halves.episodes='/nowhere' holds no training episodes"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(folder, values, words):
    with killable.tiny_world(folder, 'refused'), pytest.raises(ValueError, match=words) as refused:
        ppo.run(killable.make_stage(folder, 'refused', **values))
    assert cli.explain(refused.value) and not (folder / 'refused').exists()


@pytest.mark.parametrize('keep', [1, 0])
def test_an_alarm_refers_to_the_episodes_of_its_step_or_keeps_them(folder, keep):
    _, stage = run(folder, f'keep{keep}', **{'episodes.keep': keep, 'watch.entropy_below': 100.0})
    directory = folder / f'keep{keep}'
    kept, alarms = ['train_00000', 'train_00001'] if keep else [], directory / 'alarms'
    assert episode_files.names(directory / 'episodes') == kept and episode_files.names(alarms) == ['entropy_00000']
    made = episode_files.read(alarms, 'entropy_00000')
    assert len(made) == stage.ppo.problems_per_step * stage.ppo.samples and {e.step for e in made} == {0}
    if keep:
        assert made == episode_files.read(directory / 'episodes', 'train_00000')
        for end in ('.npz', '.jsonl.gz'):
            assert (alarms / f'entropy_00000{end}').samefile(directory / 'episodes' / f'train_00000{end}')


def test_rollouts_that_would_not_be_kept_are_refused(folder):
    with pytest.raises(ValueError, match='episodes.keep=0 throws away what halves.train=False makes'):
        killable.make_stage(folder, 'thrown', **{'halves.train': False, 'episodes.keep': 0})
