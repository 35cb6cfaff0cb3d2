"""What is said through the wall of the jail, in the one place that both sides read.

Supervisor and zygote exchange fixed-size messages over a SEQPACKET socket; a child has a stream of its own, on which
it says one word, takes one request and hears no more. Imported inside the jail and by the host: standard library
alone. It says what messages look like, not who may be believed: the host takes from a child only its readiness, its
pid as the kernel states it, and the descriptor of its /box; verdicts come from wait statuses and counters.
"""

from __future__ import annotations

import json
import struct
from typing import BinaryIO

# Zygote to supervisor. `number` is the supervisor's name for a child, `pid` the jail's.
READY, CHILD, EXIT = range(3)
UP = struct.Struct('=iiiid')  # kind, number (CHILD), pid (CHILD, EXIT), wait status and CPU seconds (EXIT)
CHILD_DESCRIPTORS = 4  # that come with CHILD: pidfd, the child's stream, the read ends of its stdout and stderr
# Supervisor to zygote: fork one child.
DOWN = struct.Struct('=ii')  # number, user
# Child to supervisor, once it has given up everything; the descriptor of its /box comes with it.
SEALED = b'R'


def header(
    *, code: int, stdin: int, files: list[list], seed: int, echo: bool, cpu_s: float, address_bytes: int
) -> bytes:
    """The line that a request begins with; code, standard input and files follow it as they are.

    code, stdin: sizes in bytes. files: pairs of path below /box and size. cpu_s, address_bytes: what the child sets as
    its own backstops.
    """
    return (
        json.dumps(
            {
                'code': code,
                'stdin': stdin,
                'files': files,
                'seed': seed,
                'echo': echo,
                'cpu_s': cpu_s,
                'address_bytes': address_bytes,
            }
        ).encode()
        + b'\n'
    )


def read(stream: BinaryIO) -> dict:
    """A request with the sizes of its header replaced by what was sent: code, stdin, files as path → content."""
    request = json.loads(stream.readline())
    request['code'] = stream.read(request['code'])
    request['stdin'] = stream.read(request['stdin'])
    request['files'] = {name: stream.read(size) for name, size in request['files']}
    return request
