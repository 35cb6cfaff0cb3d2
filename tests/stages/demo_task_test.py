"""What the demo learns: problems that a seed only orders, held-out ones that nothing trains on."""

from __future__ import annotations

import json

import pytest

from retool_jax.core import cli, settings
from retool_jax.core.errors import UserError
from retool_jax.stages import demo_task
from retool_jax.stages.demo_config import Demo
from retool_jax.tasks.grader import Grader

GSM = 'reasoning_gym:gsm_symbolic?held_out_templates=15&size=80'


def load(seed: int = 0, **changes) -> Demo:
    config = cli.load_config('configs/demo.py:smollm2_135m')
    config.run.seed = seed
    config.data.sources, config.data.weights = (GSM, 'reasoning_gym:chain_sum?size=40'), (2.0, 1.0)
    config.held_out.headline = GSM
    config.held_out.apart.new_templates = f'{GSM}&templates=held_out'
    config.recipe.update({'problems_seen': 40, 'problems': 30, 'apart_problems': 10} | changes)
    return settings.build(Demo, config)


@pytest.fixture(scope='module')
def grader():
    with Grader() as grader:
        yield grader


@pytest.fixture(scope='module')
def tasks(grader):
    return [demo_task.open_task(load(seed), grader) for seed in (0, 1)]


def template(problem) -> str:
    return problem.id.rpartition('/template_')[2]


def test_no_held_out_question_is_trained_on(tasks):
    task = tasks[0]
    training = {task.order[i].question for i in range(500)} | {p.question for p, _ in task.pairs}
    assert len(training) > 100
    for name, problems in task.held_out.items():
        assert problems and not training & {p.question for p in problems}, name
    assert task.facts()['held_out_in_training'] == 0
    assert task.facts()['training_questions'] == len(training)


def test_the_sets_hold_new_numbers_new_templates_and_new_generators(tasks):
    sets = tasks[0].held_out
    assert list(sets) == ['new_numbers', 'basic_arithmetic', 'lcm', 'new_templates']  # no gsm8k without its file
    assert [len(problems) for problems in sets.values()] == [30, 10, 10, 10]
    trained = {template(p) for p, _ in tasks[0].pairs if '/template_' in p.id}
    assert not trained & {template(p) for p in sets['new_templates']}
    assert {p.family for p in sets['lcm']} == {'lcm'}


def test_the_seed_orders_the_same_training_problems_and_leaves_the_held_out_ones(tasks):
    first, second = tasks
    assert first.held_out == second.held_out
    asked = [[task.order[i].id for i in range(60)] for task in tasks]
    assert asked[0] != asked[1]
    everything = [{p.id for p, _ in task.pairs} | set(ids) for task, ids in zip(tasks, asked)]
    assert len(everything[0] & everything[1]) > 50


def test_rl_asks_problems_that_the_cold_start_did_not_show(tasks):
    shown = {p.id for p, _ in tasks[0].pairs}
    assert len(shown) == 40 and not shown & {tasks[0].asked(1)[i].id for i in range(60)}


def test_both_lines_are_shown_the_same_problems(tasks):
    tool, text = tasks[0].drafts(True), tasks[0].drafts(False)
    assert [d.problem.id for d in tool] == [d.problem.id for d in text]
    assert {len(d.turns) for d in text} == {1}
    assert 0.3 < sum(len(d.turns) == 2 for d in tool) / len(tool) < 0.8


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda c: c.held_out.update({'headline': None}), 'belong together'),
        (lambda c: c.data.update({'sources': ('problems.jsonl',)}), 'must be a generator'),
        (lambda c: c.mix.needy.update({'repair': 0.1, 'code': 0.45}), 'mix: 0.1 of the needy traces are repair'),
    ],
)
def test_what_does_not_fit_together_is_refused(change, words):
    config = cli.load_config('configs/demo.py:smollm2_135m')
    with config.unlocked(), config.ignore_type():
        change(config)
    if not config.data.weights or len(config.data.sources) != len(config.data.weights):
        config.data.weights = (1.0,)
    with pytest.raises(UserError, match=words):
        settings.build(Demo, config)


def test_a_file_that_holds_a_training_question_is_refused(grader, tasks, tmp_path):
    problem = tasks[0].order[0]
    row = {'id': 'a', 'problem': problem.question, 'answer': problem.answer}
    (tmp_path / 'test.jsonl').write_text(json.dumps(row))
    config = settings.to_json(load())
    config['held_out']['apart'] = {'gsm8k': str(tmp_path / 'test.jsonl')}
    with pytest.raises(UserError, match="held_out: 1 questions are trained on too, the first 'a'"):
        demo_task.open_task(settings.build(Demo, config), grader)
