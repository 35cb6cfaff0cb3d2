"""The engine without configuration files: a model directory, a sandbox, questions – for notebooks and scripts."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from retool_jax.core.pytrees import Params
from retool_jax.core.records import Episode, Problem
from retool_jax.model import config as model_config
from retool_jax.model import decoder, hf
from retool_jax.model.config import ModelConfig
from retool_jax.rollout import engine as engines
from retool_jax.rollout.requests import Executor, Request, SamplingSettings
from retool_jax.rollout.sampler import Sampler, SamplerSettings
from retool_jax.rollout.turns import Rules, TurnSettings
from retool_jax.sandbox.feedback import FeedbackSettings, render
from retool_jax.text import tags, template
from retool_jax.text import tokenizer as tokenizers
from retool_jax.text.template import Template
from retool_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model directory in memory: weights in the sampling layout, and how it is spoken to."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: Template
    params: Params

    def text(self, episode: Episode) -> str:
        """Everything after the prompt."""
        return self.tokenizer.decode(episode.tokens[episode.prompt_length:])


def open_model(directory: str | pathlib.Path, family: str, dtype: str = 'float32', *, tools: bool = True) -> Model:
    """Reads a Hugging Face model directory; `family` names its template (text.template).

    Errors: UserError for files that are missing, or sizes that are not supported.
    """
    config = model_config.load_config(directory)
    params = jax.jit(functools.partial(decoder.to_sampling, config, dtype=jnp.dtype(dtype)))(hf.load(directory, config))
    tokenizer = tokenizers.load(directory)
    return Model(config, tokenizer, template.make_template(family, tools, tokenizer), params)


class Engine(engines.Engine):
    """An engine with its model, sizes from two numbers.

        model = open_model('Qwen2.5-1.5B-Instruct', 'qwen2_5', 'bfloat16')
        with Pool(settings) as pool:
            engine = Engine(model, pool, rows=16, max_tokens=4096)
            for episode in engine.ask(['What is 3 ** 40 mod 1000?'], samples=4):
                print(model.text(episode), episode.calls)
    """

    def __init__(self, model: Model, executor: Executor | None = None, *, rows: int = 16, decode_rows: int = 0,
                 max_tokens: int = 2048, max_calls: int = 7, temperature: float = 1.0, top_p: float = 1.0,
                 top_k: int = 0, min_p: float = 0.0, cache_dtype: str | None = None, style: str = 'paper',
                 max_chars: int = 400, seed: int = 0):
        """rows: episodes in flight. decode_rows: how many of them decode at a time, where tools are slow; 0: all.
        max_tokens: of an episode, prompt included. executor: sandbox.pool.Pool or a remote client; None samples text
        alone. cache_dtype: 'bfloat16' or 'int8' for a smaller KV cache. style, max_chars: of what a snippet printed."""
        self.model = model
        chunk = min(256, max_tokens)
        dtype = str(model.params['norm']['weight'].dtype)
        sizes = SamplerSettings(rows=rows, slots=max_tokens, chunk=chunk, group=min(8, rows), quota=32,
                                decode_rows=decode_rows, min_bound=chunk, dtype=dtype, cache_dtype=cache_dtype or dtype)
        tools = executor is not None
        table = tags.build_table(model.tokenizer.token_bytes, model.config.vocab_size,
                                 tags.TAGS if tools else {'</answer>': tags.ANSWER})
        turns = TurnSettings(tools=tools, max_tokens=max_tokens, max_turn_tokens=max_tokens, max_turns=max_calls + 1,
                             max_calls=max_calls, on_cap='answer', on_answer='end')
        shown = FeedbackSettings(style=style, max_chars=max_chars, max_frames=6)
        super().__init__(Sampler(model.config, sizes, table.next_state, table.stops, model.tokenizer.eos_ids),
                         Rules(turns, model.tokenizer, table, lambda result: render(result, shown)),
                         SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
                         executor, seed, purpose=0)
        self.keeps_cache = True

    def ask(self, questions: Sequence[str], samples: int = 1, step: int = 0) -> list[Episode]:
        """`samples` episodes per question, side by side; another `step` draws others."""
        requests = []
        for question in questions:
            prompt = tuple(template.prompt_ids(self.model.template, self.model.tokenizer, question))
            problem = Problem(id=question, question=question, answer='', source='', family='')
            requests += [Request(problem, sample, prompt) for sample in range(samples)]
        return self.run(self.model.params, 0, requests, step)
