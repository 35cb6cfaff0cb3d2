"""Pointers in the place of contents are named."""

import pytest

from retool_jax.core import pointers
from retool_jax.core.errors import UserError

LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n'


@pytest.mark.parametrize(
    'content, words',
    [
        (LFS, 'is a pointer of Git LFS, .* run `git lfs pull`'),
        (b'/annex/objects/SHA256E-s9--0123.parquet\n', 'is a pointer of git-annex, .* run `git annex get`'),
    ],
)
def test_a_pointer_is_refused_in_one_line_that_names_the_file(tmp_path, content, words):
    (tmp_path / 'a.parquet').write_bytes(content)
    with pytest.raises(UserError, match=rf'{tmp_path}/a\.parquet {words}') as caught:
        pointers.refuse(tmp_path / 'a.parquet')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [b'', b'v', b'{"version https://git-lfs": 1}', b'\x00' * 40])
def test_other_files_pass(tmp_path, content):
    (tmp_path / 'a').write_bytes(content)
    pointers.refuse(tmp_path / 'a')
    pointers.refuse(tmp_path / 'absent')
