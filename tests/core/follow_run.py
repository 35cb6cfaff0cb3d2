"""A follower with one more tracker: `python -m tests.core.follow_run RUN --to=file …`.

The tracker `file` is a JSONL file, FOLLOWED in the environment, and like those of services it is sent to in the
background: it stores what it is given by threes, so that whoever is killed takes up to two steps along.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from retool_jax.core import follow


class FileTracker:
    def __init__(self, directory: Path, project: str, name: str, config: dict):
        self._path, self._waiting = Path(os.environ['FOLLOWED']), []
        stored = self._path.read_text().splitlines() if self._path.exists() else []
        steps = [line['step'] for line in map(json.loads, stored) if line['run'] == name]
        self.last, self._name = max(steps, default=-1), name

    def send(self, step: int, values: dict[str, float]) -> None:
        self._waiting.append({'run': self._name, 'step': step} | values)
        if len(self._waiting) == 3:
            self.close()

    def close(self) -> None:
        with open(self._path, 'ab', buffering=0) as file:
            file.write(''.join(json.dumps(line) + '\n' for line in self._waiting).encode())
        self._waiting.clear()


def install() -> None:
    """Adds the tracker to those that a follower knows; no library is needed for it."""
    follow.TRACKERS['file'] = FileTracker
    library = follow.library
    follow.library = lambda name: None if name == 'file' else library(name)


if __name__ == '__main__':
    install()
    sys.exit(follow.main())
