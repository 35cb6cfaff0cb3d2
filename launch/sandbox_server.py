"""Serves the sandbox over HTTP, in SandboxFusion's schema (docs/sandbox.md).

    python launch/sandbox_server.py --port=8080
    RETOOL_SANDBOX_TOKEN=… python launch/sandbox_server.py --host=0.0.0.0

SIGTERM finishes what runs, then ends.
"""

import os

from absl import flags

from retool_jax.core import cli

SERVER = (
    flags.DEFINE_string('host', '127.0.0.1', 'Address; others than loopback need RETOOL_SANDBOX_TOKEN.'),
    flags.DEFINE_integer('port', 8080, 'Port to listen on.'),
    flags.DEFINE_integer('metrics_port', 0, 'A further port, for /metrics without the token; 0: none.'),
    flags.DEFINE_float('max_timeout_s', 60.0, 'Seconds of a request at most, wall and CPU.'),
    flags.DEFINE_float('max_memory_mb', 4096.0, 'Memory that a request gets at most.'),
    flags.DEFINE_integer('connections', 1024, 'Clients at once; beyond them the idle make room, or 503.'),
    flags.DEFINE_float('drain_s', 60.0, 'Seconds that running snippets get after SIGTERM.'),
)
POOL = (
    flags.DEFINE_integer('zygotes', 2, 'Warm workers.'),
    flags.DEFINE_integer('spares', 3, 'Children sealed ahead of need, per worker.'),
    flags.DEFINE_integer('concurrency', 0, 'Snippets running at once; 0: two per core.'),
    flags.DEFINE_integer('memory_mb', 256, 'Memory of a snippet that names none.'),
    flags.DEFINE_integer('queue', 4096, 'Snippets waiting before the answer is 429.'),
    flags.DEFINE_integer('queue_mb', 256, 'MiB of waiting snippets before the answer is 429.'),
    flags.DEFINE_list('packages', ['numpy', 'scipy', 'sympy'], 'Packages that snippets can import.'),
    flags.DEFINE_list('preload', ['numpy', 'sympy'], 'Modules imported before a snippet starts.'),
)


def main() -> None:
    from retool_jax.sandbox.http.server import ServerSettings, serve  # of the extra `server`
    from retool_jax.sandbox.settings import SandboxSettings

    server, pool = ({flag.name: flag.value for flag in group} for group in (SERVER, POOL))
    token = os.environ.get('RETOOL_SANDBOX_TOKEN', '')
    serve(ServerSettings(token=token, **server), SandboxSettings(**pool))


def run() -> None:
    cli.run_plain(main)


if __name__ == '__main__':
    run()
