"""Episodes of a model behind a server: the same rules, and for the same model the same episodes as the engine's."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.core.answers import Answer
from retool_jax.core.endpoint import Endpoint
from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem, Stop, Verdict
from retool_jax.model import decoder
from retool_jax.rollout import served, turns
from retool_jax.rollout.journal import Journal
from retool_jax.rollout.requests import Request
from retool_jax.rollout.sampler import STOP_ANSWER, STOP_CODE, STOP_EOS, STOP_LENGTH
from retool_jax.rollout.served import Served
from retool_jax.rollout.settings import SamplingSettings
from retool_jax.text import tags, template
from retool_jax.text.template import make_template
from retool_jax.train.grading import make_requests
from tests.core.endpoint_server import Cut, Says, Status, make_settings, serve
from tests.fakes import FakePool, byte_tokenizer
from tests.train import small

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special_ids['<|im_end|>']
STOPS = {'</code>': STOP_CODE, '</answer>': STOP_ANSWER}
BUDGETS = turns.TurnSettings(
    tools=True, max_tokens=600, max_turn_tokens=300, max_turns=4, max_calls=3, on_cap='answer', on_answer='end'
)
PLAIN = SamplingSettings(temperature=1.0, top_p=0.7, top_k=0, min_p=0.0)
RULES = turns.Rules(BUDGETS, TOKENIZER, tags.build_table(TOKENIZER.token_bytes, 259), lambda result: result.stdout)
CALL = 'Let me see. <code>\n```python\nprint(2)\n```\n'
VLLM = {'stop_reason': '</code>'}


def make(server, directory, rules=RULES, stops=STOPS, sampling=PLAIN, pool=None, **changes):
    pool = pool or FakePool(lambda code: f'{len(code)}\n')
    endpoint = Endpoint(make_settings(server.url, **changes), directory)
    return Served(endpoint, rules, sampling, pool, stops, END)


def requests(count=1, samples=1):
    problems = [Problem(f'p{i}', f'Question {i}?', '2', 'test', '') for i in range(count)]
    return [Request(p, n, tuple(TOKENIZER.encode(p.question))) for p in problems for n in range(samples)]


def run(engine, asked, journal=None):
    with engine.endpoint:
        found = dict(engine.stream(None, 0, asked, 0, journal=journal))
    return [found[i] for i in range(len(asked))]


def said(episode):
    return [(acted, TOKENIZER.decode(ids, specials=True)) for acted, ids in episode.segments()]


@pytest.mark.parametrize('telling', [True, False])
def test_an_episode_goes_from_turn_to_turn_as_the_rules_say(telling, tmp_path):
    """Of a server that tells which stop string it was, and of one that does not."""

    def script(asked, tries):
        text = TOKENIZER.decode(asked['prompt'])
        first = '<interpreter>' not in text
        told = {'stop_reason': '</code>' if first else '</answer>'} if telling else {}
        return Says(CALL if first else 'So 2.\n<answer>\n\\boxed{2}\n', extra=told)

    with serve(script) as server:
        (episode,) = run(make(server, tmp_path), requests())
        assert said(episode) == [
            (False, 'Question 0?'),
            (True, f'{CALL}</code>'),
            (False, '\n<interpreter>\n8\n</interpreter>\n\n'),
            (True, 'So 2.\n<answer>\n\\boxed{2}\n</answer>'),
        ]
        assert (episode.stop, episode.turns, episode.void) == (Stop.ANSWER, 2, False)
        assert [call.code for call in episode.calls] == ['print(2)'] and episode.calls[0].verdict == Verdict.OK
        assert all(math.isnan(x) == acted for x, acted in zip(episode.logprobs, episode.acted))
        first, second = server.bodies
        assert (
            first['prompt'] == TOKENIZER.encode('Question 0?')
            and second['prompt'] == episode.tokens[: len(second['prompt'])]
        )
        assert first['max_tokens'] == 300 and first['stop'] == ['</code>', '</answer>'] and 'candidate' not in first
        assert second['max_tokens'] == min(300, 600 - len(second['prompt']))
        drawn = {key: first[key] for key in ('temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty')}
        assert drawn == {'temperature': 1.0, 'top_p': 0.7, 'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0}


@pytest.mark.parametrize(
    'answer, text, stop',
    [
        (Answer(CALL, 'stop', '</code>'), f'{CALL}</code>', STOP_CODE),
        (Answer('no call </code', 'stop', '</code>'), 'no call </code</code>', STOP_CODE),
        (Answer('two', 'stop', '</answer>'), 'two</answer>', STOP_ANSWER),
        (Answer('it ends', 'stop', 258), 'it ends<|im_end|>', STOP_EOS),
        (Answer(CALL, 'stop', ''), f'{CALL}<|im_end|>', STOP_EOS),  # vLLM: the text ended in an open call
        (Answer(CALL, 'stop'), f'{CALL}</code>', STOP_CODE),
        (Answer('<answer>\n2', 'stop'), '<answer>\n2</answer>', STOP_ANSWER),
        (Answer('the <answer> is <code>\n', 'stop'), 'the <answer> is <code>\n</code>', STOP_CODE),
        (Answer('plain', 'stop'), 'plain<|im_end|>', STOP_EOS),
        (Answer('', 'stop'), '<|im_end|>', STOP_EOS),
        (Answer('', 'content_filter'), '', STOP_EOS),
        (Answer(CALL, 'length'), CALL, STOP_LENGTH),
        (Answer(f'{CALL}</code>\n<inter', 'length'), f'{CALL}</code>', STOP_CODE),  # a server that knows no stops
        (Answer(f'{CALL}</code>', 'stop_sequence'), f'{CALL}</code>', STOP_CODE),  # one that leaves it in
    ],
)
def test_what_ended_a_turn_is_read_from_what_the_server_tells_or_else_from_the_text(answer, text, stop):
    ids, found = served.read(answer, STOPS, RULES, END)
    assert (TOKENIZER.decode(ids, specials=True), found) == (text, stop)


def test_without_stop_strings_the_text_is_taken_as_it_is(tmp_path):
    assert served.read(Answer(f'{CALL}</code> on', 'stop'), {}, RULES, END)[1] == STOP_EOS
    with serve(lambda asked, tries: Says('no tools')) as server:
        rules = dataclasses.replace(RULES, settings=dataclasses.replace(BUDGETS, tools=False))
        (episode,) = run(Served(Endpoint(make_settings(server.url), tmp_path), rules, PLAIN, None, {}, END), requests())
        assert 'stop' not in server.bodies[0] and episode.stop == Stop.EOS and episode.void
    with pytest.raises(ValueError, match='needs an executor'):
        Served(Endpoint(make_settings('http://127.0.0.1:1/v1'), tmp_path), RULES, PLAIN, None, STOPS, END)


def test_budgets_end_episodes(tmp_path):
    settings = dataclasses.replace(BUDGETS, max_tokens=60, max_calls=1, on_cap='end')
    rules = dataclasses.replace(RULES, settings=settings)
    with serve(lambda asked, tries: Says('<code>x', extra=VLLM)) as server:
        long = Request(Problem('long', 'Q' * 60, '2', 'test', ''), 0, tuple(TOKENIZER.encode('Q' * 60)))
        full, other = run(make(server, tmp_path, rules), [long, *requests()])
        assert (full.stop, full.void, full.acted_count) == (Stop.LENGTH, True, 0)
        assert other.stop == Stop.LENGTH and other.calls[0].verdict == Verdict.FORMAT
        assert len(server.bodies) == 1


def test_an_answer_or_a_call_that_is_known_is_not_asked_for_again(tmp_path):
    def script(asked, tries):
        text = TOKENIZER.decode(asked['prompt'])
        return Says('<answer>2' if '<interpreter>' in text else CALL)

    with serve(script) as server, contextlib.closing(Journal(tmp_path / 'journal.jsonl')) as journal:
        pool = FakePool(lambda code: '2', latency_s=0.001)
        whole = run(make(server, tmp_path / 'a', pool=pool), requests(5, 3), journal)
        # Samples of one prompt are candidates of one request, which each has an answer of its own.
        assert sum(server.answered.values()) == 30 and len(server.answered) == 10 and len(pool.codes) == 15
        again = run(make(server, tmp_path / 'a', pool=pool), requests(5, 3), journal)
        same = lambda e: dataclasses.replace(e, logprobs=[])
        assert list(map(same, again)) == list(map(same, whole))
        assert sum(server.answered.values()) == 30 and len(pool.codes) == 15


def test_a_budget_ends_the_run_with_what_is_finished(tmp_path):
    with serve(lambda asked, tries: Says('<answer>2')) as server:
        engine, found = make(server, tmp_path, max_requests=7, concurrency=2), []
        with engine.endpoint, pytest.raises(UserError, match='5 of 12 episodes are not finished.*max_requests=7'):
            for _, episode in engine.stream(None, 0, requests(12), 0):
                found.append(episode.problem.id)
        assert sorted(found) == [f'p{i}' for i in range(7)] and len(server.bodies) == 7


def test_a_request_that_fails_leaves_the_other_episodes_whole(tmp_path):
    def script(asked, tries):
        text = TOKENIZER.decode(asked['prompt'])
        return Cut('half') if '3' in text and server.failing else Says('<answer>2')

    with serve(script) as server:
        server.failing = True
        engine, found = make(server, tmp_path, retries=1), []
        with engine.endpoint, pytest.raises(UserError, match='1 of 6 episodes are not finished: .*connection failed'):
            for _, episode in engine.stream(None, 0, requests(6), 0):
                found.append(episode.problem.id)
        assert sorted(found) == ['p0', 'p1', 'p2', 'p4', 'p5']
        server.failing = False
        assert [e.stop for e in run(make(server, tmp_path), requests(6))] == [Stop.ANSWER] * 6


def test_a_server_that_takes_no_request_ends_it_at_once(tmp_path):
    with serve(lambda asked, tries: Status(401)) as server:
        engine = make(server, tmp_path)
        with engine.endpoint, pytest.raises(UserError, match='401'):
            list(engine.stream(None, 0, requests(50), 0))
        assert len(server.bodies) <= 8


@pytest.fixture(scope='module')
def speaker():
    """A random model that never prefers a byte beyond ASCII, which text could not carry; letters stand for tags."""
    params = decoder.init(small.SPEAKER, jax.random.key(0))
    mute = np.arange(small.SPEAKER.vocab_size)
    mute = (mute >= 128) & (mute != END)  # special ids among them
    head = params['lm_head']['weight']
    axis = head.shape.index(small.SPEAKER.vocab_size)
    params['lm_head']['weight'] = jnp.where(mute[:, None] if axis == 0 else mute[None], 0.0, head)
    return params


def most_probable(params):
    """The next id after some ids, by the forward pass of training: nothing of the sampler takes part."""

    @jax.jit
    def choose(tokens_T, length):
        positions_BT = jnp.arange(len(tokens_T))[None]
        segments_BT = (positions_BT < length).astype(jnp.int32)
        hidden_BTD = decoder.forward(small.SPEAKER, params, tokens_T[None], positions_BT, segments_BT)
        return decoder.unembed(params, hidden_BTD[0, length - 1]).argmax()

    def follow(ids):
        return int(choose(jnp.array(ids + [0] * (small.TURNS.max_tokens - len(ids))), len(ids)))

    return follow


def test_greedy_episodes_through_a_server_are_the_engines(speaker, tmp_path, monkeypatch):
    """The model's own weights behind HTTP, drawn token by token with the training forward pass, and through the
    engine: the same episodes token for token."""
    monkeypatch.setattr(template, 'extract_snippet', lambda text: template.Snippet(text, 0))  # every turn is one
    letters = {'a': STOP_CODE, 'e': STOP_CODE, 'o': STOP_CODE, 'z': STOP_ANSWER}
    greedy = SamplingSettings(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    sampler = small.make_sampler()
    engine = small.make_engine(sampler)
    engine.sampling = greedy
    asked = make_requests(small.make_problems(12), 1, make_template('tiny'), small.TOKENIZER)
    mine = engine.run(sampler.sync(speaker), 0, asked, 0)
    assert sum(len(e.calls) for e in mine) > 8 and {e.stop for e in mine} == {Stop.LENGTH, Stop.ANSWER, Stop.EOS}

    follow = most_probable(speaker)

    def script(body, tries):
        assert body['temperature'] == 0.0
        written = []
        while len(written) < body['max_tokens']:
            token = follow([*body['prompt'], *written])
            if token in small.TOKENIZER.eos_ids:
                return Says(small.TOKENIZER.decode(written), extra={'stop_reason': token})
            if (letter := chr(token)) in body['stop']:
                return Says(small.TOKENIZER.decode(written), extra={'stop_reason': letter})
            written.append(token)
        return Says(small.TOKENIZER.decode(written), finish='length')

    with serve(script) as server:
        theirs = run(make(server, tmp_path, engine.rules, letters, greedy, engine.executor), asked)
    for one, other in zip(mine, theirs):
        assert one.tokens == other.tokens and one.acted == other.acted and one.stop == other.stop
        assert [c.code for c in one.calls] == [c.code for c in other.calls] and one.turns == other.turns
