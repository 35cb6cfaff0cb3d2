# %% [markdown]
# # One rollout
#
# From a model's directory to its text: what it wrote, the code it ran, what the interpreter said.
# `RETOOL_MODEL` names a Hugging Face directory and `RETOOL_SIZE` its configuration (`qwen2_5_7b`, …). Without them it is
# the model that `make demo` trained, or, before that, an untrained one of the same size, which writes noise.

# %%
import os
import tempfile
from pathlib import Path

from retool_jax.core import cli, settings
from retool_jax.report import ink
from retool_jax.stages import parts
from retool_jax.stages.config import Reinforcement
from retool_jax.tasks import arithmetic
from retool_jax.train import grading

trained = cli.ROOT / 'runs/demo_tiny/tool_rl'
MODEL = os.environ.get('RETOOL_MODEL') or (str(trained) if trained.is_dir() else None)
SIZE = os.environ.get('RETOOL_SIZE', 'tiny')
problem = arithmetic.problems('new_operands', 3, seed=4)[0]
print('model:', Path(MODEL).name if MODEL else 'untrained')
print(problem.question, '→', problem.answer)

# %% [markdown]
# A dozen lines. The engine feeds the prompt once for all samples, decodes until `</code>`, sends the snippet to the
# sandbox, feeds what it printed, and goes on until the answer.

# %%
config = cli.load_config(f'configs/ppo.py:{SIZE}')
config.model.path, config.sampler.rows = MODEL, 4
stage = settings.build(Reinforcement, config)
model = parts.open_model(stage.model, Path(tempfile.mkdtemp()))
sampler = parts.make_sampler(model, stage.sampler, stage.turns)
params = sampler.sync(parts.load_policy(stage.model, model, 0, parts.make_mesh(stage.mesh)))
with parts.open_sandbox(stage.sandbox) as pool, parts.open_grader(stage.reward) as grader:
    engine = parts.make_engine(model, sampler, stage.turns, stage.feedback, stage.evaluate_sampling, pool, 0,
                               parts.EVALUATION)
    episodes = grading.run(engine, params, 0, [problem], 4, model.template, model.tokenizer, grader)
shown = next((e for e in episodes if any(call.code for call in e.calls)), episodes[0])
ink.paint(shown, model.tokenizer)

# %% [markdown]
# The prompt is grey, code blue, the interpreter's words amber, the answer green. An episode is plain data: ids with a
# mask that says who wrote each, the log-probability of each written one, and the calls with their verdicts.

# %%
print(len(shown.tokens), 'ids, of which the model wrote', shown.acted_count)
print('calls:', [(str(call.verdict), call.stdout) for call in shown.calls])
print('rewards of the four samples:', [e.reward.value for e in episodes])
