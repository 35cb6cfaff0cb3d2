"""The warm worker inside the jail: imports once, then forks one sealed child per snippet, ahead of need.

Standard library alone; runs on the guest's interpreter as pid 1 of a jail. The supervisor holds
the other end of a SEQPACKET socket; its end of file ends this process and, as pid 1, everything in
the jail. Messages up: ready, child (with four descriptors), exit. Messages down: fork.
"""

from __future__ import annotations

import array
import ctypes
import gc
import os
import resource
import select
import signal
import socket
import struct

import protocol
import runner
import seccomp

_libc = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID, _MS_NODEV = 2, 4
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 24, 47
_OWN_NS = os.CLONE_NEWNS | os.CLONE_NEWIPC | os.CLONE_NEWUTS | os.CLONE_NEWCGROUP


def _check(result: int, what: str) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f'{what}: {os.strerror(error)}')


def serve(descriptor: int, settings: dict) -> None:
    """Answers the supervisor until its end closes.

    It keeps nothing per child and speaks in fixed sizes, so that its heap looks alike at every fork.
    """
    link = socket.socket(fileno=descriptor)
    runner.preload(settings['preload'])
    own_namespace = os.pidfd_open(os.getpid())
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    _send(link, protocol.UP.pack(protocol.READY, 0, 0, 0, 0.0))
    gc.collect()
    gc.freeze()
    poll = select.poll()
    poll.register(link, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == wake_read:
                os.read(wake_read, 256)
                _reap(link)
            else:
                order = link.recv(protocol.DOWN.size)
                if len(order) != protocol.DOWN.size:
                    os._exit(0)
                _fork(link, own_namespace, *protocol.DOWN.unpack(order), settings)


def _send(link: socket.socket, message: bytes, descriptors: tuple[int, ...] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', descriptors))] if descriptors else []
    try:
        link.sendmsg([message], ancillary)
    except OSError:
        os._exit(0)  # the supervisor is gone


def _reap(link: socket.socket) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(link, protocol.UP.pack(protocol.EXIT, 0, pid, status, usage.ru_utime + usage.ru_stime))


def _fork(link: socket.socket, own_namespace: int, number: int, uid: int, settings: dict) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the child's word names its pid on the host
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    os.unshare(os.CLONE_NEWPID)  # for the next child; setns below takes it back, else no second one could follow
    pid = os.fork()
    if pid == 0:
        leave = os._exit
        try:
            os.dup2(out_write, 1)
            os.dup2(err_write, 2)
            channel = _seal(theirs, uid, settings)
            request = runner.receive(channel)
        except BaseException as error:
            try:
                os.write(2, f'sealing failed: {type(error).__name__}: {error}'.encode())
            finally:
                leave(99)
        try:
            runner.execute(request)
        finally:  # nothing below is the child's, whatever the snippet made of the runner
            leave(1)
    os.setns(own_namespace, os.CLONE_NEWPID)
    pidfd = os.pidfd_open(pid)
    _send(link, protocol.UP.pack(protocol.CHILD, number, pid, 0, 0.0), (pidfd, ours.fileno(), out_read, err_read))
    for descriptor in (pidfd, out_read, out_write, err_read, err_write):
        os.close(descriptor)
    ours.close()
    theirs.close()


def _seal(channel: socket.socket, uid: int, settings: dict) -> socket.socket:
    """Gives up everything that the snippet must not have; any failure is fatal to this child."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.dup2(os.open('/dev/null', os.O_RDWR), 0)
    if channel.fileno() != 3:
        os.dup2(channel.fileno(), 3)
        channel.detach()
        channel = socket.socket(fileno=3)
    os.closerange(4, 1 << 16)
    os.unshare(_OWN_NS)
    owner = 0 if settings['single_uid'] else uid
    options = f'size={settings["scratch_mb"]}m,nr_inodes={settings["scratch_inodes"]},mode=0700,uid={owner},gid={owner}'
    _check(_libc.mount(b'none', b'/box', b'tmpfs', _MS_NOSUID | _MS_NODEV, options.encode()), 'mount /box')
    os.chdir('/box')
    _limit(settings, single=False)
    if not settings['single_uid']:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    # A user namespace of its own, in which no user is mapped: whichever it is, it reads 65534. Where there is but one,
    # this stands in for a user of its own: processes are counted per namespace.
    os.unshare(os.CLONE_NEWUSER)
    _limit(settings, single=True)
    _drop_capabilities()
    seccomp.install(_libc)
    return channel


def _limit(settings: dict, single: bool) -> None:
    if single:  # after the change of user: the kernel counts processes by user
        resource.setrlimit(resource.RLIMIT_NPROC, (settings['processes'],) * 2)
        return
    scratch_bytes = settings['scratch_mb'] << 20
    for name, value in [
        ('CORE', 0),
        ('FSIZE', scratch_bytes),
        ('NOFILE', settings['files']),
        ('STACK', 8 << 20),
        ('MEMLOCK', 65536),
        ('MSGQUEUE', 0),
        ('RTPRIO', 0),
        ('SIGPENDING', runner.PENDING_SIGNALS),
    ]:
        limit = getattr(resource, f'RLIMIT_{name}')
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))


def _drop_capabilities() -> None:
    for capability in range(64):  # a new user namespace starts with all of them
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    _libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    header = struct.pack('Ii', 0x20080522, 0)
    _check(_libc.capset(header, struct.pack('6I', 0, 0, 0, 0, 0, 0)), 'capset')
