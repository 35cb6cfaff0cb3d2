"""How a snippet ends: the status and the words that CPython gives, and no frame of ours, whatever it has replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox import inside
from retool_jax.sandbox.job import Job

OK, ERROR = Verdict.OK, Verdict.ERROR
# name: (code, verdict, exit status, stdout, what stderr is or ends with)
ENDS = {
    'an exit whose text fails': (
        'class A:\n    def __str__(self): raise ValueError("no")\nraise SystemExit(A())',
        ERROR, 1, '', 'ValueError: no\n'),
    'an exit whose text exits': ('class A:\n    def __str__(self): raise SystemExit(0)\nraise SystemExit(A())',
                                 ERROR, 1, '', 'SystemExit: 0\n'),
    'an exit whose code fails': (
        'class E(SystemExit):\n    code = property(lambda s: 1 / 0)\nraise E("hey")', ERROR, 1, '', 'hey\n'),
    'an exit with stderr gone': ('import sys\nsys.stderr = None\nraise SystemExit("bye")', ERROR, 1, '', 'bye\n'),
    'an exit of a lying number': (
        'class N(int):\n    def __and__(self, o): return 0\n    __le__ = __and__\n    __add__ = __and__\n'
        'raise SystemExit(N(7))', ERROR, 7, '', ''),
    'an exit of a lying class': (
        'class N:\n    __class__ = int\n    def __str__(self): return "x"\nraise SystemExit(N())',
        ERROR, 1, '', 'x\n'),
    'an exit of a huge number': ('raise SystemExit(2 ** 70)', ERROR, 255, '', ''),
    'os._exit replaced': ('import os, sys\nprint("a")\nos._exit = lambda s: None\nsys.exit(0)', OK, 0, 'a\n', ''),
    'builtins replaced': (
        'import builtins, sys\nd = vars(builtins)\nfor n in [*d]: d[n] = None\nsys.exit(3)', ERROR, 3, '', None),
    'modules emptied': (
        'import builtins, sys\nkeep = (sys, builtins, sys.modules["__main__"])\nsys.stdout.write("a\\n")\n'
        'for m in list(sys.modules.values()):\n    if m not in keep: vars(m).clear()', None, None, 'a\n', None),
    'a trace function that raises at the end': (
        'import sys\ndef t(frame, event, arg):\n    raise ValueError\nframe = sys._getframe()\n'
        'while frame:\n    frame.f_trace = t\n    frame = frame.f_back\nprint("a")\nsys.settrace(t)',
        ERROR, 1, 'a\n', None),
    'a profile function that raises at the end': (
        'import sys\nprint("a")\ndef p(frame, event, arg):\n    if event == "c_call" and arg.__name__ == "_exit":\n'
        '        raise ValueError\nsys.setprofile(p)', OK, 0, 'a\n', ''),
    'an audit hook that refuses everything': (
        'import sys\nprint("a")\ndef h(*a): raise RuntimeError\nsys.addaudithook(h)', OK, 0, 'a\n', ''),
    'a storm of signals that raise': (
        'import signal\ndef f(*a): raise ValueError("late")\nprint("a")\nsignal.signal(signal.SIGALRM, f)\n'
        'signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)', None, None, 'a\n', None),
    'an exit handler that replaces the end': (
        'import atexit, os, sys\ndef f():\n    g = sys.modules["runner"].__dict__ if "runner" in sys.modules else {}\n'
        '    for n in ("_finish", "_leave", "os", "_show"): g[n] = None\n    os._exit = None\n'
        'atexit.register(f)\nprint("a")', OK, 0, 'a\n', ''),
    'a line separator in a string': ('x = "a\u2028b\x85c"\n1 / 0', ERROR, 1, '',
                                     'File "<cell>", line 2, in <module>\n    1 / 0\n    ~~^~~\n'
                                     'ZeroDivisionError: division by zero\n'),
    'a form feed in a comment': ('# a\x0cb\x1cc\n1 / 0', ERROR, 1, '', 'line 2, in <module>\n    1 / 0\n    ~~^~~\n'
                                 'ZeroDivisionError: division by zero\n'),
    'carriage returns as line ends': ('x = 1\r1 / 0\r\n', ERROR, 1, '', 'line 2, in <module>\n    1 / 0\n    ~~^~~\n'
                                      'ZeroDivisionError: division by zero\n'),
}  # fmt: skip


@pytest.mark.parametrize('path', ['warm', pytest.param('cold', marks=pytest.mark.slow)])
def test_a_snippet_ends_as_the_interpreter_would_end_it(path, pools):
    pool = pools(path)
    for name, (code, verdict, status, out, err) in ENDS.items():
        result = pool.submit(code).result(60)
        told = (name, result)
        assert result.verdict is (verdict or result.verdict) and result.verdict is not Verdict.SANDBOX_ERROR, told
        assert result.exit_code == status or status is None, told
        assert result.stdout == out and '/runner/' not in result.stderr, told
        if err is not None:
            assert result.stderr.endswith(err) and (err or not result.stderr), told
        assert pool.submit('print(6 * 7)').result(60).stdout == '42\n', name
    assert pool.stats()['retried'] == 0


@pytest.mark.parametrize('path', ['warm', 'cold'])
def test_a_snippet_may_call_its_own_files_what_the_jails_are_called(path, pools):
    names = [file.stem for file in Path(inside.__path__[0]).glob('[a-z]*.py')]
    code = f'import {", ".join(names)}\nprint({", ".join(f"{name}.mine" for name in names)})'
    files = {f'{name}.py': f'mine = {i}'.encode() for i, name in enumerate(names)}
    result = pools(path).submit_job(Job(code=code, files=files)).result(120).result
    assert len(names) == 4 and (result.verdict, result.stdout) == (OK, '0 1 2 3\n'), result.stderr
