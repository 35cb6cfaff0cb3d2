"""Records read from chat templates: equal by ids to their rendering by transformers, refused where they are not."""

from __future__ import annotations

import json

import pytest

from retool_jax.core.errors import UserError
from retool_jax.text import chat, template
from retool_jax.text.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tests.model import gguf_files
from tests.text.corpus import QWEN, TRACES

QUESTION = 'Let $x^2=2$; find x.\n  Is  it 中文? {braces} %d <|im_end|>'
TEMPLATES = {
    'chatml': gguf_files.CHATML,
    'system': (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        + gguf_files.CHATML
    ),
    'headers': (
        "{{ bos_token }}{%- if date_string is not defined %}{%- set date_string = '1 Jan 2026' %}{%- endif %}"
        "{{- 'Today: ' + date_string + '\n\n' }}{%- for message in messages %}{{- '<|im_start|>' + "
        "message.role + '<|endoftext|>\n\n' + message['content'] | trim + eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|endoftext|>\n\n' }}{%- endif %}"
    ),
    'thinks': (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
        '<|endoftext|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}'
        '{% if add_generation_prompt %}<|endoftext|><think>\n{% endif %}'
    ),
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp('trained')
    train_bpe(TRACES, 400, directory)
    return directory


def with_template(trained, tmp_path, source, **changes) -> Tokenizer:
    config = json.loads((trained / 'tokenizer_config.json').read_text()) | changes
    (tmp_path / 'tokenizer.json').write_bytes((trained / 'tokenizer.json').read_bytes())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | {'chat_template': source}))
    return load_tokenizer(tmp_path)


def theirs(directory, content: str) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory).apply_chat_template(
        [{'role': 'user', 'content': content}], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize('tools', [True, False])
@pytest.mark.parametrize('name', TEMPLATES)
def test_prompt_ids_are_those_of_the_template_as_transformers_renders_it(trained, tmp_path, name, tools):
    tokenizer = with_template(trained, tmp_path, TEMPLATES[name], bos_token='<|endoftext|>')
    made = template.make_template('own', tools, tokenizer)
    instruction = template.TOOL_INSTRUCTION if tools else template.TEXT_INSTRUCTION
    question = QUESTION.removesuffix(' <|im_end|>')  # transformers makes a chat token of that, we never do
    assert template.prompt_ids(made, tokenizer, question) == theirs(
        tmp_path, instruction.replace('{question}', question)
    )
    assert template.end_ids(made, tokenizer) == [tokenizer.special_ids['<|im_end|>']]
    assert made.opens_think == (name == 'thinks')
    ids = template.prompt_ids(made, tokenizer, QUESTION)
    assert tokenizer.decode(ids, specials=True) == made.before + QUESTION + made.after
    assert len([i for i in ids if i in tokenizer.special_ids.values()]) == len(
        [i for i in template.prompt_ids(made, tokenizer, 'Q') if i in tokenizer.special_ids.values()]
    )


@pytest.mark.skipif(not QWEN.is_dir(), reason='the real Qwen2.5 tokenizer is not here')
@pytest.mark.parametrize('tools', [True, False])
def test_qwens_own_template_gives_the_record_of_its_family(tools):
    own = template.make_template('own', tools, load_tokenizer(QWEN))
    known = template.make_template('qwen2_5', tools)
    assert (own.before, own.after, own.turn_end) == (known.before, known.after, known.turn_end)


def test_a_template_in_a_file_of_its_own_and_one_among_several_are_found(trained, tmp_path):
    tokenizer = with_template(
        trained, tmp_path, [{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': TEMPLATES['chatml']}]
    )
    assert chat.read(tokenizer)[0] == '<|im_start|>user\n'
    (tmp_path / 'chat_template.jinja').write_text(TEMPLATES['system'])
    assert chat.read(tokenizer)[0].startswith('<|im_start|>system\nYou help.')


def test_special_tokens_may_be_records(trained, tmp_path):
    tokenizer = with_template(
        trained,
        tmp_path,
        TEMPLATES['headers'],
        bos_token={'content': '<|endoftext|>'},
        eos_token={'content': '<|im_end|>', 'special': True},
    )
    assert chat.read(tokenizer)[0].startswith('<|endoftext|>Today: 1 Jan 2026\n\n<|im_start|>user')


@pytest.mark.parametrize(
    'source, message',
    [
        (None, 'holds no chat template'),
        ('{% for m in messages %}', 'cannot be rendered'),
        ("{{ raise_exception('system first') }}", 'cannot be rendered .system first.'),
        ("{{ messages[3]['content']['x'] }}", 'cannot be rendered'),
        ('{{ [1] + 1 }}', 'cannot be rendered'),
        ('<|im_start|>', 'writes the message 0 times'),
        ('{{ messages[0].content + messages[0].content }}', 'writes the message 2 times'),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", 'ends an answer with no token'),
        ("{% for m in messages %}{{ m.content + '<|im_start|>' }}{% endfor %}", 'ends an answer with no token'),
        (
            "{% for m in messages %}{{ m.content | replace('Python', 'Ruby') + '<|im_end|>' }}{% endfor %}",
            'changes the words of a message',
        ),
        ("{{ ''.__class__.__mro__ }}", 'cannot be rendered'),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(trained, tmp_path, source, message):
    tokenizer = with_template(trained, tmp_path, source)
    with pytest.raises(UserError, match=message) as caught:
        template.make_template('own', True, tokenizer)
    assert '\n' not in str(caught.value)
