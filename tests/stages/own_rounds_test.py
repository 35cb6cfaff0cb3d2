"""A model that makes its own cold start: two rounds teach it what fine-tuning on a tenth of the traces did not."""

from __future__ import annotations

import json

import pytest
from ml_collections import ConfigDict

from configs import cold_start as cold_start_config
from configs import evaluate as evaluate_config
from configs import rewrite as rewrite_config
from configs import sft as sft_config
from retool_jax.core import settings
from retool_jax.stages import cold_start, evaluate, own_rounds, rewrite, sft
from retool_jax.stages.config import ColdStart, Evaluation, FineTuning
from retool_jax.stages.rewrite_config import Rewrite
from retool_jax.tasks import arithmetic


def stage(kind: type, config: ConfigDict, **changes):
    """A stage of the tiny configuration with some keys changed; blocks and names are joined by two underscores."""
    for key, value in changes.items():
        block, _, name = key.rpartition('__')
        (config[block] if block else config)[name] = value
    return settings.build(kind, config)


@pytest.mark.slow
def test_two_rounds_raise_what_fine_tuning_on_a_tenth_of_the_traces_gave(tmp_path, capsys):
    held = tmp_path / 'held.jsonl'
    asked = [
        {'id': p.id, 'problem': p.question, 'answer': p.answer} for p in arithmetic.problems('new_operands', 96, 7)
    ]
    held.write_text(''.join(json.dumps(row) + '\n' for row in asked))

    def tune(name: str, traces, **changes) -> str:
        run = {'run__dir': str(tmp_path / name), 'traces': str(traces / 'episodes')}
        sft.run(stage(FineTuning, sft_config.get_config('tiny'), **run | changes))
        return str(tmp_path / name / 'final')

    def score(name: str, model: str) -> float:
        run = {'run__dir': str(tmp_path / name), 'problems': str(held), 'model__path': model, 'sampling__top_p': 1.0}
        sizes = {'turns__max_tokens': 200, 'sampler__slots': 256, 'sampler__min_bound': 64}
        return evaluate.run(stage(Evaluation, evaluate_config.get_config('tiny'), **run | sizes))['held']['avg']

    cold = {'run__dir': str(tmp_path / 'cold_start'), 'problems': 1200}
    cold_start.run(stage(ColdStart, cold_start_config.get_config('tiny'), **cold))
    first = tune('sft', tmp_path / 'cold_start')
    rounds = {'run__dir': str(tmp_path / 'self'), 'model__path': first, 'rewriter__rounds': 2, 'problems': 384}
    made = stage(Rewrite, rewrite_config.get_config('tiny'), **rounds, rewriter__candidates=8)
    rewrite.run(made)
    said = capsys.readouterr()
    assert 'round 1 of 2' in said.err and 'round 2 of 2' in said.err
    summary = json.loads((tmp_path / 'self/summary.json').read_text())
    assert summary['counts']['kept'] > 100 and summary['statistics']['with_code'] == 1.0
    # All that was sampled is on disk: a second run makes the same of it, and tunes nothing.
    samples = (tmp_path / 'self/round_2' / own_rounds.SAMPLES).read_bytes()
    rewrite.run(made)
    assert (tmp_path / 'self/round_2' / own_rounds.SAMPLES).read_bytes() == samples
    assert json.loads((tmp_path / 'self/summary.json').read_text()) == summary

    tuned = {'sft__steps': 60, 'optimizer__lr': 1e-3, 'optimizer__warmup_steps': 5, 'model__path': first}
    last = tune('self_sft', tmp_path / 'self', **tuned)
    before, after = score('before', first), score('after', last)
    print(f'avg@8 on 96 problems: {before:.3f} → {after:.3f}')
    assert after - before >= 0.10
