"""Runs one snippet inside the jail and ends the process as the interpreter would have ended.

Standard library alone. Both paths use it: the warm one in a sealed fork of the zygote, the cold
one in an interpreter of its own. What it reads from `channel` comes from the supervisor; nothing
it writes decides a verdict. The snippet may replace whatever it can reach, so what comes after it
goes by names of its own and ends the process however that fares.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import gc
import importlib
import io
import linecache
import os
import random
import resource
import signal
import socket
import sys
import threading
import traceback
import types

import protocol

CELL = '<cell>'
PENDING_SIGNALS = 1024  # RLIMIT_SIGPENDING, which nsjail cannot set
# What a snippet does to the builtins that it shares with every module stays out of this file.
__builtins__ = vars(builtins).copy()
_leave = os._exit


def preload(names: list[str]) -> None:
    """Imports what snippets find ready; the same in both paths, so that they start from one state."""
    for name in names:
        importlib.import_module(name)
    if 'numpy' in names:
        import numpy.linalg
        import numpy.random  # noqa: F401
    here = os.path.dirname(__file__)
    for name, module in list(sys.modules.items()):  # the names of these files are free for the snippet's own
        if os.path.dirname(getattr(module, '__file__', None) or '') == here:
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # keeps the collector's hands off pages shared with the zygote


def receive(channel: socket.socket) -> dict:
    """Says that this process is ready, waits for the one request, closes the channel."""
    gc.collect()  # little is left unfrozen; the collector's count starts alike for every snippet
    box = os.open('/box', os.O_RDONLY | os.O_DIRECTORY)
    socket.send_fds(channel, [protocol.SEALED], [box])  # the supervisor fetches files through it, after the end
    os.close(box)
    with channel, channel.makefile('rb') as stream:
        return protocol.read(stream)


def execute(request: dict) -> None:
    """Executes the request's code as `__main__` and never returns, nor raises."""
    leave, status = _leave, 1  # the snippet may replace what other names mean
    try:
        try:
            _open_streams(request['stdin'], request['files'])
            resource.setrlimit(resource.RLIMIT_AS, (request['address_bytes'],) * 2)
            # A backstop for a single process; the whole snippet's CPU time is billed from outside.
            resource.setrlimit(resource.RLIMIT_CPU, (int(request['cpu_s']) + 2,) * 2)
            _seed(request['seed'])
            status = _finish(_run(request.pop('code'), request['echo']))
        finally:
            leave(status)
    finally:  # a trace or profile function that raises at the call above is unset by that
        leave(status)


def _open_streams(stdin: bytes, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = os.path.normpath(os.path.join('/box', name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(content)
    if stdin:  # a file without a name: every name is the snippet's
        with open(os.open('/box', os.O_TMPFILE | os.O_RDWR, 0o600), 'wb+') as file:
            file.write(stdin)
            file.seek(0)
            os.dup2(file.fileno(), 0)
    sys.stdin = sys.__stdin__ = open(0, encoding='utf-8', errors='surrogateescape', closefd=False)  # noqa: SIM115
    # One write per line: a killed snippet keeps what it printed.
    sys.stdout = sys.__stdout__ = _writer(1, 'strict')
    sys.stderr = sys.__stderr__ = _writer(2, 'backslashreplace')


def _writer(descriptor: int, errors: str) -> io.TextIOWrapper:
    return open(descriptor, 'w', buffering=1, encoding='utf-8', errors=errors, closefd=False)


def _seed(seed: int) -> None:
    """Seeds every generator that the preload may have made: forks would share their state."""
    random.seed(seed)
    if 'numpy' in sys.modules:
        sys.modules['numpy'].random.seed(seed % 2**32)
    if 'sympy' in sys.modules:
        sys.modules['sympy.core.random'].seed(seed)


def _run(code: bytes, echo: bool) -> int:
    """Runs the code and returns the status that it asks for."""
    try:
        _run_code(code, echo)
        return 0
    except SystemExit as error:
        exit_ = error  # its text is made below, lest an error in that have this one for a context
    except BaseException as error:
        _show(error)
        return 1
    return _exit_status(exit_)


def _run_code(code: bytes, echo: bool) -> None:
    text = code.decode('utf-8', 'surrogatepass').removeprefix('\ufeff')
    # Python's line ends (str.splitlines knows seven more), and one at the end, without which carets are misplaced.
    lines = [line.removesuffix('\n') + '\n' for line in io.StringIO(text, newline=None)]
    linecache.cache[CELL] = (len(text), None, lines, CELL)
    main = types.ModuleType('__main__')
    main.__builtins__ = builtins
    sys.modules['__main__'] = main
    sys.argv = [CELL]
    sys.path[:] = ['/box', *(p for p in sys.path if p not in ('', '/box', '/runner'))]
    last = None
    if echo:
        tree = ast.parse(text, CELL)
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = compile(ast.Expression(tree.body.pop().value), CELL, 'eval', dont_inherit=True)
        program = compile(tree, CELL, 'exec', dont_inherit=True)
    else:
        program = compile(text, CELL, 'exec', dont_inherit=True)
    exec(program, main.__dict__)
    if last is not None:
        value = eval(last, main.__dict__)
        if value is not None:
            print(repr(value))


def _exit_status(exit_: SystemExit) -> int:
    """The status of a SystemExit, whose code may be anything; a text goes to stderr, as the interpreter does it."""
    try:
        try:
            code = exit_.code
        except BaseException:
            code = exit_
        if code is None:
            return 0
        if issubclass(type(code), int):  # of a subclass no method is called
            code = int.__add__(code, 0)
            return code & 0xFF if -(2**63) <= code < 2**63 else 0xFF
        text = f'{code!s}\n'
        if sys.stderr is None:
            os.write(2, text.encode('utf-8', 'backslashreplace'))
        else:
            sys.stderr.write(text)
    except BaseException as error:
        _show(error)
    return 1


def _show(error: BaseException) -> None:
    """Prints the traceback without this file's frames, through the snippet's own hook if it set one."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals is globals():
        frames = frames.tb_next
    try:
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(error), error.with_traceback(frames), frames)
        else:
            traceback.print_exception(type(error), error.with_traceback(frames), frames)
    except BaseException as second:  # the snippet broke its hook, its stderr or its own exception
        with contextlib.suppress(BaseException):
            os.write(2, f'{type(error).__name__} (its traceback failed: {type(second).__name__})\n'.encode())


def _finish(status: int) -> int:
    """What the interpreter does on its way out, without the slow teardown of modules; returns the final status."""
    try:
        threading._shutdown()  # waits for threads that are no daemons
    except BaseException as error:
        _show(error)
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BaseException:
            status = status or 120  # CPython's own status for output it could not write
    return status


def run_cold(descriptor: int, out: int, err: int, names: list[str]) -> None:
    """The cold path's whole program: nsjail has set the limits, one snippet, the end.

    `out` and `err` become 1 and 2 here: until now those were nsjail's, and the dynamic loader's.
    """
    for given, standard in ((out, 1), (err, 2)):
        os.dup2(given, standard)
        os.close(given)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (PENDING_SIGNALS,) * 2)
    preload(names)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    execute(receive(socket.socket(fileno=descriptor)))
