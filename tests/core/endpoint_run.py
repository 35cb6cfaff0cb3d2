"""A run that can be killed: URL, folder of answers, file of results, number of words; two answers for each word."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from retool_jax.core.answers import Request
from retool_jax.core.endpoint import Endpoint
from tests.core.endpoint_server import make_settings


def main(url: str, answers: str, out: str, count: str) -> None:
    requests = (
        Request(messages=[{'role': 'user', 'content': str(i)}], parameters={'seed': n}, candidate=n)
        for i in range(int(count))
        for n in range(2)
    )
    with Endpoint(make_settings(url, timeout_s=600.0), answers) as endpoint:
        found = [answer.text for answer in endpoint.answers(requests)]
    new = Path(f'{out}.new')
    new.write_text(json.dumps(found))
    new.replace(out)


if __name__ == '__main__':
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)
