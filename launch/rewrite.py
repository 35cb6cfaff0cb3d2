"""Text traces rewritten into verified traces with code (see configs/rewrite.py)."""

import os

from retool_jax.core import cli


def main(stage):
    from retool_jax.report import pages
    from retool_jax.stages import rewrite

    rewrite.run(stage)
    print(f'episodes: {os.path.join(stage.run.dir, "episodes")}')
    print(f'report: {pages.write(stage.run.dir)}')


def run() -> None:
    cli.run(main, 'retool_jax.stages.rewrite_config:Rewrite')


if __name__ == '__main__':
    run()
