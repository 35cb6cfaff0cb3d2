from retool_jax.core.errors import nearest


def test_a_near_word_is_named():
    words = ['loss.clip_low', 'loss.clip_high', 'ppo.steps']
    assert nearest('loss.clip_hi', words) == ' (did you mean loss.clip_high?)'


def test_a_right_last_word_below_a_wrong_block_is_found():
    assert nearest('a_block_far_away.clip_high', ['ppo.steps', 'loss.clip_high']) == ' (did you mean loss.clip_high?)'


def test_nothing_near_is_nothing():
    assert nearest('banana', ['ppo.steps']) == ''
