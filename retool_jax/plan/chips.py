"""Published figures of accelerators, and slices of them that a program can be compiled for.

TPU: Google Cloud's pages of each generation (HBM capacity and bandwidth, bf16 peak, total of the
inter-chip links in both directions). GPU: NVIDIA's data sheets, dense bf16, NVLink (or PCIe) both directions.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path

import jax

from retool_jax.core.errors import UserError

GB = 10**9
GBIT = GB / 8
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    name: str
    platform: str  # 'tpu' or 'gpu'
    hbm: int  # bytes
    hbm_bandwidth: float  # bytes/s
    flops: float  # bf16 multiply-adds × 2 per second
    link: float  # bytes/s one way between neighbours, both directions of one torus axis together (GPU: NVLink)
    host: int  # devices of a host in a slice of many
    capability: float = 0.0  # of an NVIDIA GPU: which kernels it has
    dcn: float = 100 * GBIT / 8  # bytes/s to other slices, one way; without a figure eight share a port of 100 Gbit/s


# link: (total of all links, both ways) ÷ 2 ÷ axes: v5p has 3 axes, v5e and v6e 2. A ring along one axis sends
# to both neighbours at once.
# dcn: Google Cloud's pages too. v5p has 50 Gbit/s a chip; v6e hosts of 8 chips four ports of 200, v5e's two of 100; for
# tpu7x v5p's is taken. NVIDIA's DGX hosts of 8 have a port for each GPU, of 400 Gbit/s since H100, of 200 with A100.
CHIPS = {
    'v5e': Chip('v5e', 'tpu', 16 * 2**30, 819 * GB, 197e12, 100 * GB, 4, dcn=25 * GBIT),
    'v5p': Chip('v5p', 'tpu', 95 * 2**30, 2765 * GB, 459e12, 200 * GB, 4, dcn=50 * GBIT),
    'v6e': Chip('v6e', 'tpu', 32 * 2**30, 1640 * GB, 918e12, 200 * GB, 4, dcn=100 * GBIT),
    'tpu7x': Chip('tpu7x', 'tpu', 96 * 2**30, 3690 * GB, 1153e12, 200 * GB, 8, dcn=25 * GBIT),  # a chip is two devices
    'rtx4090': Chip('rtx4090', 'gpu', 24 * GB, 1008 * GB, 165e12, 32 * GB, 8, 8.9),
    'a100_40': Chip('a100_40', 'gpu', 40 * 2**30, 1555 * GB, 312e12, 300 * GB, 8, 8.0, 200 * GBIT),
    'l40s': Chip('l40s', 'gpu', 48 * GB, 864 * GB, 362e12, 32 * GB, 8, 8.9),
    'a100': Chip('a100', 'gpu', 80 * 2**30, 2039 * GB, 312e12, 300 * GB, 8, 8.0, 200 * GBIT),
    'h100': Chip('h100', 'gpu', 80 * 2**30, 3350 * GB, 989e12, 450 * GB, 8, 9.0, 400 * GBIT),
    'h200': Chip('h200', 'gpu', 141 * GB, 4800 * GB, 989e12, 450 * GB, 8, 9.0, 400 * GBIT),
    'b200': Chip('b200', 'gpu', 180 * GB, 7700 * GB, 2250e12, 900 * GB, 8, 10.0, 400 * GBIT),
}
# Slices of hosts with four chips, of two axes and of three, a host's first.
SHAPES = {1: ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16'), 2: ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4')}


@dataclasses.dataclass(frozen=True)
class Slice:
    """So many chips of a kind; `devices` are None where no compiler for them is at hand (GPU)."""

    name: str
    chip: Chip
    count: int  # of all slices
    devices: list[jax.Device] | None
    slices: int = 1  # that are alike, joined by the network between hosts


def open_slice(name: str, slices: int = 1) -> Slice:
    """The slice that 'v5p:4x4x4' or 'h100:8' names, or so many of it.

    Raises: UserError for a name that is none, or a TPU where the compiler is not installed.
    """
    match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f'--topology={name}: expected KIND:SHAPE like v5p:4x4x4 or h100:64; kinds are {", ".join(CHIPS)}'
        )
    chip, count = CHIPS[match[1]], math.prod(map(int, match[2].split('x')))
    title = name if slices == 1 else f'{slices} × {name}'
    if chip.platform == 'gpu':
        return Slice(title, chip, slices * count, None, slices=slices)
    if compiler() is None:
        raise UserError(
            f'--topology={name} needs the TPU compiler: bash launch/baselines.sh plan, or pip install .[plan]'
        )
    prepare()
    try:
        devices = _describe(name, **({'num_slices': slices} if slices > 1 else {}))
    except Exception as error:  # the compiler's own words, of many types
        raise UserError(f'--topology={name}: {" ".join(str(error).split())[:300]}') from None
    return Slice(title, chip, len(devices), devices, slices=slices)


def first(slice: Slice, count: int) -> list[jax.Device]:
    """So many devices of a slice, of a smaller slice where one has them: the compiler takes a part of some slices
    only."""
    shapes = SHAPES.get(slice.name.rpartition(':')[2].count('x'), ()) if slice.chip.host == 4 else ()
    for shape in shapes:
        if count <= math.prod(map(int, shape.split('x'))) < len(slice.devices):
            return _describe(f'{slice.chip.name}:{shape}')[:count]
    return slice.devices[:count]


def _describe(name: str, **more: int) -> list[jax.Device]:
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **more).devices)


def compiler() -> Path | None:
    """libtpu.so of the environment or of .baselines/plan; None without it."""
    given, spec = os.environ.get('TPU_LIBRARY_PATH'), importlib.util.find_spec('libtpu')
    places = [given, spec and Path(spec.origin).parent / 'libtpu.so', ROOT / '.baselines/plan/libtpu/libtpu.so']
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


def prepare() -> None:
    """Sets what lets libtpu compile on a machine without TPUs; before JAX's first use of it.

    A libtpu that finds no TPU asks the cloud's metadata server for one, 20 s in vain.
    """
    os.environ['TPU_LIBRARY_PATH'] = str(compiler())
    wanted = {
        'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_ACCELERATOR_TYPE': 'v5p-8',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_WORKER_ID': '0',
        'TPU_LOG_DIR': 'disabled',
    }
    for key, value in wanted.items():
        os.environ.setdefault(key, value)
