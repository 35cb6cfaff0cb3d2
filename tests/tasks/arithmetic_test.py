"""The embedded task: splits are disjoint, traces are right, everything comes from the seed."""

import json
import random
import re
import subprocess
import sys

import pytest

from retool_jax.tasks import arithmetic
from retool_jax.tasks.families import FAMILIES


def _everything(split, count=2400, seed=5):
    return arithmetic.problems(split, count, seed)


def test_there_are_at_least_ten_families_and_at_least_seven_need_the_tool():
    assert len(FAMILIES) >= 10
    assert sum(f.mental for f in FAMILIES) == 3
    assert all(len(set(f.wordings)) >= 4 and f.held_out_wording not in f.wordings for f in FAMILIES)


def test_the_same_seed_gives_the_same_problems_and_a_shorter_list_is_a_prefix():
    long = arithmetic.problems('train', 240, 3)
    assert arithmetic.problems('train', 60, 3) == long[:60]
    assert arithmetic.problems('train', 240, 4) != long


@pytest.mark.parametrize('split', arithmetic.SPLITS)
def test_every_split_is_balanced_with_unique_ids_and_mostly_fresh_questions(split):
    problems = _everything(split)
    counts = {f.name: sum(p.family == f.name for p in problems) for f in FAMILIES}
    assert set(counts.values()) == {len(problems) // len(FAMILIES)}
    assert len({p.id for p in problems}) == len(problems)
    assert len({p.question for p in problems}) > 0.99 * len(problems)
    assert all(p.source == f'arithmetic/{split}' for p in problems)
    assert max(len(p.question) for p in problems) <= 60


def test_no_seed_trains_on_held_out_operands_even_swapped():
    def keys(split):
        for p in _everything(split, 6000):
            operands = arithmetic.operands_of(p)
            ordered = arithmetic.BY_NAME[p.family].ordered
            yield p.family, operands if ordered else tuple(sorted(operands))

    held = set(keys('new_operands'))
    assert not held & (set(keys('train')) | set(keys('new_wording')))


@pytest.mark.parametrize('family', FAMILIES, ids=lambda f: f.name)
def test_each_family_has_at_least_500_held_out_operand_tuples(family):
    rng, found = random.Random(0), set()
    for _ in range(400_000):
        operands = family.sample(rng, False)
        key = operands if family.ordered else tuple(sorted(operands))
        if key not in found and arithmetic.held_out(family, operands):
            found.add(key)
        if len(found) >= 500:
            return
    pytest.fail(f'{len(found)} held-out tuples found')


def test_the_held_out_wording_is_never_trained_on_and_always_used_in_its_split():
    def shape(p):
        return re.sub(r'\d+', '#', p.question)

    trained = {shape(p) for p in _everything('train')}
    held = {shape(p) for p in _everything('new_wording')}
    assert len(held) == len(FAMILIES) and not held & trained


def test_larger_range_operands_lie_outside_the_training_range():
    for family in FAMILIES:
        train = [arithmetic.operands_of(p) for p in _everything('train', 6000) if p.family == family.name]
        large = [arithmetic.operands_of(p) for p in _everything('larger_range') if p.family == family.name]
        highest = [max(column) for column in zip(*train)]
        assert all(any(x > top for x, top in zip(operands, highest)) for operands in large), family.name


@pytest.mark.parametrize('split', arithmetic.SPLITS)
def test_worked_steps_are_compact_and_every_equation_in_them_holds(split):
    for problem in _everything(split, 1200):
        trace = arithmetic.trace(problem, 'mental', 0)
        steps = trace.parts[1][1]
        assert re.findall(r'\d+', steps)[-1] == problem.answer, problem
        assert len(steps) <= 200
        assert trace.parts[-1][1] == f'<answer>\n\\boxed{{{problem.answer}}}\n</answer>'
        if problem.family == 'power':  # its equations hold modulo c
            *_, c = arithmetic.operands_of(problem)
            for left, right in re.findall(r'([\d*^]+)=(\d+)', steps):
                assert eval(left.replace('^', '**')) % c == int(right), steps
            continue
        for chain in re.findall(r'[\d*+/^-]+(?:=[\d*+/^-]+)+', steps):
            if ' mod ' not in steps:
                assert len({eval(side) for side in chain.split('=')}) == 1, (chain, steps)
        for n, d, r in re.findall(r'(\d+) mod (\d+)=(\d+)', steps):
            assert int(n) % int(d) == int(r)


def test_an_answer_said_at_once_is_the_worked_one_without_its_work():
    for problem in _everything('train', 24):
        worked, direct = (arithmetic.trace(problem, kind, 0) for kind in ('mental', 'direct'))
        assert direct.parts == (worked.parts[0], worked.parts[-1])
        shows = [arithmetic.shows_work(problem, ''.join(text for _, text in t.parts)) for t in (worked, direct)]
        assert shows == [True, False]


def test_snippets_print_the_answer_and_slips_fail(tmp_path):
    # One child runs what these families wrote: nothing here was written by a model.
    cases: list[tuple[str | None, str]] = []
    for problem in _everything('train', 1200) + _everything('larger_range', 240):
        for kind in ('code', 'repair'):
            codes = [c for k, c in arithmetic.trace(problem, kind, 1).parts if k == 'code']
            assert len(codes) == (1 if kind == 'code' else 2)
            for i, code in enumerate(codes):
                cases.append((problem.answer if i == len(codes) - 1 else None, code))
    script = ['import contextlib, io, json', 'out = []', f'for code in {[c for _, c in cases]!r}:']
    script += ['    b = io.StringIO()', '    try:']
    script += ['        with contextlib.redirect_stdout(b): exec(code, {})']
    script += ['        out.append(b.getvalue())']
    script += ['    except Exception: out.append(None)', 'print(json.dumps(out))']
    path = tmp_path / 'run.py'
    path.write_text('\n'.join(script))
    run = subprocess.run([sys.executable, '-W', 'ignore', path], capture_output=True, text=True, check=True)
    for (answer, code), got in zip(cases, json.loads(run.stdout), strict=True):
        assert got == (None if answer is None else answer + '\n'), code


def test_rewriting_keeps_everything_but_the_manual_calculation():
    for problem in _everything('train', 24):
        text = arithmetic.trace(problem, 'mental', 0)
        code = arithmetic.rewrite(text, problem)
        assert code.parts[0] == text.parts[0] and code.parts[-1] == text.parts[-1]
        assert [k for k, _ in code.parts] == ['text', 'code', 'text']
        assert all(str(x) in code.parts[1][1] for x in arithmetic.operands_of(problem))


def test_repairs_differ_by_seed():
    problem = arithmetic.problems('train', 4, 0)[3]
    assert len({arithmetic.trace(problem, 'repair', seed) for seed in range(20)}) == 2


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: arithmetic.problems('test', 1, 0), "split is 'test'"),
        (lambda: arithmetic.problems('train', -1, 0), 'count is -1'),
        (lambda: arithmetic.trace(arithmetic.problems('train', 1, 0)[0], 'prose', 0), "kind is 'prose'"),
    ],
)
def test_bad_input_names_the_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
