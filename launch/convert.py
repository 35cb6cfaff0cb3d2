"""Converts weights between Hugging Face directories and checkpoints of this project, and out of GGUF files.

    python launch/convert.py SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct
    python launch/convert.py --to=orbax --source=Qwen2.5-7B --target=checkpoints/qwen2_5_7b
    python launch/convert.py --to=hf --source=runs/ppo/checkpoints --like=Qwen2.5-7B --target=exported
    python launch/convert.py --to=peft --source=runs/ppo/checkpoints --like=Qwen2.5-7B --target=adapter

The two names are --source and --target; a GGUF file becomes a Hugging Face directory. `--like` is one whose
config.json and tokenizer an export gets; of a run over adapters (lora.rank) it is the model that they stand on, into
which --to=hf merges them; --to=peft writes them alone. Nothing is overwritten. Memory: the weights once, plus the
largest tensor; of a GGUF file 64 MiB of numbers.
"""

import os

from absl import flags

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # no accelerator is needed, and weights may exceed its memory

from retool_jax.core import cli, console

TO = flags.DEFINE_enum('to', None, ['hf', 'orbax', 'peft'], 'What to write.')
SOURCE = flags.DEFINE_string('source', None, 'Directory, or GGUF file, to read.')
TARGET = flags.DEFINE_string('target', None, 'Directory to write; it must be new or empty.')
LIKE = flags.DEFINE_string('like', None, '--to=hf, peft: Hugging Face directory with config.json and tokenizer.')
STEP = flags.DEFINE_integer('step', None, '--to=hf, peft: step of the checkpoint; the newest by default.')
PART = flags.DEFINE_string('part', 'params.policy', '--to=hf, peft: where the weights are in the checkpoint.')
DTYPE = flags.DEFINE_enum(
    'dtype',
    None,
    ['float32', 'bfloat16'],
    'Of the target; by default of orbax float32, of hf bfloat16, of a GGUF file what holds its numbers exactly.',
)


def main() -> None:
    source, to = SOURCE.value or '', TO.value
    is_gguf = source.endswith('.gguf') or os.path.isfile(source)  # the others are directories
    for flag in (SOURCE, TARGET) if is_gguf else (TO, SOURCE, TARGET) + ((LIKE,) if to in ('hf', 'peft') else ()):
        if flag.value is None:
            raise cli.UserError(f'--{flag.name} is missing; see --help')
    if is_gguf and to in ('orbax', 'peft'):
        raise cli.UserError(f'--to={to}: a GGUF file becomes a Hugging Face directory first; leave --to out')
    from retool_jax.model import convert

    way = 'gguf' if is_gguf else to
    convert.run(way, source, TARGET.value, like=LIKE.value, step=STEP.value, part=PART.value, dtype=DTYPE.value)
    console.say(f'{TARGET.value}: written')


def run() -> None:
    cli.run_plain(main, bare=('source', 'target'))


if __name__ == '__main__':
    run()
