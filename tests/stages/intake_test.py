"""Intake: what is left out is said and listed, what is refused is named, and data are not replaced under a run."""

import dataclasses
import json
from pathlib import Path

import pytest

from retool_jax.core.errors import UserError
from retool_jax.core.records import Problem
from retool_jax.model.config import TINY
from retool_jax.rollout.library import Model
from retool_jax.stages import intake, parts, ppo
from retool_jax.stages.intake import Intake
from retool_jax.tasks import answers, stream
from retool_jax.text.template import make_template, prompt_ids
from tests.fakes import byte_tokenizer
from tests.train import killable

MODEL = Model(TINY, byte_tokenizer(), make_template('tiny'))
FRAME = len(prompt_ids(MODEL.template, MODEL.tokenizer, ''))
GOOD = [{'id': f'p{i}', 'problem': f'{i} + {i}?', 'answer': str(2 * i)} for i in range(4)]
BAD = [
    {'id': 'words', 'problem': 'Why?', 'answer': '\\begin{cases}'},
    {'id': 'proof', 'problem': 'Prove it.', 'answer': 'proof'},
]


def write(path: Path, rows) -> Path:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def parses(gold: str) -> bool:
    return answers.integer(gold) is not None


def test_what_cannot_be_read_is_refused_by_name_with_the_key_that_leaves_it_out(tmp_path):
    refusing = Intake('refuse', parses)
    assert [p.id for p in refusing.read(write(tmp_path / 'a.jsonl', GOOD))] == ['p0', 'p1', 'p2', 'p3']
    with pytest.raises(UserError, match=r"^problem 'words' of a: answer .* set reward\.unreadable=leave_out$"):
        refusing.read(write(tmp_path / 'a.jsonl', [*GOOD, BAD[0]]))
    with pytest.raises(UserError, match=r"a\.jsonl:5: field 'answer' is 'proof'"):
        refusing.open([write(tmp_path / 'a.jsonl', [*GOOD, BAD[1]])])


def test_what_cannot_be_read_may_be_left_out_said_and_listed(tmp_path, capsys):
    leaving = Intake('leave_out', parses)
    read = leaving.read(write(tmp_path / 'a.jsonl', [*BAD, *GOOD]), limit=3)
    assert [p.id for p in read] == ['p0', 'p1', 'p2']
    said = capsys.readouterr().err
    assert '1 of 6 rows cannot be read' in said and "1 of 5 problems are left out: 'words': answer" in said
    leaving.write(tmp_path)
    listed = [json.loads(line) for line in (tmp_path / intake.FILE).read_text().splitlines()]
    assert [(entry['id'], 'proof' in entry['why']) for entry in listed] == [('', True), ('words', False)]
    with pytest.raises(UserError, match='no problems in it|no problem of a source is left'):
        leaving.read(write(tmp_path / 'b.jsonl', BAD))


def test_golds_of_array_records_are_checked_too(tmp_path):
    from retool_jax.tasks import problems

    rows = [Problem('a', 'Q', '1', 's', ''), Problem('b', 'Q', '\\begin{cases}', 's', '')]
    problems.write_array_record(tmp_path / 'a.array_record', rows)
    with pytest.raises(UserError, match="problem 'b' of s"):
        Intake('refuse', parses).open([tmp_path / 'a.array_record'])
    (kept,) = Intake('leave_out', parses).open([tmp_path / 'a.array_record'])
    assert [p.id for p in stream.once(kept)] == ['a']


def test_a_generator_is_read_by_its_name_for_training_and_for_evaluation(tmp_path, capsys):
    taken = Intake('refuse', parses)
    source = 'reasoning_gym:chain_sum?max_terms=2&max_digits=1&size=100'
    held = taken.read(source, limit=300)
    trained, beside = taken.open([source, write(tmp_path / 'a.jsonl', GOOD)])
    assert len(held) == 300 and 0 < len(trained) < 100 and len(beside) == 4
    assert not {p.question for p in held} & {p.question for p in stream.once(trained)}
    assert 'training problems ask what a held-out one asks and are left out' in capsys.readouterr().err
    words = taken.read('reasoning_gym:emoji_mystery', limit=5)
    assert len(words) == 5 and not any(parses(p.answer) for p in words)  # who judges them reads no mathematics
    with pytest.raises(UserError, match='did you mean chain_sum'):
        taken.open(['reasoning_gym:chain_sums'])


@pytest.mark.parametrize('question', ['x' * 64, 'é' * 32, '中' * 21 + 'x', ' ' + 'x' * 63])
def test_a_prompt_is_left_out_exactly_where_it_fills_the_budget(question):
    size = FRAME + 64
    problem = Problem('long', question, '1', 's', '')
    assert len(prompt_ids(MODEL.template, MODEL.tokenizer, question)) == size
    assert intake.overlong(problem, MODEL, size + 1) == ''
    for budget in (size, size - 1, 1):
        assert intake.overlong(problem, MODEL, budget) == (
            f'a prompt of {size} tokens leaves no room in turns.max_tokens={budget}'
        )


def test_over_long_prompts_are_left_out_of_every_source_and_counted(capsys):
    sources = stream.open_sources(
        [[Problem(f'{n}', 'x' * n, '1', 's', '') for n in sizes] for sizes in ((1, 90, 2), (91, 3, 92, 93, 94))]
    )
    one = Intake('refuse', parses)
    kept = one.fit(sources, MODEL, FRAME + 64)
    assert [[p.id for p in stream.once(dataset)] for dataset in kept] == [['0/1', '0/2'], ['1/3']]
    assert "5 of 8 problems are left out: '0/90': a prompt of" in capsys.readouterr().err
    assert intake.describe(one.left).endswith('; and 2 more')
    with pytest.raises(UserError, match=r"no problem of a source is left: '0/1': a prompt of .* turns.max_tokens=2"):
        one.fit(sources, MODEL, 2)


def test_an_evaluation_says_which_problems_count_as_wrong_for_their_length(capsys):
    asked = [Problem('short', 'x', '1', 's', ''), Problem('long', 'x' * 90, '1', 's', '')]
    intake.tell_overlong(asked[:1], MODEL, FRAME + 64)
    assert capsys.readouterr().err == ''
    intake.tell_overlong(asked, MODEL, FRAME + 64)
    assert "warning: 1 of 2 problems count as wrong: 'long': a prompt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_leaves_long_questions_out_and_refuses_data_replaced_under_it(tmp_path, capsys):
    folder = tmp_path / 'world'
    killable.make_model(folder)
    stage = killable.make_stage(
        folder, 'run', **{'model.tools': False, 'ppo.steps': 1, 'forward.micro_rows': 0, 'sampler.rows': 1}
    )
    file = folder / 'problems.jsonl'
    before = file.read_text()
    file.write_text(before + json.dumps({'id': 'long-one', 'problem': '2 + ' * 200 + '2', 'answer': '402'}) + '\n')
    ppo.run(stage)
    assert "1 of 21 problems are left out: 'long-one'" in capsys.readouterr().err
    (entry,) = map(json.loads, (folder / 'run' / intake.FILE).read_text().splitlines())
    assert entry['id'] == 'long-one'
    stage = dataclasses.replace(stage, ppo=dataclasses.replace(stage.ppo, steps=2))
    file.write_text(before.replace('Q3?', 'Q33?'))
    with pytest.raises(UserError, match=r"data\.sources='.*problems\.jsonl' is not what .* began with \(21 .* 20 now"):
        ppo.run(stage)


def test_episodes_beyond_the_positions_of_the_model_are_refused_with_the_keys_of_yarn():
    parts.check_context(MODEL, 4096, 'turns.max_tokens')
    with pytest.raises(
        UserError,
        match=r'^turns.max_tokens=9000 exceeds the 4096 positions .*max_position_embeddings'
        r'.*"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 4096',
    ):
        parts.check_context(MODEL, 9000, 'turns.max_tokens')
