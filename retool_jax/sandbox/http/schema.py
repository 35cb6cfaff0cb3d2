"""SandboxFusion's words: the body of POST /run_code as a job, an outcome as its reply.

Extra keys go both ways: `seed`, `cpu_timeout` in; `verdict`, `truncated`, `cpu_time`, `peak_mb`, `signal`, `cut` out.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import reprlib
from collections.abc import Callable
from typing import Annotated

import pydantic

from retool_jax.core.records import ExecResult, Verdict
from retool_jax.sandbox.job import Job
from retool_jax.sandbox.pool import Outcome

LANGUAGES = ('python', 'python3')  # of one meaning
_MOST_VALUES = 1 << 16  # of a body, ten times what files and names can be
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # an unfinished one ends with the text: linear time


def _text(value: object) -> str:
    if not isinstance(value, str):  # not pydantic's str: it refuses lone surrogates, which Python code may hold
        raise ValueError('must be a string')
    return value


def _language(value: object) -> str:
    if value not in LANGUAGES:
        raise ValueError(
            f'{reprlib.repr(value)} is not run here; this server runs {" and ".join(LANGUAGES)}, '
            'as a script (no pytest, no notebook, no compiled language)'
        )
    return value


def _contents(value: object) -> dict[str, bytes]:
    """Files by name; those without content are left out, as the schema has it."""
    if not isinstance(value, dict):
        raise ValueError('must map names to base64')
    contents = {}
    for name, text in value.items():
        if text is not None:
            try:
                contents[name] = base64.b64decode(_text(text), validate=True)
            except (binascii.Error, ValueError):
                raise ValueError(f'{reprlib.repr(name)}: must be base64') from None
    return contents


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError('must be a list of names')
    return tuple(map(_text, value))


def _memory(value: float) -> float:
    if not (value > 0 or value == -1):
        raise ValueError('must be greater than 0, or -1 for the limit of this server')
    return value


def _by(check: Callable) -> pydantic.PlainValidator:
    return pydantic.PlainValidator(check)


_Number = Annotated[float, pydantic.Field(strict=True, allow_inf_nan=False)]
_Seconds = Annotated[_Number, pydantic.Field(gt=0)]


class RunCode(pydantic.BaseModel):
    """The body of /run_code."""

    code: Annotated[str, _by(_text)]
    language: Annotated[str, _by(_language)] = 'python'
    compile_timeout: _Seconds = 10.0  # nothing is compiled
    run_timeout: _Seconds = 10.0  # wall seconds
    memory_limit_MB: Annotated[_Number, pydantic.AfterValidator(_memory)] = -1  # the schema's spelling
    stdin: Annotated[str, _by(lambda value: '' if value is None else _text(value))] = ''
    files: Annotated[dict[str, bytes], _by(_contents)] = {}
    fetch_files: Annotated[tuple[str, ...], _by(_names)] = ()
    seed: Annotated[int, pydantic.Field(strict=True)] = 0
    cpu_timeout: _Seconds | None = None  # CPU seconds of all processes; without it run_timeout bounds both

    def job(self, most_s: float, most_mb: float) -> tuple[Job, dict[str, float]]:
        """What the pool is asked to do, and the fields that asked for more than the server gives, with what it gives.

        `most_s` bounds wall and CPU seconds, `most_mb` the memory in MiB.
        """
        asked = {
            'run_timeout': (self.run_timeout, most_s),
            'memory_limit_MB': (self.memory_limit_MB, most_mb),
            'cpu_timeout': (self.cpu_timeout or self.run_timeout, most_s),
        }
        given = {name: min(value, most) for name, (value, most) in asked.items()}
        cut = {
            name: given[name]
            for name, (value, most) in asked.items()
            if value > most and (name != 'cpu_timeout' or self.cpu_timeout)
        }
        return Job(
            code=self.code,
            seed=self.seed,
            stdin=self.stdin.encode('utf-8', 'surrogatepass'),
            files=self.files,
            fetch=self.fetch_files,
            wall_s=given['run_timeout'],
            cpu_s=given['cpu_timeout'],
            memory_mb=given['memory_limit_MB'] if self.memory_limit_MB > 0 else None,
        ), cut


def _parse(body: bytes) -> object:
    """JSON of a bounded number of values: a million empty lists would hold up all other clients for seconds."""
    text = body.decode(json.detect_encoding(body), 'surrogatepass')
    if _separators(text) > _MOST_VALUES and _separators(_STRING.sub('', text)) > _MOST_VALUES:
        raise ValueError(f'more than {_MOST_VALUES} values')
    return json.loads(text.removeprefix('\ufeff'))


def _separators(text: str) -> int:
    return text.count(',') + text.count('[') + text.count('{')


def read(body: bytes) -> RunCode:
    """A body; ValueError names the field, or says why it is no JSON object."""
    try:
        return RunCode.model_validate(_parse(body))
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise ValueError(
            '; '.join(
                f'{".".join(map(str, e["loc"])) or "body"}: {e["msg"].removeprefix("Value error, ")}' for e in faults
            )
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'the body is no JSON object: {error}') from None


def reply(outcome: Outcome, name: str, cut: dict[str, float]) -> dict:
    """An outcome in the schema's words; `message` says what was cut."""
    result = outcome.result
    if result.verdict is Verdict.SANDBOX_ERROR:
        return {
            'status': 'SandboxError',
            'message': result.stderr or 'the sandbox failed',
            'compile_result': None,
            'run_result': None,
            'executor_pod_name': name,
            'files': {},
            'verdict': str(result.verdict),
        }
    timed_out = result.verdict is Verdict.TIMEOUT
    shorter = [f'{field} was cut to {value:g}, the most that this server gives' for field, value in cut.items()]
    return {
        'status': 'Success' if result.verdict is Verdict.OK else 'Failed',
        'message': '; '.join(shorter),
        'compile_result': None,
        'run_result': {
            'status': 'TimeLimitExceeded' if timed_out else 'Finished',
            'execution_time': result.wall_s,
            'return_code': None if timed_out else _return_code(result),
            'stdout': result.stdout,
            'stderr': result.stderr,
        },
        'executor_pod_name': name,
        'files': {path: base64.b64encode(content).decode() for path, content in outcome.files.items()},
        'verdict': str(result.verdict),
        'truncated': result.truncated,
        'cpu_time': result.cpu_s,
        'peak_mb': result.peak_mb,
        'signal': result.signal,
        'cut': cut,
    }


def _return_code(result: ExecResult) -> int:
    if result.exit_code is not None:
        return result.exit_code
    return -(result.signal or 9)  # as subprocess says it; killed for memory or output: SIGKILL
