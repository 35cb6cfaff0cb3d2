# %% [markdown]
# # Your own task and reward
#
# A task is a list of `Problem`s. A reward is anything with `grade_many(texts, golds, calls, wholes)`. This trains two steps of PPO
# on both; `RETOOL_MODEL` names a Hugging Face directory, without it a model of a million random weights learns nothing in
# two steps, but takes them.

# %%
import os
import random
import tempfile
from pathlib import Path

from retool_jax.core import cli, settings
from retool_jax.core.records import Problem, Reward
from retool_jax.report import ink
from retool_jax.stages.config import Reinforcement
from retool_jax.stages.parts import build, open_sandbox
from retool_jax.tasks import answers
from retool_jax.train import ppo

trained = cli.ROOT / 'runs/demo_tiny/tool_rl'
MODEL = os.environ.get('RETOOL_MODEL') or (str(trained) if trained.is_dir() else None)

# %% [markdown]
# ## The task: counting the digits of a power

# %%
rng = random.Random(0)
problems = []
for i in range(100):
    base, power = rng.randrange(2, 99), rng.randrange(10, 99)
    problems.append(Problem(id=f'digits-{i}', question=f'How many digits has {base}^{power}?',
                            answer=str(len(str(base ** power))), source='digits', family='digits'))
problems[0]

# %% [markdown]
# ## The reward: right is right, and near is better than far

# %%
class Nearness:
    """1 for the right number, less the further it is away, −1 without a number. No mathematics is judged here, so no
    child process is needed."""

    def grade_many(self, texts, golds, calls=None, wholes=None):
        return [self.grade(text, gold) for text, gold in zip(texts, golds)]

    def grade(self, text, gold):
        box = answers.last_box(text)  # of the model's own words after its last tool output
        number = answers.integer(box) if box is not None else None
        if number is None:
            return Reward(value=-1.0, correct=False, exact=False, lenient=False, answer=box or '')
        right = number == gold
        value = 1.0 if right else -min(1.0, abs(int(number) - int(gold)) / int(gold))
        return Reward(value=value, correct=right, exact=right, lenient=right, answer=box)


Nearness().grade(r'so \boxed{19}', '20')

# %% [markdown]
# ## Two steps
#
# `configs/ppo.py` holds every setting with its source; what differs is set here. `parts.build` makes model, optimizer
# and learner of it, `sync` the weights that are sampled with, a `source` the episodes of a step, and `ppo.train` is the loop.

# %%
config = cli.load_config('configs/ppo.py:tiny')
config.model.path = MODEL
config.ppo.steps, config.ppo.problems_per_step, config.ppo.samples = 2, 4, 4
config.sampler.rows, config.forward.unroll = 16, 1  # small programs compile sooner
stage = settings.build(Reinforcement, config)
parts = build(stage, Path(tempfile.mkdtemp()))
results = []


def report(result):
    results.append(result)
    print(f'step {result.step}:', ', '.join(f'{name} {result.metrics[name]:.4g}' for name in (
        'rewards/mean', 'tools/code_ratio', 'actor/grad_norm', 'mismatch/logprob_abs_max')))


with open_sandbox(stage.sandbox) as pool:
    sampler = parts.sampler()
    sync, source = parts.sync(sampler), parts.source(sampler, pool, problems, Nearness())
    ppo.train(parts.learner, parts.progress, stage.ppo, sync=sync, collect=source, seed=0, report=report)

# %%
ink.paint(results[-1].episodes[0], parts.model.tokenizer)

# %% [markdown]
# For a real run, write the problems to a file (`{"id": …, "problem": …, "answer": …}` a line) and let
# `launch/ppo.py --config.data.sources="('digits.jsonl',)"` do the rest: checkpoints, resume, validation and the report.
