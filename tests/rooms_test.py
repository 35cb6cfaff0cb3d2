"""The rooms keep to their table of imports, light children stay light, and files stay short."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import base

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'retool_jax'

_BELOW_STAGES = {'core', 'sandbox', 'text', 'algo', 'model', 'tasks', 'rollout', 'traces', 'train'}
ROOMS = {  # what a room may import besides itself: rooms, or single modules of a room
    'core': set(),
    # The sandbox's children start light.
    'sandbox': {'core.records', 'core.errors', 'core.checks', 'core.signals', 'core.streams'},
    'sandbox/inside': set(),  # runs in the jail, on the guest's interpreter; see the test of its libraries
    'text': {'core'},
    'algo': {'core'},
    'model': {'core', 'text.vocabulary'},  # a GGUF file holds both
    'tasks': {'core', 'text'},
    'rollout': {'core', 'text', 'sandbox', 'model'},
    'traces': {'core', 'text', 'sandbox', 'tasks', 'rollout'},
    'train': {'core', 'algo', 'model', 'rollout', 'tasks', 'text'},
    'stages': _BELOW_STAGES,
    'report': _BELOW_STAGES | {'stages'},
    'plan': _BELOW_STAGES | {'stages'},
    'bench': _BELOW_STAGES | {'stages', 'plan.models'},
}
# Machines with accelerators may have little else; these rooms run there.
LEAN_ROOMS = ('algo', 'model', 'rollout', 'bench')
LEAN_LIBRARIES = {'jax', 'flax', 'optax', 'numpy', 'absl', 'ml_collections'}
HEAVY = ('jax', 'jaxlib', 'flax', 'transformers', 'torch', 'matplotlib')
DYNAMIC = ('__import__', 'import_module', 'importlib.import_module')
LONGEST_FILE, LONGEST_BINARY = 400, 60
TOP_LEVEL = {'.ci', 'configs', 'docs', 'launch', 'notebooks', 'retool_jax', 'tests'} | {
    *('.git-blame-ignore-revs', '.gitignore', 'LICENSE', 'Makefile', 'README.md'),
    *('pyproject.toml', 'requirements.lock', 'setup.py'),
}


def imports(
    tree: ast.Module, module: str, *, at_load: bool = False, for_types: bool = False
) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything a module imports.

    at_load: without what functions import when called. for_types: with names for the type checker alone.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if not for_types and isinstance(node, ast.If) and ast.unparse(node.test).endswith('TYPE_CHECKING'):
            pending.extend(node.orelse)
            continue
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split('.')[: -node.level] if node.level else []
            source = '.'.join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f'{source}.{alias.name}') for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC:
            yield from ((node.lineno, str(x.value)) for x in node.args[:1] if isinstance(x, ast.Constant))
        pending.extend(ast.iter_child_nodes(node))


def sources(folder: Path) -> list[tuple[Path, str, ast.Module]]:
    """(path, dotted module name, syntax tree) of every Python file below a folder."""
    found = []
    for path in sorted(folder.rglob('*.py')):
        name = '.'.join(path.relative_to(folder.parent).with_suffix('').parts)
        found.append((path, name, ast.parse(path.read_text(encoding='utf-8'), str(path))))
    return found


def room_of(path: Path) -> str:
    """The room of a file of the package: its innermost folder with a line of its own in the table."""
    folders = [folder.as_posix() for folder in path.parents]
    return next((folder for folder in folders if folder in ROOMS), path.parts[0])


def trespasses(package: Path) -> list[str]:
    """Imports of other rooms that the table does not allow, one line each."""
    found = []
    for path, module, tree in sources(package):
        room = room_of(path.relative_to(package))
        if room.endswith('.py'):  # the package's own __init__ is loaded before every room
            found += [f'{path.name}:{n} imports {x}' for n, x in imports(tree, module) if x != '__future__']
            continue
        for line, name in imports(tree, module):
            parts = name.split('.')
            if parts[0] != 'retool_jax':
                if parts[0] == 'configs':
                    found.append(f'{path.relative_to(package)}:{line} {room} may not import {name}')
                continue
            inside = '.'.join(parts[1:])
            allowed = ROOMS.get(room, set()) | {room.replace('/', '.')}
            if inside and not any(inside == x or inside.startswith(f'{x}.') for x in allowed):
                found.append(f'{path.relative_to(package)}:{line} {room} may not import {name}')
    return found


def test_every_room_imports_only_what_its_line_of_the_table_allows():
    assert len(sources(PACKAGE)) > 20
    assert trespasses(PACKAGE) == []


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason="not a clone: what belongs to the project is git's to say")
def test_nothing_lies_at_the_top_level_but_what_belongs_there():
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.partition('/')[0] for line in listed.splitlines()} == TOP_LEVEL


def test_every_folder_of_the_package_has_its_line_in_the_table():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob('*.py'))}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize(
    'room, line',
    [
        ('algo', 'from retool_jax.model import decoder'),
        ('algo', 'from retool_jax import text'),
        ('algo', 'from ..text import tags'),
        ('sandbox', 'from retool_jax.core import cli'),
        ('sandbox', 'import retool_jax.core.settings as s'),
        ('sandbox/inside', 'from retool_jax.core.records import Verdict'),
        ('sandbox/inside', 'from retool_jax.sandbox import child'),
        ('sandbox/inside', 'from .. import child'),
        ('model', 'def f():\n    from retool_jax.algo import losses'),
        ('model', 'import importlib\nimportlib.import_module("retool_jax.train.ppo")'),
        ('rollout', 'import retool_jax.tasks.grader'),
        ('train', 'from configs import demo'),
        ('core', 'from retool_jax.text.tags import x'),
        ('bench', 'from retool_jax.report import plots'),
    ],
)
def test_a_trespass_is_seen_however_it_is_written(tmp_path, room, line):
    folder = tmp_path / 'retool_jax' / room
    folder.mkdir(parents=True)
    (folder / 'culprit.py').write_text(line)
    assert len(trespasses(tmp_path / 'retool_jax')) == 1


@pytest.mark.parametrize(
    'room, line',
    [
        ('sandbox', 'from retool_jax.core.records import Verdict'),
        ('sandbox', 'from retool_jax.core import records'),
        ('sandbox', 'from retool_jax.sandbox.inside import protocol'),
        ('sandbox/inside', 'import protocol\nimport json'),
        ('algo', 'from retool_jax.algo import segments\nfrom . import groups'),
        ('algo', 'import typing\nif typing.TYPE_CHECKING:\n    from retool_jax.model import decoder'),
        ('stages', 'import retool_jax.sandbox.pool\nfrom retool_jax import algo'),
    ],
)
def test_what_the_table_allows_passes(tmp_path, room, line):
    folder = tmp_path / 'retool_jax' / room
    folder.mkdir(parents=True)
    (folder / 'neighbour.py').write_text(line)
    assert trespasses(tmp_path / 'retool_jax') == []


def test_what_runs_in_the_jail_imports_the_standard_library_and_its_own_files(tmp_path):
    folder = PACKAGE / 'sandbox' / 'inside'
    known = {'runner', 'seccomp', 'zygote', 'protocol'}
    assert {path.stem for path in folder.glob('[a-z]*.py')} == known
    block = base.sandbox('tiny')
    known |= sys.stdlib_module_names | set(block.preload) & set(block.packages)
    assert [
        f'{path.name}:{line} imports {name}'
        for path, module, tree in sources(folder)
        for line, name in imports(tree, module)
        if name.split('.')[0] not in known
    ] == []


def files_imported(package: Path) -> dict[str, set[str]]:
    """Module → modules of the package that it imports anywhere, for types and when functions are called too."""
    files = {module.removesuffix('.__init__'): tree for _, module, tree in sources(package)}
    graph: dict[str, set[str]] = {}
    for module, tree in files.items():
        graph[module] = set()
        for _, name in imports(tree, module, for_types=True):
            beside = f'{module.rpartition(".")[0]}.{name}'
            name = beside if '.inside.' in module and beside in files else name  # there, files are no package
            while name and name not in files:
                name = name.rpartition('.')[0]
            if name != package.name:
                graph[module] |= {name} - {'', module}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle in its order, the first again at the end; none: []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_file_imports_itself_by_way_of_others():
    graph = files_imported(PACKAGE)
    assert graph['retool_jax.sandbox.inside.zygote'] >= {
        f'retool_jax.sandbox.inside.{name}' for name in ('runner', 'seccomp', 'protocol')
    }
    assert cycle(graph) == []


@pytest.mark.parametrize(
    'there, back',
    [
        ('from retool_jax.algo.b import x', 'from retool_jax.algo import a'),
        ('from . import b', 'def f():\n    import retool_jax.algo.a'),
        ('import retool_jax.algo.b as b', 'import typing\nif typing.TYPE_CHECKING:\n    from .a import A'),
    ],
)
def test_a_cycle_of_files_is_seen_however_it_is_hidden(tmp_path, there, back):
    folder = tmp_path / 'retool_jax' / 'algo'
    folder.mkdir(parents=True)
    (folder / '__init__.py').write_text('')
    (folder / 'a.py').write_text(there)
    (folder / 'b.py').write_text('import json')
    assert cycle(files_imported(tmp_path / 'retool_jax')) == []
    (folder / 'b.py').write_text(back)
    assert sorted(set(cycle(files_imported(tmp_path / 'retool_jax')))) == ['retool_jax.algo.a', 'retool_jax.algo.b']


def test_training_knows_no_command_line_and_no_configuration_file():
    found = [
        f'{path.name}:{line} imports {name}'
        for path, module, tree in sources(PACKAGE / 'train')
        for line, name in imports(tree, f'retool_jax.{module}')
        if name.startswith(('retool_jax.core.cli', 'retool_jax.sandbox', 'ml_collections'))
    ]
    assert found == []


def test_below_the_door_nothing_takes_the_configuration_of_a_file():
    door = {'retool_jax.core.cli', 'retool_jax.core.settings'}
    named = {
        module
        for _, module, tree in sources(PACKAGE)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == 'ConfigDict')
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and 'ConfigDict' in node.value)
        or (isinstance(node, ast.Attribute) and node.attr == 'ConfigDict')
    }
    assert named == door


def test_configurations_import_nothing_but_ml_collections_and_their_base():
    found = []
    configs = sources(ROOT / 'configs')
    assert configs
    for path, module, tree in configs:
        for line, name in imports(tree, module):
            top = name.split('.')[0]
            known = top in sys.stdlib_module_names | {'ml_collections'} or name.startswith(
                ('configs.base', 'configs.cards')
            )
            if not known:
                found.append(f'configs/{path.name}:{line} may not import {name}')
    assert found == []


@pytest.mark.parametrize('room', LEAN_ROOMS)
def test_rooms_that_run_on_accelerators_load_with_few_libraries(room):
    found = []
    for path, module, tree in sources(PACKAGE):
        if path.relative_to(PACKAGE).parts[0] != room:
            continue
        for line, name in imports(tree, module, at_load=True):
            top = name.split('.')[0]
            known = top in sys.stdlib_module_names | LEAN_LIBRARIES | {'retool_jax'}
            if not known:
                found.append(f'{path.relative_to(PACKAGE)}:{line} imports {name} when it is loaded')
    assert found == []


def test_records_need_the_standard_library_alone():
    (tree,) = [tree for _, module, tree in sources(PACKAGE) if module == 'retool_jax.core.records']
    tops = {name.split('.')[0] for _, name in imports(tree, 'retool_jax.core.records')}
    assert tops and tops <= sys.stdlib_module_names


@pytest.mark.parametrize('module', ['retool_jax.sandbox.pool', 'retool_jax.tasks.grader'])
def test_light_children_load_without_the_heavy_libraries(module):
    program = f'import sys, {module}; print(*sorted(set({HEAVY}) & set(sys.modules)))'
    child = subprocess.run(
        [sys.executable, '-c', program],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == []


def test_code_is_executed_inside_the_jail_alone():
    inside = {'retool_jax.sandbox.inside.runner'}  # what a jailed child runs; no other module may execute a string
    found = {
        module
        for _, module, tree in sources(PACKAGE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ('exec', 'eval')
    }
    assert found == inside


def lengths(*folders: str) -> dict[str, int]:
    """Lines of every Python and shell file below the folders."""
    paths = [p for folder in folders for p in (ROOT / folder).rglob('*') if p.suffix in ('.py', '.sh')]
    assert paths
    return {str(p.relative_to(ROOT)): len(p.read_text(encoding='utf-8').splitlines()) for p in paths}


def test_files_are_short_enough_to_read_in_one_sitting():
    long = {name: n for name, n in lengths('retool_jax', 'launch', 'configs').items() if n > LONGEST_FILE}
    assert long == {}


def test_binaries_are_doors_not_rooms():
    long = {name: n for name, n in lengths('launch').items() if name.endswith('.py') and n > LONGEST_BINARY}
    assert long == {}
