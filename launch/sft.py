"""Supervised fine-tuning on verified traces (see configs/sft.py)."""

from retool_jax.core import cli


def main(config):
    from retool_jax.core import processes
    from retool_jax.report import pages
    from retool_jax.stages import sft

    sft.run(config)
    if processes.leads():
        print(f'report: {pages.write(config.run.dir)}')


def run() -> None:
    cli.run(main)


if __name__ == '__main__':
    run()
