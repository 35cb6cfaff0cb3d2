"""What is known of each program once it is compiled: memory, work, bytes moved, bytes exchanged."""

from __future__ import annotations

import collections
import dataclasses
import re
import time

import jax

from retool_jax.plan import flops, hlo
from retool_jax.plan.programs import Program, per_device

UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30}


@dataclasses.dataclass(frozen=True)
class Facts:
    """One program on one chip; bytes, but for what says otherwise."""

    name: str
    phase: str
    arguments: int
    temporaries: int  # with results that take no argument's place
    flops: float  # of matmuls, a chip's share
    moved: float  # to and from the chip's memory
    sent: dict[str, float]  # to other chips, by kind of collective
    compile_s: float
    estimated: bool = False  # from shapes alone
    refused: str = ''  # the compiler's words where the program does not fit

    @property
    def sent_bytes(self) -> float:
        return sum(self.sent.values())


def compile(program: Program) -> Facts:
    """Compiles for the devices that the program's shapes lie on."""
    began = time.perf_counter()
    traced = program.function.trace(**program.arguments)
    work = flops.count(traced.jaxpr, program.trips) / program.devices
    arguments = sum(per_device(tree) for tree in program.arguments.values() if not isinstance(tree, int | bool))
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        used = needed(str(error))
        return Facts(program.name, program.phase, arguments, max(used - arguments, 0), work, 0.0, {},
                     time.perf_counter() - began, refused=' '.join(str(error).split())[:400])
    memory = compiled.memory_analysis()
    module = hlo.Module(compiled.as_text(), program.trips)
    sent: collections.Counter[str] = collections.Counter()
    for collective in module.collectives():
        sent[collective.kind] += collective.sent
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Facts(program.name, program.phase, memory.argument_size_in_bytes,
                 memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes, work,
                 module.bytes_moved(), dict(sent), time.perf_counter() - began)


def needed(text: str) -> int:
    """Bytes that a program of a compiler's out-of-memory message would take; 0 where it names none."""
    found = re.search(r'Used ([\d.]+)([KMG]) of', text)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def estimate(program: Program, temporaries: int, sent: dict[str, float]) -> Facts:
    """The same from shapes alone, where no compiler for the chip is at hand.

    Every matmul is taken to read its operands and to write its result; temporaries and exchanged
    bytes are the caller's (plan.guess).
    """
    began = time.perf_counter()
    jaxpr = program.function.trace(**program.arguments).jaxpr
    arguments = sum(per_device(tree) for tree in program.arguments.values() if not isinstance(tree, int | bool))
    work = flops.count(jaxpr, program.trips) / program.devices
    moved = max(flops.traffic(jaxpr, program.trips) / program.devices, arguments)
    return Facts(program.name, program.phase, arguments, temporaries, work, moved, sent,
                 time.perf_counter() - began, estimated=True)
