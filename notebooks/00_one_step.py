# %% [markdown]
# # One step of ReTool, on one page
#
# What `launch/ppo.py` does in a step; every function called here is the one that a run calls. `RETOOL_MODEL` names a
# directory of the embedded model; without it the model is the demo's, or one of random weights.

# %%
import dataclasses
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from configs import base
from retool_jax.algo.advantages import gae, reward_on_last_acted
from retool_jax.model import decoder, hf
from retool_jax.model.logprobs import token_logprobs
from retool_jax.rollout import library
from retool_jax.stages import embedded, parts
from retool_jax.stages.config import SandboxBlock
from retool_jax.tasks import arithmetic
from retool_jax.tasks.grader import Grader
from retool_jax.train import grading
from retool_jax.train.pack import pack

directory = Path(os.environ.get('RETOOL_MODEL', '../runs/demo_tiny/tool_rl'))
if not (trained := directory.is_dir()):
    embedded.write_model(directory := Path(tempfile.mkdtemp()))
model = library.load_model(directory, 'tiny', tools=True)  # sizes, tokenizer and template; `policy` are its f32 weights
policy = hf.load(directory, model.config) if trained else embedded.init(model.config, jax.random.key(0))

# %% [markdown]
# **Roll out and grade.** At `</code>` a row waits for the sandbox while the others decode; the reward is +1 or −1.

# %%
model = dataclasses.replace(model, params=decoder.to_sampling(model.config, policy))
problems = arithmetic.problems('train', 8, seed=0)
with parts.open_sandbox(SandboxBlock(**base.sandbox('tiny'))) as pool, Grader() as grader:
    engine = library.Engine(model, pool, rows=32, max_tokens=200, max_calls=3)
    episodes = grading.run(engine, model.params, 0, problems, 4, model.template, model.tokenizer, grader)
print(sum(e.reward.correct for e in episodes), 'right of', len(episodes), 'calls:', sum(len(e.calls) for e in episodes))

# %% [markdown]
# **Estimate.** Several episodes share a row. `acted` marks the tokens that the policy wrote: GAE steps over all others,
# and the reward stands on the last acted one. V, a line on the last hidden state, values the state before each token.

# %%
batch = jax.tree.map(jnp.asarray, pack(episodes, width=200, rows=1, segments=8))
acted, segments = batch.acted_BT, batch.segment_ids_BT
params = {'policy': policy, 'critic': jnp.zeros(model.config.hidden_size)}

def look(params):
    hidden = decoder.forward(model.config, params['policy'], batch.tokens_BT, batch.positions_BT, segments)
    logprob, _ = token_logprobs(params['policy'], hidden, batch.tokens_BT, chunk=200)
    return logprob, jnp.pad((hidden @ params['critic'])[:, :-1], ((0, 0), (1, 0)))

old_logprob, old_value = jax.jit(look)(params)
reward = reward_on_last_acted(batch.reward_BN, acted, segments)
advantage, returns = gae(reward, old_value, acted, 1.0, 1.0, segments)

# %% [markdown]
# **Update.** PPO's clipped loss and half the critic's squared error, means over acted tokens; one step of AdamW.

# %%
def loss(params):
    logprob, value = look(params)
    ratio = jnp.exp(jnp.where(acted, logprob - old_logprob, 0.0))
    clipped = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.8, 1.28))
    return jnp.where(acted, clipped + 0.5 * 0.5 * (value - returns) ** 2, 0.0).sum() / acted.sum()

gradient = jax.jit(jax.grad(loss))(params)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
updates, _ = optimizer.update(gradient, optimizer.init(params), params)
params = optax.apply_updates(params, updates)
print('norm of the gradient:', optax.tree.norm(gradient))
