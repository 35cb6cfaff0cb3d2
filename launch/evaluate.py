"""Scores a model on a problem file with sandboxed rollouts (see configs/evaluate.py)."""

import json
import os
import pathlib

from retool_jax.core import cli, metrics


def main(config):
    from retool_jax.report import pages
    from retool_jax.tasks import problems as problem_files
    from retool_jax.train import assembly, evaluate, folder

    if not config.problems:
        raise cli.UserError('config.problems is missing; give a problem file')
    problems = problem_files.read(config.problems, config.limit)
    name = pathlib.Path(config.problems).stem
    mesh = assembly.make_mesh(config.mesh)
    directory = folder.claim(config)
    language = assembly.open_language(config.model, directory)
    params = assembly.load_policy(config.model, language, config.run.seed, mesh)
    with (assembly.open_executor(config.sandbox, config.model.tools) as pool,
          assembly.open_grader(config.reward) as grader):
        metrics.banner(model=language, mesh=dict(mesh.shape), sandbox=pool, problems=f'{len(problems)} of {name}',
                       run=directory)
        sampler = assembly.make_sampler(language, config, config.model.tools)
        engine = assembly.make_engine(language, sampler, config, config.sampling, config.model.tools, pool,
                                      config.run.seed, assembly.EVALUATION)
        with metrics.progress(f'evaluate {name}', len(problems) * config.samples) as advance:
            episodes = evaluate.run_in_parts(
                engine, sampler.sync(params), problems, config.samples, directory / 'episodes', name,
                language.template, language.tokenizer, grader, advance)
    found = evaluate.summarise(episodes)
    (directory / 'summary.json').write_text(json.dumps({name: found}, indent=2))
    with metrics.Metrics(directory) as writer:
        writer.rewind(None)
        writer.write(0, evaluate.as_metrics(name, found))
    pages.write(directory)
    evaluate.show(name, found)
    print(f'report: {directory / "report.html"}')


if __name__ == '__main__':
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    cli.run(main)
