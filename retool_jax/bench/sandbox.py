"""How fast the sandbox is: one in flight, saturated, cold, over HTTP; bare Python beside it.

The snippets are small and distinct, numpy and sympy are imported by each; every answer is checked.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from retool_jax.sandbox.pool import Pool
from retool_jax.sandbox.settings import SandboxSettings

_SNIPPET = 'import numpy, sympy\nprint({0} ** 2)'


def measure(settings: SandboxSettings, seconds: float, clients: int, say: Callable[[str], None]) -> dict:
    """Every figure, each over `seconds`; times in milliseconds, memory in MB.

    settings: of the pool; the server has the values of its own flags.
    """
    figures: dict = {'cores': len(os.sched_getaffinity(0)), 'load_before': os.getloadavg()[0]}
    with Pool(dataclasses.replace(settings, path='warm')) as pool:
        _saturate(pool, 0.5)  # caches and spares settle
        time.sleep(0.5)
        say('memory of idle workers')
        figures |= _memory(pool)
        say('one in flight')
        figures |= _name('', _one_by_one(pool, seconds))
        say('saturated')
        rate, latencies = _saturate(pool, seconds)
        figures |= {'snippets_per_s': rate, 'saturated_p99_ms': _percentile(latencies, 99)}
    say(f'HTTP, {clients} clients')
    figures |= _over_http(clients, seconds)
    figures['server_over_pool'] = figures['server_per_s'] / rate
    say('cold path')
    with Pool(dataclasses.replace(settings, path='cold')) as cold:
        figures['cold_per_s'], latencies = _saturate(cold, max(seconds, 5.0))
        figures['cold_p50_ms'] = _percentile(latencies, 50)
    figures['warm_over_cold'] = rate / figures['cold_per_s']
    say('bare python')
    figures |= _name('bare_python_', _bare_python(seconds))
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}


def _name(prefix: str, latencies: list[float]) -> dict:
    return {f'{prefix}p50_ms': _percentile(latencies, 50), f'{prefix}p99_ms': _percentile(latencies, 99)}


def _percentile(latencies: list[float], percent: int) -> float:
    return 1e3 * statistics.quantiles(latencies, n=100, method='inclusive')[percent - 1]


def _one_by_one(pool: Pool, seconds: float) -> list[float]:
    latencies, end = [], time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        n = len(latencies)
        _check(pool.submit(_SNIPPET.format(n)).result().stdout, n)
        latencies.append(time.monotonic() - start)
    return latencies


def _saturate(pool: Pool, seconds: float) -> tuple[float, list[float]]:
    """Snippets per second with twice as many in flight as run at once, and their latencies."""
    flying: collections.deque = collections.deque()
    latencies: list[float] = []
    n, begin = 0, time.monotonic()
    while flying or time.monotonic() - begin < seconds:
        if time.monotonic() - begin < seconds and len(flying) < 2 * pool.settings.concurrency:
            flying.append((n, future := pool.submit(_SNIPPET.format(n))))
            start = time.monotonic()
            future.add_done_callback(lambda _, start=start: latencies.append(time.monotonic() - start))
            n += 1
            continue
        number, future = flying.popleft()
        _check(future.result().stdout, number)
    return n / (time.monotonic() - begin), latencies


def _check(stdout: str, n: int) -> None:
    if stdout != f'{n**2}\n':
        raise RuntimeError(f'wrong answer from the sandbox: {stdout!r} for {n} squared')


def _memory(pool: Pool) -> dict:
    """Private memory of an idle sealed child, and of a zygote (mean over each)."""
    private: dict[bool, list[float]] = {True: [], False: []}
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = (path / 'cmdline').read_text().split('\0')
            namespaces = next(line for line in (path / 'status').read_text().splitlines() if line.startswith('NSpid'))
            if 'zygote.serve' not in ' '.join(words) or words[0] != '/python/bin/python3':
                continue
            rollup = (path / 'smaps_rollup').read_text()
            kb = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith('Private_'))
            private[len(namespaces.split()) == 4].append(kb / 1024)  # a child is one namespace deeper
    return {
        f'{name}_private_mb': statistics.mean(private[deeper]) if private[deeper] else None
        for name, deeper in (('worker', True), ('zygote', False))
    }


def _bare_python(seconds: float) -> list[float]:
    latencies, end = [], time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        subprocess.run([sys.executable, '-c', 'pass'], check=True)
        latencies.append(time.monotonic() - start)
    return latencies


def _over_http(clients: int, seconds: float) -> dict:
    """The server and its clients as processes of their own, all on the same cores."""
    root = Path(__file__).parents[2]
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(root / 'launch' / 'sandbox_server.py'), f'--port={port}'],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await(port)
        done = subprocess.run(
            [sys.executable, '-m', 'retool_jax.bench.sandbox', str(port), str(clients), str(seconds)],
            cwd=root,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(done.stdout)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _await(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection('127.0.0.1', port)) as probe:
            probe.request('GET', '/v1/ping')
            if probe.getresponse().status == 200:
                return
        if time.monotonic() > deadline:
            raise RuntimeError('the server does not answer')
        time.sleep(0.1)


def load(port: int, clients: int, seconds: float) -> dict:
    """Requests answered per second to so many clients at once; wrong and dropped ones are counted."""
    latencies: list[float] = []
    wrong, dropped = [], []
    end = time.monotonic() + seconds

    def work(index: int) -> None:
        with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, timeout=120)) as connection:
            n = index * 10**6
            while (start := time.monotonic()) < end:
                n += 1
                try:
                    body = json.dumps({'language': 'python', 'code': _SNIPPET.format(n)})
                    connection.request('POST', '/run_code', body)
                    reply = json.loads(connection.getresponse().read())
                except (OSError, http.client.HTTPException, ValueError) as error:
                    dropped.append(error)
                    return
                latencies.append(time.monotonic() - start)
                if (reply.get('run_result') or {}).get('stdout') != f'{n**2}\n':
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - begin
    return {
        'server_per_s': len(latencies) / elapsed,
        'server_clients': clients,
        'server_wrong': len(wrong),
        'server_dropped': len(dropped),
        **_name('server_', latencies),
    }


if __name__ == '__main__':
    print(json.dumps(load(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
