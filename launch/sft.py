"""Supervised fine-tuning on verified traces (see configs/sft.py)."""

from retool_jax.core import cli


def main(stage):
    from retool_jax.core import processes
    from retool_jax.report import pages
    from retool_jax.stages import sft

    sft.run(stage)
    if processes.leads():
        print(f'report: {pages.write(stage.run.dir)}')


def run() -> None:
    cli.run(main, 'retool_jax.stages.config:FineTuning')


if __name__ == '__main__':
    run()
