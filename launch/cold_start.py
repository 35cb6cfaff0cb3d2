"""Verified cold-start traces, ready for launch/sft.py (see configs/cold_start.py)."""

import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing here needs an accelerator

from retool_jax.core import cli, console, episode_files


def main(config):
    from retool_jax.core import settings
    from retool_jax.stages import cold_start, folder, intake, parts
    from retool_jax.stages import config as config_stage
    from retool_jax.tasks import arithmetic, golds
    from retool_jax.tasks import problems as problem_files

    stage = settings.build(config_stage.ColdStart, config)
    leave_out = stage.reward.unreadable == 'leave_out'
    rewritten, remarks = problem_files.load_traces(config.traces, leave_out) if config.traces else (None, [])
    for line in remarks:
        console.say(line)
    own = golds.own(rewritten, config.traces) if rewritten else set()
    if config.golds:
        rewritten, own = golds.join(rewritten, own, problem_files.read(config.golds))
    if rewritten:
        with parts.open_grader(config.reward) as grader:
            rewritten = intake.Intake(config.reward.unreadable, grader.parses).worked(rewritten)
    with (folder.claimed(config) as directory, parts.open_sandbox(config.sandbox) as pool,
          parts.open_grader(config.reward) as grader):
        model = parts.open_model(config.model, directory)
        console.banner(model=model, sandbox=pool, run=directory)
        if rewritten is not None:
            made, counts = cold_start.verify(rewritten, pool, stage.feedback, model.template, model.tokenizer,
                                             grader.equal, config.max_tokens)
        else:
            drawn = arithmetic.problems('train', config.problems, config.run.seed)
            made, counts = cold_start.build(drawn, stage.mix, pool, stage.feedback, model.template,
                                            model.tokenizer, config.run.seed, config.max_tokens)
        if not made:
            raise cli.UserError(f'no trace was kept: {counts}')
        episode_files.write(directory / 'episodes', 'cold_start', made, model.tokenizer.decode)
        unverified = sum(episode.problem.id in own for episode in made)
        verified = {'verified': len(made) - unverified, 'own': unverified}
        (directory / 'summary.json').write_text(json.dumps({'counts': counts, 'answers': verified}, indent=2))
    console.table('traces', ('', 'number', 'share'), cold_start.shares(counts))
    if own:
        console.say(f'answers: {len(made) - unverified} of {len(made)} traces kept were verified; {unverified} have no '
                    'gold answer but their own last box, which verifies nothing: --config.golds=FILE names one')
    print(f'episodes: {directory / "episodes"}')


def run() -> None:
    cli.run(main)


if __name__ == '__main__':
    run()
