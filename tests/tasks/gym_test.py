"""Generated problems: named by one string, the same in every process, held-out ones never trained on."""

import ast
import inspect
import os
import subprocess
import sys
import textwrap
import warnings

import pytest

from retool_jax.core.errors import UserError
from retool_jax.tasks import gym, problems, stream
from retool_jax.tasks.child import Child
from retool_jax.tasks.grader import Grader

warnings.filterwarnings('ignore', category=SyntaxWarning)  # of a library of the library, where it is first compiled
# What runs text, or reads it as a program.
RUNS = {'eval', 'exec', 'compile', '__import__', 'parse_expr', 'sympify', 'S', 'system', 'popen', 'Popen', 'run',
        'check_output', 'parse_latex', 'simplify', 'lambdify', 'loads_pickle', 'import_module', 'getattr'}  # fmt: skip
HOSTILE = ('', ' ', 'banana', 'nan', 'NaN, NaN', '[NaN]', '[NaN, NaN, NaN, NaN, NaN, NaN]', 'inf', '{}', 'null',
           'x' * 1500, '9' * 1500, '(' * 1000, '[' * 1500, '1e999999', '10**10**10', '-', '→', 'A',
           'L' * 1000)  # fmt: skip
ATTACK = '__import__("os").system("touch {}")'


@pytest.fixture(scope='module')
def child():
    with gym.maker() as maker:
        yield maker


@pytest.fixture(scope='module')
def grader():
    with Grader() as grader:
        yield grader


@pytest.mark.parametrize('source, text', [
    ('countdown', 'countdown is refused: its verifier runs what the answer says as a program'),
    ('game_of_life_halting?max_difficulty=1', 'takes any text for right'),
    ('rubiks_cube', 'come without an answer'), ('codeio', 'runs programs, some of which write files'),
    ('chain_sum?', r"'' is no parameter: write reasoning_gym:chain_sum\?parameter=value&"),
    ('chain_sum?max_terms', "'max_terms' is no parameter"),
    ('chain_sum?max_terms=3&max_terms=4', 'max_terms stands there twice'),
    ('chain_sum?seed=4', 'run.seed shuffles the training problems'),
    ('chain_sum?size=0', r'size=0 must be a whole number of \[1, 19000\]'),
    ('chain_sum?size=many', 'size=many must be a whole number'),
    ('gsm_symbolic?held_out_templates=-1', 'held_out_templates=-1 must be'),
    ('gsm_symbolic?templates=held_out', 'needs held_out_templates'),
    ('gsm_symbolic?templates=new', 'templates=new is unknown; choose one of trained, held_out'),
    ('gsm_symbolic?held_out_templates=15&templates=held_out', 'are never trained on'),
])  # fmt: skip
def test_what_is_wrong_with_a_source_is_one_line_before_any_child_starts(source, text):
    with pytest.raises(UserError, match=text) as caught:
        gym.read(gym.PREFIX + source, gym.TRAINING)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('source, text', [
    ('chian_sum', r"no data set 'chian_sum' \(did you mean chain_sum\?\)"),
    ('chain_sum?max_term=6', r"no parameter 'max_term' \(did you mean max_terms\?\); it has min_terms, "),
    ('chain_sum?max_terms=six', "max_terms='six' is no int"),
    ('chain_sum?allow_negation=1', 'allow_negation=1 is no bool'),
    ('chain_sum?max_terms=1', 'refused by chain_sum: max_terms must be >= min_terms'),
    ('chain_sum?held_out_templates=3', 'chain_sum has no templates to hold out'),
    ('gsm_symbolic?held_out_templates=85', 'must be less than the 85 templates'),
    ('count_bits?max_n=10&size=40', 'no problem is left .40 of 40 training problems ask what a held-out one'),
])  # fmt: skip
def test_what_the_library_knows_nothing_of_is_one_line_with_the_nearest_name(child, source, text):
    with pytest.raises(UserError, match=text) as caught:
        gym.read(gym.PREFIX + source, gym.TRAINING, child=child)
    assert '\n' not in str(caught.value)


def test_a_machine_without_the_library_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'retool_jax\[gym\]'"):
        gym.read('reasoning_gym:chain_sum', gym.TRAINING)


def test_parameters_reach_the_data_set_and_ids_are_indices(child):
    drawn = gym.read('reasoning_gym:chain_sum?min_terms=3&max_terms=3&allow_negation=false', gym.EVALUATION, 5, child)
    assert [p.id for p in drawn.problems] == [f'chain_sum/{i}' for i in range(5)]
    for problem in drawn.problems:
        terms = problem.question.partition(':')[2].strip(' =')
        summands = terms.replace('- ', '-').replace('+ ', '').split()
        assert len(summands) == 3 and sum(map(int, summands)) == int(problem.answer)
        assert (problem.family, problem.judge) == ('chain_sum', '')


@pytest.mark.parametrize(
    'source',
    [
        'chain_sum?max_terms=3&max_digits=1&size=400',
        'gsm_symbolic?size=600',
        'count_primes?size=300',
        'calendar_arithmetic?size=300',
        'word_ladder?size=60',
    ],
)
def test_no_held_out_question_is_trained_on(child, source):
    trained = gym.read(gym.PREFIX + source, gym.TRAINING, child=child)
    held = gym.read(gym.PREFIX + source, gym.EVALUATION, child=child)
    assert len(held.problems) == gym.HELD_OUT
    assert not {p.question for p in trained.problems} & {p.question for p in held.problems}
    index = lambda problem: int(problem.id.split('/')[1])
    assert max(map(index, held.problems)) < gym.RESERVED <= min(map(index, trained.problems))
    # Of small numbers some questions come up in both ranges: those are left out of training, and said.
    assert ('ask what a held-out one asks' in ''.join(trained.remarks)) == (
        len(trained.problems) < gym.parse(gym.PREFIX + source).size
    )


def test_one_digit_sums_repeat_and_their_repetitions_are_left_out(child):
    trained = gym.read('reasoning_gym:chain_sum?max_terms=2&max_digits=1&size=200', gym.TRAINING, child=child)
    assert 0 < len(trained.problems) < 200 and 'training problems ask what a held-out one' in trained.remarks[0]


def test_problems_without_an_answer_are_left_out_and_counted(child):
    drawn = gym.read('reasoning_gym:ab?size=832', gym.TRAINING, child=child)  # a program that ends in nothing
    assert 800 < len(drawn.problems) < 832 and all(p.answer for p in drawn.problems)
    assert f'{832 - len(drawn.problems)} of 832 problems have no answer' in drawn.remarks[-1]


def test_templates_that_are_held_out_are_never_trained_on_and_are_asked_apart(child):
    source = 'reasoning_gym:gsm_symbolic?size=2000&held_out_templates=15'
    trained, known, new = (
        {item.template for item in gym.read(name, split, child=child).items}
        for name, split in (
            (source, gym.TRAINING),
            (source, gym.EVALUATION),
            (f'{source}&templates=held_out', gym.EVALUATION),
        )
    )
    assert len(new) == 15 and not new & trained and not new & known
    assert known <= trained and len(trained) == 70
    asked = gym.read(f'{source}&templates=held_out', gym.EVALUATION, child=child)
    assert len(asked.problems) == gym.HELD_OUT
    assert all(p.id.endswith(f'/template_{item.template}') for p, item in zip(asked.problems, asked.items))


def test_worked_solutions_end_in_the_gold_answer(child):
    pairs = gym.worked('reasoning_gym:gsm_symbolic?size=40&held_out_templates=15', child=child)
    assert len(pairs) == 40
    for problem, solution in pairs:
        assert float(solution.rpartition('####')[2].replace(',', '')) == float(problem.answer)
    with pytest.raises(UserError, match='no worked solutions; gsm_symbolic has'):
        gym.worked('reasoning_gym:gcd?size=20', child=child)


def test_questions_that_ask_for_an_expression_are_worked_out_operation_by_operation(child):
    pairs = gym.worked('reasoning_gym:chain_sum?size=20', child=child)
    assert len(pairs) == 20
    for problem, solution in pairs:
        assert solution.rpartition(' = ')[2] == problem.answer
        assert solution.count('\n') + 1 == problem.question.count(' + ') + problem.question.count(' - ')


@pytest.mark.slow
def test_data_sets_that_follow_the_order_of_sets_are_the_same_in_every_process():
    script = (
        'from retool_jax.tasks import gym\n'
        'with gym.maker() as child:\n'
        '    for name in ("isomorphic_strings", "list_functions", "ransom_note", "word_ladder"):\n'
        '        print(gym.read(gym.PREFIX + name, gym.EVALUATION, 8, child).problems)'
    )
    said = [
        subprocess.run(
            [sys.executable, '-c', script],
            env=os.environ | {'PYTHONHASHSEED': seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ('1', '2')
    ]
    assert said[0] == said[1] and said[0].count('Problem(') == 32


def test_a_source_is_streamed_beside_files_and_goes_on_from_its_cursor(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"problem": "1+1?", "answer": 2}\n')
    sources = ['reasoning_gym:chain_sum?size=30', tmp_path / 'a.jsonl']
    dataset = stream.stream(stream.open_sources(sources), None, 5)
    whole, _ = stream.next_batch(dataset, 0, 30)
    assert stream.next_batch(dataset, 10, 20)[0] == whole[10:]
    assert {p.id.rpartition('/')[0] for p in whole} >= {'reasoning_gym:chain_sum?size=30/chain_sum'}
    assert [p.id for p in whole] != [p.id for p in stream.next_batch(stream.stream(sources, None, 6), 0, 30)[0]]
    assert stream.title(sources[0]) == 'chain_sum_size=30' and stream.title(sources[1]) == 'a'


def test_a_problem_keeps_its_judge_in_an_array_record(tmp_path, child):
    drawn = gym.read('reasoning_gym:word_ladder', gym.EVALUATION, 3, child).problems
    problems.write_array_record(tmp_path / 'a.array_record', drawn)
    read = list(stream.once(stream.open_source(tmp_path / 'a.array_record')))
    assert read == drawn and drawn[2].judge == 'reasoning_gym:word_ladder#2'


def test_several_right_answers_are_right_and_a_number_is_judged_by_mathematics(child, grader):
    twelve = 'reasoning_gym:prime_factorization?min_value=12&max_value=12'
    (factors,) = gym.read(twelve, gym.EVALUATION, 1, child).problems
    right = lambda text: grader.grade(rf'so \boxed{{{text}}}', factors.answer, judge=factors.judge).correct
    assert right('2 × 2 × 3') and right('3 × 2 × 2') and not right('12') and not right('4 × 3')
    (sum_,) = gym.read('reasoning_gym:gsm_symbolic', gym.EVALUATION, 1, child).problems
    right = lambda text: grader.grade(rf'so \boxed{{{text}}}', sum_.answer, judge=sum_.judge).correct
    assert right(sum_.answer) and right(f'{int(sum_.answer):,}') and not right(f'{sum_.answer} or 5')
    (word,) = gym.read('reasoning_gym:spell_backward?min_word_len=6', gym.EVALUATION, 1, child).problems
    right = lambda text: grader.grade(rf'so \boxed{{{text}}}', word.answer, judge=word.judge).correct
    assert right(rf'\text{{{word.answer}}}') and not right(word.answer[1:] + word.answer[0])


def score_answer(cls):
    """The functions of its module that a data set's verifier reaches, as syntax trees."""
    functions = {}
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[cls.__module__]))):
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node)
    bases = [base for base in cls.__mro__ if base.__module__.startswith('reasoning_gym')]
    for base in bases:  # a verifier that is inherited stands in another module
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append(node)
    reached, pending = set(), ['score_answer']
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        for function in functions.get(name, ()):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    yield called(node)
                    pending.append(called(node))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')


def test_no_verifier_that_is_asked_runs_an_answer_and_those_that_do_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import reasoning_gym  # noqa: F401
        from reasoning_gym.factory import DATASETS
    runs = {name for name, (cls, _) in DATASETS.items() if RUNS & set(score_answer(cls))}
    refused = {name for name, reason in gym.REFUSED.items() if reason == gym.EVALUATES}
    assert len(DATASETS) == 106 and len(refused) == 9
    # The last three evaluate the problem or the gold answer, not what a model wrote; their verifiers are not asked.
    assert refused <= runs <= refused | {'bitwise_arithmetic', 'number_sorting', 'propositional_logic'}
    assert not runs & set(gym.VERIFIED) and set(gym.VERIFIED) | gym.MATHEMATICS | gym.SPELLED <= set(DATASETS)


def test_an_answer_that_a_verifier_would_run_ends_the_child_before_it_runs(tmp_path):
    """Behind the table of names: the verifiers that are refused, asked all the same."""
    child = Child('retool_jax.tasks.gym_child', gym.MEMORY_MB, 5)
    try:
        for name in ('countdown', 'spiral_matrix', 'simple_integration', 'puzzle24'):
            reply = child.ask(
                {'do': 'score', 'name': name, 'parameters': {}, 'index': 0, 'answer': ATTACK.format(tmp_path / name)}
            )
            assert reply == {'died': True}, name
    finally:
        child.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_data_set_that_is_not_refused_gives_judges_and_repeats_its_problems(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from reasoning_gym.factory import DATASETS
    names = sorted(set(DATASETS) - set(gym.REFUSED))
    assert len(names) == 88
    faults, there = [], sorted(os.listdir())
    with gym.maker() as one, gym.maker() as other, Grader() as grader:
        for name in names:
            drawn = gym.read(gym.PREFIX + name, gym.EVALUATION, 20, one).problems
            if len(drawn) != 20 or drawn != gym.read(gym.PREFIX + name, gym.EVALUATION, 20, other).problems:
                faults.append((name, 'not the same 20 in another process'))
            for i, problem in enumerate(drawn):
                right = lambda text, problem=problem: grader.judge(text, problem.answer, problem.judge).equal
                if not right(problem.answer):
                    faults.append((name, 'refuses', problem.answer))
                attack = ATTACK.format(tmp_path / name)
                wrong = [f'{problem.answer} or 5', 'banana', attack, f'[{attack}]', *(HOSTILE if i < 3 else ())]
                faults += [
                    (name, 'takes', text[:40], problem.answer)
                    for text in wrong
                    if text.strip() != problem.answer.strip() and right(text)
                ]
    assert faults == [] and list(tmp_path.iterdir()) == [] and sorted(os.listdir()) == there
