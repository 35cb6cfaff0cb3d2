"""The child process of `gym`: makes reasoning_gym's problems, and judges answers by a data set's own verifier.

Only a score of 1.0 is right. An exception, a timeout and a death are wrong, and while a verifier runs, compiling a
text, starting a process, opening a socket or a file for writing ends the worker: no answer is ever a program.
Run as `python -m retool_jax.tasks.gym_child MEMORY_MB TIME_LIMIT_S`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import re
import sys
import typing
import warnings

from retool_jax.tasks import child, gym

_NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?')
_NOT_A_NUMBER = re.compile(r'(?<![a-z])(?:nan|inf(?:inity)?)(?![a-z])', re.IGNORECASE)  # which compare in odd ways
_FORBIDDEN = ('os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.startfile',
              'os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.kill', 'os.putenv', 'subprocess.Popen',
              'socket.__new__', 'ctypes.dlopen', 'shutil.rmtree', 'pty.spawn', 'webbrowser.open')  # fmt: skip
_judging = False


def main() -> None:
    """Answers the messages of `gym` and `grader`; says {'ready'} first."""
    memory_mb, time_limit_s = int(sys.argv[1]), float(sys.argv[2])
    warnings.simplefilter('ignore')
    sys.addaudithook(_watch)

    def answer(message: dict) -> dict:
        task = message.pop('do')
        try:
            return _TASKS[task](time_limit_s=time_limit_s, **message)
        except Exception as e:
            return {'fault': f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'}

    child.serve(answer, functools.partial(__import__, 'reasoning_gym'), memory_mb)


def check(name: str, parameters: dict, **_) -> dict:
    """Whether there is such a data set under such parameters, and the template of each index."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        return {'names': [known for known in DATASETS if known not in gym.REFUSED]}
    kinds = {key: kind for key, kind in typing.get_type_hints(DATASETS[name][1]).items() if key not in ('seed', 'size')}
    for key, value in parameters.items():
        if key not in kinds:
            return {'parameters': list(kinds), 'unknown': key}
        if not _fits(value, kinds[key]):
            return {'fault': f'{key}={value!r} is no {getattr(kinds[key], "__name__", kinds[key])}'}
    try:
        dataset = open_dataset(name, json.dumps(parameters))
    except AssertionError as e:
        return {'fault': f'refused by {name}: {" ".join(str(e).split()) or "a parameter is out of its range"}'}
    templates = getattr(dataset, 'task_indices', None)
    return {'templates': None if templates is None else list(map(int, templates))}


def make(name: str, parameters: dict, indices: list[int], **_) -> dict:
    """Items by index; None for one without a text as its answer, or whose own verifier refuses it."""
    key = json.dumps(parameters)
    return {'items': [_item(name, key, index) for index in indices]}


def score(name: str, parameters: dict, index: int, answer: str, time_limit_s: float) -> dict:
    """Whether the data set's verifier gives an answer the whole score."""
    key = json.dumps(parameters)
    found = entry(name, key, index)
    form = re.compile(gym.VERIFIED.get(name, '.*'), re.IGNORECASE | re.DOTALL)
    with child.limited(time_limit_s):
        odd = _NOT_A_NUMBER.search(answer) and not _NOT_A_NUMBER.search(str(found['answer']))
        if odd or not form.fullmatch(answer.strip()):
            return {'equal': False}
        return {'equal': _right(open_dataset(name, key), found, answer)}


@functools.lru_cache(maxsize=64)
def open_dataset(name: str, parameters: str):
    """A data set by its name and its parameters as JSON."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=gym.SEED, size=gym.SPAN, **json.loads(parameters))


@functools.lru_cache(maxsize=1024)
def entry(name: str, parameters: str, index: int) -> dict:
    """One item as the library makes it, in every process alike."""
    random.seed(f'{gym.SEED}/{index}')  # list_functions draws from the module's own generator
    return open_dataset(name, parameters)[index]


def _item(name: str, parameters: str, index: int) -> dict | None:
    dataset, found = open_dataset(name, parameters), entry(name, parameters, index)
    gold = found['answer']
    if not isinstance(found['question'], str) or not isinstance(gold, str) or not gold.strip():
        return None
    if name in gym.VERIFIED:
        judge = 'verifier'
    elif name in gym.MATHEMATICS or (name not in gym.SPELLED and _NUMBER.fullmatch(gold)):
        judge = ''
    else:
        judge = 'text'
    if judge == 'verifier' and not _right(dataset, found, gold):
        return None
    templates = getattr(dataset, 'task_indices', None)
    worked = found['metadata'].get('answer_cot')
    return {
        'question': found['question'],
        'answer': gold,
        'judge': judge,
        'template': None if templates is None else int(templates[index]),
        'worked': worked if isinstance(worked, str) and worked.strip() else None,
    }


def _right(dataset, found: dict, answer: str) -> bool:
    global _judging
    found = copy.deepcopy(found)  # some verifiers write into it
    _judging = True
    try:
        given = dataset.score_answer(answer, found)
    except Exception:  # MemoryError and RecursionError among them
        return False
    finally:
        _judging = False
    return not isinstance(given, str) and given is not None and float(given) == 1.0


def _watch(event: str, arguments: tuple) -> None:
    """Ends the worker where a verifier does what no verifier needs to do."""
    if not _judging:
        return
    compiles = event == 'compile' and arguments[0] is not None and str(arguments[1]).startswith('<')
    writes = event == 'open' and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if compiles or writes or event in _FORBIDDEN:
        os._exit(1)


def _fits(value: object, kind: object) -> bool:
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True  # lists, tuples and choices: the data set's own check has to do


_TASKS = {'check': check, 'make': make, 'score': score}

if __name__ == '__main__':
    main()
