"""Where no compiler for the chip is at hand (GPUs): temporaries and exchanges by arithmetic. An estimate."""

from __future__ import annotations

import jax.numpy as jnp

from retool_jax.plan import facts
from retool_jax.plan.facts import Facts
from retool_jax.plan.programs import Program, Run, per_device

# Collectives of a decode step outside its layers, as XLA's partitioner makes them: embedding, softmax, draw.
ENDS = 12


def estimate(run: Run, program: Program) -> Facts:
    """What a program would take on one chip."""
    name = program.name
    return facts.estimate(
        program, _temporaries(run, name), _sent(run, name), _exchanges(run, name), run.slice.chip.capability
    )


def _temporaries(run: Run, name: str) -> int:
    """Activations that are alive at once: what every layer keeps, one layer's own, one piece of logits."""
    f, model = run.learner.forward, run.model
    tensor = run.mesh.shape['tensor']
    width = jnp.dtype(f.dtype).itemsize
    tokens = f.micro_rows // (run.mesh.size // tensor) * f.row_width
    inner = 2 * model.intermediate_size + 4 * model.num_attention_heads * model.head_dim
    layer = model.hidden_size * 4 + inner / tensor
    one_layer = 2 * tokens * layer * width  # a value and its gradient
    (trained, added), (layers, _) = (per_device(x['policy']) for x in (run.params, run.gradients)), _read(run)
    gathered = 2 * layers * (run.mesh.size // tensor) / model.num_hidden_layers  # this layer and the next
    logits = 3 * 4 * min(f.logprob_chunk, f.row_width) * min(f.vocab_chunk, model.vocab_size / tensor)
    if name.startswith('update'):
        heads = model.num_attention_heads * model.head_dim
        keys = model.num_key_value_heads * model.head_dim
        kept = {
            'full': model.hidden_size / tensor,
            'attention': (model.hidden_size + heads) / tensor,
            'dots_but_mlp': 2 * (model.hidden_size + heads + keys) / tensor,
        }.get(f.remat, layer)
        kept *= tokens * width * model.num_hidden_layers
        # A micro-batch's gradients come out of the scan over layers whole, before they are added to the others; weights
        # of which they are taken in another dtype than f32 are a copy.
        return int(added * (2 if added < trained else 1) + kept + one_layer + gathered + logits)
    if name == 'apply':
        return trained  # the clipped gradients: their norm must be known before any of them is used
    if name.startswith('score'):
        return int(one_layer / 2 + gathered + logits)
    if name in ('extend', 'decode'):
        s, heads = run.sampler.settings, model.num_attention_heads / tensor
        rows, width = s.rows if name == 'decode' else s.feed_rows, jnp.dtype(s.dtype).itemsize
        tokens = rows if name == 'decode' else rows * s.chunk
        logits = 4 * rows * model.vocab_size / tensor
        # Scores of one layer in f32, their softmax, and that in the weights' dtype; decoding GPUs hold none.
        scores = 0 if name == 'decode' else (4 + 4 + width) * tokens * heads * s.slots
        taken = run.copied(s.slots) if name == 'decode' else 0
        one = 2 * per_device((run.sample_state.cache.k[0],))
        return int(tokens * layer * width * 2 + logits + scores + taken + one)
    return 0


def _exchanges(run: Run, name: str) -> int:
    """Collectives of a decode call: two a layer and step over tensor, and `ENDS` for embedding and draw."""
    if name != 'decode' or run.mesh.shape['tensor'] == 1:
        return 0
    return run.sampler.settings.quota * (2 * run.model.num_hidden_layers + ENDS)


def _read(run: Run) -> tuple[float, float]:
    """Bytes of the layers and of the other weights as matmuls read them, in 16 bits, a chip's part."""
    if run.frozen is not None:  # they lie there in that dtype
        layers, whole = per_device(run.frozen['layers']), per_device(run.frozen)
    else:
        layers, whole = (per_device(x) / 2 for x in (run.params['policy']['layers'], run.params['policy']))
    return layers, whole - layers


def _sent(run: Run, name: str) -> dict[str, float]:
    """Weights gathered over fsdp for each pass, gradients reduced once, activations over tensor in each layer."""
    f, model = run.learner.forward, run.model
    fsdp, tensor = run.mesh.shape['fsdp'], run.mesh.shape['tensor']
    layers, ends = (n * fsdp for n in _read(run))  # one chip's after gathering
    weights, trained = layers + ends, per_device(run.params['policy']) * fsdp
    tokens = f.micro_rows // (run.mesh.size // tensor) * f.row_width
    hidden = tokens * model.hidden_size * jnp.dtype(f.dtype).itemsize * (tensor - 1) / tensor * model.num_hidden_layers
    share = (fsdp - 1) / fsdp
    if name.startswith('update'):  # forwards, recomputed, backwards; two gathers and two scatters a layer and pass
        return {
            'all-gather': 2 * weights * share + 3 * 2 * hidden,
            'reduce-scatter': trained * share + 3 * 2 * hidden,
        }
    if name.startswith('score'):
        return {'all-gather': weights * share + 2 * hidden, 'reduce-scatter': 2 * hidden}
    if name == 'sync layer':
        return {'all-gather': layers / model.num_hidden_layers * share}
    if name == 'sync ends':
        return {'all-gather': ends * share}
    if name in ('extend', 'decode'):
        s = run.sampler.settings
        tokens = run.sampler.decode_rows * s.quota if name == 'decode' else s.feed_rows * s.chunk
        return {'all-reduce': 2 * 2 * tokens * model.hidden_size * 2 * (tensor - 1) / tensor * model.num_hidden_layers}
    return {}
