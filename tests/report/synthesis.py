"""A made-up run of the demo's shape: real records and real files, invented behaviour."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from retool_jax.core import episode_files
from retool_jax.core.metrics import Metrics
from retool_jax.core.records import Episode, Reward, Stop, ToolCall, Verdict
from retool_jax.tasks import arithmetic
from retool_jax.tasks.summary import summarise
from retool_jax.text.template import wrap_answer, wrap_feedback, wrap_snippet
from retool_jax.text.tokenizer import Tokenizer, train_bpe


def episode(
    problem, sample: int, step: int, *, kind: str, right: bool, rng: random.Random, tokenizer: Tokenizer
) -> Episode:
    """An answer of one kind: 'mental', 'code', 'repair', 'fail' (the snippet fails, nothing repairs it)."""
    made = Episode(problem, sample, step)
    start, end = (tokenizer.special_ids[name] for name in ('<|im_start|>', '<|im_end|>'))
    made.append(
        [start, *tokenizer.encode('user\n' + problem.question), end, start, *tokenizer.encode('assistant\n')],
        acted=False,
    )
    made.prompt_length = len(made.tokens)

    def write(text: str) -> None:
        ids = tokenizer.encode(text)
        made.append(ids, acted=True, logprobs=[-rng.expovariate(4.0) for _ in ids], version=step)

    def call(code: str, verdict: Verdict, stdout: str = '', stderr: str = '') -> None:
        write(wrap_snippet(code))
        feedback = stdout or stderr
        made.calls.append(
            ToolCall(made.turns, code, verdict, stdout, stderr, feedback, len(made.tokens), rng.uniform(0.001, 0.02))
        )
        made.turns += 1
        made.append(tokenizer.encode(wrap_feedback(feedback)), acted=False)

    trace = arithmetic.trace(problem, {'fail': 'repair'}.get(kind, kind), seed=0)
    codes = [text for part, text in trace.parts if part == 'code']
    for part, text in trace.parts[:-1]:
        if part == 'text':
            write(text)
        elif len(codes) == 2 and text == codes[0]:
            call(text, Verdict.ERROR, stderr='SyntaxError: invalid syntax')
            if kind == 'fail':
                break
        else:
            call(text, Verdict.OK, stdout=problem.answer + '\n')
    answer = problem.answer if right else str(int(problem.answer) + 1)
    write(wrap_answer(answer))
    made.turns += 1
    made.stop = Stop.ANSWER
    made.reward = Reward(1.0 if right else -1.0, right, right, right, answer)
    return made


def episodes(
    split: str, count: int, samples: int, step: int, skill: float, tools: bool, seed: int, tokenizer: Tokenizer
) -> list[Episode]:
    rng, found = random.Random(f'{split}{step}{seed}{tools}'), []
    for problem in arithmetic.problems(split, count, seed):
        for sample in range(samples):
            kinds = ['mental', 'code', 'repair', 'fail'] if tools else ['mental']
            weights = [1.2 - skill, skill, 0.25 * (1 - skill), 0.2 * (1 - skill)] if tools else [1]
            kind = rng.choices(kinds, weights)[0]
            right = rng.random() < {'mental': 0.2, 'code': 0.97, 'repair': 0.9, 'fail': 0.05}[kind] + 0.1 * skill
            found.append(episode(problem, sample, step, kind=kind, right=right, rng=rng, tokenizer=tokenizer))
    return found


def run_folder(directory: Path, steps: int = 30, problems: int = 16, samples: int = 4, held_out: int = 48) -> Path:
    """Writes a whole run folder and returns it; 2 · steps · problems · samples training episodes."""
    directory.mkdir(parents=True, exist_ok=True)
    corpus = [
        p.question
        + wrap_snippet(arithmetic.BY_NAME[p.family].code(*arithmetic.operands_of(p)))
        + wrap_feedback(p.answer)
        + wrap_answer(p.answer)
        for p in arithmetic.problems('train', 300, seed=1)
    ]
    tokenizer = train_bpe(corpus, 400, directory / 'model')
    decode, rng, clock, summary = tokenizer.decode, random.Random(1), 0, {}
    skills = {'base': 0.0, 'sft': 0.4, 'tool_rl': 1.0, 'text_sft': 0.1, 'text_rl': 0.3}
    (directory / 'config.json').write_text(json.dumps({'run': {'seed': 0}, 'ppo': {'steps': steps}}))
    with Metrics(directory, tensorboard=False) as writer:

        def log(phase, k, values):
            nonlocal clock
            writer.write(clock, {'phase': phase, 'phase_step': k} | values)
            clock += 1

        for kind in ('tool', 'text'):
            for k in range(120):
                loss = 4 * math.exp(-k / 30) + rng.uniform(0.2, 0.3)
                log(f'sft_{kind}', k, {'sft/loss': loss, 'actor/grad_norm': 1.0})
            for k in range(steps):
                skill = 0.4 + 0.6 * k / steps if kind == 'tool' else 0.1 + 0.2 * k / steps
                made = episodes('train', problems, samples, k, skill, kind == 'tool', seed=k, tokenizer=tokenizer)
                n = len(made)
                log(
                    f'ppo_{kind}',
                    k,
                    {
                        'rewards/correct': sum(e.reward.correct for e in made) / n,
                        'rewards/mean': sum(e.reward.value for e in made) / n,
                        'tools/code_ratio': sum(bool(e.calls) for e in made) / n,
                        'response_length/mean': sum(e.acted_count for e in made) / n,
                        'tools/calls': sum(len(e.calls) for e in made) / n,
                        'tools/failure_frequency': 0.2 * (1 - skill),
                        'actor/entropy': 0.8 - 0.6 * skill + rng.uniform(0, 0.05),
                        'actor/ppo_kl': rng.uniform(0, 2e-3),
                        'actor/pg_clipfrac': rng.uniform(0, 0.02),
                        'actor/grad_norm': rng.uniform(0.3, 0.8),
                        'mismatch/logprob_abs_max': rng.uniform(1e-5, 5e-5),
                        'mismatch/kl': rng.uniform(0, 1e-9),
                        'time/step_s': rng.uniform(9, 11),
                        'time/rollout_s': rng.uniform(5, 6),
                        'time/update_s': rng.uniform(3, 4),
                        'time/tools_blocked_s': rng.uniform(0, 0.3),
                        'critic/explained_var': skill - 0.3,
                        'void_turn_ratio': 0.0,
                        'rollout/weird': 1.0,
                    },
                )
                episode_files.write(directory / 'episodes', f'{kind}_{k:05d}', made, decode)
        for name, skill in skills.items():
            sets = {}
            for split in ('new_operands', 'new_wording', 'larger_range')[: 1 if name in ('base', 'text_sft') else 3]:
                made = episodes(split, held_out, 2, 0, skill, not name.startswith('text'), seed=7, tokenizer=tokenizer)
                episode_files.write(directory / 'episodes', f'val_{name}_{split}', made, decode)
                sets[split] = summarise(made)
            log(f'val_{name}', 0, {f'val/{split}/avg@2': found['avg'] for split, found in sets.items()})
            summary[name] = sets.pop('new_operands') | {'apart': sets}
    summary |= {'code_ratio': {'before': 0.55, 'after': 0.99}, 'steps': steps, 'seconds': 745.2, 'seed': 0}
    (directory / 'summary.json').write_text(json.dumps(summary))
    return directory
