"""The system calls a snippet may use: one allowlist, as a BPF program and as a kafel policy.

Runs inside the jail too, so it imports the standard library alone. Everything not named fails
with EPERM; clone3 answers ENOSYS so that glibc takes its older road.

Not covered: what pointers lead to, which a filter cannot read – so not which file is opened or started, which is the
mount namespace's affair; how often an allowed call is made, and what it costs the kernel; machines other than x86-64.
"""

from __future__ import annotations

import ctypes
import struct

EPERM, ENOTTY, ENOSYS, EOPNOTSUPP = 1, 25, 38, 95
NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}

# x86-64 numbers of what is allowed without looking at arguments.
ALLOWED = {
    'read': 0, 'write': 1, 'open': 2, 'close': 3, 'stat': 4, 'fstat': 5, 'lstat': 6, 'poll': 7, 'lseek': 8,
    'mmap': 9, 'mprotect': 10, 'munmap': 11, 'brk': 12, 'rt_sigaction': 13, 'rt_sigprocmask': 14,
    'rt_sigreturn': 15, 'pread64': 17, 'pwrite64': 18, 'readv': 19, 'writev': 20, 'access': 21, 'pipe': 22,
    'select': 23, 'sched_yield': 24, 'mremap': 25, 'msync': 26, 'mincore': 27, 'madvise': 28, 'dup': 32,
    'dup2': 33, 'pause': 34, 'nanosleep': 35, 'getitimer': 36, 'alarm': 37, 'setitimer': 38, 'getpid': 39,
    'sendfile': 40, 'sendto': 44, 'recvfrom': 45, 'sendmsg': 46, 'recvmsg': 47, 'shutdown': 48,
    'getsockname': 51, 'getpeername': 52, 'getsockopt': 55, 'fork': 57, 'vfork': 58,
    'execve': 59, 'exit': 60, 'wait4': 61, 'kill': 62, 'uname': 63, 'fsync': 74,
    'fdatasync': 75, 'truncate': 76, 'ftruncate': 77, 'getdents': 78, 'getcwd': 79, 'chdir': 80, 'fchdir': 81,
    'rename': 82, 'mkdir': 83, 'rmdir': 84, 'creat': 85, 'link': 86, 'unlink': 87, 'symlink': 88,
    'readlink': 89, 'chmod': 90, 'fchmod': 91, 'umask': 95, 'gettimeofday': 96, 'getrlimit': 97,
    'getrusage': 98, 'sysinfo': 99, 'times': 100, 'getuid': 102, 'getgid': 104, 'geteuid': 107,
    'getegid': 108, 'setpgid': 109, 'getppid': 110, 'getpgrp': 111, 'setsid': 112, 'getgroups': 115,
    'getresuid': 118, 'getresgid': 120, 'getpgid': 121, 'getsid': 124, 'capget': 125, 'rt_sigpending': 127,
    'rt_sigtimedwait': 128, 'rt_sigqueueinfo': 129, 'rt_sigsuspend': 130, 'sigaltstack': 131, 'utime': 132,
    'statfs': 137, 'fstatfs': 138, 'getpriority': 140, 'sched_getparam': 143, 'sched_getscheduler': 145,
    'sched_get_priority_max': 146, 'sched_get_priority_min': 147, 'sched_rr_get_interval': 148,
    'arch_prctl': 158, 'setrlimit': 160, 'gettid': 186, 'tkill': 200, 'time': 201, 'futex': 202,
    'sched_setaffinity': 203, 'sched_getaffinity': 204, 'epoll_create': 213, 'getdents64': 217,
    'set_tid_address': 218, 'restart_syscall': 219, 'fadvise64': 221, 'timer_create': 222,
    'timer_settime': 223, 'timer_gettime': 224, 'timer_getoverrun': 225, 'timer_delete': 226,
    'clock_gettime': 228, 'clock_getres': 229, 'clock_nanosleep': 230, 'exit_group': 231, 'epoll_wait': 232,
    'epoll_ctl': 233, 'tgkill': 234, 'utimes': 235, 'waitid': 247, 'openat': 257, 'mkdirat': 258,
    'newfstatat': 262, 'unlinkat': 263, 'renameat': 264, 'linkat': 265, 'symlinkat': 266, 'readlinkat': 267,
    'fchmodat': 268, 'faccessat': 269, 'pselect6': 270, 'ppoll': 271, 'set_robust_list': 273,
    'get_robust_list': 274, 'splice': 275, 'tee': 276, 'utimensat': 280, 'epoll_pwait': 281, 'signalfd': 282,
    'timerfd_create': 283, 'eventfd': 284, 'fallocate': 285, 'timerfd_settime': 286, 'timerfd_gettime': 287,
    'signalfd4': 289, 'eventfd2': 290, 'epoll_create1': 291, 'dup3': 292, 'pipe2': 293, 'preadv': 295,
    'pwritev': 296, 'getcpu': 309, 'renameat2': 316, 'getrandom': 318, 'execveat': 322, 'membarrier': 324,
    'copy_file_range': 326, 'preadv2': 327, 'pwritev2': 328, 'statx': 332, 'rseq': 334, 'close_range': 436,
    'faccessat2': 439, 'epoll_pwait2': 441,
}  # fmt: skip
# Answered with an error number that programs expect.
REFUSED = {
    'clone3': (435, ENOSYS),
    'openat2': (437, ENOSYS),
    'getxattr': (191, EOPNOTSUPP),
    'lgetxattr': (192, EOPNOTSUPP),
    'fgetxattr': (193, EOPNOTSUPP),
    'listxattr': (194, EOPNOTSUPP),
    'llistxattr': (195, EOPNOTSUPP),
    'flistxattr': (196, EOPNOTSUPP),
    'flock': (73, 0),  # answered 0 and not done: every snippet would see a lock on a file of the shared root
}

_TYPES, _FLAGS = (1, 2), (0, 0x800, 0x80000, 0x80800)  # SOCK_STREAM, DGRAM; none, NONBLOCK, CLOEXEC, both
# name: (number, {argument: the allowed values}, error number otherwise); low 32 bits are compared.
BY_ARGUMENT = {
    'ioctl': (16, {1: (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)}, ENOTTY),  # TCGETS, sizes, FIO*
    'socketpair': (53, {0: (1,), 1: tuple(t | flags for t in _TYPES for flags in _FLAGS)}, EPERM),  # AF_UNIX
    # No socket may get a name: all snippets of a worker would see it. Besides `bind` and `connect`, SO_PASSCRED and
    # SO_PASSPIDFD give one to a datagram socket. Here: sizes, KEEPALIVE, LINGER, time limits.
    'setsockopt': (54, {1: (1,), 2: (2, 7, 8, 9, 13, 18, 20, 21, 66, 67)}, EPERM),
    'prctl': (157, {0: (1, 2, 3, 15, 16, 39)}, EPERM),  # PDEATHSIG, DUMPABLE (read), NAME, NO_NEW_PRIVS (read)
    'prlimit64': (302, {0: (0,)}, EPERM),  # its own limits; raising them needs a capability it lacks
    # Descriptors, flags, owners, signals, sizes of pipes; locks and leases are read only. F_NOTIFY, F_SETLEASE and
    # F_SET_RW_HINT would leave a mark on files of the shared root.
    'fcntl': (72, {1: (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 15, 16, 36, 1025, 1030, 1031, 1032)}, EPERM),
}
# name: (number, argument, values) that are answered 0 and not done.
PRETENDED = {'fcntl': (72, 1, (6, 7, 37, 38))}  # locks of records, as with flock
_CLONE = 56
_AUDIT_ARCH_X86_64 = 0xC000003E
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LD_ABS, _JEQ, _JSET, _RET = 0x20, 0x15, 0x45, 0x06


def program() -> bytes:
    """The BPF program, one `struct sock_filter` after another."""
    code = [
        (_LD_ABS, 0, 0, 4),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        (_RET, 0, 0, _KILL),  # i386 calls end the process
        (_LD_ABS, 0, 0, 0),
    ]  # x32 calls carry a bit that no number below has: they fall through to EPERM

    def give(number: int, verdict: int) -> None:
        code.extend([(_JEQ, 0, 1, number), (_RET, 0, 0, verdict)])

    for number in _by_use():
        give(number, _ALLOW)
    for number, error in REFUSED.values():
        give(number, _ERRNO | error)
    code.extend(
        [
            (_JEQ, 0, 4, _CLONE),
            (_LD_ABS, 0, 0, 16),
            (_JSET, 0, 1, NAMESPACES),
            (_RET, 0, 0, _ERRNO | EPERM),
            (_RET, 0, 0, _ALLOW),
        ]
    )
    for number, argument, values in PRETENDED.values():
        code.extend(_among(number, argument, values, _ERRNO))
    for number, arguments, error in BY_ARGUMENT.values():
        body = []
        for argument, values in arguments.items():  # on to the next where the value is one of these
            body.append((_LD_ABS, 0, 0, 16 + 8 * argument))
            body.extend((_JEQ, len(values) - i, 0, value) for i, value in enumerate(values))
            body.append((_RET, 0, 0, _ERRNO | error))
        body.append((_RET, 0, 0, _ALLOW))
        code.append((_JEQ, 0, len(body), number))
        code.extend(body)
    code.append((_RET, 0, 0, _ERRNO | EPERM))
    return b''.join(struct.pack('=HBBI', *instruction) for instruction in code)


def _among(number: int, argument: int, values: tuple[int, ...], verdict: int) -> list[tuple[int, int, int, int]]:
    """Gives `verdict` where the argument is one of the values; otherwise the number is looked at again below."""
    body = [(_LD_ABS, 0, 0, 16 + 8 * argument)]
    for value in values:
        body.extend([(_JEQ, 0, 1, value), (_RET, 0, 0, verdict)])
    body.append((_LD_ABS, 0, 0, 0))
    return [(_JEQ, 0, len(body), number), *body]


def _by_use() -> list[int]:
    """Allowed numbers with the busiest calls first: the program is read from the top."""
    busy = ['read', 'write', 'mmap', 'munmap', 'futex', 'brk', 'newfstatat', 'lseek', 'openat', 'close', 'fstat']
    return [ALLOWED[n] for n in busy] + [v for n, v in ALLOWED.items() if n not in busy]


def kafel() -> str:
    """The same allowlist in kafel, nsjail's policy language (the cold path); by number: its names are its own."""
    allow = [f'SYSCALL[{number}]' for number in _by_use()]
    allow.append(f'SYSCALL[{_CLONE}](flags) {{ (flags & {NAMESPACES:#x}) == 0 }}')
    errors: dict[int, list[str]] = {}
    for number, argument, values in PRETENDED.values():
        errors.setdefault(0, []).append(_rule(number, {argument: values}))
    for number, arguments, error in BY_ARGUMENT.values():
        allow.append(_rule(number, arguments))
        if error != EPERM:
            errors.setdefault(error, []).append(f'SYSCALL[{number}]')
    for number, error in REFUSED.values():
        errors.setdefault(error, []).append(f'SYSCALL[{number}]')
    groups = [f'ALLOW {{ {", ".join(allow)} }}']
    groups += [f'ERRNO({error}) {{ {", ".join(names)} }}' for error, names in errors.items()]
    return 'POLICY snippet { ' + ', '.join(groups) + f' }} USE snippet DEFAULT ERRNO({EPERM})'


def _rule(number: int, arguments: dict[int, tuple[int, ...]]) -> str:
    names = ', '.join('abcdef'[: max(arguments) + 1])
    tests = [
        ' || '.join(f'({"abcdef"[argument]} & 0xffffffff) == {value:#x}' for value in values)
        for argument, values in arguments.items()
    ]
    return f'SYSCALL[{number}]({names}) {{ {" && ".join(f"({test})" for test in tests)} }}'


def install(libc: ctypes.CDLL) -> None:
    """Sets no_new_privs and the filter for this process and its descendants.

    Raises:
        OSError: the kernel took neither, or only the first; nothing may run then.
    """
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack('HxxxxxxP', len(code) // 8, ctypes.addressof(buffer)))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(header), 0, 0):
        raise OSError(ctypes.get_errno(), 'seccomp filter refused')
