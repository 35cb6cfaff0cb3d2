"""What is known of each program once it is compiled: memory, work, bytes moved, bytes exchanged."""

from __future__ import annotations

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import jax

from retool_jax.model import kernels
from retool_jax.plan import flops, hlo
from retool_jax.plan.programs import Program, per_device

BETWEEN_SLICES = 'all-reduce between slices'  # a kind of collective; over the hosts' network
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30}


@dataclasses.dataclass(frozen=True)
class Facts:
    """One program on one chip; bytes, unless a field says otherwise."""

    name: str
    phase: str
    arguments: int
    temporaries: int  # and of results that neither take an argument's place nor are a buffer of the phase
    flops: float  # of matmuls, a chip's share
    moved: float  # to and from the chip's memory
    sent: dict[str, float]  # to other chips, by kind of collective
    compile_s: float
    estimated: bool = False  # from shapes alone
    refused: str = ''  # the compiler's words where the program does not fit

    @property
    def sent_bytes(self) -> float:
        """Over the links of a slice."""
        return sum(n for kind, n in self.sent.items() if kind != BETWEEN_SLICES)


def compile_all(programs: Sequence[Program], done: Callable[[str], None], workers: int = 2) -> list[Facts]:
    """Compiles each program for the devices that its shapes lie on; `done` hears the name of each that is ready.

    Tracing holds the interpreter, the compiler does not: it works on one program while others are traced, on
    `workers` at most (a 32B program takes 2 GB of this machine's memory).
    """
    with futures.ThreadPoolExecutor(workers) as pool:
        running = []
        for program in programs:
            running.append(pool.submit(_compile, program, program.function.trace(**program.arguments)))
            running[-1].add_done_callback(lambda _, name=program.name: done(name))
        try:
            return [one.result() for one in running]
        except BaseException:  # one is wrong, or Ctrl-C: the others need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compile(program: Program, traced: jax.stages.Traced) -> Facts:
    began = time.perf_counter()
    work = flops.count(traced.jaxpr, program.trips) / program.devices
    arguments = sum(per_device(tree) for tree in program.arguments.values() if not isinstance(tree, int | bool))
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        used = needed(str(error))
        return Facts(
            program.name,
            program.phase,
            arguments,
            max(used - arguments, 0),
            work,
            0.0,
            {},
            time.perf_counter() - began,
            refused=' '.join(str(error).split())[:400],
        )
    memory = compiled.memory_analysis()
    module = hlo.Module(compiled.as_text(), program.trips)
    sent: collections.Counter[str] = collections.Counter()
    for collective in module.collectives():
        sent[collective.kind] += collective.sent
    return Facts(
        program.name,
        program.phase,
        memory.argument_size_in_bytes,
        beside_arguments(memory, program.held),
        work,
        module.bytes_moved(),
        dict(sent),
        time.perf_counter() - began,
    )


def beside_arguments(memory, held: bool) -> int:
    """Bytes of temporaries, of the program itself, and (unless `held`) of results that take no argument's place.

    What the compiler allocates, where jaxlib tells it: the TPU compiler's `temp_size_in_bytes` is larger than its
    own buffer assignment (12.5 for 8.1 GiB in the update of a 32B policy).
    """
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = getattr(memory, 'total_allocation_bytes', 0)
    temporaries = total - memory.argument_size_in_bytes - results if total else memory.temp_size_in_bytes
    return max(temporaries, 0) + memory.generated_code_size_in_bytes + (0 if held else results)


def needed(text: str) -> int:
    """Bytes that a program of a compiler's out-of-memory message would take; 0 where it names none."""
    match = re.search(r'Used ([\d.]+)([KMG]) of', text)
    return int(float(match[1]) * UNITS[match[2]]) if match else 0


def estimate(program: Program, temporaries: int, sent: dict[str, float]) -> Facts:
    """The same from shapes alone, where no compiler for the chip is at hand.

    Every matmul, and cuDNN's attention, is taken to read its operands and to write its result; temporaries and
    exchanged bytes are the caller's (plan.guess).
    """
    began = time.perf_counter()
    with kernels.traced_anywhere():
        jaxpr = program.function.trace(**program.arguments).jaxpr
    arguments = sum(per_device(tree) for tree in program.arguments.values() if not isinstance(tree, int | bool))
    work = flops.count(jaxpr, program.trips) / program.devices
    moved = max(flops.traffic(jaxpr, program.trips) / program.devices, arguments)
    return Facts(
        program.name,
        program.phase,
        arguments,
        temporaries,
        work,
        moved,
        sent,
        time.perf_counter() - began,
        estimated=True,
    )
