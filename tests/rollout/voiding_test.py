"""A policy that tries to void what it would lose: through engine and sandbox its episodes count like any others."""

import dataclasses
import platform
import zlib

import jax
import pytest

from retool_jax.core.records import Reward, Stop, Verdict
from retool_jax.model import decoder
from retool_jax.rollout import turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.sampler import Sampler
from retool_jax.sandbox.guard import Guard
from retool_jax.sandbox.pool import Pool
from retool_jax.text import template
from retool_jax.train import sources
from tests.rollout.engine_test import CONFIG, PLAIN, SIZES, TABLE, TOKENIZER, TURNS, requests, same
from tests.sandbox.given import tiny
from tests.sandbox.verdicts_test import OUR_OWN

LIMITS = dict(zygotes=1, spares=3, preload=(), cpu_s=1.2, wall_s=4.0, memory_mb=128, concurrency=3)


@pytest.mark.skipif(platform.system() != 'Linux' or platform.machine() != 'x86_64', reason='needs a pool')
def test_an_episode_whose_snippets_try_to_be_our_fault_is_graded_like_any_other(monkeypatch):
    sampler = Sampler(CONFIG, SIZES, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)
    params = sampler.sync(decoder.init(CONFIG, jax.random.key(0)))
    rules = turns.Rules(dataclasses.replace(TURNS, max_calls=2), TOKENIZER, TABLE, lambda result: 'told')
    attempts = sorted(OUR_OWN)

    def play(choose):
        monkeypatch.setattr(template, 'extract_snippet', lambda text: template.Snippet(choose(text), 0))
        settings = tiny(**LIMITS)
        with Pool(settings) as pool, Guard(pool, lambda: Pool(settings), 120) as guard:
            found = Engine(sampler, rules, PLAIN, guard, seed=1, purpose=1).run(params, 0, requests(5, 2), step=0)
            return found, guard, pool.stats()

    honest, _, _ = play(lambda text: 'print("a")')
    voiding, guard, stats = play(lambda text: OUR_OWN[attempts[zlib.crc32(text.encode()) % len(attempts)]])
    calls = [call for episode in voiding for call in episode.calls]
    assert len({call.code for call in calls}) > 5 and any(call.verdict != Verdict.OK for call in calls)
    assert not any(call.fault or call.verdict == Verdict.SANDBOX_ERROR for call in calls)
    assert not any(episode.stop == Stop.FAULT for episode in voiding)
    assert all(same(a, b) for a, b in zip(honest, voiding, strict=True))
    assert guard.faults == guard.renewals == stats['retried'] == stats['respawned'] == 0
    for i, episode in enumerate(voiding):
        episode.reward = Reward(float(i % 2), bool(i % 2), False, False, '')
    assert sources.differs(voiding[:2], drop_void=False)  # in the baseline and in the update
    assert sources.describe(voiding)['tools/fault_frequency'] == 0.0
