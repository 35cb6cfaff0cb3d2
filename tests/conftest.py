"""Eight virtual CPU devices and one compilation cache for every test process and the children it starts.

JAX_PLATFORMS=cuda runs what one such device can on it (JAX_DEFAULT_MATMUL_PRECISION=highest: tolerances are those of
f32); tests of several devices fail there.

Set before JAX is imported, in the environment, so that child processes inherit all of it.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={DEVICES}'.strip()
# Tests compile hundreds of small programs: keep every one, whatever it took to compile.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # quiet after a fork
os.environ['HF_HUB_OFFLINE'] = '1'  # nothing is fetched
os.environ['MPLBACKEND'] = 'agg'

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that with two processes none of them is left to one at the end."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)
