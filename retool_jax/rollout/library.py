"""The engine without configuration files: a model directory, a sandbox, questions – for notebooks and scripts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from retool_jax.core.errors import UserError
from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem
from retool_jax.model import decoder, hf
from retool_jax.model.config import ModelConfig, load_config
from retool_jax.rollout import engine
from retool_jax.rollout.requests import Executor, Request
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.rollout.turns import Rules, TurnSettings
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.text import tags
from retool_jax.text.template import Template, common_ids, make_template, prompt_ids, read_instruction
from retool_jax.text.tokenizer import Tokenizer, load_tokenizer

FEEDBACK = FeedbackSettings(style='paper', max_chars=400, max_frames=6)


@dataclasses.dataclass(frozen=True)
class Spoken:
    """How a model is spoken to that others hold."""

    tokenizer: Tokenizer
    template: Template


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's sizes and how it is spoken to; with weights in the sampling layout where no trainer holds them."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: Template
    params: Params | None = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f'{self.config.model_type}, {self.config.parameter_count():,} parameters'

    def text(self, episode: Episode) -> str:
        """Everything after the prompt."""
        return self.tokenizer.decode(episode.tokens[episode.prompt_length :])


def load_spoken(directory: str | Path, family: str, tools: bool, instruction: str | None = None) -> Spoken:
    """Reads the tokenizer of a model directory, and nothing else: of a model that a server holds, of any architecture.

    The arguments are those of `load_model`.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    _check_directory(directory)
    tokenizer = load_tokenizer(directory)
    asked = None if instruction is None else read_instruction(instruction, tools)
    return Spoken(tokenizer, make_template(family, tools, tokenizer, asked))


def load_model(directory: str | Path, family: str, tools: bool, instruction: str | None = None) -> Model:
    """Reads config.json and the tokenizer of a Hugging Face model directory, but no weights.

    family: names the template (text.template). instruction: what the model is asked, by name or file; None: the
    template's own.

    Raises:
      UserError: a file is missing, a size is not supported, or the tokenizer has more ids than the model logits.
    """
    _check_directory(directory)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f'model.path={str(directory)!r}: the tokenizer has {tokenizer.size} ids, the model only '
            f'{config.vocab_size} logits'
        )
    asked = None if instruction is None else read_instruction(instruction, tools)
    return Model(config, tokenizer, make_template(family, tools, tokenizer, asked))


def _check_directory(directory: str | Path) -> None:
    if not Path(directory).is_dir():
        aside = '; launch/convert.py makes one of a GGUF file' if Path(directory).is_file() else ''
        raise UserError(f'model.path={str(directory)!r} is no directory; give a Hugging Face model directory{aside}')


def open_model(directory: str | Path, family: str, dtype: str = 'float32', *, tools: bool = True) -> Model:
    """`load_model` with its weights, cast to `dtype`."""
    model = load_model(directory, family, tools)
    cast = jax.jit(functools.partial(decoder.to_sampling, model.config, dtype=jnp.dtype(dtype)))
    return dataclasses.replace(model, params=cast(hf.load(directory, model.config)))


class Engine(engine.Engine):
    """An engine with its model, sizes from two numbers.

    model = open_model('Qwen2.5-1.5B-Instruct', 'qwen2_5', 'bfloat16')
    with Pool(settings) as pool:
        engine = Engine(model, pool, rows=16, max_tokens=4096)
        for episode in engine.ask(['What is 3 ** 40 mod 1000?'], samples=4):
            print(model.text(episode), episode.calls)
    """

    def __init__(
        self,
        model: Model,
        executor: Executor | None = None,
        *,
        rows: int = 16,
        decode_rows: int = 0,
        max_tokens: int = 2048,
        max_calls: int = 7,
        cache_dtype: str | None = None,
        feedback: FeedbackSettings = FEEDBACK,
        seed: int = 0,
        **sampling: float,
    ):
        """executor: sandbox.pool.Pool or a remote client; None samples text alone. rows: episodes at a time.
        decode_rows: how many of them decode at a time, where tools are slow; 0: all. max_tokens: of an episode, prompt
        included. cache_dtype: 'bfloat16' or 'int8' for a smaller KV cache. feedback: how a snippet's output is shown.
        sampling: fields of SamplingSettings, such as temperature=0.6, top_p=0.95; otherwise temperature 1, nothing cut
        off."""
        self.model = model
        chunk = min(256, max_tokens)
        dtype = str(model.params['norm']['weight'].dtype)
        sizes = SamplerSettings(
            rows=rows,
            slots=max_tokens,
            chunk=chunk,
            feed_rows=min(8, rows),
            quota=32,
            decode_rows=decode_rows,
            min_bound=chunk,
            dtype=dtype,
            weights='float',
            cache_dtype=cache_dtype or dtype,
        )
        tools = executor is not None
        table = tags.build_table(
            model.tokenizer.token_bytes, model.config.vocab_size, tags.TAGS if tools else {'</answer>': tags.ANSWER}
        )
        turns = TurnSettings(
            tools=tools,
            max_tokens=max_tokens,
            max_turn_tokens=max_tokens,
            max_turns=max_calls + 1,
            max_calls=max_calls,
            on_cap='answer',
            on_answer='end',
        )
        super().__init__(
            Sampler(model.config, sizes, table.next_state, table.stops, model.tokenizer.eos_ids),
            Rules(turns, model.tokenizer, table, lambda result: render(result, feedback)),
            SamplingSettings(**{'temperature': 1.0, 'top_p': 1.0, 'top_k': 0, 'min_p': 0.0, **sampling}),
            executor,
            seed,
            purpose=0,
        )
        self.keeps_cache = True
        self.common = common_ids(model.template, model.tokenizer)

    def ask(self, questions: Sequence[str], samples: int = 1, step: int = 0) -> list[Episode]:
        """`samples` episodes per question, side by side; another `step` draws others."""
        requests = []
        for question in questions:
            prompt = tuple(prompt_ids(self.model.template, self.model.tokenizer, question))
            problem = Problem(id=question, question=question, answer='', source='', family='')
            requests += [Request(problem, sample, prompt) for sample in range(samples)]
        return self.run(self.model.params, 0, requests, step)
