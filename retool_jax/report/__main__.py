"""`python -m retool_jax.report RUN_DIR` writes the report of a run and prints where it is."""

from __future__ import annotations

import argparse
import sys

from retool_jax.core import cli, streams
from retool_jax.core.errors import UserError
from retool_jax.report import pages, plots


@streams.ends_unread()
def main() -> int:
    parser = argparse.ArgumentParser(prog='retool-report', description='Writes RUN_DIR/report.html.')
    parser.add_argument('run_dir', help='the folder that a run wrote')
    parser.add_argument('--episodes', type=int, default=2000, help='episodes in the browser, at most')
    parser.add_argument('--picture', action='store_true', help='write curves.png beside the report')
    options = parser.parse_args()
    try:
        if options.episodes < 1:
            raise UserError(f'--episodes is {options.episodes}: give 1 or more')
        print(pages.write(options.run_dir, pages.Limits(episodes=options.episodes)))
        if options.picture:
            print(plots.curves(options.run_dir))
    except Exception as error:
        return cli.tell(error)
    return 0


if __name__ == '__main__':
    sys.exit(main())
