"""The system calls a snippet may use: one allowlist, as a BPF program and as a kafel policy.

Runs inside the jail too, so it imports the standard library alone. Everything not named fails
with EPERM; clone3 answers ENOSYS so that glibc takes its older road.
"""

from __future__ import annotations

import ctypes
import struct

EPERM, ENOSYS, ENOTTY, EOPNOTSUPP = 1, 38, 25, 95
NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}

# x86-64 numbers of what is allowed without looking at arguments.
ALLOWED = {
    'read': 0, 'write': 1, 'open': 2, 'close': 3, 'stat': 4, 'fstat': 5, 'lstat': 6, 'poll': 7, 'lseek': 8,
    'mmap': 9, 'mprotect': 10, 'munmap': 11, 'brk': 12, 'rt_sigaction': 13, 'rt_sigprocmask': 14,
    'rt_sigreturn': 15, 'pread64': 17, 'pwrite64': 18, 'readv': 19, 'writev': 20, 'access': 21, 'pipe': 22,
    'select': 23, 'sched_yield': 24, 'mremap': 25, 'msync': 26, 'mincore': 27, 'madvise': 28, 'dup': 32,
    'dup2': 33, 'pause': 34, 'nanosleep': 35, 'getitimer': 36, 'alarm': 37, 'setitimer': 38, 'getpid': 39,
    'sendfile': 40, 'sendto': 44, 'recvfrom': 45, 'sendmsg': 46, 'recvmsg': 47, 'shutdown': 48,
    'getsockname': 51, 'getpeername': 52, 'setsockopt': 54, 'getsockopt': 55, 'fork': 57, 'vfork': 58,
    'execve': 59, 'exit': 60, 'wait4': 61, 'kill': 62, 'uname': 63, 'fcntl': 72, 'flock': 73, 'fsync': 74,
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
}
# Answered with an error number that programs expect.
REFUSED = {
    'clone3': (435, ENOSYS), 'openat2': (437, ENOSYS),
    'getxattr': (191, EOPNOTSUPP), 'lgetxattr': (192, EOPNOTSUPP), 'fgetxattr': (193, EOPNOTSUPP),
    'listxattr': (194, EOPNOTSUPP), 'llistxattr': (195, EOPNOTSUPP), 'flistxattr': (196, EOPNOTSUPP),
}
# name: (number, argument, the allowed values, error number otherwise); low 32 bits are compared.
BY_ARGUMENT = {
    'ioctl': (16, 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), ENOTTY),  # TCGETS, sizes, FIO*
    'socketpair': (53, 0, (1,), EPERM),  # AF_UNIX pairs alone: asyncio wakes itself through one
    'prctl': (157, 0, (1, 2, 3, 15, 16, 39), EPERM),  # PDEATHSIG, DUMPABLE (read), NAME, NO_NEW_PRIVS (read)
    'prlimit64': (302, 0, (0,), EPERM),  # its own limits; raising them needs a capability it lacks
}
_CLONE = 56
_AUDIT_ARCH_X86_64 = 0xC000003E
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LD_ABS, _JEQ, _JSET, _RET = 0x20, 0x15, 0x45, 0x06


def program() -> bytes:
    """The BPF program, one `struct sock_filter` after another."""
    code = [(_LD_ABS, 0, 0, 4), (_JEQ, 1, 0, _AUDIT_ARCH_X86_64), (_RET, 0, 0, _KILL),  # i386 calls end the process
            (_LD_ABS, 0, 0, 0)]  # x32 calls carry a bit that no number below has: they fall through to EPERM

    def give(number: int, verdict: int) -> None:
        code.extend([(_JEQ, 0, 1, number), (_RET, 0, 0, verdict)])

    for number in _by_use():
        give(number, _ALLOW)
    for number, error in REFUSED.values():
        give(number, _ERRNO | error)
    code.extend([(_JEQ, 0, 4, _CLONE), (_LD_ABS, 0, 0, 16), (_JSET, 0, 1, NAMESPACES), (_RET, 0, 0, _ERRNO | EPERM),
                 (_RET, 0, 0, _ALLOW)])
    for number, argument, values, error in BY_ARGUMENT.values():
        body = [(_LD_ABS, 0, 0, 16 + 8 * argument)]
        for value in values:
            body.extend([(_JEQ, 0, 1, value), (_RET, 0, 0, _ALLOW)])
        body.append((_RET, 0, 0, _ERRNO | error))
        code.append((_JEQ, 0, len(body), number))
        code.extend(body)
    code.append((_RET, 0, 0, _ERRNO | EPERM))
    return b''.join(struct.pack('=HBBI', *instruction) for instruction in code)


def _by_use() -> list[int]:
    """Allowed numbers with the busiest calls first: the program is read from the top."""
    busy = ['read', 'write', 'mmap', 'munmap', 'futex', 'brk', 'newfstatat', 'lseek', 'openat', 'close', 'fstat']
    return [ALLOWED[n] for n in busy] + [v for n, v in ALLOWED.items() if n not in busy]


def kafel() -> str:
    """The same allowlist in kafel, nsjail's policy language (the cold path); by number: its names are its own."""
    allow = [f'SYSCALL[{number}]' for number in _by_use()]
    allow.append(f'SYSCALL[{_CLONE}](flags) {{ (flags & {NAMESPACES:#x}) == 0 }}')
    errors: dict[int, list[str]] = {}
    for number, argument, values, error in BY_ARGUMENT.values():
        names = ', '.join('abcdef'[:argument + 1])
        test = ' || '.join(f'({"abcdef"[argument]} & 0xffffffff) == {value:#x}' for value in values)
        allow.append(f'SYSCALL[{number}]({names}) {{ {test} }}')
        if error != EPERM:
            errors.setdefault(error, []).append(f'SYSCALL[{number}]')
    for number, error in REFUSED.values():
        errors.setdefault(error, []).append(f'SYSCALL[{number}]')
    groups = [f'ALLOW {{ {", ".join(allow)} }}']
    groups += [f'ERRNO({error}) {{ {", ".join(names)} }}' for error, names in errors.items()]
    return 'POLICY snippet { ' + ', '.join(groups) + f' }} USE snippet DEFAULT ERRNO({EPERM})'


def install(libc: ctypes.CDLL) -> None:
    """Sets no_new_privs and the filter for this process and its descendants; raises OSError."""
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack('HxxxxxxP', len(code) // 8, ctypes.addressof(buffer)))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(header), 0, 0):
        raise OSError(ctypes.get_errno(), 'seccomp filter refused')
