"""The one door of every binary: flags in, one line and exit 2 out where the user is at fault.

A launch file ends in `cli.run(main, STAGE)`. Flags are absl's, the configuration is an ml_collections file:
`python launch/ppo.py --config=configs/ppo.py:tiny --config.ppo.clip=0.2`. Where the package is installed the same
binary is `retool-ppo`, and `configs/` is part of it unless the current folder has its own.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_dict, config_flags

from retool_jax.core import settings, signals, streams
from retool_jax.core.errors import UserError, nearest
from retool_jax.core.signals import Terminated

ROOT = Path(__file__).resolve().parents[2]
TRACEBACK = 'RETOOL_TRACEBACK'  # environment variable: 1 prints the traceback of a user's error too

HELP_WIDTH = 100  # characters of a line
LONG_S = 30.0  # in which a process has told the others that it ends

_OVERRIDE = re.compile(r'--?(?P<no>no)?config\.(?P<key>[^=]+)(?:=(?P<value>.*))?$', re.DOTALL)
_ASIDE = ('retool_jax', 'absl', 'ml_collections')  # modules whose flags --help leaves out
# Errors of the operating system that the user can mend: files, disks and ports.
_OUTSIDE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EISDIR,
    errno.ENOTDIR, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENAMETOOLONG,
}  # fmt: skip

_SERVER = ('starlette', 'uvicorn', 'pydantic', 'prometheus_client', 'httpx')  # libraries of an extra of setup.py

# Finalisers, and JAX's callback of the garbage collector: Python prints what they raise and goes on.
_SWALLOWING = ('__del__', '_xla_gc_callback')


def run(main: Callable[[Any], None], stage: str, *, default_config: str | None = None) -> None:
    """Parses the command line, calls `main` with the stage that it describes and ends the process.

    Exit status: 0; 1 with a traceback for a fault of ours; 2 with one line for a fault of the user
    (see `explain`); 130 and 143 with one line after Ctrl-C and SIGTERM; 141 without a word where nobody reads on.
    Of several processes one that fails ends all of them with its status; 75 where one died without a word.

    stage: the dataclass that the configuration becomes, 'package.module:Name', imported when it is needed.
    default_config: 'configs/NAME.py:ARG', used where --config is not given.
    """

    def body(argv: list[str]) -> None:
        config = parse_config(argv, default_config)
        main(settings.build(pkgutil.resolve_name(stage), config))

    _run(body, main, stage)


def run_plain(main: Callable[[], None], bare: Sequence[str] = ()) -> None:
    """`run` for a binary with flags of its own and no configuration file.

    bare: the flags that arguments without a name stand for, in this order.
    """
    _run(lambda argv: (parse_flags(argv, bare=bare), main())[1], main)


def command() -> str:
    """The command line of this process, as one can paste it into a shell."""
    script = Path(sys.argv[0])
    if script.suffix != '.py':  # a console script
        return shlex.join([script.name, *sys.argv[1:]])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join(['python', str(script), *sys.argv[1:]])


def parse_config(argv: list[str], default_config: str | None = None) -> ConfigDict:
    """Loads the file of `--config=PATH[:ARG]`, applies every `--config.key=value`, locks the result.

    Args:
      argv: the command line, program first. Other flags must have been defined with absl.
      default_config: PATH[:ARG] where --config is absent; None makes the flag necessary.

    Raises:
      UserError: no such file, ARG, key, or a value of another type.
    """
    argv, given = _take_config(argv)
    if given is None and default_config is None:
        raise UserError(f'--config is missing; give --config=configs/NAME.py:ARG, one of: {_known_configs()}')
    config = load_config(given or default_config)
    keys = flatten(config)
    for argument in argv[1:]:
        if argument == '--':
            break
        if match := _OVERRIDE.match(argument):
            _check_key(config, keys, match['key'])
    for name in [n for n in flags.FLAGS if n == 'config' or n.startswith('config.')]:
        delattr(flags.FLAGS, name)  # a second parse in one process starts afresh
    config_flags.DEFINE_config_dict('config', config, sys_argv=argv)
    parse_flags(argv, keys)
    return config


def parse_flags(argv: list[str], keys: dict[str, object] | None = None, bare: Sequence[str] = ()) -> None:
    """Parses absl flags; what is unknown or of a wrong type is a UserError.

    `keys` are the configuration's, as `flatten` gives them, to name the type that was expected. bare: `run_plain`.
    """
    try:
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        match = re.match(r'flag --config\.([\w.]+)=(.*?): ', str(error), re.DOTALL)
        if match and keys and match[1] in keys:
            kind = keys[match[1]].__name__
            raise UserError(f'--config.{match[1]}={match[2]}: expected {_article(kind)}') from None
        raise UserError(_one_line(error)) from None
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    unnamed = [name for name in bare if not flags.FLAGS[name].present]
    if len(rest) > 1 + len(unnamed):
        raise UserError(f'unexpected argument {rest[1 + len(unnamed)]!r}; flags are written --name=value')
    for name, value in zip(unnamed, rest[1:]):
        flags.FLAGS[name].value = value


def load_config(spec: str) -> ConfigDict:
    """Returns the locked `get_config(ARG)` of 'PATH[:ARG]'; PATH is relative to here, or one of this project's.

    Raises:
      UserError: no such file, or one that gives no configuration for ARG.
    """
    path, colon, arg = spec.partition(':')
    file = _find(path)
    _name_configs(file)
    loader = importlib.util.spec_from_file_location(f'{file.stem}_config', file)
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f'config file {error.filename}:{error.lineno}: {error.msg}') from None
    if not hasattr(module, 'get_config'):
        raise UserError(f'config file {path} defines no get_config(arg)')
    signature = inspect.signature(module.get_config)
    try:
        signature.bind(*([arg] if colon else []))
    except TypeError:
        remedy = 'takes no ARG: leave the colon out' if colon else f'needs an ARG: --config={path}:ARG'
        raise UserError(f'config file {path} {remedy}') from None
    try:
        config = module.get_config(*([arg] if colon else []))
    except ValueError as error:
        raise UserError(f'--config={spec}: {error}') from error
    if not isinstance(config, ConfigDict):
        raise UserError(f'config file {path}: get_config returned {type(config).__name__}, not a ConfigDict')
    config.lock()
    return config


def config_folder() -> Path:
    """The folder of this project's configurations: beside the package in a checkout, inside it once installed."""
    inside = ROOT / 'retool_jax' / '_configs'
    return inside if inside.is_dir() else ROOT / 'configs'


def flatten(config: ConfigDict, prefix: str = '') -> dict[str, type]:
    """Returns {dotted key: type} of every leaf."""
    leaves = {}
    for key in config:
        kind = config.get_type(key)
        if issubclass(kind, ConfigDict):
            leaves |= flatten(config[key], f'{prefix}{key}.')
        else:
            leaves[f'{prefix}{key}'] = kind
    return leaves


def explain(error: BaseException) -> str | None:
    """Returns the one line for an error that the user can mend, None for one of ours.

    The user's are: a UserError, an OSError about files, disks and ports, and a library of an extra that is not
    installed. Any other error is a fault of ours and keeps its traceback.
    """
    if isinstance(error, UserError):
        return _one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _SERVER:
        return f"{error.name} is not installed; it comes with the extra `server`: pip install 'retool_jax[server]'"
    if isinstance(error, OSError) and error.errno in _OUTSIDE:
        where = ' → '.join(repr(str(f)) for f in (error.filename, error.filename2) if f is not None)
        return f'{where}: {error.strerror}' if where else _one_line(error)
    return None


def tell(error: Exception) -> int:
    """Says `explain`'s line of an error on stderr; returns the exit status, 2.

    Raises: the error itself, where it is one of ours.
    """
    line = explain(error)
    if line is None:
        raise error
    print(f'error: {line}', file=sys.stderr)
    return 2


@streams.ends_unread()
def _run(body: Callable[[list[str]], None], main: Callable, stage: str | None = None) -> None:
    with contextlib.ExitStack() as stack:
        try:
            if threading.current_thread() is threading.main_thread():
                signals.listen(_stop)
                stack.enter_context(signals.Watch(signals.grace()))
            if any(a in ('-h', '--help', '--helpfull') for a in sys.argv[1:]):
                _help(main, stage)
                sys.exit(0)
            logging.use_absl_handler()
            body(sys.argv)
            _leave(0)
        except KeyboardInterrupt as stop:
            by_term = isinstance(stop, Terminated)
            line = str(stop) or ('stopped by SIGTERM' if by_term else 'interrupted')
            _say(line)
            _leave(143 if by_term else 130, line.partition('\n')[0])
        except Exception as error:
            line = explain(error)
            if line is None:
                _leave(streams.UNREAD if isinstance(error, BrokenPipeError) else 1, _one_line(error), unexpected=True)
                raise
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            _say(f'error: {line}')
            _leave(2, f'error: {line}')
        sys.exit(0)


def _leave(status: int, line: str = '', unexpected: bool = False) -> None:
    """Ends the process, unless all is well or a traceback is due; of several processes the others hear of it first."""
    watch = signals.watch
    if watch is not None and watch.farewell is not None:
        signals.ignore()  # the work is over, and whoever starts processes tells all to stop where one ends
        if status:
            watch.end_within(LONG_S, status, line)
        watch.farewell(status, line, traceback.format_exc() if unexpected else '')
        if status:
            signals.end(status)  # the interpreter's own end would wait for the others
    if status and not unexpected:
        sys.exit(status)


def _stop(number: int, frame) -> None:
    """Ends the main thread's work by an exception; where Python would swallow it, a moment later."""
    while frame is not None:
        if frame.f_code.co_name in _SWALLOWING:
            again = threading.Timer(0.01, signals.again, (number,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise signals.stop(number)


def _say(line: str) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())


def _article(kind: str) -> str:
    return f'an {kind}' if kind[0] in 'aeiou' else f'a {kind}'


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Splits `--config=SPEC` or `--config SPEC` off; the last one counts."""
    rest, given, i = [], None, 0
    while i < len(argv):
        if argv[i] == '--':
            return rest + argv[i:], given
        if argv[i] in ('--config', '-config'):
            if i + 1 == len(argv):
                raise UserError('--config needs a value: --config=configs/NAME.py:ARG')
            given, i = argv[i + 1], i + 1
        elif argv[i].startswith(('--config=', '-config=')):
            given = argv[i].split('=', 1)[1]
        else:
            rest.append(argv[i])
        i += 1
    return rest, given


def _find(path: str) -> Path:
    given = Path(path)
    ours = config_folder().joinpath(*given.parts[1:]) if given.parts[:1] == ('configs',) else given
    for file in (given, ours):
        if file.is_file():
            return file.resolve()
    raise UserError(f'config file not found: {path!r}{nearest(path, _known_configs().split(", "))}')


def _name_configs(file: Path) -> None:
    """Makes `from configs import base` find the neighbours of a configuration file, and this project's behind them:
    no path of modules holds a `configs`."""
    package = sys.modules.setdefault('configs', types.ModuleType('configs'))
    neighbours = [str(file.parent)] if file.parent.name == 'configs' else []
    package.__path__ = list(dict.fromkeys([*neighbours, str(config_folder()), *getattr(package, '__path__', ())]))


def _known_configs() -> str:
    names = sorted(p.name for p in config_folder().glob('*.py') if p.name not in ('__init__.py', 'base.py', 'cards.py'))
    return ', '.join(f'configs/{n}' for n in names)


def _check_key(config: ConfigDict, keys: dict[str, type], key: str) -> None:
    if key in keys:
        return
    node = config
    for part in key.split('.'):
        node = node[part] if isinstance(node, ConfigDict) and part in node else None
    if isinstance(node, ConfigDict):
        raise UserError(f'--config.{key} is a block; set one of its keys: {", ".join(sorted(node))}')
    raise UserError(f'unknown config key {key!r}{nearest(key, keys)}')


def _help(main: Callable, stage: str | None) -> None:
    module = sys.modules[main.__module__]
    print((module.__doc__ or '').strip() + '\n')
    for name, own in sorted(flags.FLAGS.flags_by_module_dict().items()):
        if name.split('.')[0] not in _ASIDE or name == main.__module__:
            for flag in sorted(own, key=lambda f: f.name):
                print(f'  --{flag.name}={flag.default}\n      {flag.help}')
    if stage is None:
        return
    keys = settings.keys(pkgutil.resolve_name(stage))
    _, given = _take_config(sys.argv)
    if given is None:
        print(f'  --config=PATH:ARG\n      One of: {_known_configs()}; with --help it gives its values.')
        for key, (kind, words) in keys.items():
            _explain_key(f'{key}=…', kind, words)
        return
    config = load_config(given)
    print(f'  --config={given}')
    for key in flatten(config):
        holder, _, leaf = key.rpartition('.')
        block = config
        for part in filter(None, holder.split('.')):
            block = block[part]
        try:
            value = repr(block[leaf])
        except config_dict.RequiredValueError:
            value = '(must be given)'
        # A table's words stand beside the table: mix.easy has those of mix.easy.code.
        own = block.get_type(leaf).__name__, keys.get(holder, ('', ''))[1]
        _explain_key(f'{key}={value}', *keys.get(key, own))


def _explain_key(flag: str, kind: str, words: str) -> None:
    print(f'  --config.{flag}  ({kind})')
    if words:
        print(textwrap.fill(words, HELP_WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6))
