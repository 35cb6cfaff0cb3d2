"""What a rollout says of its time."""

import itertools
import json

import jax
import pytest

from retool_jax.model import decoder
from retool_jax.rollout.sampler import Sampler
from retool_jax.rollout.stats import RolloutStats, Timeline
from retool_jax.text import template
from tests.rollout.engine_test import CONFIG, SIZES, TABLE, TOKENIZER, make_engine, requests


@pytest.fixture(scope='module')
def flown():
    """An engine after a run with slow tools, with its timeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, 'extract_snippet', lambda text: template.Snippet(text, 0))
        sampler = Sampler(CONFIG, SIZES, TABLE.next_state, TABLE.stops, TOKENIZER.eos_ids)
        engine = make_engine(sampler, latency_s=0.05)
        engine.timeline = Timeline()
        episodes = engine.run(sampler.sync(decoder.init(CONFIG, jax.random.key(0))), 0, requests(), step=4)
    return engine, episodes


def test_counts_are_those_of_the_episodes(flown):
    engine, episodes = flown
    s, made = engine.stats, engine.stats.summary()
    assert s.episodes == len(episodes) and s.sampled_tokens == sum(e.acted_count for e in episodes)
    unread = sum(e.prompt_length for e in episodes) - s.shared_tokens
    fed = sum(len(e.tokens) - e.acted_count - e.prompt_length for e in episodes)
    assert s.fed_tokens == unread + fed and s.shared_tokens > 0
    executed = [c for e in episodes for c in e.calls if c.code]
    assert len(s.tool_wait_s) == len(s.tool_wall_s) == len(executed) and min(s.tool_wait_s) >= 0.05
    assert made['tools/wait_p99'] >= made['tools/wait_p50'] >= 0.05
    assert 0 < made['rollout/slot_occupancy'] <= 1
    assert made['rollout/tokens_per_s'] == pytest.approx(s.sampled_tokens / s.total_s)


def test_shares_are_parts_of_one_whole(flown):
    made = flown[0].stats.summary()
    shares = [made[f'rollout/{name}_share'] for name in ('decode', 'prefill', 'blocked')]
    assert min(shares) > 0 and sum(shares) <= 1.0


def test_an_empty_run_divides_by_nothing():
    assert set(RolloutStats().summary().values()) == {0.0}


def test_the_timeline_opens_in_a_trace_viewer_and_a_row_does_one_thing_at_a_time(flown, tmp_path):
    engine, _ = flown
    engine.timeline.save(tmp_path / 'trace.json')
    events = json.loads((tmp_path / 'trace.json').read_text())['traceEvents']
    spans = [e for e in events if e['ph'] == 'X']
    lanes = {e['tid'] for e in spans}
    assert lanes == set(range(SIZES.rows + 1))
    names = {e['args']['name'] for e in events if e['ph'] == 'M'}
    assert names == {'device'} | {f'row {i}' for i in range(SIZES.rows)}
    for lane in lanes:
        own = sorted((e['ts'], e['ts'] + e['dur']) for e in spans if e['tid'] == lane)
        assert all(end <= start + 1 for (_, end), (start, _) in itertools.pairwise(own))  # microseconds
    tokens = sum(e['args']['tokens'] for e in spans if e['name'] == 'decode' and e['tid'] > 0)
    assert tokens == engine.stats.sampled_tokens
    assert sum(e['name'] == 'tool' for e in spans) == len(engine.stats.tool_wait_s)
    curves = [e['args'] for e in events if e['ph'] == 'C']
    assert any(c['tools'] and c['live'] for c in curves)  # rows decoded while tools ran
