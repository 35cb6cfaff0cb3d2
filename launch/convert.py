"""Converts weights between Hugging Face directories and checkpoints of this project.

    python launch/convert.py --to=orbax --source=Qwen2.5-7B --target=checkpoints/qwen2_5_7b
    python launch/convert.py --to=hf --source=runs/ppo/checkpoints --like=Qwen2.5-7B --target=exported

`--like` is a Hugging Face directory whose config.json and tokenizer the export gets. Nothing is
overwritten. Memory: the weights once, plus the largest tensor.
"""

import os

from absl import flags

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # no accelerator is needed, and weights may exceed its memory

from retool_jax.core import cli, metrics

TO = flags.DEFINE_enum('to', None, ['hf', 'orbax'], 'What to write.')
SOURCE = flags.DEFINE_string('source', None, 'Directory to read.')
TARGET = flags.DEFINE_string('target', None, 'Directory to write; it must be new or empty.')
LIKE = flags.DEFINE_string('like', None, '--to=hf: Hugging Face directory with config.json and tokenizer.')
STEP = flags.DEFINE_integer('step', None, '--to=hf: step of the checkpoint; the newest by default.')
PART = flags.DEFINE_string('part', 'params.policy', '--to=hf: where the weights are in the checkpoint.')
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the target; hf: bfloat16, orbax: float32.')


def main() -> None:
    for flag in (TO, SOURCE, TARGET) + ((LIKE,) if TO.value == 'hf' else ()):
        if flag.value is None:
            raise cli.UserError(f'--{flag.name} is missing; see --help')
    from retool_jax.model import config, convert, hf

    names = hf.leaves(config.load_config(LIKE.value if TO.value == 'hf' else SOURCE.value))
    with metrics.progress(f'{SOURCE.value} → {TARGET.value}', sum(len(leaf.names) for leaf in names)) as advance:
        step = lambda done, total: advance()
        if TO.value == 'orbax':
            convert.to_orbax(SOURCE.value, TARGET.value, DTYPE.value or 'float32', step)
        else:
            convert.to_hf(SOURCE.value, TARGET.value, LIKE.value, step=STEP.value, part=PART.value,
                          dtype=DTYPE.value or 'bfloat16', progress=step)
    metrics.say(f'{TARGET.value}: written')


if __name__ == '__main__':
    cli.run_plain(main)
