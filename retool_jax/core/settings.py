"""From configuration blocks to frozen dataclasses, and what differs between two configurations."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import io
import os
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from retool_jax.core.errors import UserError, nearest

LIMIT = 1e30  # numbers beyond it, infinities and NaN are no value of any key: float32 ends at 3.4e38
ABSENT = '(absent)'  # stands for the value of a key that one of two configurations lacks


def build[T](kind: type[T], block: ConfigDict | Mapping[str, Any], name: str = '') -> T:
    """Builds the dataclass `kind` from a block with exactly its fields, nested dataclasses included.

    Types are checked, never guessed: an int is taken for a float, a list for a tuple, a string for
    the Enum member of that value, and nothing else is converted. `name` is the block's dotted key,
    for messages.

    Raises:
      UserError: a key unknown or missing, a value of another type (the dotted key is named), or what the
        dataclass's own __post_init__ refused, which begins with the name of a field; further fields of the same
        block stand in it as `./NAME`.
    """
    if not isinstance(block, (ConfigDict, Mapping)):
        raise UserError(f'config key {name}: expected a block of keys, got {block!r}')
    hints = _hints(kind)
    fields = [f.name for f in dataclasses.fields(kind) if f.init]
    for key in block:
        if key not in fields:
            raise UserError(f'unknown config key {_join(name, key)!r}{nearest(key, fields)}')
    values = {}
    for key in fields:
        if key not in block:
            raise UserError(f'config key {_join(name, key)!r} is missing')
        try:
            value = block[key]
        except config_dict.RequiredValueError:
            raise UserError(f'{_join(name, key)} must be given: --config.{_join(name, key)}=VALUE') from None
        values[key] = _convert(hints[key], value, _join(name, key))
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(_join(name, str(error)).replace(' ./', f' {_join(name, "")}')) from error


def words(kind: type) -> dict[str, str]:
    """What the source says of each field of a dataclass, for `--help`; '' where it says nothing.

    A field's words are the comments on lines of their own right above it and the one behind it. Fields of a base
    class are read there.

    Raises:
      OSError: the source is not at hand.
    """
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _comments(textwrap.dedent(inspect.getsource(base)))
    return {field.name: comments.get(field.name, '') for field in dataclasses.fields(kind)}


def keys(kind: type, name: str = '') -> dict[str, tuple[str, str]]:
    """{dotted key: (type, `words`)} of every field of a dataclass, those of nested dataclasses in their place."""
    hints, said = _hints(kind), words(kind)
    found: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(kind):
        key, hint = _join(name, field.name), hints[field.name]
        found |= keys(hint, key) if dataclasses.is_dataclass(hint) else {key: (_name(hint), said[field.name])}
    return found


def _comments(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {
        t.start[0]: (t.string.lstrip('# '), t.line.lstrip().startswith('#'))
        for t in tokens
        if t.type == tokenize.COMMENT
    }
    texts = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while said.get(first - 1, ('', False))[1]:
            first -= 1
        texts[node.target.id] = ' '.join(said[line][0] for line in range(first, node.end_lineno + 1) if line in said)
    return texts


def to_json(config: Any) -> Any:
    """Returns the same as plain dicts, lists, strings and numbers: ConfigDicts, dataclasses, tuples,
    enums and paths have their plain form. Raises: TypeError for anything else."""
    if isinstance(config, enum.Enum):
        return config.value
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(k): to_json(v) for k, v in config.items()}
    if isinstance(config, Sequence):
        return [to_json(v) for v in config]
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    raise TypeError(f'{type(config).__name__} has no plain form: {config!r}')


def differences(
    a: Any, b: Any, ignore: Sequence[str] = (), renamed: Mapping[str, str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted key: (in a, in b)} for every leaf that differs; ABSENT where one has no such key.

    Both are configurations or what `to_json` made of them. `ignore` names keys, or blocks with all
    that is below them. `renamed` gives keys of `a` that have another name in `b` that name.
    """
    now = renamed or {}
    a, b = {now.get(key, key): value for key, value in _leaves(to_json(a))}, dict(_leaves(to_json(b)))
    changed = {}
    for key in [*a, *(k for k in b if k not in a)]:
        if any(key == i or key.startswith(f'{i}.') for i in ignore):
            continue
        left, right = a.get(key, ABSENT), b.get(key, ABSENT)
        same = left == right and isinstance(left, bool) == isinstance(right, bool)
        if not same and not (left != left and right != right):  # NaN equals NaN here
            changed[key] = (left, right)
    return changed


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Writes `differences` on one line: 'key: left, now right; …'."""
    return '; '.join(f'{key}: {left!r}, now {right!r}' for key, (left, right) in changed.items())


def _leaves(node: Any, prefix: str = ''):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, _join(prefix, key))
    else:
        yield prefix, node


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _join(name: str, key: str) -> str:
    return f'{name}.{key}' if name else key


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, key)
            except ValueError:
                continue
        return _convert(options[-1], value, key)
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f'{key}={value!r}: expected one of {", ".join(map(repr, args))}')
    if dataclasses.is_dataclass(kind):
        return build(kind, value, key)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError:
            known = ', '.join(repr(m.value) for m in kind)
            raise UserError(f'{key}={value!r}: expected one of {known}') from None
    if origin is tuple and isinstance(value, (tuple, list)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f'{key}[{i}]') for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(a, v, f'{key}[{i}]') for i, (a, v) in enumerate(zip(args, value)))
        raise UserError(f'{key}={value!r}: expected {len(args)} entries')
    if origin in (dict, Mapping) and isinstance(value, (ConfigDict, Mapping)):
        return {k: _convert(args[1], value[k], _join(key, k)) for k in value}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _convert(float, float(value), key) if abs(value) < LIMIT else _convert(int, value, key)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    plain = origin or kind
    if isinstance(value, plain) and not (isinstance(value, bool) and plain in (int, float)):
        if value == '' or (plain in (int, float) and not abs(value) < LIMIT):
            raise UserError(f'{key}={value!r}: {"must not be empty" if value == "" else "must be a finite number"}')
        return value
    raise UserError(f'{key}={value!r}: expected {_name(kind)}, got {type(value).__name__}')


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
