"""Verified cold-start traces, ready for launch/sft.py (see configs/cold_start.py)."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here needs an accelerator

from retool_jax.core import cli


def main(stage):
    from retool_jax.report import pages
    from retool_jax.stages import cold_start

    cold_start.run(stage)
    print(f'episodes: {os.path.join(stage.run.dir, "episodes")}')
    print(f'report: {pages.write(stage.run.dir)}')


def run() -> None:
    cli.run(main, 'retool_jax.stages.config:ColdStart')


if __name__ == '__main__':
    run()
