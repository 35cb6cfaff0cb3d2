"""Episodes that are carried over: cut on their own clock, taken up under later weights."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from retool_jax.core.records import Episode, Problem
from retool_jax.model import decoder
from retool_jax.rollout import turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import Sampler
from retool_jax.text import tags, template
from tests.fakes import FakePool
from tests.rollout import engine_test
from tests.rollout.engine_test import CONFIG, SIZES, TABLE, TOKENIZER, answer, make_engine, requests, same


@pytest.fixture(scope='module')
def sampler():
    return Sampler(CONFIG, SIZES, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)


@pytest.fixture(scope='module')
def params():
    return decoder.init(CONFIG, jax.random.key(0))


@pytest.fixture(autouse=True)
def every_turn_is_a_snippet(monkeypatch):
    monkeypatch.setattr(template, 'extract_snippet', lambda text: template.Snippet(text, 0))


def in_parts(sampler, weights, order=None, journal=None, results=answer, **kwargs) -> dict:
    """Two quanta of each episode per version, until all are finished."""
    asked = requests()
    waiting = [asked[i] for i in (order or range(len(asked)))]
    done, version, carried = {}, 0, 0
    while waiting:
        engine = make_engine(sampler, results=results, **kwargs)
        step = 4 if version == 0 else 100 + version  # what is taken up keeps the step that asked for it
        made = engine.run(weights, version, waiting, step, quanta=2, journal=journal)
        done |= {(e.problem.id, e.sample): e for e in made if e.stop is not None}
        waiting = [Request.resume(e) for e in made if e.stop is None]
        version, carried = version + 1, carried + len(waiting)
    assert carried > 10
    return done


def test_where_an_episode_is_cut_depends_on_no_latency_and_no_neighbour(sampler, params):
    weights, rng = sampler.sync(params), random.Random(0)
    reference = in_parts(sampler, weights)
    order = list(range(len(requests())))
    rng.shuffle(order)
    again = in_parts(sampler, weights, order=order, latency_s=lambda code: rng.random() * 0.05)
    assert reference.keys() == again.keys()
    for key, episode in reference.items():
        assert same(episode, again[key]) and episode.versions == again[key].versions


def test_a_carried_episode_writes_what_it_would_have_written_and_knows_which_weights_did(sampler, params):
    weights = sampler.sync(params)
    parts = in_parts(sampler, weights)
    whole, _ = engine_test.run(sampler, params)
    # The same weights and positions: only a rounding of logits computed in another shape may differ.
    equal = [parts[k].tokens == whole[k].tokens for k in whole]
    assert sum(equal) >= len(equal) - 2
    for episode in parts.values():
        written = [v for v, acted in zip(episode.versions, episode.acted) if acted]
        assert written == sorted(written) and written[0] == 0
        assert all(v == -1 for v, acted in zip(episode.versions, episode.acted) if not acted)
        counts = np.bincount(written)
        assert counts.max() <= 2 * SIZES.quota and episode.step == 4
    assert max(max(e.versions) for e in parts.values()) > 2


def test_budgets_hold_over_the_cuts(sampler, params):
    for e in in_parts(sampler, sampler.sync(params)).values():
        assert len(e.tokens) == len(e.acted) == len(e.logprobs) == len(e.versions) <= engine_test.TURNS.max_tokens
        assert e.turns <= engine_test.TURNS.max_turns
        assert all(n <= engine_test.TURNS.max_turn_tokens for n in (len(ids) for acted, ids in e.segments() if acted))


def test_a_journal_replays_carried_episodes_without_a_sandbox(sampler, params, tmp_path):
    weights = sampler.sync(params)
    journal = Journal(tmp_path / 'journal')
    reference = in_parts(sampler, weights, journal=journal)
    journal.close()

    def refuse(code):
        raise AssertionError('the sandbox was asked')

    journal = Journal(tmp_path / 'journal')
    again = in_parts(sampler, weights, journal=journal, results=refuse)
    journal.close()
    assert all(same(reference[k], again[k]) for k in reference)


def test_a_tag_that_was_cut_in_the_middle_is_found(params):
    """Of `</code` any further byte ends the tag here: a row taken up there stops after one token."""
    table = tags.build_table(TOKENIZER.token_bytes, 264, {'</code' + chr(b): tags.CODE for b in range(128)})
    sampler = Sampler(CONFIG, SIZES, table.next_state, table.stops, ())
    rules = turns.Rules(
        dataclasses.replace(engine_test.TURNS, max_calls=0, on_cap='end'), TOKENIZER, table, lambda r: r.stdout
    )
    engine = Engine(sampler, rules, dataclasses.replace(engine_test.PLAIN, top_k=1), FakePool({}), seed=0, purpose=0)
    weights = sampler.sync(jax.tree.map(lambda x: x, params))
    for begun, tokens in ((b'text </code', 1), (b'text </cod', None)):
        episode = Episode(Problem('p', 'q', 'a', 's', ''), 0, 0, prompt_length=2)
        episode.append([5, 6], acted=False)
        episode.append(list(begun), acted=True, logprobs=[0.0] * len(begun), version=0)
        (made,) = engine.run(weights, 1, [Request.resume(episode)], step=1)
        fresh = len(made.tokens) - 2 - len(begun)
        byte = made.tokens[2 + len(begun)] < 128
        assert fresh == 1 if tokens and byte else fresh > 1


def test_a_cut_row_is_no_longer_decoded(sampler, params):
    engine = make_engine(sampler)
    engine.keeps_cache = True
    made = engine.run(sampler.sync(params), 0, requests(), step=4, quanta=1)
    assert any(e.stop is None for e in made) and not np.asarray(engine.kept.live_B).any()
