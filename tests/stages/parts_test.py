"""From configuration blocks to parts: which model is opened, and at which tags it stops."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import base
from retool_jax.core import settings, sharding
from retool_jax.model import decoder
from retool_jax.model.config import load_config
from retool_jax.rollout.library import Model
from retool_jax.stages import embedded, parts
from retool_jax.stages.config import MeshSettings, ModelSettings, Reinforcement, RunSettings, SandboxBlock
from retool_jax.text import tags
from retool_jax.text.template import make_template
from tests import fakes
from tests.model.sizes import make_config
from tests.sandbox.servers import Server

BYTES = Model(make_config(vocab_size=300), fakes.byte_tokenizer(), make_template('tiny'))


def model_block(path=None, template='tiny', tools=True, instruction=None):
    return ModelSettings(
        path=path and str(path),
        name='tiny',
        template=template,
        tools=tools,
        instruction=instruction and str(instruction),
    )


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """The embedded model and the folder it was written to."""
    directory = tmp_path_factory.mktemp('run')
    return parts.open_model(model_block(), directory), directory


def stops_of(table, text):
    """Where in a text, and at what, the automaton stops."""
    state, found = tags.START, {}
    for i, token in enumerate(BYTES.tokenizer.encode(text)):
        state = table.walk([token], state)
        if table.stops[state]:
            found[i + 1] = int(table.stops[state])
    return found


def test_without_a_path_the_embedded_model_is_written_and_opened(written):
    model, directory = written
    assert (directory / 'model' / 'config.json').is_file() and model.template == make_template('tiny', True)
    assert model.config.vocab_size == model.tokenizer.size == embedded.VOCAB_SIZE
    assert str(model).startswith('qwen2, ') and f'{model.config.parameter_count():,}' in str(model)


@pytest.mark.parametrize('template', ['qwen2_5', 'qwen3', 'r1_distill'])
def test_without_a_path_no_other_family_is_opened_and_nothing_is_written(tmp_path, template):
    with pytest.raises(ValueError, match='model.path is missing; give a Hugging Face model directory'):
        parts.open_model(model_block(template=template), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_path_is_opened_where_it_is(written, tmp_path):
    model, directory = written
    found = parts.open_model(model_block(directory / 'model', tools=False), tmp_path)
    assert found.config == model.config and found.template == make_template('tiny', False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"model.path='.*nowhere' is no directory; give a Hugging Face"):
        parts.open_model(model_block(tmp_path / 'nowhere'), tmp_path)
    (tmp_path / 'model.gguf').touch()
    with pytest.raises(ValueError, match=r'launch/convert.py makes one of a GGUF file$'):
        parts.open_model(model_block(tmp_path / 'model.gguf'), tmp_path)


def test_the_instruction_of_a_file_is_what_the_model_is_asked(written, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('Please: {question}\n')
    found = parts.open_model(model_block(written[1] / 'model', instruction=prompt), tmp_path)
    assert found.template == make_template('tiny', True, instruction='Please: {question}')
    assert found.template.before.endswith('user\nPlease: ')


def test_a_tokenizer_wider_than_the_logits_is_refused(tmp_path):
    embedded.write_model(tmp_path)
    config = tmp_path / 'config.json'
    config.write_text(config.read_text().replace(f'"vocab_size": {embedded.VOCAB_SIZE}', '"vocab_size": 600'))
    assert load_config(tmp_path).vocab_size == 600
    with pytest.raises(ValueError, match='the tokenizer has 640 ids, the model only 600 logits'):
        parts.load_model(tmp_path, 'tiny', True)


@pytest.mark.parametrize(
    ('tools', 'on_answer', 'expected'),
    [
        (True, 'end', {8: tags.CODE, 19: tags.ANSWER}),
        (True, 'eos', {8: tags.CODE}),
        (False, 'end', {19: tags.ANSWER}),
        (False, 'eos', {}),
    ],
)
def test_the_table_stops_where_tools_and_answers_do(tools, on_answer, expected):
    model = dataclasses.replace(BYTES, template=make_template('tiny', tools))
    table = parts.make_table(model, on_answer)
    assert stops_of(table, 'x</code>, </answer>') == expected
    assert table.next_state.shape[1] == 300  # as wide as the logits
    assert parts.make_table(model, on_answer) is table


def test_the_mesh_takes_all_devices():
    mesh = parts.make_mesh(MeshSettings(data=1, fsdp=-1, tensor=2, slices=1))
    assert dict(mesh.shape) == {'data': 1, 'fsdp': len(jax.devices()) // 2, 'tensor': 2}


def test_random_weights_follow_their_seed_alone_and_lie_on_the_mesh():
    sizes = make_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_hidden_layers=1)
    model = Model(sizes, BYTES.tokenizer, BYTES.template)
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1}, jax.devices()[:2])
    first, again, other = (
        parts.load_policy(model_block(), model, seed, mesh)['embed_tokens']['weight'] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert first.sharding.shard_shape(first.shape) == (sizes.vocab_size, 16)


def test_engines_share_a_sampler_and_differ_in_their_randomness(written):
    model, _ = written
    text_only = dataclasses.replace(model, template=make_template('tiny', tools=False))
    stage = settings.build(Reinforcement, base.reinforcement('tiny', 'ppo'))
    sampler = parts.make_sampler(model, stage.sampler, stage.turns)
    assert sampler.settings == stage.sampler
    make = lambda model, purpose, executor=None: parts.make_engine(
        model, sampler, stage.turns, stage.feedback, stage.train_sampling, executor, 0, purpose
    )
    training, evaluation = make(model, parts.TRAINING, fakes.FakePool({})), make(text_only, parts.EVALUATION)
    assert training.sampler is evaluation.sampler is sampler
    assert not (training.key_data == evaluation.key_data).all()
    assert (training.rules.settings.tools, evaluation.rules.settings.tools) == (True, False)
    with pytest.raises(ValueError, match='needs an executor'):
        make(model, parts.TRAINING)


def test_a_model_without_tools_has_no_sandbox_and_a_grader_is_closed_behind_it():
    stage = settings.build(Reinforcement, base.reinforcement('tiny', 'ppo'))
    with parts.open_guarded(stage.sandbox, tools=False) as sandbox:
        assert sandbox is None
    with parts.open_grader(stage.reward) as grader:
        assert grader.grade('<answer>\\boxed{7}</answer>', '7').correct


def test_a_critic_has_its_own_optimizer_and_its_first_state_is_the_policy_with_a_head():
    stage = settings.build(Reinforcement, base.reinforcement('tiny', 'ppo'))
    sizes = make_config(vocab_size=300)
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
    policy = decoder.init(sizes, jax.random.key(0))
    learner = parts.make_learner(stage, sizes, mesh)
    begun = parts.begin(learner, stage.ppo.critic, policy)
    assert begun.done == 0 and begun.state.params['policy'] is policy
    assert begun.state.params.keys() == begun.state.opt_state.keys() == {'policy', 'critic'}
    assert (learner.loss, learner.advantage, learner.temperature) == (stage.loss, stage.advantage, 1.0)


def test_stages_that_differ_in_their_folders_share_a_learner_as_it_is_compiled():
    stage = settings.build(Reinforcement, base.reinforcement('tiny', 'ppo'))
    sizes = make_config(vocab_size=300)
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
    learner = parts.make_learner(stage, sizes, mesh)
    elsewhere = dataclasses.replace(stage, run=RunSettings(dir='elsewhere', seed=1))
    assert parts.make_learner(elsewhere, sizes, mesh) is learner
    other = dataclasses.replace(stage, loss=dataclasses.replace(stage.loss, clip_high=0.3))
    assert parts.make_learner(other, sizes, mesh).loss.clip_high == 0.3


def test_a_sandbox_with_addresses_runs_snippets_there(monkeypatch):
    server = Server(token='letmein')
    try:
        block = base.sandbox('tiny')
        block.addresses = (server.address,)
        sizes = settings.build(SandboxBlock, block)
        monkeypatch.setenv('RETOOL_SANDBOX_TOKEN', 'letmein')
        with parts.open_sandbox(sizes) as sandbox:
            assert sandbox.submit('print(6 * 7)').result().stdout == '42\n' and server.address in str(sandbox)
        monkeypatch.setenv('RETOOL_SANDBOX_TOKEN', 'wrong')
        with pytest.raises(ValueError, match='sandbox: no server can be used: .*token'):
            parts.open_sandbox(sizes).__enter__()
    finally:
        server.stop()
