"""A tiny RL run that can be killed anywhere: `python -m tests.train.killable FOLDER NAME --at=…`.

The model is random and so small that a life costs little more than its imports. Its tool is honest about time: a
call that was answered in an earlier life is answered otherwise when it is asked again, as a clock or a random number
would be. So a run whose journal loses an answer cannot end as the undisturbed one does.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import jax

from retool_jax.core import cli, episode_files, settings
from retool_jax.core.metrics import Metrics
from retool_jax.core.mirror import Mirror
from retool_jax.core.records import Episode, ExecResult, Problem, Stop, Verdict
from retool_jax.model import decoder, hf
from retool_jax.model.config import load_config
from retool_jax.rollout.journal import Journal
from retool_jax.stages import parts, ppo
from retool_jax.stages.config import Reinforcement
from retool_jax.text import tags, template
from retool_jax.text.tokenizer import load_tokenizer, train_bpe
from tests.model.sizes import make_config
from tests.train import small

STEPS = 3
VALUES = {
    'ppo.steps': STEPS, 'ppo.problems_per_step': 3, 'ppo.samples': 2, 'ppo.minibatches': 2, 'checkpoints.every': 1,
    'turns.max_tokens': 96, 'turns.max_turn_tokens': 24, 'turns.max_turns': 3, 'turns.max_calls': 2,
    'sampler.rows': 4, 'sampler.slots': 96, 'sampler.chunk': 32, 'sampler.feed_rows': 2, 'sampler.quota': 8,
    'sampler.min_bound': 96, 'forward.unroll': 1, 'forward.row_width': 96, 'forward.logprob_chunk': 96,
    'forward.vocab_chunk': 264, 'forward.row_segments': 3, 'forward.micro_rows': 2, 'optimizer.lr': 1e-2,
    'watch.equal_rewards': 'ignore',
}  # fmt: skip


def make_traces(folder):
    """Twenty traces in the model's own tokens, in `traces` beside it."""
    tokenizer, tiny = load_tokenizer(folder / 'model'), template.make_template('tiny')
    traces = []
    for i in range(20):
        trace = Episode(Problem(f'p{i}', f'{i}?', str(i), 'test', ''), sample=0, step=0, stop=Stop.EOS, turns=1)
        trace.append(template.prompt_ids(tiny, tokenizer, trace.problem.question), acted=False)
        trace.prompt_length = len(trace.tokens)
        ids = [*tokenizer.encode(template.wrap_answer(str(i))), *template.end_ids(tiny, tokenizer)]
        trace.append(ids, acted=True, logprobs=[0.0] * len(ids))
        traces.append(trace)
    episode_files.write(folder / 'traces', 'cold_start', traces, tokenizer.decode)


def make_model(folder: Path) -> None:
    """A random model with a tokenizer, and the problems, below `folder`."""
    folder.mkdir(parents=True)
    train_bpe(['a b c'], 264, folder / 'source')
    config = make_config(vocab_size=264, initializer_range=0.2, num_hidden_layers=1)
    hf.save(folder / 'model', config, decoder.init(config, jax.random.key(0)), 'float32', folder / 'source')
    assert load_config(folder / 'model').vocab_size == 264
    lines = [f'{{"id": "p{i}", "problem": "Q{i}?", "answer": "{i}"}}\n' for i in range(20)]
    (folder / 'problems.jsonl').write_text(''.join(lines))


def make_stage(folder: Path, name: str, algorithm: str = 'ppo', **values):
    """The stage of run `name` below `folder`, `algorithm` being a file of configs/."""
    values = {'model.path': folder / 'model', 'run.dir': folder / name} | VALUES | values
    flags = [f'--config.{key}={value}' for key, value in values.items()]
    sources = f"--config.data.sources=('{folder / 'problems.jsonl'}',)"
    return settings.build(
        Reinforcement, cli.parse_config(['ppo', f'--config=configs/{algorithm}.py:tiny', sources, *flags])
    )


class HonestTool:
    """Answers a call by who asks; otherwise once its answer has been acted upon in an earlier life (`ledger`)."""

    def __init__(self, ledger: Path):
        self.ledger, self.key = ledger, ''
        self.earlier = set(ledger.read_text().splitlines()) if ledger.exists() else set()

    def submit(self, code: str) -> concurrent.futures.Future:
        text = f'{len(self.key)} again' if self.key in self.earlier else f'{sum(self.key.encode()) % 97}'
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(ExecResult(Verdict.OK, text, ''))
        return future

    def acted_upon(self, key: str) -> None:
        with open(self.ledger, 'a') as file:
            file.write(f'{key}\n')


@contextlib.contextmanager
def tiny_world(folder: Path, name: str, journal: bool = True, moment=lambda what: None, executor=None):
    """Everything of a run that is not under test, replaced; `moment` is called at every point where to be killed.

    journal False: results are written, and never read. executor: instead of the honest tool.
    """
    tool = HonestTool(folder / f'{name}.answered')

    class Noted(Journal):
        def get(self, key):
            tool.key = key
            return super().get(key) if journal else None

        def put(self, key, result):
            moment('before journal')
            tear(self._file, f'{{"key": "{key}", "resu'.encode(), 'inside journal')
            super().put(key, result)
            tool.acted_upon(key)
            moment('after journal')

    def tear(file, part: bytes, what: str) -> None:
        """Half a line, which only a killed run leaves behind."""
        if moment(what):
            (file.write(part), file.flush()) if hasattr(file, 'write') else os.write(file, part)
            die()

    def around(function, what):
        def call(*arguments, **keywords):
            moment(f'before {what}')
            found = function(*arguments, **keywords)
            moment(f'after {what}')
            return found

        return call

    write = Metrics.write

    def write_metrics(self, step, metrics):
        moment('before metrics')
        tear(self._file, b'{"step": 1, "rewa', 'inside metrics')
        write(self, step, metrics)
        moment('after metrics')

    def table(model, on_answer):
        stops = dict.fromkeys('abcdefghij', tags.CODE) | {'z': tags.ANSWER}  # often enough without training
        return tags.build_table(model.tokenizer.token_bytes, 264, stops)

    patches = [
        mock.patch('retool_jax.stages.folder.Journal', Noted),
        mock.patch.object(ppo, 'open_guarded', lambda *_: contextlib.nullcontext(executor or tool)),
        mock.patch.object(parts, 'make_table', table),
        mock.patch.object(parts, 'make_mesh', lambda sizes: small.one_device()),
        mock.patch.object(template, 'extract_snippet', lambda text: template.Snippet(text, 0)),
        mock.patch.object(Metrics, 'write', write_metrics),
        mock.patch.object(os, 'replace', around(os.replace, 'rename')),
        mock.patch.object(os, 'rename', around(os.rename, 'rename')),
        mock.patch.object(Mirror, '_put', around(Mirror._put, 'upload')),
        mock.patch.object(Mirror, '_remove', around(Mirror._remove, 'removal')),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Moments:
    """Counts the moments of one life; at `at`, as in 'before rename:2', the process dies. `log` keeps their names."""

    def __init__(self, at: str | None = None):
        self.kind, _, number = (at or '').partition(':')
        self.number, self.log = int(number or 0), []

    def __call__(self, what: str) -> bool:
        """Whether a torn write is to be made now, by the one who asks."""
        self.log.append(what)
        if what != self.kind or self.log.count(what) - 1 != self.number:
            return False
        if not what.startswith('inside'):
            die()
        return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('name')
    parser.add_argument('--at')  # a moment, as in 'before rename:2'
    parser.add_argument('--after', type=float)  # seconds from the first moment on
    parser.add_argument('--signal', default='SIGKILL')
    parser.add_argument('--no_journal', action='store_true')
    parser.add_argument('--dir')  # run.dir, where it is not FOLDER/NAME
    parser.add_argument('--quanta', type=int, default=0)  # ppo.quanta
    given = parser.parse_args()
    moments = Moments(given.at)

    def moment(what: str) -> bool:
        if not moments.log and given.after is not None:
            number = getattr(signal, given.signal)
            strike = lambda: (time.sleep(given.after), os.kill(os.getpid(), number))
            threading.Thread(target=strike, daemon=True).start()
        return moments(what)

    def body(stage) -> None:
        with tiny_world(given.folder, given.name, not given.no_journal, moment):
            ppo.run(stage)

    values = {'ppo.quanta': given.quanta} | ({'run.dir': given.dir} if given.dir else {})
    cli._run(lambda argv: body(make_stage(given.folder, given.name, **values)), body)


if __name__ == '__main__':
    main()
