"""Fetches a public set of problems or traces from the Hugging Face hub, under the name that the commands read.

    python launch/fetch.py aime24
    python launch/fetch.py dapo_math_17k --to=data --revision=COMMIT

The names are retool_sft, dapo_math_17k, aime24, aime25 and math500. FILE.source beside the file says which commit it
was, with rows and SHA-256; `--revision` with that commit fetches the same again. A set with another number of rows than
it is known with is refused; one that was fetched before stays as it is. HF_ENDPOINT names another hub, HF_TOKEN a key.
"""

from pathlib import Path

from absl import flags

from retool_jax.core import cli, console

SET = flags.DEFINE_string('set', None, 'The set.')
TO = flags.DEFINE_string('to', '.', 'Folder that its file is written to.')
REVISION = flags.DEFINE_string('revision', 'main', 'Branch, tag or commit of its repository.')


def main() -> None:
    from retool_jax.tasks import fetch

    if SET.value is None:
        raise cli.UserError(f'--set is missing; give one of {", ".join(fetch.SETS)}')
    path, facts = fetch.fetch(SET.value, Path(TO.value), REVISION.value)
    console.say(f'{path}: {facts["rows"]:,} rows of {facts["repository"]} at {facts["revision"]}')


def run() -> None:
    cli.run_plain(main, bare=('set',))


if __name__ == '__main__':
    run()
