"""Problems that reasoning_gym generates, as sources by name and parameters: `reasoning_gym:chain_sum?max_terms=6`.

Item i of one of its data sets is made from seed + i, so neighbouring seeds hold the same problems shifted by one. Here
the seed is fixed, and a split is a range of indices: held-out problems come from the first RESERVED ones, training
problems from those behind them. A training problem whose question stands among the held-out ones is left out.

Items are made in a child process (`gym_child`) whose hash seed is fixed, because some data sets follow the order of a
set of strings. The library (0.1.25, Apache-2.0, extra `gym`) is never imported here.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from retool_jax.core.errors import UserError, nearest
from retool_jax.core.records import Problem
from retool_jax.tasks import solutions
from retool_jax.tasks.child import Child

PREFIX = 'reasoning_gym:'
SEED = 0
SPAN = 20_000  # indices of a data set; word_ladder takes no more
RESERVED = 1000  # of them, the first, that no training reads
HELD_OUT = 300  # problems of the held-out split
SIZE = 3000  # problems of the training split, where `size` says nothing
MEMORY_MB = 4096  # of a child, whose libraries alone map more than one GiB
BATCH = 16  # items asked for at once: some take a second each
TRAINING, EVALUATION = 'training', 'evaluation'

EVALUATES = 'its verifier runs what the answer says as a program'
NO_ANSWER = 'its problems come without an answer'
REFUSED = {
    **dict.fromkeys(
        ('spiral_matrix', 'string_insertion', 'binary_matrix', 'n_queens', 'countdown', 'puzzle24',
         'polynomial_multiplication', 'simple_integration', 'intermediate_integration'), EVALUATES),
    **dict.fromkeys(('boxnet', 'graph_color', 'propositional_logic', 'rubiks_cube', 'rush_hour'), NO_ANSWER),
    'game_of_life_halting': 'its verifier takes any text for right',
    'codeio': 'making its problems runs programs, some of which write files',
    'acre': 'what an index holds depends on how many problems are asked for',
    'composite': 'it mixes other data sets; name them as sources of their own',
}  # fmt: skip
# Several answers are right, so that the data set's own verifier has to say: it runs nothing and refuses what is wrong.
# (Those of complex_arithmetic and number_sorting score NaN as right.) An answer must be of the form given, whole, where
# the verifier takes the first thing that it can use.
VERIFIED = {
    **dict.fromkeys(
        ('cryptarithm', 'group_anagrams', 'jugs', 'knight_swap', 'palindrome_generation', 'palindrome_partitioning',
         'pool_matrix', 'power_function', 'prime_factorization', 'shortest_path', 'word_ladder'), r'.*'),
    'kakurasu': r'[01\s]+',
    'knights_knaves': r'(?:(?:and\s+)?[\w-]+ is an? [\w-]+[,.]?\s*)+',
    'quantum_lock': r'[A-C\s→]+',
    'sokoban': r'[LRUD\s]+',
    'tower_of_hanoi': r'(?:\s*Move disk \d+ from Peg \d+ to Peg \d+\.?\s*(?:\n|\Z))+',
}  # fmt: skip
MATHEMATICS = frozenset(('advanced_geometry', 'complex_arithmetic', 'dice', 'polynomial_equations'))  # beside numbers
# The equal number in another spelling is wrong, or the gold answer only looks like a decimal number.
SPELLED = frozenset(('fraction_simplification', 'base_conversion', 'bitwise_arithmetic'))


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set under its parameters, and which of its problems."""

    name: str
    parameters: dict[str, object]  # of the data set's configuration
    size: int = SIZE  # training problems
    held_out_templates: int = 0  # templates that training leaves to evaluation
    templates: str = 'trained'  # whose problems these are: those of templates 'trained' on, or of those 'held_out'


@dataclasses.dataclass(frozen=True)
class Item:
    """A problem with what its data set knows of it."""

    problem: Problem
    template: int | None  # of data sets that draw from templates
    worked: str | None  # a worked solution in words


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A split of a source, and what a person should hear of it, a line each."""

    items: list[Item]
    remarks: list[str]

    @property
    def problems(self) -> list[Problem]:
        return [item.problem for item in self.items]


def named(source: object) -> bool:
    """Whether a source is a generator's name and no file."""
    return isinstance(source, str | Path) and str(source).startswith(PREFIX)


def parse(source: str) -> Source:
    """The source that `reasoning_gym:NAME?PARAMETER=VALUE&…` names.

    Raises:
      UserError: for a form that is none, for a data set that is refused, and for values of the parameters that are
        not the data set's: `size` and `held_out_templates`, whole numbers, and `templates`, trained or held_out.
    """
    name, mark, query = source.removeprefix(PREFIX).partition('?')
    parameters = {}
    for pair in query.split('&') if mark else ():
        key, equals, value = pair.partition('=')
        if not (key and equals and value):
            raise UserError(f'{source}: {pair!r} is no parameter: write {PREFIX}{name}?parameter=value&parameter=value')
        if key in parameters:
            raise UserError(f'{source}: the parameter {key} stands there twice')
        parameters[key] = _value(value)
    if name in REFUSED:
        raise UserError(f'{source}: the data set {name} is refused: {REFUSED[name]}')
    if 'seed' in parameters:
        raise UserError(
            f'{source}: a seed is not given here, because neighbouring seeds hold the same problems; '
            'run.seed shuffles the training problems'
        )
    own = {field.name for field in dataclasses.fields(Source)} - {'name', 'parameters'}
    found = Source(
        name, {k: v for k, v in parameters.items() if k not in own}, **{k: v for k, v in parameters.items() if k in own}
    )
    for key, low, high in (('size', 1, SPAN - RESERVED), ('held_out_templates', 0, SPAN)):
        value = getattr(found, key)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f'{source}: {key}={value} must be a whole number of [{low}, {high}]')
    if found.templates not in ('trained', 'held_out'):
        raise UserError(f'{source}: templates={found.templates} is unknown; choose one of trained, held_out')
    if found.templates == 'held_out' and not found.held_out_templates:
        raise UserError(f'{source}: templates=held_out needs held_out_templates, how many are kept from training')
    return found


def read(source: str | Path, split: str, limit: int | None = None, child: Child | None = None) -> Drawn:
    """The problems of a source; split: TRAINING, or EVALUATION for the held-out ones.

    Their ids are NAME/INDEX, with /template_NUMBER behind it where there are templates; `judge` says who judges
    answers: '' where the gold answer is mathematics, 'text' where it is a text of one spelling, else the data set's
    own verifier. `limit` keeps the first ones; `child` is a `maker` that several sources share.

    Raises:
      UserError: one line, for whatever is wrong with the source; where the library is not installed; and where no
        problem is left.
    """
    source = str(source)
    found = parse(source)
    if split == TRAINING and found.templates == 'held_out':
        raise UserError(f'{source}: templates=held_out are never trained on: leave it out')
    if importlib.util.find_spec('reasoning_gym') is None:
        raise UserError(f"{source}: needs the package reasoning-gym: pip install 'retool_jax[gym]'")
    with contextlib.nullcontext(child) if child else maker() as child:
        indices = _split(source, found, _templates(source, found, child))
        wanted = HELD_OUT if limit is None or split == TRAINING else min(limit, HELD_OUT)
        held = _make(source, found, child, indices[EVALUATION], wanted)
        if split == EVALUATION:
            return _whole(source, held, [])
        asked = {item.problem.question for item in held if item}
        made = _make(source, found, child, indices[TRAINING])
    kept = [item for item in made if item is None or item.problem.question not in asked]
    remarks = []
    if len(kept) < len(made):
        remarks.append(
            f'{source}: {len(made) - len(kept)} of {len(made)} training problems ask what a held-out one '
            'asks and are left out'
        )
    drawn = _whole(source, kept, remarks)
    return dataclasses.replace(drawn, items=drawn.items[:limit])


def worked(source: str, limit: int | None = None, child: Child | None = None) -> list[tuple[Problem, str]]:
    """Training problems with worked solutions in words, for a cold start: those of the data set (gsm_symbolic has
    them), or, where a question asks for the value of an expression, its operations one by one.

    Raises UserError as `read` does, and for a data set without worked solutions.
    """
    told = [
        (item.problem, item.worked or solutions.in_words(item.problem))
        for item in read(source, TRAINING, limit, child).items
    ]
    pairs = [(problem, words) for problem, words in told if words]
    if not pairs:
        raise UserError(
            f'{source}: this data set has no worked solutions; gsm_symbolic has, and chain_sum, '
            'products, basic_arithmetic get them from their questions'
        )
    return pairs


def locate(judge: str) -> dict:
    """What `gym_child` needs to judge answers to one problem, of that problem's `judge`."""
    source, _, index = judge.rpartition('#')
    found = parse(source)
    return {'name': found.name, 'parameters': found.parameters, 'index': int(index)}


def kept_back(templates: Sequence[int], count: int) -> set[int]:
    """`count` of the numbers of templates, spread evenly over their order: the same ones in every run."""
    numbers = sorted(set(templates))
    return {numbers[i * len(numbers) // count] for i in range(count)}


# --- the child that makes them -------------------------------------------------------------------


@contextlib.contextmanager
def maker() -> Iterator[Child]:
    """A child that makes problems, started when first asked."""
    child = Child('retool_jax.tasks.gym_child', MEMORY_MB, 3600)
    try:
        yield child
    finally:
        child.kill()


def _templates(source: str, found: Source, child: Child) -> list[int] | None:
    """Which template each index is made from, None where there are none; UserError for a wrong name or parameter."""
    reply = child.ask({'do': 'check', 'name': found.name, 'parameters': found.parameters})
    if 'names' in reply:
        raise UserError(f'{source}: reasoning_gym has no data set {found.name!r}{nearest(found.name, reply["names"])}')
    if 'parameters' in reply:
        known = [*reply['parameters'], 'size', 'held_out_templates', 'templates']
        raise UserError(
            f'{source}: {found.name} has no parameter {reply["unknown"]!r}'
            f'{nearest(reply["unknown"], known)}; it has {", ".join(known)}'
        )
    if 'fault' in reply:
        raise UserError(f'{source}: {reply["fault"]}')
    if 'died' in reply:
        raise UserError(f'{source}: the data set takes more than {MEMORY_MB} MB or never ends with these parameters')
    templates = reply['templates']
    kinds = len(set(templates or ()))
    if found.held_out_templates and not kinds:
        raise UserError(f'{source}: {found.name} has no templates to hold out; gsm_symbolic and list_functions have')
    if found.held_out_templates and found.held_out_templates >= kinds:
        raise UserError(
            f'{source}: held_out_templates={found.held_out_templates} must be less than the {kinds} '
            f'templates of {found.name}'
        )
    return templates


def _split(source: str, found: Source, templates: list[int] | None) -> dict[str, list[int]]:
    """The indices of each split. No index of a template that is held out is ever trained on, wherever it lies."""
    apart = kept_back(templates, found.held_out_templates) if found.held_out_templates else set()
    if found.templates == 'held_out':
        return {EVALUATION: [i for i in range(SPAN) if templates[i] in apart]}
    trained = [i for i in range(SPAN) if not apart or templates[i] not in apart]
    training = [i for i in trained if i >= RESERVED][: found.size]
    if len(training) < found.size:
        raise UserError(f'{source}: size={found.size} is more than its {len(training)} training problems; lower it')
    return {EVALUATION: [i for i in trained if i < RESERVED], TRAINING: training}


def _make(source: str, found: Source, child: Child, indices: Sequence[int], count: int = SPAN) -> list[Item | None]:
    """The items of some indices, until `count` are whole; None for one that has no answer, or one that its own verifier
    refuses."""
    query = '&'.join(f'{key}={value}' for key, value in found.parameters.items())
    place = f'{PREFIX}{found.name}' + (f'?{query}' if query else '')
    made: list[Item | None] = []
    while len(made) < len(indices) and count > (whole := sum(item is not None for item in made)):
        batch = list(indices[len(made) : len(made) + min(BATCH, count - whole)])
        reply = child.ask({'do': 'make', 'name': found.name, 'parameters': found.parameters, 'indices': batch})
        if 'items' not in reply:
            reason = reply.get('fault', f'it takes more than {MEMORY_MB} MB, or never ends')
            raise UserError(f'{source}: problems {batch[0]} to {batch[-1]} cannot be made: {reason}')
        made += [item and _item(found, place, index, item) for index, item in zip(batch, reply['items'])]
    return made


def _item(found: Source, place: str, index: int, item: dict) -> Item:
    template = item['template']
    name = f'{found.name}/{index}' + ('' if template is None else f'/template_{template}')
    judge = f'{place}#{index}' if item['judge'] == 'verifier' else item['judge']
    problem = Problem(name, item['question'], item['answer'], place, found.name, judge)
    return Item(problem, template, item['worked'])


def _whole(source: str, made: list[Item | None], remarks: list[str]) -> Drawn:
    items = [item for item in made if item]
    if len(items) < len(made):
        remarks = [
            *remarks,
            f'{source}: {len(made) - len(items)} of {len(made)} problems have no answer, or one that '
            'their own verifier refuses, and are left out',
        ]
    if not items:
        said = f' ({remarks[0].removeprefix(f"{source}: ")})' if remarks else ''
        raise UserError(f'{source}: no problem is left{said}; change its parameters')
    return Drawn(items, remarks)


def _value(text: str) -> object:
    """A parameter's value: a Python literal, true, false or none, else a word."""
    words = {'true': True, 'false': False, 'none': None, 'null': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
