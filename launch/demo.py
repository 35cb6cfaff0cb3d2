"""The demo: ReTool from nothing on one CPU machine, in minutes (see configs/demo.py)."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from retool_jax.core import cli  # noqa: E402


def main(config):
    from retool_jax.train import recipe
    recipe.run(config)


if __name__ == '__main__':
    cli.run(main, default_config='configs/demo.py')
