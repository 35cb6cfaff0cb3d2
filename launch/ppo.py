"""Multi-turn RL with sandboxed rollouts (see configs/ppo.py, configs/grpo.py, configs/dapo.py)."""

from absl import flags

from retool_jax.core import cli

DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Build and compile everything, take one step on fake tools, write nothing, print the memory.'
)


def main(stage):
    from retool_jax.core import processes
    from retool_jax.report import pages
    from retool_jax.stages import dry_run, ppo

    if DRY_RUN.value:
        dry_run.run(stage)
        return
    ppo.run(stage)
    if processes.leads():
        print(f'report: {pages.write(stage.run.dir)}')


def run() -> None:
    cli.run(main, 'retool_jax.stages.config:Reinforcement')


if __name__ == '__main__':
    run()
