"""The engine on a real (random) model: what an episode samples depends on nothing around it."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from retool_jax.bench.timing import compilations
from retool_jax.core.pytrees import Batch
from retool_jax.core.records import ExecResult, Problem, Stop, Verdict
from retool_jax.model import decoder
from retool_jax.model.config import TINY
from retool_jax.model.logprobs import token_logprobs
from retool_jax.rollout import scheduler, turns
from retool_jax.rollout.engine import Engine
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.settings import SamplerSettings, SamplingSettings
from retool_jax.text import tags, template
from retool_jax.train.pack import pack
from tests.fakes import FakePool, byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = dataclasses.replace(
    TINY, vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32, initializer_range=0.2
)
# A random model never spells a tag, so single letters stand for them: calls and answers are frequent.
TABLE = tags.build_table(
    TOKENIZER.token_bytes, 264, {'a': tags.CODE, 'e': tags.CODE, 'f': tags.CODE, 'o': tags.CODE, 'z': tags.ANSWER}
)
# One bound: on some CPU shapes matmuls round by their extent.
SIZES = SamplerSettings(
    rows=8,
    slots=256,
    chunk=32,
    feed_rows=4,
    quota=8,
    decode_rows=0,
    min_bound=256,
    dtype='float32',
    weights='float',
    cache_dtype='float32',
)
TURNS = turns.TurnSettings(
    tools=True, max_tokens=150, max_turn_tokens=60, max_turns=6, max_calls=4, on_cap='answer', on_answer='end'
)
PLAIN = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)


@pytest.fixture(scope='module')
def sampler():
    return Sampler(CONFIG, SIZES, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)


@pytest.fixture(scope='module')
def params():
    return decoder.init(CONFIG, jax.random.key(0))


@pytest.fixture(autouse=True)
def every_turn_is_a_snippet(monkeypatch):
    monkeypatch.setattr(template, 'extract_snippet', lambda text: template.Snippet(text, 0))


def answer(code):
    return f'{len(code)} characters' + 'x' * (sum(code.encode()) % 40)


def make_engine(sampler, latency_s=0.0, results=answer, **changes):
    rules = turns.Rules(dataclasses.replace(TURNS, **changes), TOKENIZER, TABLE, lambda r: r.stdout)
    return Engine(sampler, rules, PLAIN, FakePool(results, latency_s), seed=1, purpose=1)


def requests(problems=7, samples=3):
    made = []
    for p in range(problems):
        question = f'question {p} ' * (1 + p % 3)
        problem = Problem(f'p{p}', question, 'a', 's', '')
        made += [Request(problem, s, tuple(TOKENIZER.encode(question))) for s in range(samples)]
    return made


def run(sampler, params, order=None, **kwargs):
    asked = requests()
    order = list(range(len(asked))) if order is None else order
    engine = make_engine(sampler, **kwargs)
    found = engine.run(sampler.sync(params), 0, [asked[i] for i in order], step=4)
    return {(e.problem.id, e.sample): e for e in found}, engine


def same(a, b):
    return a.tokens == b.tokens and a.logprobs == b.logprobs and a.acted == b.acted and a.stop == b.stop


def test_episodes_are_bit_equal_under_random_latencies_and_any_order(sampler, params):
    reference, _ = run(sampler, params)
    assert sum(len(e.calls) for e in reference.values()) > 8
    rng = random.Random(0)
    order = list(range(21))
    rng.shuffle(order)
    again, _ = run(sampler, params, order=order, latency_s=lambda code: rng.random() * 0.05)
    assert all(same(reference[k], again[k]) for k in reference)


def test_an_episode_does_not_depend_on_its_neighbours(sampler, params):
    reference, _ = run(sampler, params)
    alone = make_engine(sampler).run(sampler.sync(params), 0, requests()[5:6], step=4)[0]
    assert same(alone, reference[alone.problem.id, alone.sample])


def test_samples_steps_and_purposes_differ(sampler, params):
    reference, _ = run(sampler, params)
    assert len({tuple(e.tokens) for e in reference.values()}) == len(reference)
    other = make_engine(sampler).run(sampler.sync(params), 0, requests()[:1], step=5)[0]
    assert other.tokens != reference['p0', 0].tokens


def test_a_decode_loop_keyed_by_rows_would_be_noticed(sampler, params, monkeypatch):
    """The check above can fail: with keys that follow the row, order changes episodes."""
    assign = type(sampler).assign

    def keyed_by_row(self, state, key_data, assignment):
        return assign(
            self,
            state,
            key_data,
            dataclasses.replace(assignment, problem_R=np.asarray(assignment.row_R).astype(np.uint32)),
        )

    monkeypatch.setattr(type(sampler), 'assign', keyed_by_row)
    first, _ = run(sampler, params)
    again, _ = run(sampler, params, order=list(reversed(range(21))))
    assert not all(same(first[k], again[k]) for k in first)


def test_what_is_fed_has_one_width_whatever_is_ready_together(sampler, params, monkeypatch):
    """Some processors round a matmul by its extent: a width that follows latency changes a row's bits there."""
    extend, shapes = type(sampler).extend, set()

    def noted(self, params, state, chunks, longest):
        shapes.add(chunks.tokens_RC.shape)
        return extend(self, params, state, chunks, longest)

    monkeypatch.setattr(type(sampler), 'extend', noted)
    rng = random.Random(0)
    episodes, _ = run(sampler, params, latency_s=lambda code: rng.random() * 0.05)
    assert sum(len(e.calls) for e in episodes.values()) > 8
    assert shapes == {(SIZES.feed_rows, SIZES.chunk)}


def gaps(params, episodes):
    """Mean |ℓ_trainer − ℓ_sampler| of each episode."""
    batch: Batch = pack(episodes, width=160, rows=1, segments=1)
    score = jax.jit(
        lambda b: token_logprobs(
            params,
            decoder.forward(CONFIG, params, b.tokens_BT, b.positions_BT, b.segment_ids_BT),
            b.tokens_BT,
            chunk=160,
        )[0]
    )
    gap = np.abs(np.where(batch.acted_BT, np.asarray(score(batch)) - batch.sampler_logprob_BT, 0.0))
    return gap.sum(1) / batch.acted_BT.sum(1)


@pytest.mark.parametrize('length', [1, 20, 90])
def test_problems_of_equal_ids_are_sampled_from_their_own_prompts(sampler, params, length):
    asked = []
    for letter in 'bcd':
        problem = Problem('0', letter, 'a', letter, '')
        prompt = tuple(TOKENIZER.encode(f'question {letter} ' * length)[:120])
        asked += [Request(problem, sample, prompt) for sample in range(5)]
    episodes = make_engine(sampler).run(sampler.sync(params), 0, asked, step=4)
    assert [tuple(e.tokens[: e.prompt_length]) for e in episodes] == [r.prompt for r in asked]
    assert gaps(params, episodes).max() < 1e-4


def test_equal_prompts_are_fed_once_whatever_their_problems_are_called(sampler, params):
    prompt = tuple(TOKENIZER.encode('the same question '))
    asked = [Request(Problem(f'p{i}', 'q', 'a', 's', ''), 0, prompt) for i in range(6)]
    engine = make_engine(sampler)
    episodes = engine.run(sampler.sync(params), 0, asked, step=4)
    assert engine.stats.shared_tokens == 5 * len(prompt)
    assert len({tuple(e.tokens) for e in episodes}) == 6  # each with its own randomness
    assert gaps(params, episodes).max() < 1e-4


@pytest.mark.parametrize('count', [21, pytest.param(1000, marks=pytest.mark.slow)])
def test_sampler_and_trainer_logprobs_agree(sampler, params, count):
    asked = requests(problems=-(-count // 3))[:count]
    episodes = make_engine(sampler).run(sampler.sync(params), 0, asked, step=4)
    assert sum(e.turns > 1 for e in episodes) > count // 3
    batch: Batch = pack(episodes, width=160, rows=1, segments=4)
    score = jax.jit(
        lambda b: token_logprobs(
            params,
            decoder.forward(CONFIG, params, b.tokens_BT, b.positions_BT, b.segment_ids_BT),
            b.tokens_BT,
            chunk=160,
        )[0]
    )
    acted, widest = 0, 0.0
    for start in range(0, len(batch.tokens_BT), 8):
        part = jax.tree.map(lambda x: np.resize(x[start : start + 8], (8, *x.shape[1:])), batch)  # noqa: B023
        gap = np.abs(np.where(part.acted_BT, np.asarray(score(part)) - part.sampler_logprob_BT, 0.0))
        acted, widest = acted + part.acted_BT.sum(), max(widest, gap.max())
    assert acted > 12 * count and widest < 1e-4


def test_budgets_hold_and_lengths_agree(sampler, params):
    reference, _ = run(sampler, params)
    for e in reference.values():
        assert len(e.tokens) == len(e.acted) == len(e.logprobs) == len(e.versions) <= TURNS.max_tokens
        assert e.turns <= TURNS.max_turns and len(e.calls) <= TURNS.max_calls + 1
        assert all(n <= TURNS.max_turn_tokens for n in (len(ids) for acted, ids in e.segments() if acted))
        assert e.stop in (Stop.ANSWER, Stop.EOS, Stop.LENGTH, Stop.TURNS)
    assert {e.stop for e in reference.values()} > {Stop.ANSWER}


def test_a_prompt_beyond_the_budget_is_counted_not_dropped(sampler, params):
    long = Request(Problem('long', 'q', 'a', 's', ''), 0, tuple(TOKENIZER.encode('x' * 150)))
    found = make_engine(sampler).run(sampler.sync(params), 0, [requests()[0], long, long], step=0)
    assert [e.stop for e in found[1:]] == [Stop.LENGTH] * 2 and found[1].acted_count == 0
    assert found[0].stop != Stop.LENGTH or found[0].acted_count > 0


@pytest.mark.parametrize('steps', [5, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(params, steps):
    sampler = Sampler(
        CONFIG, dataclasses.replace(SIZES, min_bound=32), TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids
    )
    assert sampler.bounds() == [32, 64, 128, 256]
    weights = sampler.sync(params)
    make_engine(sampler).warm_up(weights)
    compiled, rng = compilations(), random.Random(0)
    tokens = 0
    for step in range(steps):
        engine = make_engine(
            sampler,
            latency_s=lambda code: rng.random() * 0.005,
            max_calls=rng.randint(0, 4),
            max_turn_tokens=rng.randint(1, 60),
            max_turns=rng.randint(1, 6),
            max_tokens=rng.randint(40, 256),
        )
        engine.sampling = dataclasses.replace(PLAIN, temperature=rng.choice([0.0, 0.5, 1.0]))
        asked = requests(problems=rng.randint(1, 4), samples=rng.randint(1, 3))
        tokens += sum(e.acted_count for e in engine.run(weights, step, asked, step))
    assert tokens > 10 * steps and compiled == []


def test_a_journal_replays_without_a_sandbox(sampler, params, tmp_path):
    journal = Journal(tmp_path / 'journal.jsonl')
    engine = make_engine(sampler)
    first = engine.run(sampler.sync(params), 0, requests(), step=4, journal=journal)
    journal.close()

    def refuse(code):
        raise AssertionError('the sandbox was asked')

    journal = Journal(tmp_path / 'journal.jsonl')
    again = make_engine(sampler, results=refuse).run(sampler.sync(params), 0, requests(), step=4, journal=journal)
    journal.close()
    assert all(same(a, b) for a, b in zip(first, again))


def test_a_torn_journal_line_is_cut_off(tmp_path):
    journal = Journal(tmp_path / 'j')
    journal.put('a', ExecResult(Verdict.OK, '1\n', ''))
    journal.close()
    with open(tmp_path / 'j', 'ab') as f:
        f.write(b'{"key": "b", "res')
    journal = Journal(tmp_path / 'j')
    assert journal.get('a').stdout == '1\n' and journal.get('b') is None
    journal.put('b', ExecResult(Verdict.ERROR, '', 'no', exit_code=1))
    journal.close()
    journal = Journal(tmp_path / 'j')
    assert journal.get('b').verdict == Verdict.ERROR
    journal.close()


def test_text_only_rollouts_take_no_executor(sampler, params):
    rules = turns.Rules(dataclasses.replace(TURNS, tools=True), TOKENIZER, TABLE, lambda r: r.stdout)
    with pytest.raises(ValueError, match='needs an executor'):
        Engine(sampler, rules, PLAIN, None, seed=0, purpose=0)


def test_where_decode_calls_end_changes_no_bit(sampler, params, monkeypatch):
    """With tools, calls are as short as QUANTUM_S asks; partial rollouts, which count calls, take whole quotas."""
    given = []
    whole = Sampler.decode
    monkeypatch.setattr(Sampler, 'decode', lambda self, *args: given.append(args[-1]) or whole(self, *args))
    episodes = {}
    for seconds, steps in ((0.0, 1), (1e9, SIZES.quota)):
        given.clear()
        monkeypatch.setattr(scheduler, 'QUANTUM_S', seconds)
        episodes[steps], _ = run(sampler, params)
        assert given[0] == 1 and set(given[1:]) == {steps}  # the first call compiles, and tells nothing of a step
    assert all(same(episodes[1][key], episode) for key, episode in episodes[SIZES.quota].items())
    monkeypatch.setattr(scheduler, 'QUANTUM_S', 0.0)
    given.clear()
    make_engine(sampler).run(sampler.sync(params), 0, requests(), step=4, quanta=2)
    assert set(given) == {SIZES.quota}
