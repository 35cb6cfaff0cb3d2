"""The block `endpoint`: a server that speaks OpenAI's protocol, and what may be asked of it."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from typing import Any

from retool_jax.core.checks import MANY, Rule, above, check, filled, within
from retool_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """A server that speaks OpenAI's protocol, and what may be asked of it."""

    url: str | None  # where its paths begin: http://host:8000/v1; None: there is none
    model: str | None  # the model's name at the server: vLLM's --served-model-name, or the path it was started with
    key_variable: str | None  # name of the environment variable that holds the key; None: the server wants none
    concurrency: int  # requests on their way at once, 1 to 1,000
    timeout_s: float  # seconds without a byte after which a request is sent again, above 0, at most 86,400
    retries: int  # further tries after 429, 5xx, a broken connection or answer, or silence; 0 to 100
    # before the first of them, doubled before each next up to 60 s and drawn from its upper half; Retry-After goes
    # before. Above 0, at most 3,600
    backoff_s: float
    max_requests: int | None  # answers asked for in the whole run, those on disk included; None: as many as it takes
    # tokens of prompts and answers in the whole run; requests that are on their way may exceed it. None: no limit
    max_tokens: int | None

    def __post_init__(self):
        # Not by `check`: what breaks these two rules may be a secret, which no line may show.
        if self.key_variable is not None and not re.fullmatch(r'[A-Za-z_]\w*', self.key_variable):
            raise UserError('key_variable must be the name of an environment variable, not the key itself')
        if self.url is not None and '@' in self.url:
            raise UserError('url holds a user or a password; give the key by an environment variable, ./key_variable')
        check(
            self,
            url=Rule(_is_url, 'must be http://host:port/v1 or https://host/v1'),
            model=filled(),
            concurrency=within(1, 1000),
            timeout_s=above(0, 86400),
            retries=within(0, 100),
            backoff_s=above(0, 3600),
            max_requests=within(1, MANY),
            max_tokens=within(1, 10**12),
        )

    def require(self, name: str = 'endpoint') -> None:
        """Refuses settings without a server, or without what a client of it needs; `name` is their block.

        Raises: UserError.
        """
        if self.url is None:
            raise UserError(f'{name}.url is missing; give where the server listens, as http://host:8000/v1')
        if self.model is None:
            raise UserError(f'{name}.model is missing; give the name under which {self.url} serves the model')
        if self.key_variable and not os.environ.get(self.key_variable, '').strip():
            raise UserError(
                f'{name}.key_variable={self.key_variable}: no such environment variable is set, or it is empty; '
                'export it with the key'
            )
        library()


# Keys that may be others when a run goes on: the same model may be served elsewhere, and a budget raised.
FREE = tuple(f'endpoint.{field.name}' for field in dataclasses.fields(EndpointSettings) if field.name != 'model')


def library() -> Any:
    """The package `openai`. Raises: UserError where it is not installed."""
    try:
        import openai
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; it comes with the extra `rewrite`: pip install 'retool_jax[rewrite]'"
        ) from None
    return openai


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        whole = parts.scheme in ('http', 'https') and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return whole and not parts.query and not parts.fragment and not re.search(r'\s', text)
