"""Tool results on disk, keyed by who asked: a replay reads them and needs no sandbox."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from retool_jax.core.records import Episode, ExecResult, Verdict


def call_key(episode: Episode, code: str) -> str:
    """Names a call by (step, problem, sample, turn, code): what decides its result in a replay."""
    digest = hashlib.sha256(code.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
    return f'{episode.step}/{episode.problem.id}/{episode.sample}/{episode.turns}/{digest}'


class Journal:
    """An append-only JSONL file of results; a torn last line (killed run) is cut off on opening.

    others: the files of the run's other processes, which are read too: a restart may deal episodes out otherwise.
    """

    def __init__(self, path: str | Path, others: Iterable[Path] = ()):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, ExecResult] = {}
        for other in others:
            self._read(other)
        whole = self._read(self.path)
        self._file = self.path.open('r+b' if self.path.exists() else 'w+b')
        self._file.truncate(whole)
        self._file.seek(whole)

    def _read(self, path: Path) -> int:
        """Reads the whole lines of a file into `results`; returns their length in bytes."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b'\n'):
                break
            entry = json.loads(line)
            entry['result']['verdict'] = Verdict(entry['result']['verdict'])
            self.results[entry['key']] = ExecResult(**entry['result'])
            whole += len(line)
        return whole

    def get(self, key: str) -> ExecResult | None:
        return self.results.get(key)

    def put(self, key: str, result: ExecResult) -> None:
        """Records a result before anything acts on it."""
        self.results[key] = result
        self._file.write(_line(key, result))
        self._file.flush()

    def forget(self, step: int) -> None:
        """Drops the results of the steps before `step`, from which a resumed run would begin."""
        kept = {key: result for key, result in self.results.items() if int(key.partition('/')[0]) >= step}
        if len(kept) == len(self.results):
            return
        self.results = kept
        new = self.path.with_name(self.path.name + '.new')
        new.write_bytes(b''.join(_line(key, result) for key, result in kept.items()))
        new.replace(self.path)
        self._file.close()
        self._file = self.path.open('ab')

    def close(self) -> None:
        self._file.close()


def _line(key: str, result: ExecResult) -> bytes:
    return json.dumps({'key': key, 'result': dataclasses.asdict(result)}, ensure_ascii=True).encode() + b'\n'
