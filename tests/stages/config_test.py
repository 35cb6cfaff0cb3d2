"""Every key of every configuration refuses what it cannot mean, in one line that names it, before anything is built."""

from __future__ import annotations

import ast
import copy
import functools
import math
import re

import pytest
from ml_collections import ConfigDict

from retool_jax.core import cli, settings
from retool_jax.core.errors import UserError
from retool_jax.stages.config import ColdStart, Evaluation, FineTuning, Reinforcement, require_path
from retool_jax.stages.demo_config import Demo
from retool_jax.stages.rewrite_config import Rewrite

STAGES = {
    'configs/rewrite.py:tiny': Rewrite,
    'configs/cold_start.py:tiny': ColdStart,
    'configs/sft.py:tiny': FineTuning,
    'configs/ppo.py:tiny': Reinforcement,
    'configs/grpo.py:tiny': Reinforcement,
    'configs/dapo.py:tiny': Reinforcement,
    'configs/evaluate.py:tiny': Evaluation,
    'configs/demo.py': Demo,
}
# Keys that take the address of a store, and others that take any word.
ADDRESSES = (
    r'model\.path|traces|golds|(validation\.)?problems|halves\.episodes|model\.name|rewriter\.hint|endpoint\.model'
)
AT_HOME = ('configs/demo.py', 'configs/rewrite.py:tiny')  # stages that know paths of this machine alone
# What is refused by each key of a type; the patterns are the keys that take it nevertheless.
BAD = {
    int: {-1: r'mesh\.fsdp', 0: r'run\.seed|.*\.(warmup_steps|critic_warmup_steps|top_k|retries|quanta|'
                               r'dynamic_rounds|overlong_buffer|micro_rows|decode_rows|max_calls)|sft\.epochs|'
                               r'(recipe|text)\.lead_steps|sandbox\.concurrency|lora\.rank|episodes\.keep|mesh\.slices',
          10**12: r'endpoint\.max_tokens', 2**70: None},
    float: {math.nan: None, math.inf: None, -math.inf: None, 1e300: None, -1.0: None,
            0.0: r'\w*sampling\.(temperature|min_p)|(text\.)?(\w*optimizer\.(lr|b1|b2|weight_decay)|advantage\.\w+)|'
                 r'loss\.(clip_low|clip_high|entropy_coef|kl_coef|value_coef|correction_low)|sft\.evaluation_share|'
                 r'watch\.\w+|checkpoints\.every_s|text\.needy|recipe\.evaluation_share|rewriter\.temperature|'
                 r'filters\.(pass_rate_low|pass_rate_high|short_share)'},
    str: {'': None, ' ': None,
          'nonsense': r'run\.dir|model\.(path|name|instruction)|traces|golds|(validation\.)?problems|halves\.episodes|'
                      r'rewriter\.hint|endpoint\.(model|key_variable)',
          **dict.fromkeys(('gs:/bucket/thing', 'gs://', 'hdfs://x/y'), r'model\.name|rewriter\.hint|endpoint\.model'),
          'gs://bucket/thing': rf'run\.dir|{ADDRESSES}', 's3://bucket/thing': ADDRESSES},
    tuple: {('',): None, (' ',): None, (0,): r'profile\.steps', ('gs://bucket/a.jsonl',): r'data\.sources',
            (math.nan,): None, (None,): None},
    bool: {},
}  # fmt: skip
# Of training: a temperature of 0 is for evaluation alone.
REFUSED = {('train_sampling.temperature', 0.0)}


def load(spec: str) -> ConfigDict:
    """A configuration of which every key that must be given is."""
    config = cli.load_config(spec)
    with config.unlocked():
        if spec.startswith('configs/sft'):
            config.traces = 'runs/cold_start_tiny/episodes'
        if spec.startswith(('configs/cold_start', 'configs/rewrite')):
            config.traces = 'rewritten.jsonl'
        if spec.startswith('configs/evaluate'):
            config.problems = 'good.jsonl'
    return config


def change(spec: str, key: str, value: object) -> dict:
    """The configuration of a file in its plain form, with another value."""
    config = block = copy.deepcopy(_plain(spec))
    *above, last = key.split('.')
    for name in above:
        block = block[name]
    block[last] = value
    return config


@functools.cache
def _plain(spec: str) -> dict:
    return settings.to_json(load(spec))


def keys(spec: str) -> list[tuple[str, type]]:
    return list(cli.flatten(cli.load_config(spec)).items())


@pytest.mark.parametrize('spec', STAGES)
def test_the_file_as_it_is_holds(spec):
    settings.build(STAGES[spec], load(spec))


@pytest.mark.parametrize('spec', STAGES)
def test_every_key_is_explained_beside_its_field(spec):
    explained = settings.keys(STAGES[spec])
    assert not [key for key, (_, words) in explained.items() if len(words.split()) < 2]
    whole = {key for key, _ in keys(spec)}
    assert {key for key in whole if key not in explained} <= {key for key in whole if re.match(r'(text\.)?mix\.', key)}
    assert {key.rpartition('.')[0] for key in whole if key not in explained} <= explained.keys()


@pytest.mark.parametrize('spec', STAGES)
def test_every_key_refuses_what_it_cannot_mean_and_is_named(spec):
    stage, missed = STAGES[spec], []
    for key, kind in keys(spec):
        for value, legal in BAD[kind].items():
            expected = (key, value) in REFUSED or not (legal and re.fullmatch(legal, key))
            expected |= spec in AT_HOME and '://bucket' in str(value) and not re.search('name|hint|endpoint', key)
            try:
                settings.build(stage, change(spec, key, value))
                line = ''
            except UserError as error:
                line = str(error)
            if (key not in line if expected else bool(line)) or '\n' in line:
                missed.append((key, value, line))
    assert not missed


@pytest.mark.parametrize('spec', STAGES)
def test_every_key_refuses_another_type_and_is_named(spec):
    stage, missed = STAGES[spec], []
    for key, kind in keys(spec):
        for value in {int: ('x', 1.5, True), float: ('x', ()), str: (3, True), bool: ('x', 2), tuple: ('x', 3)}[kind]:
            try:
                settings.build(stage, change(spec, key, value))
                missed.append((key, value))
            except UserError as error:
                if key not in str(error):
                    missed.append((key, value, str(error)))
    assert not missed


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'turns.max_tokens': 300}, 'turns.max_tokens=300 exceeds sampler.slots=256'),
        ({'turns.max_tokens': 250}, 'turns.max_tokens=250 exceeds forward.row_width=200'),
        ({'ppo.overlong_buffer': 201}, 'ppo.overlong_buffer=201 exceeds turns.max_tokens=200'),
        (
            {'ppo.critic': 'none'},
            'ppo.critic=none.*advantage.kind=gae'.replace('none', "'none'").replace('gae', "'gae'"),
        ),
        ({'advantage.kind': 'grpo'}, "ppo.critic='head' contradicts advantage.kind='grpo'"),
        ({'train_sampling.top_p': 0.9}, 'train_sampling.top_p=0.9'),
        ({'train_sampling.temperature': 0.0}, 'train_sampling.temperature=0.0'),
        ({'ppo.quanta': 2, 'halves.train': False}, 'ppo.quanta=2.*ppo.quanta=0'),
        ({'ppo.dynamic_rounds': 2, 'ppo.samples': 1}, 'ppo.dynamic_rounds=2.*samples=1'),
        ({'sampler.decode_rows': 65}, 'sampler.decode_rows=65.*rows=64'),
        ({'sampler.weights': 'int8', 'loss.correction': 'none'}, "sampler.weights='int8' samples from another"),
        ({'sampler.weights': 'int8', 'sampler.dtype': 'float16'}, "sampler.weights='int8'.* sampler.dtype=bfloat16"),
        ({'forward.logprob_chunk': 7}, 'forward.logprob_chunk=7 does not divide row_width=200'),
        ({'forward.attention': 'splash'}, 'forward.row_width=200 is no multiple of 128, which attention=splash'),
        ({'forward.attention': 'cudnn'}, 'forward.attention=cudnn has no float32 kernel'),
        ({'mesh.data': -1}, 'mesh.data=-1 and mesh.fsdp=-1: only one axis'),
        ({'data.weights': (1.0,)}, 'data.weights.*0 data.sources'),
        ({'loss.kind': 'gspo'}, "loss.aggregation='token-mean'"),
        ({'loss.aggregation': 'seq-mean-token-sum'}, 'loss.aggregation_constant=None must be positive'),
        ({'advantage.whiten': False, 'advantage.kind': 'reinforce_pp'}, 'advantage.whiten=False contradicts'),
        ({'sandbox.addresses': ('host:8080',)}, r'sandbox.addresses\[0\].*http://'),
        ({'sandbox.preload': ('a b',)}, 'sandbox.preload'),
    ],
)
def test_blocks_that_contradict_each_other_are_refused(changes, words):
    config = load('configs/ppo.py:tiny')
    for key, value in changes.items():
        block, name = key.split('.')
        with config.unlocked(), config[block].ignore_type():
            config[block][name] = value
    with pytest.raises(UserError, match=words):
        settings.build(Reinforcement, config)


@pytest.mark.parametrize(
    'shares, words',
    [
        ({'code': 0.9}, 'mix.easy.code=0.9, mix.easy.mental=0.6: the shares must add up to 1'),
        ({'code': -0.4}, 'mix.easy.code=-0.4'),
        ({'code': math.nan}, 'mix.easy.code'),
        ({'mental': 1.4}, 'mix.easy.mental=1.4'),
        ({'song': 0.0}, 'mix.easy.song'),
    ],
)
def test_shares_of_traces_are_shares_of_a_whole(shares, words):
    config = load('configs/cold_start.py:tiny')
    with config.unlocked(), pytest.raises(UserError, match=words):
        config.mix.easy.update(shares)
        settings.build(ColdStart, config)


@pytest.mark.parametrize(
    'name, words',
    [('ppo', 'model.path'), ('sft', 'config.traces'), ('evaluate', 'config.problems'), ('cold_start', 'model.path')],
)
def test_what_must_be_given_is_asked_for(name, words):
    config = cli.load_config(f'configs/{name}.py:qwen2_5_7b')
    with pytest.raises(UserError, match=words):
        require_path(settings.build(STAGES[f'configs/{name}.py:tiny'], config).model)


def test_a_plan_needs_no_files_of_the_model():
    settings.build(Reinforcement, cli.load_config('configs/ppo.py:qwen2_5_32b'))


def test_messages_name_no_key_that_is_not_there():
    """Every `block.key=` in the text of an error of the package is a key of some configuration."""
    known = {key for spec in STAGES for key, _ in keys(spec)}
    blocks = {key.split('.')[0] for key in known if '.' in key}
    named = {}
    for path in (cli.ROOT / 'retool_jax').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                text = ' '.join(part.value for part in ast.walk(node) if isinstance(getattr(part, 'value', None), str))
                for word in re.findall(rf'(?<![\w./])(?:{"|".join(sorted(blocks))})\.[a-z_]+', text):
                    named.setdefault(word, path.name)
    assert len(named) > 15
    assert not {word: file for word, file in named.items() if word not in known}


def test_what_may_be_absent_stays_absent():
    stage = settings.build(Reinforcement, cli.load_config('configs/ppo.py:tiny'))
    assert stage.model.path is stage.halves.episodes is stage.validation.problems is None
