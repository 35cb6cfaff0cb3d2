"""What prompts have in common is computed once per run: which rows copy it, and that nothing else changes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from retool_jax.core.records import Problem
from retool_jax.model import decoder
from retool_jax.rollout.prompts import Prompts
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import Sampler
from retool_jax.text.template import COMMON_FROM, common_ids, make_template, prompt_ids
from tests.fakes import byte_tokenizer
from tests.rollout import engine_test
from tests.rollout.engine_test import CONFIG, SIZES, TABLE, TOKENIZER

COMMON = tuple(TOKENIZER.encode('Solve step by step, as shown. '))  # 30 ids: not a whole number of chunks


@pytest.fixture(scope='module')
def sampler():
    return Sampler(CONFIG, SIZES, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)


@pytest.fixture(scope='module')
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def requests(problems=9, samples=2):
    made = []
    for p in range(problems):
        ids = COMMON + tuple(TOKENIZER.encode(f'question {p} ' * (1 + p % 3)))
        if p == 4:  # one that begins otherwise
            ids = tuple(TOKENIZER.encode('Question 4?'))
        made += [Request(Problem(f'p{p}', f'q{p}', 'a', 's', ''), s, ids) for s in range(samples)]
    return made


@pytest.fixture
def run(sampler, params, monkeypatch):
    monkeypatch.setattr(engine_test.template, 'extract_snippet', lambda text: engine_test.template.Snippet(text, 0))

    def run(common, asked=None, **kwargs):
        engine = engine_test.make_engine(sampler, **kwargs)
        engine.common = common
        found = engine.run(sampler.sync(params), 0, asked or requests(), step=4)
        return {(e.problem.id, e.sample): e for e in found}, engine

    return run


def test_it_is_fed_once_however_many_problems_there_are(run):
    shared, engine = run(COMMON)
    whole, plain = run(())
    assert engine.stats.prefix_feeds == 1 and plain.stats.prefix_feeds == 0
    assert engine.stats.prefix_copies == 7  # nine problems: the first feeds it, one begins otherwise
    assert plain.stats.fed_tokens - engine.stats.fed_tokens == 7 * len(COMMON)
    assert engine.stats.summary()['rollout/prefix_feeds'] == 1
    for key, episode in whole.items():
        assert shared[key].tokens == episode.tokens and shared[key].stop == episode.stop
        np.testing.assert_allclose(shared[key].logprobs, episode.logprobs, atol=2e-5)


def test_an_episode_does_not_depend_on_what_else_is_asked(run):
    together, _ = run(COMMON)
    for i in (0, 5, 9, 17):
        asked = requests()[i]
        (alone,) = run(COMMON, [asked])[0].values()
        assert engine_test.same(alone, together[asked.problem.id, asked.sample])


def test_episodes_taken_up_copy_it_too(run, sampler, params):
    engine = engine_test.make_engine(sampler)
    engine.common = COMMON
    weights = sampler.sync(params)
    begun = engine.run(weights, 0, requests(), step=4, quanta=1)
    assert any(e.stop is None for e in begun)
    rest = [Request.resume(dataclasses.replace(e)) for e in begun if e.stop is None]
    engine.run(weights, 0, rest, step=5)
    assert engine.stats.prefix_feeds == 1 and engine.stats.prefix_copies >= len(rest) - 3


def test_a_row_that_is_fed_something_else_holds_it_no_more():
    prompts = Prompts(requests(2, 1), COMMON, 8)
    prompts.place(3, True)
    prompts.place(3, False)
    prompts.place(2, False)
    assert prompts.begun == set()
    assert prompts.begins([*COMMON, 7]) and not prompts.begins(COMMON) and not prompts.begins([7, *COMMON])
    assert not Prompts([], (), 8).begins([1, 2])


def test_each_engine_is_fed_what_its_rows_hold():
    prompts = Prompts(requests(3, 4), COMMON, 4)  # rows 0 to 3 are of one engine, 4 to 7 of the next
    leaders, followers = prompts.deal({0: 0, 1: 1, 4: 2, 5: 3, 6: 4})
    assert leaders == {(0, 0): 0, (1, 0): 4, (1, 1): 6} and followers == {(0, 0): [1], (1, 0): [5]}
    assert prompts.first([0, 1, 4, 5]) == [0, 4]
    prompts.place(1, True)
    assert prompts.first([0, 4, 5]) == [4]
    prompts.place(4, True)
    assert prompts.first([0, 5]) == [] and prompts.sources([0, 5, 2]) == {1: [0, 2], 4: [5]}
    prompts.hold(leaders, lambda key: key != (1, 1), lambda r: f'logits of {r}')
    assert prompts.held == {(0, 0): (0, 'logits of 0'), (1, 0): (4, 'logits of 4')}
    prompts.leave(0, {1: 1, 4: 2})
    prompts.leave(4, {1: 1})  # no other row of that engine holds it
    assert prompts.held == {(0, 0): (1, 'logits of 0')}


def test_the_ids_that_a_template_begins_with_are_those_of_every_question():
    tokenizer = byte_tokenizer()
    made = make_template('qwen2_5', tokenizer=tokenizer)
    common = common_ids(made, tokenizer)
    assert len(common) > 300  # bytes of the system turn and the instruction
    for question in ('What is 2 + 2?', 'αβγ', '12'):
        assert tuple(prompt_ids(made, tokenizer, question)[: len(common)]) == common
    assert common_ids(make_template('tiny'), tokenizer) == () and COMMON_FROM > 5
