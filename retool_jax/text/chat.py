"""A model's own chat template (Jinja, as Hugging Face stores it) read into the three strings of a record."""

from __future__ import annotations

import json
from pathlib import Path

from retool_jax.core.errors import UserError
from retool_jax.text.tokenizer import Tokenizer

# What stands for the user's and the model's words: nothing that a template trims or cuts.
ASKED, ANSWERED = 'words-that-are-asked', 'words-that-are-answered'


def read(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """(text before a user's message, text from it to the model's answer, special token that ends the answer).

    The template is rendered without tools, system message or date, so that a prompt is the same every day. Raises
    UserError where there is none, it cannot be rendered, changes the message, or ends a turn with no end that the
    tokenizer knows.
    """
    where = f'chat template of {str(tokenizer.directory)!r}'
    asked = {'role': 'user', 'content': ASKED}
    prompt = render(tokenizer, [asked], True)
    parts = prompt.split(ASKED)
    if len(parts) != 2:
        raise UserError(f'{where} writes the message {len(parts) - 1} times; name a template with model.template')
    whole = render(tokenizer, [asked, {'role': 'assistant', 'content': ANSWERED}], False)
    ends = [i for i in tokenizer.split(whole.partition(ANSWERED)[2]) if isinstance(i, int)]
    if not ends or ends[0] not in tokenizer.eos_ids:
        raise UserError(
            f'{where} ends an answer with no token that ends a turn; name it as eos_token in tokenizer_config.json'
        )
    turn_end = next(name for name, i in tokenizer.special_ids.items() if i == ends[0])
    return parts[0], parts[1], turn_end


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], generate: bool) -> str:
    """The conversation as the template writes it; `generate`: up to the first token of the next answer.

    Raises:
      UserError: the template refuses the conversation, or is broken.
    """
    import jinja2
    from jinja2 import sandbox

    source, names = _source(tokenizer.directory)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.filters['tojson'] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals['raise_exception'] = refuse
    try:
        return environment.from_string(source).render(messages=messages, add_generation_prompt=generate, **names)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f'chat template of {str(tokenizer.directory)!r} cannot be rendered '
            f'({str(error).splitlines()[0]}); name a template with model.template'
        ) from None


def _source(directory: Path | None) -> tuple[str, dict[str, str]]:
    """The template, and the special tokens that it may name."""
    directory = directory or Path()
    path, own = directory / 'tokenizer_config.json', directory / 'chat_template.jinja'
    config = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    source = own.read_text(encoding='utf-8') if own.is_file() else config.get('chat_template')
    if isinstance(source, list):  # several of them, by name
        source = next((entry['template'] for entry in source if entry.get('name') == 'default'), None)
    if not isinstance(source, str):
        raise UserError(
            f'model.template=own: {str(directory)!r} holds no chat template (tokenizer_config.json or '
            "chat_template.jinja); name a template of the model's family"
        )
    spell = lambda token: token.get('content') if isinstance(token, dict) else token
    names = {key: spell(value) for key, value in config.items() if key.endswith('_token') and spell(value)}
    return source, {'bos_token': '', 'eos_token': ''} | names
