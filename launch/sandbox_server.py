"""Serves the sandbox over HTTP, in SandboxFusion's schema (docs/sandbox.md).

    python launch/sandbox_server.py --port=8080
    RETOOL_SANDBOX_TOKEN=… python launch/sandbox_server.py --host=0.0.0.0

SIGTERM finishes what runs, then ends.
"""

import os

from absl import flags

from retool_jax.core import cli
from retool_jax.sandbox.pool import SandboxSettings
from retool_jax.sandbox.server import ServerSettings, serve

HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; others than loopback need RETOOL_SANDBOX_TOKEN.')
PORT = flags.DEFINE_integer('port', 8080, 'Port to listen on.', lower_bound=0, upper_bound=65535)
ZYGOTES = flags.DEFINE_integer('zygotes', 2, 'Warm workers.', lower_bound=1)
SPARES = flags.DEFINE_integer('spares', 3, 'Children sealed ahead of need, per worker.', lower_bound=1)
CONCURRENCY = flags.DEFINE_integer('concurrency', 0, 'Snippets running at once; 0: two per core.', lower_bound=0)
MEMORY_MB = flags.DEFINE_integer('memory_mb', 256, 'Memory of a snippet that names none.', lower_bound=1)
QUEUE = flags.DEFINE_integer('queue', 4096, 'Snippets waiting before the answer is 429.', lower_bound=1)
PACKAGES = flags.DEFINE_list('packages', ['numpy', 'scipy', 'sympy'], 'Packages that snippets can import.')
PRELOAD = flags.DEFINE_list('preload', ['numpy', 'sympy'], 'Modules imported before a snippet starts.')
DRAIN_S = flags.DEFINE_float('drain_s', 60.0, 'Seconds that running snippets get after SIGTERM.', lower_bound=0)


def main() -> None:
    server = ServerSettings(host=HOST.value, port=PORT.value, token=os.environ.get('RETOOL_SANDBOX_TOKEN', ''),
                            drain_s=DRAIN_S.value)
    sandbox = SandboxSettings(
        zygotes=ZYGOTES.value, spares=SPARES.value, concurrency=CONCURRENCY.value, memory_mb=MEMORY_MB.value,
        queue=QUEUE.value, packages=tuple(PACKAGES.value), preload=tuple(PRELOAD.value))
    serve(server, sandbox)


if __name__ == '__main__':
    cli.run_plain(main)
