"""The user's mistakes: the error that the door of every binary prints as one line, and near misses of a word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user can mend: `core.cli` prints its text as one line and exits 2."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns ' (did you mean X?)', or '' where nothing is near."""
    words = list(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if not close:  # a right last word below a wrong block
        tail = word.rsplit('.', 1)[-1]
        tails = {w.rsplit('.', 1)[-1]: w for w in reversed(words)}
        close = [tails[t] for t in difflib.get_close_matches(tail, tails, n=1, cutoff=0.75)]
    return f' (did you mean {close[0]}?)' if close else ''
