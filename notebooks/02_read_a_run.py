# %% [markdown]
# # Reading a run
#
# A run's folder is plain files: `metrics.jsonl` holds a line per step, `episodes/` everything the model wrote.
# `RETOOL_RUN` names a folder; without it, the one that `make demo` left. (`report.html` in it shows the same, and more,
# without any code.)

# %%
import collections
import os
from pathlib import Path

import matplotlib.pyplot as plt

from retool_jax.core import cli, episode_files, metrics
from retool_jax.core.records import Verdict
from retool_jax.report import analysis, ink
from retool_jax.report.runs import Run

RUN = Path(os.environ.get('RETOOL_RUN', cli.ROOT / 'runs/demo_tiny'))
lines = metrics.read(RUN)
phases = collections.Counter(line.get('phase', '') for line in lines)
print(f'{len(lines)} lines:', dict(phases))

# %% [markdown]
# ## Curves

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout='constrained')
for axis, name in zip(axes, ('rewards/correct', 'tools/code_ratio', 'response_length/mean')):
    for phase in phases:
        values = [line[name] for line in lines if line.get('phase', '') == phase and name in line]
        if values:
            axis.plot(values, label=phase)
    axis.set_title(name)
    axis.set_xlabel('step')
axes[0].legend()
plt.show()

# %% [markdown]
# ## Episodes
#
# Files are named after what they hold: `tool_00012` is a step of training, `val_…` an evaluation.

# %%
names = episode_files.names(RUN / 'episodes')
print(len(names), 'files, the last:', names[-3:])
made = episode_files.read(RUN / 'episodes', next((n for n in reversed(names) if not n.startswith('val_')), names[-1]))
right = collections.defaultdict(list)
for episode in made:
    right[episode.problem.family].append(episode.reward.correct)
for family, marks in sorted(right.items()):
    print(f'{family or "all":22s} {sum(marks):3d} of {len(marks)}')

# %% [markdown]
# One that failed on the way, if there is one. The colours say who wrote what.

# %%
failed = [e for e in made if any(call.verdict == Verdict.ERROR for call in e.calls)]
run = Run(RUN)
ink.paint((failed or made)[0], run.tokenizer)

# %% [markdown]
# The tokens that surprised the sampler most: `acted` says which ones the model wrote, `logprobs` how likely they were.

# %%
episode = (failed or made)[0]
written = [(logprob, run.tokenizer.decode([token]))
           for token, acted, logprob in zip(episode.tokens, episode.acted, episode.logprobs) if acted]
for logprob, text in sorted(written)[:5]:
    print(f'{logprob:8.3f}  {text!r}')

# %% [markdown]
# ## How code is used
#
# The paper's six metrics, self-correction and what snippets are for (`retool_jax/report/analysis.py` defines each).

# %%
for part in [part for part in run.parts if not part.training][:4] or run.parts[-1:]:
    use = analysis.analyse(run.transcripts(part))
    print(f'{part.name}: {use.answers} answers, {100 * use.correct:.1f} % right, {100 * use.code_ratio:.1f} % with code, '
          f'{use.failures} failing snippets of which {use.repaired} repaired, {use.purposes}')
