"""Says what isolation this machine gives, line by line, with the remedy for what is missing.

`python -m retool_jax.sandbox.doctor` exits 0 where snippets can run isolated and fully limited,
1 where something is not enforced, 2 where nothing can run.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from retool_jax.core import streams
from retool_jax.core.records import Verdict
from retool_jax.sandbox import canary
from retool_jax.sandbox.cgroups import Groups
from retool_jax.sandbox.pool import Pool
from retool_jax.sandbox.settings import SandboxSettings

_NAMESPACES = {'user': 0x10000000, 'mount': 0x20000, 'pid': 0x20000000, 'network': 0x40000000, 'ipc': 0x8000000,
               'uts': 0x4000000, 'cgroup': 0x2000000}  # fmt: skip
# The pool that is examined: an ordinary one, but short in CPU time, so that the report comes soon.
EXAMINATION = SandboxSettings(cpu_s=0.5, wall_s=2.0)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    good: bool
    what: str
    remedy: str = ''
    fatal: bool = False  # without it no snippet can be run


def machine() -> Iterator[Finding]:
    """What the kernel and the system say before anything is started."""
    is_linux = platform.system() == 'Linux' and platform.machine() == 'x86_64'
    yield Finding(
        is_linux,
        f'system: {platform.system()} {platform.release()} on {platform.machine()}',
        'the local pool is for Linux on x86_64; use a remote sandbox: launch/sandbox_server.py there, its address here',
        fatal=True,
    )
    if not is_linux:
        return
    yield Finding(True, f'user: {"root" if os.geteuid() == 0 else f"uid {os.geteuid()} (one user in the jail)"}')
    yield _nsjail()
    yield from _namespaces()
    yield _seccomp()
    yield from _groups()


def _nsjail() -> Finding:
    from retool_jax.sandbox import jail

    try:
        return Finding(True, f'nsjail: {jail.binary()}')
    except RuntimeError as error:
        return Finding(False, f'nsjail: {error}', 'see the line itself', fatal=True)


def _namespaces() -> Iterator[Finding]:
    remedy = 'the kernel refuses; in a container, allow unshare (docs/sandbox.md: seccomp profile, privileges)'
    if _read('/proc/sys/kernel/apparmor_restrict_unprivileged_userns') == '1' and os.geteuid() != 0:
        remedy = (
            'AppArmor restricts user namespaces (Ubuntu ≥ 23.10); as root: '
            'sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, '
            'or run as root, or give nsjail a profile with userns'
        )
    elif _read('/proc/sys/kernel/unprivileged_userns_clone') == '0' and os.geteuid() != 0:
        remedy = 'as root: sysctl -w kernel.unprivileged_userns_clone=1'
    elif _read('/proc/sys/user/max_user_namespaces') == '0':
        remedy = 'as root: sysctl -w user.max_user_namespaces=10000'
    for name, flag in _NAMESPACES.items():
        # Others are opened from within a user namespace, as nsjail does.
        code = f'import ctypes, sys; sys.exit(ctypes.CDLL(None, use_errno=True).unshare({flag | 0x10000000}) != 0)'
        good = subprocess.run([sys.executable, '-S', '-c', code], check=False).returncode == 0
        yield Finding(good, f'namespace: {name}', remedy, fatal=True)


def _seccomp() -> Finding:
    actions = _read('/proc/sys/kernel/seccomp/actions_avail').split()
    good = {'errno', 'kill_process', 'allow'} <= set(actions)
    # PR_GET_SECCOMP; 2 says that a filter is on already (a container's), which may deny more.
    mode = ctypes.CDLL(None).prctl(21, 0, 0, 0, 0)
    return Finding(
        good,
        f'seccomp filters{" (this process has one already)" if mode == 2 else ""}',
        'a kernel with CONFIG_SECCOMP_FILTER',
        fatal=True,
    )


def _groups() -> Iterator[Finding]:
    groups = Groups()
    groups.remove()
    remedy = (
        'run as root, or in a unit with delegation: systemd-run --user --scope -p Delegate=yes …; without it {what}'
    )
    losses = {
        'memory': 'memory is limited per process only, and too much of it is an error instead of oom',
        'pids': 'processes are limited by rlimit only',
        'cpuacct': 'CPU time is read from /proc for the first process only',
    }
    for name, loss in losses.items():
        good = name not in groups.missing
        version = f' (v{groups.version})' if good else ''
        yield Finding(good, f'control group: {name}{version}', remedy.format(what=loss))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ''


def working(pool: Pool) -> Iterator[Finding]:
    """Canaries, the limits, and two seconds of work on a pool that runs."""
    for each in canary.CANARIES:
        result = pool.submit(each.code).result(60)
        yield Finding(
            canary.passed(each, result),
            f'canary: {each.claim}',
            f'{result.verdict}: {(result.stderr or result.stdout)[-200:]!r}',
            fatal=True,
        )
    for what, code, verdict in [
        ('CPU time', 'while True: pass', Verdict.TIMEOUT),
        ('memory', 'x = []\nwhile True: x.append(bytearray(b"1" * 10**6))', Verdict.OOM),
        ('output', 'while True: print("x" * 1000)', Verdict.OUTPUT_LIMIT),
    ]:
        result = pool.submit(code).result(60)
        good = result.verdict is verdict or (what == 'memory' and 'memory' in pool.missing)
        yield Finding(good, f'limit: {what} ({result.verdict})', f'expected {verdict}')
    yield Finding(True, f'throughput: {_throughput(pool, 2.0):.0f} snippets/s')


def _throughput(pool: Pool, seconds: float) -> float:
    start, done, open_ = time.monotonic(), 0, []
    while time.monotonic() - start < seconds:
        while len(open_) < 4 * pool.settings.concurrency:
            open_.append(pool.submit('print(1)'))
        done += open_.pop(0).result(60).verdict is Verdict.OK
    elapsed = time.monotonic() - start
    for future in open_:
        future.result(60)
    return done / elapsed


@streams.ends_unread()
def main() -> int:
    """Prints the report; the exit status sums it up."""
    argparse.ArgumentParser(
        prog='retool-doctor',
        description='What isolation this machine gives to snippets.',
        epilog='Exit status: 0 all, 1 not everything is limited, 2 none.',
    ).parse_args()
    worst = 0

    def say(finding: Finding) -> None:
        nonlocal worst
        print(f'[{"ok" if finding.good else "NO"}] {finding.what}', flush=True)
        if not finding.good:
            worst = max(worst, 2 if finding.fatal else 1)
            print(f'     → {finding.remedy}', flush=True)

    for finding in machine():
        say(finding)
    if worst < 2:
        try:
            with Pool(EXAMINATION) as pool:
                for finding in working(pool):
                    say(finding)
        except RuntimeError as error:
            say(Finding(False, 'pool', str(error), fatal=True))
    print(
        [
            'snippets run isolated and fully limited.',
            'snippets run isolated; not everything is limited (see above).',
            'snippets cannot be run here (see above).',
        ][worst]
    )
    return worst


if __name__ == '__main__':
    sys.exit(main())
