"""Scores a model on a problem file with sandboxed rollouts (see configs/evaluate.py)."""

import os

from retool_jax.core import cli


def main(stage):
    from retool_jax.core import processes
    from retool_jax.report import pages
    from retool_jax.stages import evaluate

    found = evaluate.run(stage)
    if not processes.leads():
        return
    report = pages.write(stage.run.dir)
    for name, scores in found.items():
        evaluate.show(name, scores)
    print(f'report: {report}')


def run() -> None:
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    cli.run(main, 'retool_jax.stages.config:Evaluation')


if __name__ == '__main__':
    run()
