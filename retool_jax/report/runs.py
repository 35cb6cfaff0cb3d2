"""A run's folder as the report reads it: metrics, summary, and transcripts of its saved episodes.

Transcripts come from the JSONL files alone. The arrays beside them, gigabytes in a long run, are opened
only for the episodes whose tokens are shown.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retool_jax.core import episode_files, metrics, storage
from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem, Reward, Stop, ToolCall, Verdict
from retool_jax.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one author: 'prompt', 'model' or 'tool'."""

    kind: str
    tokens: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Transcript:
    """An episode without its arrays: what was said, run and rewarded."""

    problem: Problem
    sample: int
    step: int
    segments: tuple[Segment, ...]
    calls: tuple[ToolCall, ...]
    turns: int
    stop: Stop | None
    void: bool
    reward: Reward | None

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return sum(s.tokens for s in self.segments if s.kind == 'model')

    @property
    def correct(self) -> bool:
        return self.reward is not None and self.reward.correct

    @property
    def snippets(self) -> list[ToolCall]:
        """The calls that held a snippet: refused ones without any do not count as code."""
        return [call for call in self.calls if call.code]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrays:
    """The per-token columns of one episode, prompt included."""

    tokens: np.ndarray
    acted: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Part:
    """One file of episodes. Training parts end in their step's number, as in 'tool_00012'."""

    kind: str  # 'tool', 'text', …; for evaluations the whole name, as in 'val_sft_new_operands'
    step: int  # -1 for evaluations
    name: str

    @property
    def training(self) -> bool:
        return self.step >= 0


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One line of metrics.jsonl: which stage and model it belongs to, and where on the axis it stands."""

    stage: str  # 'sft', 'ppo' or 'val'
    kind: str  # 'tool', 'text'; '' in a run of one model
    x: float
    values: dict[str, float]


class Run:
    """A run's folder, opened lazily. Raises: UserError where there is no such folder or nothing in it."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f'run folder {str(directory)!r} does not exist: give the folder that a run wrote')
        self.config: dict[str, Any] = _read_json(self.directory / 'config.json')
        self.summary: dict[str, Any] = _read_json(self.directory / 'summary.json')
        self.points = [_point(line) for line in metrics.read(self.directory)]
        self.hosts = metrics.read(self.directory / metrics.HOSTS)
        self.parts = sorted(_part(name) for name in episode_files.names(self.directory / 'episodes'))
        if not (self.points or self.parts or self.summary):
            raise UserError(
                f'run folder {str(directory)!r} holds no metrics.jsonl, episodes or summary.json: nothing to report'
            )

    def transcripts(self, part: Part) -> list[Transcript]:
        """All episodes of a part. Raises: UserError naming the file where it is damaged."""
        path = episode_files.text_file(self.directory / 'episodes', part.name)
        try:
            with episode_files.open_text(path) as file:
                header = json.loads(file.readline())
                if header.get('schema') != episode_files.SCHEMA:
                    raise UserError(f'schema {header.get("schema")!r}; this version reads {episode_files.SCHEMA}')
                return [_transcript(json.loads(line)) for line in file]
        except episode_files.DAMAGES as error:
            raise UserError(f'{path}: not a file of episodes ({error}): remove it or write it anew') from error

    def count(self, part: Part) -> int:
        """Episodes of a part, by its first line. Raises: UserError for a file of something else."""
        path = episode_files.text_file(self.directory / 'episodes', part.name)
        try:
            with episode_files.open_text(path) as file:
                return int(json.loads(file.readline())['episodes'])
        except episode_files.DAMAGES as error:
            raise UserError(f'{path}: not a file of episodes ({error}): remove it or write it anew') from error

    def arrays(self, part: Part, chosen: Sequence[int]) -> Iterator[Arrays]:
        """The per-token columns of the chosen episodes of a part, in that order; none without the npz."""
        path = self.directory / 'episodes' / f'{part.name}.npz'
        if not path.exists():
            return
        with np.load(path, allow_pickle=False) as stored:
            offsets = stored['offsets']
            columns = [stored[name] for name in ('tokens', 'acted', 'logprobs', 'versions')]
        for i in chosen:
            yield Arrays(*(column[offsets[i] : offsets[i + 1]] for column in columns))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer where its directory is still there: the run's own, else the configured one."""
        paths = [self.directory / 'model', self.directory / 'tool_rl', (self.config.get('model') or {}).get('path')]
        for path in paths:
            try:
                if path and (files := storage.model_files('model.path', os.fspath(path))).is_dir():
                    return load_tokenizer(files)
            except ValueError:
                continue
        return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{path}: not JSON ({error}): remove it or write it anew') from error
    return summary if isinstance(summary, dict) else {}


def _point(line: dict[str, Any]) -> Point:
    phase = line.get('phase')
    if phase:
        stage, _, kind = str(phase).partition('_')
        x = line.get('phase_step', line.get('step', 0))
    else:
        kind, x = '', line.get('step', 0)
        stage = 'sft' if any(name.startswith('sft/') for name in line) else 'ppo'
    values = {
        name: float(value)
        for name, value in line.items()
        if '/' in name or name == 'void_turn_ratio'
        if isinstance(value, int | float)
    }
    return Point(stage, kind, float(x), values)


def _part(name: str) -> Part:
    match = re.fullmatch(r'(.+?)_(\d{3,})', name)
    return Part(match[1], int(match[2]), name) if match else Part(name, -1, name)


def _transcript(line: dict[str, Any]) -> Transcript:
    return Transcript(
        problem=Problem(**line['problem']),
        sample=line['sample'],
        step=line['step'],
        segments=tuple(Segment(**segment) for segment in line['segments']),
        calls=tuple(ToolCall(**call | {'verdict': Verdict(call['verdict'])}) for call in line['calls']),
        turns=line['turns'],
        stop=None if line['stop'] is None else Stop(line['stop']),
        void=line['void'],
        reward=None if line['reward'] is None else Reward(**line['reward']),
    )
