"""Packing: what goes in comes out, nothing crosses, shapes are few."""

import numpy as np
import pytest

from retool_jax.core.records import Episode, Problem, Reward
from retool_jax.train.pack import beginnings, first_fit, join, pack


def episode(length, seed=0, value=1.0):
    rng = np.random.default_rng(seed)
    made = Episode(Problem(str(seed), 'q', 'a', 's', ''), 0, 0, prompt_length=2)
    made.append(rng.integers(1, 99, 2), acted=False)
    made.append(rng.integers(1, 99, length - 2), acted=True, logprobs=rng.random(length - 2), version=3)
    made.reward = Reward(value, value > 0, False, False, '')
    return made


EPISODES = [episode(n, i, value=i) for i, n in enumerate([30, 7, 12, 50, 3, 20, 20, 49])]


def unpack(batch):
    found = {}
    for r in range(batch.tokens_BT.shape[0]):
        for n in range(batch.reward_BN.shape[1]):
            where = batch.segment_ids_BT[r] == n + 1
            if where.any():
                found[int(batch.group_BN[r, n])] = {
                    'tokens': batch.tokens_BT[r][where].tolist(),
                    'acted': batch.acted_BT[r][where].tolist(),
                    'logprobs': batch.sampler_logprob_BT[r][where],
                    'positions': batch.positions_BT[r][where],
                    'reward': batch.reward_BN[r, n],
                    'update': batch.update_BN[r, n],
                }
    return found


def test_every_episode_comes_out_as_it_went_in():
    update = [i % 2 == 0 for i in range(len(EPISODES))]
    found = unpack(pack(EPISODES, width=50, rows=4, segments=3, update=update))
    assert sorted(found) == list(range(len(EPISODES)))
    for i, e in enumerate(EPISODES):
        assert found[i]['tokens'] == e.tokens and found[i]['acted'] == e.acted
        assert np.allclose(found[i]['logprobs'], e.logprobs)
        assert found[i]['positions'].tolist() == list(range(len(e.tokens)))
        assert found[i]['reward'] == e.reward.value and found[i]['update'] == update[i]


def test_rows_are_a_multiple_and_no_row_overflows():
    batch = pack(EPISODES, width=50, rows=4, segments=2)
    assert batch.tokens_BT.shape[0] % 4 == 0
    assert batch.segment_ids_BT.max() <= 2


def test_first_fit_uses_no_more_rows_than_one_above_the_tokens_need():
    lengths = np.random.default_rng(0).integers(3, 50, 200).tolist()
    rows = first_fit(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100
    assert len(rows) <= sum(lengths) / 100 * 1.1 + 1


def test_an_episode_longer_than_a_row_is_refused_by_name():
    with pytest.raises(ValueError, match='51 tokens, a row holds 50'):
        pack([episode(51)], width=50, rows=1, segments=1)


def test_joined_batches_know_their_rows_and_end_in_empty_ones():
    parts = [pack(EPISODES[:3], width=50, rows=2, segments=4), pack(EPISODES[3:], width=50, rows=2, segments=4)]
    whole, rows = join(parts)
    assert whole.tokens_BT.shape[0] == 2 ** int(np.log2(whole.tokens_BT.shape[0]))
    for part, (start, stop) in zip(parts, rows):
        assert (whole.tokens_BT[start:stop] == part.tokens_BT).all()
    assert not whole.segment_ids_BT[rows[-1][1] :].any() and not whole.update_BN[rows[-1][1] :].any()


@pytest.mark.parametrize('rows', [1, 3, 6, 10])
def test_joined_batches_are_filled_up_to_a_power_of_two_of_micro_batches(rows):
    parts = [pack(EPISODES[:n], width=50, rows=rows, segments=1) for n in (2, 3, 5)]
    whole, ends = join(parts, rows)
    count, rest = divmod(len(whole.tokens_BT), rows)
    assert rest == 0 and count == 2 ** int(np.log2(count)) and ends[-1][1] <= len(whole.tokens_BT) < 2 * ends[-1][1]


def asked(prompt, *lengths):
    """Episodes of one prompt."""
    made = []
    for i, length in enumerate(lengths):
        one = episode(2 + length, seed=100 * len(prompt) + i)
        one.tokens[:2], one.acted[:2], one.logprobs[:2] = prompt, [False] * len(prompt), [0.0] * len(prompt)
        one.prompt_length = len(prompt)
        made.append(one)
    return made


def check_shared(episodes, batch, beginning):
    """Every episode comes out of its row's beginning and its own segment; `beginning`: tokens of each's beginning,
    where it is not alone with it."""
    seen = set()
    for r, (ids, prefixes) in enumerate(zip(batch.segment_ids_BT, batch.prefix_ids_BT)):
        for n in np.unique(ids[(ids > 0) & (ids <= batch.reward_BN.shape[1])]):
            i = int(batch.group_BN[r, n - 1])
            own = np.flatnonzero(ids == n)
            before = np.flatnonzero(ids == prefixes[own[0]]) if prefixes[own[0]] != n else own[:0]
            alike = [j for j in batch.group_BN[r] if j >= 0 and episodes[j].tokens[:2] == episodes[i].tokens[:2]]
            assert len(before) == (beginning[i] if len(alike) > 1 else 0)
            assert (before < own[0]).all() and len(set(prefixes[own])) == 1
            where = [*before, *own]
            assert batch.tokens_BT[r][where].tolist() == episodes[i].tokens
            assert batch.positions_BT[r][where].tolist() == list(range(len(where)))
            assert batch.acted_BT[r][where].tolist() == episodes[i].acted
            assert np.allclose(batch.sampler_logprob_BT[r][where], episodes[i].logprobs)
            seen.add(i)
        shared = ids > batch.reward_BN.shape[1]
        assert (prefixes[shared] == ids[shared]).all() and not batch.acted_BT[r][shared].any()
    assert seen == set(range(len(episodes)))


def test_a_prompt_of_several_samples_lies_once_in_a_row_but_for_its_last_token():
    episodes = asked(list(range(1, 21)), 9, 5, 7, 3) + asked(list(range(40, 50)), 4, 6) + asked([7, 8, 9], 5)
    batch = pack(episodes, width=60, rows=1, segments=4, share=True)
    check_shared(episodes, batch, [19] * 4 + [9] * 2 + [0])
    assert (batch.segment_ids_BT > 0).sum() == 19 + 4 + 24 + 9 + 2 + 10 + 3 + 5  # each keeps a token of its prompt
    narrow = pack(episodes, width=40, rows=1, segments=4, share=True)  # a beginning lies in each row that needs it
    assert (narrow.segment_ids_BT > 4).any(axis=1).sum() > 1


def test_prompts_of_different_problems_share_what_they_begin_with():
    common = list(range(1, 13))
    episodes = [asked([*common, 50 + i, 60 + i], 4 + i)[0] for i in range(5)]
    batch = pack(episodes, width=60, rows=1, segments=5, share=True)
    check_shared(episodes, batch, [12] * 5)
    assert len(batch.tokens_BT) == 1 and (batch.segment_ids_BT > 0).sum() == 12 + 5 * 2 + 4 + 5 + 6 + 7 + 8


def test_rows_that_hold_too_many_episodes_are_split_with_their_beginning():
    episodes = asked(list(range(1, 9)), *[2] * 7)
    batch = pack(episodes, width=60, rows=1, segments=3, share=True)
    check_shared(episodes, batch, [7] * 7)
    assert len(batch.tokens_BT) == 3 and batch.segment_ids_BT.max() == 4


def test_where_nothing_is_shared_a_segment_goes_on_from_itself():
    for episodes in (EPISODES, [episode(5)], []):
        batch = pack(episodes, width=50, rows=2, segments=3, share=True)
        plain = pack(episodes, width=50, rows=2, segments=3)
        assert (batch.prefix_ids_BT == batch.segment_ids_BT).all() and plain.prefix_ids_BT is None
        assert (batch.tokens_BT == plain.tokens_BT).all() and (batch.segment_ids_BT == plain.segment_ids_BT).all()
    assert beginnings([]).family == []


def test_joined_batches_keep_what_goes_on_from_what():
    parts = [pack(asked([1, 2, 3], 4, n), width=20, rows=1, segments=2, share=True) for n in (2, 3, 4)]
    whole, rows = join(parts)
    assert len(whole.tokens_BT) == 4 and not whole.prefix_ids_BT[3].any()
    for part, (start, stop) in zip(parts, rows):
        assert (whole.prefix_ids_BT[start:stop] == part.prefix_ids_BT).all()
