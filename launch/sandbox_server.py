"""Serves the sandbox over HTTP, in SandboxFusion's schema (docs/sandbox.md).

    python launch/sandbox_server.py --port=8080
    RETOOL_SANDBOX_TOKEN=… python launch/sandbox_server.py --host=0.0.0.0

SIGTERM finishes what runs, then ends.
"""

import os

from absl import flags

from retool_jax.core import cli, settings

HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; others than loopback need RETOOL_SANDBOX_TOKEN.')
PORT = flags.DEFINE_integer('port', 8080, 'Port to listen on.', lower_bound=0, upper_bound=65535)
METRICS_PORT = flags.DEFINE_integer('metrics_port', 0, 'A further port, for /metrics without the token; 0: none.',
                                    lower_bound=0, upper_bound=65535)
ZYGOTES = flags.DEFINE_integer('zygotes', 2, 'Warm workers.', lower_bound=1)
SPARES = flags.DEFINE_integer('spares', 3, 'Children sealed ahead of need, per worker.', lower_bound=1)
CONCURRENCY = flags.DEFINE_integer('concurrency', 0, 'Snippets running at once; 0: two per core.', lower_bound=0)
MAX_TIMEOUT_S = flags.DEFINE_float('max_timeout_s', 60.0, 'Seconds of a request at most, wall and CPU.',
                                   lower_bound=0.001)
MAX_MEMORY_MB = flags.DEFINE_float('max_memory_mb', 4096.0, 'Memory that a request gets at most.', lower_bound=1)
MEMORY_MB = flags.DEFINE_integer('memory_mb', 256, 'Memory of a snippet that names none.', lower_bound=1)
QUEUE = flags.DEFINE_integer('queue', 4096, 'Snippets waiting before the answer is 429.', lower_bound=1)
QUEUE_MB = flags.DEFINE_integer('queue_mb', 256, 'MiB of waiting snippets before the answer is 429.', lower_bound=1)
CONNECTIONS = flags.DEFINE_integer('connections', 1024, 'Clients at once; beyond them the idle make room, or 503.',
                                   lower_bound=1)
PACKAGES = flags.DEFINE_list('packages', ['numpy', 'scipy', 'sympy'], 'Packages that snippets can import.')
PRELOAD = flags.DEFINE_list('preload', ['numpy', 'sympy'], 'Modules imported before a snippet starts.')
DRAIN_S = flags.DEFINE_float('drain_s', 60.0, 'Seconds that running snippets get after SIGTERM.', lower_bound=0)


def main() -> None:
    from retool_jax.sandbox.http.listener import Patience
    from retool_jax.sandbox.http.server import ServerSettings, serve  # of the extra `server`
    from retool_jax.sandbox.settings import SandboxSettings

    server = ServerSettings(
        host=HOST.value, port=PORT.value, metrics_port=METRICS_PORT.value,
        token=os.environ.get('RETOOL_SANDBOX_TOKEN', ''), max_timeout_s=MAX_TIMEOUT_S.value,
        max_memory_mb=MAX_MEMORY_MB.value, drain_s=DRAIN_S.value, patience=Patience(connections=CONNECTIONS.value))
    block = cli.load_config('configs/evaluate.py:tiny').sandbox.to_dict()  # for what has no flag
    del block['addresses']
    serve(server, settings.build(SandboxSettings, block | {
        'zygotes': ZYGOTES.value, 'spares': SPARES.value, 'concurrency': CONCURRENCY.value,
        'memory_mb': MEMORY_MB.value, 'queue': QUEUE.value, 'queue_mb': QUEUE_MB.value, 'packages': PACKAGES.value,
        'preload': PRELOAD.value}, 'sandbox'))


def run() -> None:
    cli.run_plain(main)


if __name__ == '__main__':
    run()
