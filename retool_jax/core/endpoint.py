"""A client of any server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, or a service.

with Endpoint(settings, 'runs/x/answers') as endpoint:
    for answer in endpoint.answers(Request(messages=chat, candidate=n) for n in range(4)):
        ...

Answers come in the order of the requests. Each is on disk before anybody sees it, so a killed run asks for none twice.
Answers are streamed: a server that is at work says so token by token, and silence can be told from length.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from retool_jax.core import console
from retool_jax.core.answers import FILTERED, Answer, Failure, Request, Store
from retool_jax.core.endpoint_settings import EndpointSettings, library
from retool_jax.core.errors import UserError
from retool_jax.core.replies import Reply, wait_s

if TYPE_CHECKING:
    import openai

AHEAD = 8  # times concurrency: how many answers may be there before the first of them is
LONGEST_WAIT_S = 60.0  # of the back-off, which doubles
LONGEST_PAUSE_S = 900.0  # that a server's Retry-After is heeded
CONNECT_S = 30.0
FAILURES = 8  # requests in a row, at least, whose failure ends the run: the server is gone, or refuses whatever it gets
UNDONE = ('abort', 'error')  # finish reasons of servers that gave an answer up
LIMITED = 429
PASSING = (408, 409, 425, LIMITED)  # statuses below 500 that a later try may not meet


@dataclasses.dataclass
class Counts:
    """What became of the requests of one client."""

    answered: int = 0  # by the server
    kept: int = 0  # on disk already
    retried: int = 0  # tries beyond the first
    failed: int = 0  # no answer after all of them
    unasked: int = 0  # the budget was used up
    prompt_tokens: int = 0  # of `answered`
    completion_tokens: int = 0


class Endpoint:
    """The server of `settings`, with a folder of answers; a thread of its own asks.

    Raises:
      UserError: `openai` is missing, or the settings lack the server, the model or the key.
    """

    def __init__(self, settings: EndpointSettings, directory: str | os.PathLike):
        settings.require()
        self.settings, self.store, self.counts = settings, Store(directory), Counts()
        self.failure = ''  # why the last request failed
        self._openai = library()
        self._key = os.environ.get(settings.key_variable or '', '').strip()
        self._on_the_way: dict[str, concurrent.futures.Future] = {}
        self._in_row, self._fatal, self._resume_at, self._closed = 0, None, 0.0, False
        self._requests = len(self.store) if settings.max_requests is not None else 0
        spent = iter(self.store if settings.max_tokens is not None else ())
        self._tokens = sum(answer.prompt_tokens + answer.completion_tokens for answer in spent)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __str__(self) -> str:
        return f'{self.settings.model} at {self.settings.url}'

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def submit(self, request: Request) -> concurrent.futures.Future[Answer | Failure]:
        """Queues a request and returns at once; requests are sent in the order in which they came.

        The future raises UserError where the server takes no request at all: a wrong key, no such model, nobody there.
        """
        name = request.name(self.settings.model)
        with self._lock:
            if self._closed:
                raise RuntimeError('the endpoint is closed')
            if (known := self._on_the_way.get(name)) is not None:
                return known
        if (answer := self.store.get(name)) is not None:
            self.counts.kept += 1
            done: concurrent.futures.Future = concurrent.futures.Future()
            done.set_result(answer)
            return done
        with self._lock:
            self._launch()
            future = asyncio.run_coroutine_threadsafe(self._carry(request, name), self._loop)
            self._on_the_way[name] = future
        future.add_done_callback(lambda _: self._on_the_way.pop(name, None))
        return future

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer | Failure]:
        """An answer or a failure for each request, in their order; the requests are read as they are needed.

        Raises:
          UserError: the server takes no request at all.
        """
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for request in requests:
            waiting.append(self.submit(request))
            while waiting and (waiting[0].done() or len(waiting) >= AHEAD * self.settings.concurrency):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def report(self) -> str:
        """What became of the requests, on one line."""
        c = self.counts
        told = [f'{c.answered} answers of {c.prompt_tokens + c.completion_tokens:,} tokens from {self}']
        told += [f'{c.kept} that were on disk'] if c.kept else []
        told += [f'{c.retried} tries again'] if c.retried else []
        told += [f'{c.failed} failed (the last: {self.failure})'] if c.failed else []
        if c.unasked:
            told.append(f'{c.unasked} were not asked: endpoint.{self._used_up()} is used up')
        return '; '.join(told)

    def close(self) -> None:
        """Drops what is on its way and ends the thread; answers that came are on disk."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(30.0)

    def _launch(self) -> None:
        if self._thread is None:
            self._client, started = self._open(), threading.Event()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._main(started)), name='endpoint', daemon=True
            )
            self._thread.start()
            started.wait()

    async def _main(self, started: threading.Event) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._slots = asyncio.Semaphore(self.settings.concurrency)
        started.set()
        async with self._client:
            await self._stopped.wait()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self) -> openai.AsyncOpenAI:
        """openai's client without what it takes from the environment: proxies, another server, names of an account."""
        timeout_s = self.settings.timeout_s
        timeout = self._openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S), pool=None)
        client = self._openai.AsyncOpenAI(
            base_url=self.settings.url,
            api_key=self._key or 'none',
            max_retries=0,
            timeout=timeout,
            http_client=self._openai.DefaultAsyncHttpxClient(
                trust_env=False,  # a proxy that the shell names would see the key, and hide servers on loopback
                follow_redirects=False,  # the key goes to the server that was named, and to no other
                timeout=timeout,
            ),
        )
        client.organization = client.project = client.admin_api_key = None
        return client

    def _used_up(self) -> str:
        """The key of the budget that is used up, '' where none is."""
        s = self.settings
        if s.max_requests is not None and self._requests >= s.max_requests:
            return f'max_requests={s.max_requests}'
        return f'max_tokens={s.max_tokens}' if s.max_tokens is not None and self._tokens >= s.max_tokens else ''

    async def _carry(self, request: Request, name: str) -> Answer | Failure:
        """Takes one request to its end; it keeps its slot while it waits for its next try."""
        async with self._slots:
            if self._fatal is not None:
                raise self._fatal
            if key := self._used_up():
                self.counts.unasked += 1
                return Failure(f'endpoint.{key} is used up; raise it', asked=False)
            self._requests += 1
            try:
                answer = await self._ask(request)
            except _Failed as error:
                self._fail(str(error), error.final)
                return Failure(self.failure)
            self.store.put(name, answer)
            self._in_row = 0
            self._tokens += answer.prompt_tokens + answer.completion_tokens
            self.counts.answered += 1
            self.counts.prompt_tokens += answer.prompt_tokens
            self.counts.completion_tokens += answer.completion_tokens
            return answer

    def _fail(self, reason: str, final: bool) -> None:
        """Counts a failure; raises UserError where no request would do better."""
        self.counts.failed += 1
        self._in_row += 1
        self.failure = reason
        s = self.settings
        if final:
            self._fatal = UserError(f'endpoint.url={s.url}, endpoint.model={s.model}: {reason}')
        elif self._in_row >= max(FAILURES, s.concurrency):
            self._fatal = UserError(
                f'endpoint.url={s.url}: {self._in_row} requests in a row failed, the last because {reason}; '
                'answers until then are kept, and the same command asks for the others'
            )
        if self._fatal is not None:
            raise self._fatal

    async def _ask(self, request: Request) -> Answer:
        """The answer; tries again as long as it may."""
        s, tries, counted = self.settings, 0, 0
        while True:
            while (pause_s := self._resume_at - time.monotonic()) > 0:  # the server asked all for patience
                await asyncio.sleep(pause_s + random.random() * s.backoff_s)
            answered = self.counts.answered
            try:
                return await self._try(request)
            except _Failed as error:
                # A server that answers others meanwhile is at its limit, not broken: it is not given up.
                counted += not (error.limited and self.counts.answered > answered)
                if not error.passes or counted > s.retries:
                    raise
                if not self.counts.answered and not self.counts.retried:
                    console.say(f'endpoint.url={s.url}: {error}; trying again')
                self.counts.retried += 1
                if error.wait_s is not None:
                    self._resume_at = max(self._resume_at, time.monotonic() + min(error.wait_s, LONGEST_PAUSE_S))
                else:
                    longest_s = min(s.backoff_s * 2 ** min(tries, 32), LONGEST_WAIT_S)
                    await asyncio.sleep(longest_s * random.uniform(0.5, 1.0))
                tries += 1

    async def _try(self, request: Request) -> Answer:
        chat, lib = request.prompt is None, self._openai
        said = {'messages': list(request.messages)} if chat else {'prompt': request.prompt}
        create = (self._client.chat if chat else self._client).completions.create
        reply = Reply()
        try:
            stream = await create(
                model=self.settings.model,
                stream=True,
                stream_options={'include_usage': True},
                extra_body=dict(request.parameters),
                **said,
            )
            async with stream:
                async for event in stream:
                    reply.take(event)
        except lib.APIStatusError as error:
            if error.code == FILTERED:  # Azure refuses a prompt by a status; to ask again would change nothing
                return Answer('', FILTERED)
            raise self._explain(error) from None
        except lib.APITimeoutError:
            raise _Failed(f'it was silent for {self.settings.timeout_s:g} s') from None
        except lib.APIConnectionError as error:
            raise _Failed(self._clean(f'the connection failed ({error.__cause__ or error})')) from None
        except lib.APIError as error:  # said in the middle of an answer
            raise _Failed(self._clean(f'it broke off: {error.message}')) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise _Failed(self._clean(f'its answer is outside the protocol ({error})')) from None
        if reply.finish is None or reply.finish in UNDONE:
            raise _Failed('its answer broke off' + (f' ({reply.finish})' if reply.finish else ''))
        return reply.answer(request)

    def _explain(self, error: openai.APIStatusError) -> _Failed:
        status, said = error.status_code, self._clean(error.message)
        if status == 401 or status == 403:
            held = f'the key in {self.settings.key_variable}' if self._key else 'a request without a key'
            return _Failed(f'it refuses {held} ({status}); see endpoint.key_variable', final=True)
        if status in (404, 405):
            return _Failed(f'no such path or model ({status}: {said}); is /v1 missing from the url?', final=True)
        if 300 <= status < 400:
            target = self._clean(error.response.headers.get('location', 'another address'))
            return _Failed(f'it sends requests on to {target} ({status}); give that address', final=True)
        if status == 402 or error.code == 'insufficient_quota':
            return _Failed(f'the account has nothing left ({status}: {said})', final=True)
        if status >= 500 or status in PASSING:
            patience_s = wait_s(error.response.headers)
            return _Failed(f'status {status}: {said}', limited=status == LIMITED, wait_s=patience_s)
        return _Failed(f'it refused the request ({status}: {said})', passes=False)

    def _clean(self, text: str) -> str:
        """Foreign words for a line of ours: short, and without the key."""
        text = ' '.join(str(text).split())
        return (text.replace(self._key, '***') if self._key else text)[:200]


class _Failed(Exception):
    """A try without an answer. passes: a later one may do better; final: no request would; limited: too many came."""

    def __init__(
        self,
        reason: str,
        passes: bool = True,
        final: bool = False,
        limited: bool = False,
        wait_s: float | None = None,
    ):
        super().__init__(reason)
        self.passes, self.final, self.limited, self.wait_s = passes and not final, final, limited, wait_s
