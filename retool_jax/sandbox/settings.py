"""What a pool is and what a snippet may use.

The sandbox serves without a configuration too (`Pool(SandboxSettings())`, its server, its doctor), so these fields,
unlike those of all other rooms, have defaults; a test holds them equal to configs/base.py's.

Letters as in configs/base.py: P the ReTool paper, O its evaluation code, R verl's recipe, H this project's choice; none
where a value is of the machine and not of the algorithm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from retool_jax.core.checks import MANY, Rule, above, check, one_of, within

PATHS = ('warm', 'cold')
MOST = {'cpu_s': 1e6, 'wall_s': 1e6, 'memory_mb': 2.0**24}  # 12 days, 16 TiB: more is a slip, and overflows somewhere
_MODULE = Rule(lambda x: x.replace('.', '').replace('_', '').isalnum(), 'is no module name')
_PACKAGE = Rule(lambda x: x.replace('.', '').replace('_', '').replace('-', '').isalnum(), 'is no name of a package')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandboxSettings:
    """Limits per snippet and the shape of the pool."""

    path: str = 'warm'  # 'warm': each snippet in a sealed fork of a zygote; 'cold': in a jail of its own, slow
    zygotes: int = 2  # processes in a jail that fork the snippets' processes; 1 to 1,024
    spares: int = 3  # children forked and sealed ahead of need, per zygote; 1 to 1,024
    concurrency: int = 0  # snippets running at once, at most 65,536; 0: two per core that this process may use
    recycle: int = 2000  # children of a zygote before it is replaced; at least 1
    cpu_s: float = 5.0  # CPU seconds of all processes of a snippet, above 0. P does not say; O 5, R 30
    wall_s: float = 15.0  # seconds from the hand-over, above 0; H: three times cpu_s, lest a loaded host change rewards
    memory_mb: int = 256  # MiB of a snippet above what the packages occupy, at least 1; more is oom. R 1024
    processes: int = 64  # of a snippet at once, threads among them; 1 to 4,194,304. H
    files: int = 256  # open descriptors of one process; 1 to 1,048,576. H
    scratch_mb: int = 64  # MiB of /box, the only writable place; at least 1, and charged to memory_mb when written. H
    scratch_inodes: int = 4096  # files and directories in /box, itself among them; at least 1. H
    output_bytes: int = 262144  # of stdout, and of stderr; at least 1; a snippet that prints more is ended. H
    preload: tuple[str, ...] = ('numpy', 'sympy')  # imported before a snippet starts; each among packages. H
    packages: tuple[str, ...] = ('numpy', 'scipy', 'sympy')  # what snippets can import, and what it requires. H
    echo: bool = False  # True: the value of a last expression is printed, as a notebook does. O False
    retries: int = 3  # runs more that a snippet gets after faults of the sandbox, each on another worker; 0 to 1,000
    queue: int = 16384  # snippets that may wait, at least 1; one more raises PoolFull
    queue_mb: int = 256  # MiB of waiting snippets with their input and files, at least 1; more raises PoolFull
    require_groups: bool = False  # True: refuses a machine whose control groups cannot be written

    def __post_init__(self):
        for name in ('preload', 'packages'):  # lists, where they come out of JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check(
            self,
            path=one_of(PATHS),
            zygotes=within(1, 1024),
            spares=within(1, 1024),
            concurrency=within(0, 2**16),
            recycle=within(1, MANY),
            processes=within(1, 2**22),
            files=within(1, 2**20),
            scratch_inodes=within(1, MANY),
            output_bytes=within(1, MANY),
            preload=_MODULE,
            packages=_PACKAGE,
            retries=within(0, 1000),
            queue=within(1, MANY),
            **{name: above(0, most) for name, most in MOST.items()},
            **dict.fromkeys(('scratch_mb', 'queue_mb'), above(0, MOST['memory_mb'])),
        )

    def fields(self) -> dict[str, Any]:
        """The values by name, without what a subclass adds."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SandboxSettings)}
