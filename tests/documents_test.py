"""What README and docs tell people to type works: every command parses, every link leads somewhere, the chain runs."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from retool_jax.core import cli, settings
from retool_jax.stages import config as stages
from tests.launch import launcher

ROOT = Path(__file__).parents[1]
DOCUMENTS = ('README.md', 'docs/guide.md', 'docs/pods.md', 'docs/troubleshooting.md', 'docs/sandbox.md')
VARIABLES = {'ARG': 'qwen2_5_7b@1x80gb', 'SIZE': 'qwen2_5_7b', 'MODEL': 'Qwen2.5-7B-Instruct'}
TAKES_CONFIG = ('demo', 'cold_start', 'sft', 'ppo', 'evaluate', 'plan')


def commands(document):
    """The lines of its shell blocks, continued ones joined, comments and variables away."""
    found = []
    for language, block in re.findall(r'^```(\w*)\n(.*?)^```', (ROOT / document).read_text(), re.DOTALL | re.MULTILINE):
        if language in ('', 'bash'):
            lines = re.sub(r'\\\n', ' ', block).splitlines()
            found += [re.sub(r'\$(\w+)', lambda m: VARIABLES.get(m[1], m[0]), line) for line in lines]
    return [shlex.split(line, comments=True) for line in found if 'launch/' in line]


LAUNCHES = [
    (document, words)
    for document in DOCUMENTS
    for words in commands(document)
    if any(re.fullmatch(r'launch/\w+\.py', word) for word in words)
]


def test_there_are_commands_of_every_binary():
    names = {Path(next(w for w in words if w.startswith('launch/'))).stem for _, words in LAUNCHES}
    assert {*TAKES_CONFIG, 'sandbox_server'} <= names


@pytest.mark.parametrize('document, words', LAUNCHES, ids=lambda value: ' '.join(value)[:100] if value else '')
def test_a_command_of_the_documents_is_understood(document, words):
    at = next(i for i, word in enumerate(words) if re.fullmatch(r'launch/\w+\.py', word))
    script, arguments = ROOT / words[at], words[at + 1 :]
    assert script.is_file()
    given = [a for a in arguments if a.startswith('--config')]
    own = [a.lstrip('-').split('=')[0] for a in arguments if a not in given and a != '--help']
    assert all(re.search(rf"DEFINE_\w+\(\s*'{name}'", script.read_text()) for name in own), own
    if script.stem in TAKES_CONFIG:
        config = cli.parse_config(['x', *given])
        assert config.run.dir
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize('document', DOCUMENTS)
def test_a_link_or_file_that_is_named_is_there(document):
    text = (ROOT / document).read_text()
    folder = (ROOT / document).parent
    for target in re.findall(r'\]\((?!https?:)([^)#]+)\)', text):
        assert (folder / target).exists(), target
    for target in re.findall(r'`((?:docs|launch|configs|notebooks|tests|retool_jax)/[\w./]+\.\w+)`', text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r'`?make ([a-z-]+)', ' '.join(re.findall(r'`[^`]+`|```.*?```', text, re.DOTALL))):
        assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE), target


def test_a_key_that_is_named_in_prose_is_a_key():
    keys = set(cli.flatten(cli.load_config('configs/ppo.py:tiny'))) | set(
        cli.flatten(cli.load_config('configs/evaluate.py:tiny'))
    )
    named = set()
    for document in DOCUMENTS:
        named |= set(
            re.findall(
                r'`(?:--config\.)?((?:sampler|forward|ppo|loss|mesh|sandbox|model|turns|run)\.\w+)[=`]',
                (ROOT / document).read_text(),
            )
        )
    assert len(named) > 8 and named <= keys | {'run.dir'}, named - keys


def section(title):
    """The README's text below a heading."""
    return re.search(rf'^## {title}\n(.*?)^## ', (ROOT / 'README.md').read_text(), re.DOTALL | re.MULTILINE)[1]


def test_every_file_has_its_line_in_the_readmes_tree():
    told, folders = [], []
    for line in re.search(r'^```\n(.*?)^```', section('Where things are'), re.DOTALL | re.MULTILINE)[1].splitlines():
        depth, words = (len(line) - len(line.lstrip())) // 2, line.split()
        if words[0].endswith('/'):
            folders[depth:] = [words[0]]
            continue
        for word in words:
            if not re.fullmatch(r'\w+\.(?:py|sh)', word):
                break
            told.append(''.join(folders) + word)
    there = [
        path
        for folder in ('retool_jax', 'configs', 'launch')
        for path in (ROOT / folder).rglob('*.*')
        if path.suffix in ('.py', '.sh') and path.name != '__init__.py' and '_configs' not in path.parts
    ]
    assert sorted(told) == sorted(str(path.relative_to(ROOT)) for path in there)


def names(path):
    """Functions and classes of a file, and `Class.method`, with their syntax trees."""
    body = ast.parse(path.read_text()).body
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return found | {
        f'{name}.{inner.name}': inner
        for name, node in found.items()
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, ast.FunctionDef)
    }


@pytest.mark.parametrize('document', [*DOCUMENTS, 'docs/scaling.md', 'docs/grading.md', 'docs/benchmarks.md'])
def test_a_module_or_function_that_is_named_in_prose_is_there(document):
    rooms = '|'.join(path.name for path in (ROOT / 'retool_jax').iterdir() if path.is_dir())
    for module, name in re.findall(rf'`((?:{rooms})/\w+)\.(\w+)`', (ROOT / document).read_text()):
        path = ROOT / 'retool_jax' / f'{module}.py'
        assert path.is_file() and (name == 'py' or name in names(path)), f'{module}.{name}'


@pytest.mark.parametrize('title', ["An episode's way", 'To change one thing'])
def test_the_functions_that_the_readme_names_are_where_it_says(title):
    pairs = []
    for line in section(title).splitlines():
        path = None
        for file, name in re.findall(r'`(?:([\w/]+/\w+\.py))?(?:: )?([A-Za-z]\w*(?:\.\w+)?)?`', line):
            path = file or path
            assert not file or (ROOT / 'retool_jax' / file).is_file() or (ROOT / file).is_file(), file
            if name and (file or '.' in name):
                pairs.append((path, name))
    assert len(pairs) > (20 if title.startswith('An') else 0)
    wrong = [f'{path}: {name}' for path, name in pairs if path is None or name not in names(ROOT / 'retool_jax' / path)]
    assert wrong == []


def value_ways():
    """(key, [(file, name), …]) of every row of the README's table of ways."""
    rows = [line.split('|')[1:3] for line in section("A value's way").splitlines() if line.startswith('| `')]
    return [(key.strip(' `'), re.findall(r'`([\w/]+\.py): ([\w.]+)`', way)) for key, way in rows]


@pytest.mark.parametrize('key, way', value_ways(), ids=lambda value: value if isinstance(value, str) else '')
def test_a_value_goes_through_five_files_at_most_from_its_field_to_where_it_is_read(key, way):
    paths = [ROOT / 'retool_jax' / file for file, _ in way]
    assert 3 <= len(set(paths)) == len(paths) <= 5
    assert [f'{file}: {name}' for path, (file, name) in zip(paths, way) if name not in names(path)] == []
    assert way[0][0] == 'stages/config.py' and key in settings.keys(getattr(stages, way[0][1]))
    for path, then in itertools.pairwise(paths):
        told = lambda there, of: re.search(rf'\b{of.stem}\b', there.read_text())
        assert told(path, then) or told(then, path), f'{path.name} and {then.name} do not know each other'
    reader = ast.unparse(names(paths[-1])[way[-1][1]])
    assert re.search(rf'\b{key.rpartition(".")[2]}\b', reader)


def test_the_ways_shown_are_of_a_rollout_a_loss_and_a_sandbox():
    assert {key.partition('.')[0] for key, _ in value_ways()} == {'ppo', 'loss', 'sandbox'}


@pytest.mark.slow
def test_the_chain_of_the_readme_runs(tmp_path):
    """Its commands for the tiny model, one after another, with fewer steps and folders of their own."""
    small = {
        'cold_start': ['problems=300', f'run.dir={tmp_path}/cold_start'],
        'sft': ['sft.steps=4', f'traces={tmp_path}/cold_start/episodes', f'run.dir={tmp_path}/sft'],
        'ppo': [
            'ppo.steps=2',
            'ppo.problems_per_step=4',
            'sampler.rows=16',
            f'model.path={tmp_path}/sft/final',
            f'run.dir={tmp_path}/ppo',
        ],
        'evaluate': ['samples=2', 'sampler.rows=8', f'problems={tmp_path}/sums.jsonl', f'run.dir={tmp_path}/evaluate'],
    }
    (tmp_path / 'sums.jsonl').write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    told = {
        Path(words[1]).stem: words
        for document, words in LAUNCHES
        if document == 'README.md' and not {'--help', '--dry_run'} & set(words)
    }
    with launcher.start() as launch:
        for name, changes in small.items():
            done = launch(name, *told[name][2:], *(f'--config.{change}' for change in changes))
            assert done.returncode == 0, (name, done.stderr)
    for name in ('sft', 'ppo', 'evaluate'):
        assert (tmp_path / name / 'report.html').is_file()


def test_a_snippet_runs_as_the_sandboxs_page_has_it():
    block = re.search(r'^```python\n(.*?)^```', (ROOT / 'docs/sandbox.md').read_text(), re.DOTALL | re.MULTILINE)[1]
    done = subprocess.run([sys.executable, '-c', block], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f'ok {2**100}\n', done.stderr


@pytest.mark.slow
def test_the_doctor_and_the_report_run_as_told(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'retool_jax.sandbox.doctor'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1) and 'snippets run isolated' in done.stdout
