"""The demo: ReTool on one CPU machine, from nothing in minutes or on a model that others trained (configs/demo.py)."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from retool_jax.core import cli


def main(stage):
    from retool_jax.report import pages
    from retool_jax.stages import demo

    summary = demo.run(stage)
    report = pages.write(stage.run.dir)
    demo.show(summary)
    print(f'report: {report}   model: {report.parent / "tool_rl"} (a Hugging Face directory)')


def run() -> None:
    cli.run(main, 'retool_jax.stages.demo_config:Demo', default_config='configs/demo.py')


if __name__ == '__main__':
    run()
